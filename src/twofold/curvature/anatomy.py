"""Anatomy: the Hessian as an exact sum over kinds of operation, and over modules."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import nan
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.batches import describe
from twofold.curvature.dissection import Group, Operation
from twofold.curvature.kinds import KINDS, ROOT
from twofold.curvature.operators import GaussNewton, SymmetricOperator, rows_of
from twofold.curvature.probes import check_count, rademacher, root_of, summarise
from twofold.curvature.products import Products
from twofold.errors import TwofoldError
from twofold.types import Estimate, Forward, LossFn, Mode, Params, ProcessGroup, Vectors, Weight

LOSS, UNSEEN = "(loss)", "(unseen)"

_TOGETHER = 4
"""How many probes are taken together: each pair of them samples the squared norms of the modules' parts."""


@dataclass(frozen=True)
class Figures:
    """What was measured of a part A of the Hessian H.

    Attributes:
        trace: tr A.
        frobenius: ||A||_F.
        along: v'Av / v'v for each direction v.
        share: v'Av / v'Hv for each direction v; over the parts of a sum they add up to 1. nan where v'Hv is 0.
    """

    trace: Estimate
    frobenius: Estimate
    along: Mapping[str, float]
    share: Mapping[str, float]


class _Operations(SymmetricOperator):
    """What some of the operations add to the Hessian."""

    def __init__(self, products: Products, group: Callable[[Operation], Group], wanted: frozenset[Group]) -> None:
        super().__init__(products.layout, products.group)
        self._products, self._group, self._wanted = products, group, wanted

    def _rows(self, rows: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        found = self._products.dissected(rows, KINDS, self._group, self._wanted.__contains__)
        return sum(found.values(), torch.zeros_like(rows))

    def _block(self, names: Sequence[str]) -> SymmetricOperator:
        return _Operations(self._products.of(names), self._group, self._wanted)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return self._products.present_parameters()


class Part(_Operations):
    """What some of the operations add to the Hessian, as an operator [P, P] with its figures.

    Products are taken at the parameters of the moment; the figures are those of the time of measuring.

    Attributes:
        name: the kind of operation, or the module.
        figures: traces, norms and shares; also to be read as attributes of the part: `part.trace`.
    """

    def __init__(
        self,
        name: str,
        products: Products,
        group: Callable[[Operation], Group],
        wanted: frozenset[Group],
        figures: Figures,
    ) -> None:
        super().__init__(products, group, wanted)
        self.name, self.figures = name, figures

    @property
    def trace(self) -> Estimate:
        """tr A."""
        return self.figures.trace

    @property
    def frobenius(self) -> Estimate:
        """||A||_F."""
        return self.figures.frobenius

    @property
    def along(self) -> Mapping[str, float]:
        """v'Av / v'v for each direction v."""
        return self.figures.along

    @property
    def share(self) -> Mapping[str, float]:
        """v'Av / v'Hv for each direction v."""
        return self.figures.share

    def __repr__(self) -> str:
        return f"Part({self.name!r}, trace={self.trace}, frobenius={self.frobenius})"


@dataclass(frozen=True)
class Anatomy:
    """The Hessian as a sum of parts, by kind of operation and by module.

    Attributes:
        hessian: the whole.
        kinds: {"loss": GN, "activation", "product", "normalisation", "attention", "other"}; they sum to the Hessian.
        modules: {"(loss)": GN, each module that called a curved operation, "(model)" for what the model's own forward
            called, "(unseen)" for operations that are not told apart}; they sum to the Hessian too.
    """

    hessian: Part
    kinds: Mapping[str, Part]
    modules: Mapping[str, Part]

    def __getitem__(self, kind: str) -> Part:
        """Return the part of one kind of operation, as an operator."""
        if kind not in self.kinds:
            raise TwofoldError(
                f"There is no kind {kind!r}; kinds are {', '.join(self.kinds)}. Parts of modules are in .modules."
            )
        return self.kinds[kind]

    def __str__(self) -> str:
        directions = list(self.hessian.share)
        title = f"{'':<24}{'trace':>22}{'Frobenius norm':>22}" + "".join(f"{name:>14}" for name in directions)
        return "\n".join(
            [title, *_lines({"hessian": self.hessian}), "", *_lines(self.kinds), "", *_lines(self.modules)]
        )


def _lines(parts: Mapping[str, Part]) -> Iterator[str]:
    for name, part in parts.items():
        figures = "".join(f"{f'{e.value:.4g} ± {e.stderr:.2g}':>22}" for e in (part.trace, part.frobenius))
        yield f"{name:<24}{figures}" + "".join(f"{f'{share:.1%}':>14}" for share in part.share.values())


def anatomy(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    params: Params = None,
    forward: Forward | None = None,
    mode: Mode = None,
    memory: int | None = None,
    weight: Weight | None = None,
    microbatches: int = 1,
    group: ProcessGroup = None,
    num_matvecs: int = 64,
    directions: Mapping[str, Vectors] | None = None,
    generator: torch.Generator | None = None,
) -> Anatomy:
    """Measure what each kind of operation, and each module, adds to the Hessian.

    By the chain rule H is a sum over the operations y = f(x) of the model and the loss,

        H = GN + sum_f J_x' [sum_i (dL/dy_i) d2y_i/dx2] J_x,    J_x = dx/dtheta,

    so that setting the second derivative of one kind of operation to zero removes exactly its part. Kinds are

        loss            GN, the curvature of the loss
        activation      elementwise nonlinearities: what carries phi''
        product         linear layers, convolutions, matmul (attention's too), gates: weights with what they multiply
        normalisation   layer, batch, group, instance and RMS norm, weight norm
        attention       softmax
        other           all else: divisions, powers, recurrent kernels (LSTM, GRU, RNN), functions of one's own

    An operation has the kind of the call that a model makes: a norm that is written out counts by its pieces, and so do
    scaled_dot_product_attention and MultiheadAttention, whose pieces are products and a softmax. Each part is computed,
    none is the remainder of the others; "other" comes from torch's own double backward through everything not named.

    Args:
        model: any module, unmodified.
        loss_fn: loss_fn(outputs, targets) -> scalar.
        data: a batch (inputs, targets), or a re-iterable of batches.
        params: names or glob patterns; None for all parameters that require a gradient.
        forward: forward(model, batch) -> (outputs, targets), for batches of another form.
        mode: "train", "eval", or None for the model as it is.
        memory: bytes for kept recordings of a set of several batches (1 GiB when None); one batch is always kept.
        weight: weight(outputs, targets) -> how many terms a batch's loss averages.
        microbatches: run each batch in so many pieces, at most; see `Curvature`.
        group: a process group whose ranks each have a shard of the data; see `Curvature`.
        num_matvecs: Rademacher probes for traces and norms. One takes the time of about 8 gradients. The norms of
            kinds are sampled by ||Av||^2, those of modules by (v'Aw)^2 over pairs of probes, which is noisier and costs
            nothing more however many modules there are.
        directions: {name: v} along which shares of v'Hv are taken, v being [P] or named tensors; None takes the
            gradient.
        generator: source of the probes; None takes a private one with a fixed seed.

    Returns:
        Anatomy: `a.kinds`, `a.modules` and `a.hessian`, whose parts are operators; `a["activation"] @ v`.

    Raises:
        TwofoldError: as `Curvature` does, and for directions of another form.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
        >>> batch = (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> a = anatomy(model, nn.CrossEntropyLoss(), batch, num_matvecs=8)
        >>> v = torch.randn(a.hessian.shape[0])
        >>> torch.allclose(sum(part @ v for part in a.kinds.values()), a.hessian @ v, atol=1e-6)
        True
        >>> list(a.modules)
        ['(loss)', '0', '1', '2', '(unseen)']
    """
    check_count(num_matvecs)
    options: dict[str, Any] = {"params": params, "forward": forward, "mode": mode, "memory": memory, "weight": weight}
    products = Products(model, loss_fn, data, microbatches=microbatches, group=group, **options)
    chosen = _directions(products, directions)
    forms = products.forms(torch.stack(list(chosen.values())), KINDS, _cell)
    measured = _Measured(chosen, forms, *_sample(products, num_matvecs, generator))
    order = [LOSS, *dict(products.model.named_modules()), ROOT, UNSEEN]
    met = {_module(cell) for cell in forms} | {LOSS, UNSEEN}

    def part(name: str, cells: _Cells, group: Callable[[Operation], Group], *wanted: Group) -> Part:
        return Part(name, products, group, frozenset(wanted), measured.figures(cells, name))

    return Anatomy(
        part("hessian", lambda _: True, lambda _: "all", "all", "gauss_newton", "rest"),
        {
            kind: part(kind, lambda cell, kind=kind: _kind(cell) == kind, lambda operation: operation.kind, *wanted)
            for kind, wanted in _KINDS.items()
        },
        {
            name: part(
                name,
                lambda cell, name=name: _module(cell) == name,
                lambda operation: (operation.module,),
                {LOSS: "gauss_newton", UNSEEN: "rest"}.get(name, (name,)),
            )
            for name in sorted(met, key=order.index)
        },
    )


_Cells: TypeAlias = Callable[[Group], bool]
"""Which groups (kind, module), "gauss_newton" and "rest" among them, make up a part."""

# Kind: the groups of `Dissection.dissect` by kind that it is the sum of.
_KINDS: dict[str, tuple[Group, ...]] = {
    "loss": ("gauss_newton",),
    **{kind: (kind,) for kind in KINDS},
    "other": ("other", "rest"),
}


def _cell(operation: Operation) -> Group:
    return operation.kind, operation.module


def _kind(cell: Any) -> str:
    return {"gauss_newton": "loss", "rest": "other"}[cell] if isinstance(cell, str) else cell[0]


def _module(cell: Any) -> str:
    return {"gauss_newton": LOSS, "rest": UNSEEN}[cell] if isinstance(cell, str) else cell[1]


def _directions(products: Products, directions: Mapping[str, Vectors] | None) -> dict[str, Float[Tensor, "P"]]:
    if directions is None:
        return {"gradient": products.loss_and_gradient(KINDS)[1]}
    if not isinstance(directions, Mapping) or not directions:
        raise TwofoldError(f"directions is a mapping from names to vectors [P]; {describe(directions)} came.")
    rows = {name: rows_of(products.layout, vector) for name, vector in directions.items()}
    for name, row in rows.items():
        if len(row) != 1:
            raise TwofoldError(f"The direction {name!r} must be one vector; {len(row)} came.")
    return {name: row[0] for name, row in rows.items()}


_Forms: TypeAlias = dict[Any, Float[Tensor, "K K"]]


def _sample(
    products: Products, num_matvecs: int, generator: torch.Generator | None
) -> tuple[list[_Forms], dict[str, list[float]]]:
    """Return v_i'A v_j of every cell for probes taken together, and ||Av||^2 of the kinds and the Hessian."""
    probes = rademacher(GaussNewton.of(products), num_matvecs, generator)
    forms: list[_Forms] = []
    squares: dict[str, list[float]] = {}
    while rows := list(islice(probes, _TOGETHER)):
        forms.append(products.forms(torch.stack(rows), KINDS, _cell))
        for row in rows:
            found = products.dissected(row.unsqueeze(0), KINDS, lambda operation: operation.kind, lambda _: True)
            found = {
                kind: sum((found[term] for term in terms if term in found), torch.zeros_like(row))
                for kind, terms in _KINDS.items()
            }
            found["hessian"] = sum(found.values(), torch.zeros_like(row))
            for name, product in found.items():
                squares.setdefault(name, []).append(product.double().square().sum().item())
    squares[LOSS] = squares["loss"]
    return forms, squares


@dataclass(frozen=True)
class _Measured:
    """All that was measured, from which the figures of any part follow."""

    directions: Mapping[str, Tensor]
    along: _Forms
    sampled: Sequence[_Forms]
    squares: Mapping[str, Sequence[float]]

    def figures(self, cells: _Cells, name: str) -> Figures:
        forms = [_summed(sample, cells) for sample in self.sampled]
        num_matvecs = sum(len(form) for form in forms)
        trace = summarise([value for form in forms for value in form.diagonal().tolist()])
        if name in self.squares:
            square = summarise(self.squares[name])
        else:
            # E (v'Aw)^2 = ||A||_F^2 for independent v and w
            pairs = [form[*torch.triu_indices(len(form), len(form), 1)] for form in forms if len(form) > 1]
            square = summarise([pair.square().mean().item() for pair in pairs]) if pairs else Estimate(nan, nan, 1)
        frobenius = root_of(square)
        own, whole = _summed(self.along, cells).diagonal(), _summed(self.along, lambda _: True).diagonal()
        lengths = torch.stack([v.double().square().sum().cpu() for v in self.directions.values()])
        return Figures(
            trace,
            Estimate(frobenius.value, frobenius.stderr, num_matvecs),
            dict(zip(self.directions, (own / lengths).tolist(), strict=True)),
            dict(zip(self.directions, (own / whole).tolist(), strict=True)),
        )


def _summed(forms: _Forms, cells: _Cells) -> Float[Tensor, "K K"]:
    chosen = [form for cell, form in forms.items() if cells(cell)]
    return torch.stack(chosen).sum(0) if chosen else torch.zeros_like(next(iter(forms.values())))
