"""Which rule an operation has: a new one is a name here."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket
from torch.nn import functional as F

from twofold.activations.known import PIECEWISE_LINEAR, SPELLINGS, spelled
from twofold.curvature.jet_rules.entries import (
    entrywise,
    exp,
    gelu,
    maximum,
    piecewise_linear,
    prelu,
    relu,
    sigmoid,
    silu,
    tanh,
)
from twofold.curvature.jet_rules.jet import Rule
from twofold.curvature.jet_rules.linear import (
    add,
    copied,
    dropout,
    embedding,
    filled_with,
    linear_in_all,
    linear_in_first,
    masked_fill,
    pad,
    set_item,
    subtract,
    subtract_swapped,
    where,
)
from twofold.curvature.jet_rules.norms import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    log_softmax,
    logsumexp,
    rms_norm,
    softmax,
)
from twofold.curvature.jet_rules.products import added_product, bilinear, divide, divide_swapped, layer, multilinear
from twofold.curvature.jet_rules.reductions import (
    amax,
    extremum,
    ordered,
    pooled,
    variance,
    vector_norm,
)

_LINEAR_IN_FIRST = (
    *("view", "view_as", "reshape", "reshape_as", "permute", "transpose", "swapaxes", "swapdims", "t", "adjoint"),
    *("flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "movedim"),
    *("moveaxis", "chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "unbind", "unfold", "fold"),
    *("__getitem__", "select", "narrow", "index_select", "gather", "take", "take_along_dim", "masked_select"),
    *("diagonal", "diag", "diag_embed", "tril", "triu", "trace", "flip", "fliplr", "flipud", "roll", "rot90"),
    *("repeat", "tile", "repeat_interleave", "contiguous", "clone", "alias", "as_strided", "to", "type", "type_as"),
    *(
        "float",
        "double",
        "half",
        "bfloat16",
        "cpu",
        "cuda",
        "real",
        "positive",
        "__pos__",
        "neg",
        "negative",
        "__neg__",
    ),
    *("sum", "mean", "cumsum", "diff", "sum_to_size", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "interpolate", "upsample"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "atleast_1d", "atleast_2d"),
    *("atleast_3d", "view_as_real", "copy", "unsafe_chunk", "unsafe_split", "squeeze_copy"),
)


_LINEAR_IN_ALL = (
    *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack", "row_stack", "block_diag"),
    *("index_add", "index_copy", "scatter_add", "slice_scatter", "select_scatter", "diagonal_scatter"),
    *("broadcast_tensors", "masked_scatter"),
)


_MULTILINEAR = (
    *("mul", "multiply", "__mul__", "__rmul__", "matmul", "__matmul__", "mm", "bmm", "mv", "dot", "vdot", "vecdot"),
    *("inner", "outer", "ger", "kron", "einsum", "multi_dot", "chain_matmul", "tensordot"),
)


_ENTRYWISE = (
    *("abs", "absolute", "__abs__", "acos", "asin", "atan", "cosh", "sinh", "tan", "sinc", "digamma"),
    *("erf", "erfc", "erfinv", "exp2", "expm1", "lgamma", "log", "log10", "log1p", "log2", "logit", "float_power"),
    *("pow", "__pow__", "__rpow__", "reciprocal", "rsqrt", "sqrt", "square", "clamp", "clip", "clamp_min", "clamp_max"),
    *("nan_to_num", "asinh", "acosh", "atanh", "floor", "ceil", "round", "trunc", "frac", "sign", "sgn"),
)


_NAMED: dict[str, Rule] = {
    **dict.fromkeys(("add", "__add__", "__radd__"), add),
    **dict.fromkeys(("sub", "subtract", "__sub__"), subtract),
    **dict.fromkeys(("rsub", "__rsub__"), subtract_swapped),
    **dict.fromkeys(("div", "divide", "true_divide", "__truediv__"), divide),
    **dict.fromkeys(("__rdiv__", "__rtruediv__"), divide_swapped),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"), dropout),
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), layer),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), layer),
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin"), maximum),
    **dict.fromkeys(("norm", "vector_norm"), vector_norm),
    **dict.fromkeys(("max", "min"), extremum),
    **dict.fromkeys(("amax", "amin"), amax),
    **dict.fromkeys(("sort", "topk"), ordered),
    **{
        f"{kind}max_pool{n}d{which}": pooled(getattr(F, f"{kind}max_pool{n}d_with_indices"), n)
        for kind in ("", "adaptive_")
        for n in (1, 2, 3)
        for which in ("", "_with_indices")
    },
    "where": where,
    "masked_fill": masked_fill,
    "pad": pad,
    "embedding": embedding,
    "bilinear": bilinear,
    "addmm": added_product(torch.mm),
    "addmv": added_product(torch.mv),
    "addr": added_product(torch.outer),
    "baddbmm": added_product(torch.bmm),
    "relu": relu,
    "gelu": gelu,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "silu": silu,
    "exp": exp,
    "prelu": prelu,
    "softmax": softmax,
    "log_softmax": log_softmax,
    "logsumexp": logsumexp,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "var": variance,
}


def _spelled(name: str) -> set[Callable]:
    """The spellings of an operation that do not work in place; torch's raw ones have signatures of their own."""
    return {
        func
        for func in spelled(name)
        if callable(func) and not isinstance(func, OpOverloadPacket | torch.dtype) and func.__name__ != name + "_"
    }


def _table() -> dict[Callable, Rule]:
    rules: dict[Callable, Rule] = {}
    for names, rule in (
        (_LINEAR_IN_FIRST, linear_in_first),
        (_LINEAR_IN_ALL, linear_in_all),
        (_MULTILINEAR, multilinear),
        (_ENTRYWISE, entrywise),
        ([spelling for name in SPELLINGS for spelling in SPELLINGS[name]], entrywise),
        ([spelling for name in PIECEWISE_LINEAR for spelling in SPELLINGS[name]], piecewise_linear),
    ):
        for name in names:
            rules |= dict.fromkeys({name} if callable(name) else _spelled(name), rule)
    for name, rule in _NAMED.items():
        rules |= dict.fromkeys(_spelled(name), rule)
    for name in ("T", "mT", "H", "mH", "real"):
        rules[getattr(torch.Tensor, name).__get__] = linear_in_first
    for func in (torch.batch_norm, torch.instance_norm, torch.group_norm, torch.linalg.norm):
        rules.pop(func, None)  # other arguments, or another meaning, than the functional of that name
    return rules


RULES: dict[Callable, Rule] = _table()
"""The rule of each operation that has one, in every spelling that does not work in place."""


def _out_of_place() -> dict[Callable, Callable]:
    found: dict[Callable, Callable] = {
        Tensor.__setitem__: set_item,
        Tensor.copy_: copied,
        Tensor.fill_: filled_with,
        Tensor.zero_: filled_with,
        Tensor.__itruediv__: torch.div,
    }
    views = set(_LINEAR_IN_FIRST) - {"neg", "tril", "triu", "cumsum"}  # these change the tensor, not its entries
    for name in {func.__name__.strip("_") for func in RULES} - views:
        func = next((getattr(place, name) for place in (torch, F, Tensor) if hasattr(place, name)), None)
        if func in RULES:
            for spelling in spelled(f"{name}_") | spelled(f"__i{name}__"):
                if not isinstance(spelling, OpOverloadPacket):
                    found[spelling] = func
    return found


OUT_OF_PLACE: dict[Callable, Callable] = _out_of_place()
"""The operation that an in-place spelling stands for: `add` for `add_` and `__iadd__`."""

RULES |= {rule: rule for rule in (set_item, copied, filled_with)}

FLAT = frozenset(
    {
        *(linear_in_first, linear_in_all, add, subtract, subtract_swapped, where, masked_fill, pad, dropout, embedding),
        *(set_item, copied, filled_with, relu, piecewise_linear, maximum, extremum, amax, ordered),
    }
)
"""Rules of operations without a second derivative."""
