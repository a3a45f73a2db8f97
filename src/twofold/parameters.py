"""Named parameters as one vector: selection, and the way from a flat vector to named tensors and back."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from twofold.batches import describe
from twofold.errors import TwofoldError
from twofold.types import Params, Vectors


def select_parameters(model: nn.Module, params: Params = None) -> dict[str, nn.Parameter]:
    """Choose parameters by name or glob pattern, in the model's order.

    Args:
        model: any module.
        params: a name or pattern ("layer3.*") or several; None means all that require a gradient. Names of tied
            parameters resolve to the one parameter; a frozen parameter that is named is included. The prefixes that
            wrappers give to names, "module." and "_orig_mod.", may stand or be left out.

    Returns:
        {first name in the model: parameter}, each parameter once.

    Raises:
        TwofoldError: when a pattern matches nothing, or nothing is left to choose.

    Example:
        >>> list(select_parameters(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), "*.weight"))
        ['0.weight', '1.weight']
    """
    named = dict(model.named_parameters())
    if params is None:
        chosen = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        if not chosen:
            raise TwofoldError(
                f"{type(model).__name__} has no parameter that requires a gradient ({len(named)} parameters in all). "
                "Name the ones you mean in params=; frozen parameters that are named are included."
            )
    else:
        chosen = {name: named[name] for name in _matched(params, _first_names(model), "params", "The model")}
    for name, parameter in chosen.items():
        if not parameter.is_floating_point():
            raise TwofoldError(
                f"Parameter {name!r} is {parameter.dtype}: second derivatives are offered for real floating-point "
                "parameters. Leave it out by naming the others in params=."
            )
        if isinstance(parameter, UninitializedParameter):
            raise TwofoldError(f"Parameter {name!r} is not initialised yet: run the model once on a batch first.")
    return chosen


def matching(names: Iterable[str], pattern: str) -> set[str]:
    """The names that a glob pattern matches, if need be without the prefixes of data-parallel and compiled wrappers.

    Example:
        >>> matching(["0.weight", "0.bias"], "module._orig_mod.0.w*")
        {'0.weight'}
    """
    names = list(names)
    found = {name for name in names if fnmatchcase(name, pattern)}
    return found or {name for name in names if fnmatchcase(_unprefixed(name), _unprefixed(pattern))}


def _unprefixed(name: str) -> str:
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _first_names(model: nn.Module) -> dict[str, str]:
    """{any name of a parameter: its first one}, in the model's order; they differ where parameters are tied."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def _matched(patterns: str | Sequence[str], first_names: Mapping[str, str], argument: str, owner: str) -> list[str]:
    """The first names, in order, of what names or glob patterns match; each pattern must match something."""
    patterns = list(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str) else [patterns]
    if not patterns:
        raise TwofoldError(f"{argument} is empty: name at least one parameter.")
    wanted: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TwofoldError(f"{argument} takes names or glob patterns; {describe(pattern)} came.")
        matched = {first_names[name] for name in matching(first_names, pattern)}
        if not matched:
            names = ", ".join(list(first_names)[:12]) + (", ..." if len(first_names) > 12 else "")
            raise TwofoldError(f"{argument}: {pattern!r} matches no parameter. {owner} has: {names or 'none'}.")
        wanted |= matched
    return [name for name in dict.fromkeys(first_names.values()) if name in wanted]


class ParameterLayout:
    """Where each named parameter lies in the vector theta [P].

    Args:
        parameters: the parameters by name, in the vector's order.
        model: where tied parameters have their other names.

    Attributes:
        shapes: {name: shape}, in the vector's order.
        size: P, the number of entries.
        dtype: the vector's dtype (the widest among the parameters).
        device: the first parameter's device.
    """

    def __init__(self, parameters: Mapping[str, Tensor], model: nn.Module | None = None) -> None:
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        known = {name: name for name in parameters} if model is None else _first_names(model)
        self._first_names = {name: first for name, first in known.items() if first in parameters}
        self._sizes = [parameter.numel() for parameter in parameters.values()]
        self._likes = [(parameter.dtype, parameter.device) for parameter in parameters.values()]
        self.size = sum(self._sizes)
        self.device = self._likes[0][1]
        dtype = self._likes[0][0]
        for other, _ in self._likes:
            dtype = torch.promote_types(dtype, other)
        self.dtype = dtype

    def find(self, named: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Look the layout's parameters up by name.

        Raises:
            TwofoldError: one is gone, or has another shape, dtype or device than when the layout was made.
        """
        for (name, shape), (dtype, device) in zip(self.shapes.items(), self._likes, strict=True):
            now = named.get(name)
            if now is None or (now.shape, now.dtype, now.device) != (shape, dtype, device):
                came = "gone" if now is None else f"a {describe(now)} on {now.device}"
                raise TwofoldError(
                    f"Parameter {name!r} was a {dtype} tensor of shape {tuple(shape)} on {device} when the operator "
                    f"was built and is {came} now. Build the operator anew."
                )
        return {name: named[name] for name in self.shapes}

    def choose(self, params: str | Sequence[str]) -> list[str]:
        """Names of the parameters that names or glob patterns match, in the vector's order; tied names resolve.

        Raises:
            TwofoldError: when a pattern matches nothing.
        """
        return _matched(params, self._first_names, "block", "The operator")

    def flatten(self, tensors: Iterable[Tensor]) -> Float[Tensor, "P"]:
        """Join tensors of the parameters' shapes, in order, into one vector [P]."""
        return torch.cat([tensor.detach().reshape(-1).to(self.device, self.dtype) for tensor in tensors])

    def unflatten(self, vector: Float[Tensor, "P"]) -> list[Tensor]:
        """Split a vector [P] into tensors of the parameters' shapes, dtypes and devices (views where it can)."""
        parts = vector.split(self._sizes)
        return [
            part.view(shape).to(device, dtype)
            for part, shape, (dtype, device) in zip(parts, self.shapes.values(), self._likes, strict=True)
        ]

    def as_dict(self, vector: Float[Tensor, "P ..."]) -> dict[str, Tensor]:
        """Name the parts of a vector [P], or of vectors [P, K] (the parts are then [*shape, K])."""
        parts = vector.split(self._sizes)
        return {
            name: part.reshape((*shape, *vector.shape[1:]))
            for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)
        }

    def from_dict(self, named: Mapping[str, Tensor]) -> Float[Tensor, "P"]:
        """Join named tensors of the parameters' shapes into one vector [P]; the order of the names is free.

        Names may have the prefixes of data-parallel and compiled wrappers.

        Raises:
            TwofoldError: when a name is missing or unknown, or a shape differs.
        """
        if not named.keys() <= self.shapes.keys():
            plain = {_unprefixed(name): name for name in self.shapes}
            named = {plain.get(_unprefixed(name), name): tensor for name, tensor in named.items()}
        missing, unknown = self.shapes.keys() - named.keys(), named.keys() - self.shapes.keys()
        if missing or unknown:
            raise TwofoldError(
                f"A vector given by names must have the chosen parameters: missing {sorted(missing) or 'none'}, "
                f"unknown {sorted(unknown) or 'none'}."
            )
        for name, shape in self.shapes.items():
            if named[name].shape != shape:
                raise TwofoldError(f"v[{name!r}] has shape {tuple(named[name].shape)}; expected {tuple(shape)}.")
        return torch.cat([self._checked(named[name]).reshape(-1) for name in self.shapes])

    def columns(self, vectors: Vectors) -> Float[Tensor, "P K"]:
        """Check vectors in any accepted form and return them as columns [P, K] (K = 1 for one vector).

        Raises:
            TwofoldError: for another shape, a dtype that would lose precision, or entries that are not finite.
        """
        if isinstance(vectors, Mapping):
            vectors = self.from_dict(vectors)
        return check_columns(vectors, self.size, self.dtype, self.device, others=", or named tensors")

    def _checked(self, vector: Tensor) -> Tensor:
        return _in_precision(vector, "v", self.dtype, self.device)


def check_columns(
    vectors: Any, size: int, dtype: torch.dtype, device: torch.device, *, name: str = "v", others: str = ""
) -> Float[Tensor, "n K"]:
    """Check vectors [size] or [size, K] and return them as columns, in this dtype and on this device.

    Args:
        vectors: what came.
        size: n, the number of entries.
        dtype: the vectors' dtype is this one, or narrower.
        device: where they go.
        name: what errors call them.
        others: which other forms are taken, for errors.
    """
    expected = f"[{size}] or [{size}, K]{others}."
    if not isinstance(vectors, Tensor):
        array = " Pass torch.from_numpy(v), or use operator.to_scipy()." if hasattr(vectors, "__array__") else ""
        raise TwofoldError(f"{name} is {describe(vectors)}; expected a tensor {expected}{array}")
    if vectors.dim() not in (1, 2) or vectors.shape[0] != size:
        raise TwofoldError(f"{name} has shape {tuple(vectors.shape)}; expected {expected}")
    vectors = _in_precision(vectors, name, dtype, device)
    # A finite norm proves finite entries and is much cheaper to take; a norm may also overflow.
    if not torch.isfinite(torch.linalg.vector_norm(vectors)) and not torch.isfinite(vectors).all():
        raise TwofoldError(f"{name} has entries that are NaN or infinite.")
    return vectors if vectors.dim() == 2 else vectors.unsqueeze(1)


def _in_precision(vector: Tensor, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not vector.is_floating_point() or torch.promote_types(vector.dtype, dtype) != dtype:
        raise TwofoldError(f"{name} is {vector.dtype}; the parameters are {dtype}. Pass {name}.to({dtype}).")
    return vector.detach().to(device, dtype)


def half_precision_among(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """The dtype of the first tensor in half precision, None if there is none."""
    return next((tensor.dtype for tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16)), None)


_CHUNK, _ROW = 1 << 16, 1 << 12
"""CPU kernels add up all of a tensor in one accumulator: float32 loses 1e-5 over 1e6 entries, not so by pieces."""


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Inner product of two lists of tensors, exact to float32 or better whatever their size."""
    return torch.stack([_sum_of_products(a, b) for a, b in zip(left, right, strict=True)]).sum()


def norm(tensors: Sequence[Tensor]) -> Float[Tensor, ""]:
    """One global 2-norm over a list of tensors, exact to float32 or better whatever their size."""
    short: list[Tensor] = []
    norms: list[Tensor] = []
    for tensor in (tensor.to(_wide(tensor)) for tensor in tensors):
        if not _loses_precision(tensor, above=4 * _ROW):
            short.append(tensor)
        elif tensor.is_contiguous():
            rows, rest = tensor.view(-1).tensor_split([tensor.numel() // _ROW * _ROW])
            norms.append(torch.linalg.vector_norm(rows.view(-1, _ROW), dim=1))
            short += [rest] if rest.numel() else []
        else:
            norms.append(torch.linalg.vector_norm(tensor, dtype=torch.float64).view(1))
    norms += [one.view(1) for one in torch._foreach_norm(short)] if short else []
    like = norms[0]
    return torch.linalg.vector_norm(torch.cat([one.to(like) for one in norms]), dtype=torch.float64).to(
        _wide(tensors[0])
    )


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.promote_types(_wide(a), b.dtype)
    a, b = a.reshape(-1).to(wide), b.reshape(-1).to(wide)
    if not _loses_precision(a, above=_CHUNK):
        return torch.dot(a, b)
    pieces = [torch.dot(x, y) for x, y in zip(a.split(_CHUNK), b.split(_CHUNK), strict=True)]
    return torch.stack(pieces).double().sum().to(wide)


def _loses_precision(tensor: Tensor, above: int) -> bool:
    return tensor.numel() > above and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
