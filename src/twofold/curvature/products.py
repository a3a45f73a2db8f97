"""Products of H, GN and NME over a whole data set: averages exact, over batches and over ranks."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.curvature.determinism import alike, checksum
from twofold.curvature.differentiable import full_precision, unwrap
from twofold.curvature.dissection import Group, Operation
from twofold.curvature.gathering import Gathering
from twofold.curvature.jet_rules import NotCarriedError
from twofold.curvature.jets import Sources
from twofold.curvature.jets import forms as forms_of
from twofold.curvature.losses import Loss
from twofold.curvature.recording import Recording
from twofold.curvature.recordings import Recordings
from twofold.curvature.torch_losses import as_loss
from twofold.distributed import agree, check_group, gathered, summed, together, world_size
from twofold.errors import HALF_PRECISION, RANKS_DIFFER, TwofoldError
from twofold.parameters import half_precision_among, select_parameters
from twofold.types import Forward, LossFn, Matrix, Mode, Params, ProcessGroup, Weight

T = TypeVar("T")
SUMS: dict[Matrix, tuple[Matrix, Matrix]] = {"nme": ("activation_nme", "rest"), "hessian": ("gauss_newton", "nme")}
ACTIVATIONS = frozenset(SUMS["nme"])

_DRIFT = 1e-2
"""By how much vectors may differ between ranks: by what rounding grows to in a long iteration, and no more."""
_WIDER = "Measure a copy in float32, copy.deepcopy(model).float(), with inputs in float32."
_SAME = {
    "vectors": "Seed their generator alike, or let the first rank broadcast its own.",
    "parameters": "Broadcast the first rank's, or load the same checkpoint on all ranks.",
}


class Products:
    """What every curvature operator of one model and data set shares.

    The loss is the average over the whole set, L = sum_b c_b l_b / sum_b c_b with c_b the terms of batch b (or the
    plain sum where the loss sums), and each product is averaged alike, over the batches of all ranks of a group.

    Args:
        model: any module; compiled and DDP wrappers are looked through.
        loss_fn: loss_fn(outputs, targets) -> scalar.
        data: one batch, or a re-iterable of batches.
        params: names or glob patterns; None for all that require a gradient.
        forward: forward(model, batch) -> (outputs, targets).
        mode: "train", "eval", or None for the model as it is. Dropout masks are fixed for each batch at construction.
        memory: bytes for kept recordings of a set of several batches (1 GiB when None); one batch is always kept.
        weight: how many terms a batch's loss averages, for losses that are not torch's own.
        microbatches: how many pieces each batch is run in, at most.
        group: a process group; `data` is then this rank's shard.

    Attributes:
        watch: called, where one is set, with the number of vectors that were multiplied.
    """

    def __init__(
        self,
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
        compile: bool = False,
        group: ProcessGroup = None,
    ) -> None:
        check_group(group)
        self.group = group
        with together(group):
            if weight is not None and not callable(weight):
                raise TwofoldError(f"weight must be callable as weight(outputs, targets) -> float; {weight!r} came.")
            self.model = unwrap(model)
            self.loss: Loss = as_loss(loss_fn, weight)
            chosen = select_parameters(self.model, params)
            how: dict[str, Any] = {"forward": forward, "mode": mode, "memory": memory}
            how |= {"microbatches": microbatches, "compile": compile}
            self.recordings = Recordings(self.model, self.loss, chosen, data, **how)
            self.layout = self.recordings.layout
            self.watch: Callable[[int], None] | None = None
            self.path: str | None = None
            self._num_terms: float | None = None
            self._checksum: tuple[int, list[float]] | None = None
            agree(group)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The chosen parameters by name."""
        return self.recordings.parameters

    def check_determinism(self) -> None:
        """Raise where data or the model give other numbers when they are asked twice."""
        with together(self.group):
            self.recordings.check_determinism()
            agree(self.group)

    def of(self, names: Sequence[str]) -> "Products":
        """The products of the named parameters' diagonal blocks: the same passes with all others held constant."""
        block = copy.copy(self)
        block.recordings = self.recordings.of(names)
        block.layout = block.recordings.layout
        block._checksum = None
        return block

    def present_parameters(self) -> dict[str, nn.Parameter]:
        """The chosen parameters that the model has now."""
        return self.layout.find(dict(self.model.named_parameters()))

    @full_precision()
    def matmat(self, rows: Float[Tensor, "K P"], parts: Sequence[Matrix]) -> list[Float[Tensor, "K P"]]:
        """Return each named matrix times K vectors.

        Args:
            rows: the vectors, [K, P].
            parts: which matrices, in the order wanted.

        Returns:
            One tensor [K, P] for each part.
        """
        # H alone takes one pass through an open gate; otherwise a matrix is the sum of its terms.
        terms: Sequence[Matrix] = ("hessian",) if set(parts) == {"hessian"} else _terms(parts)
        if ACTIVATIONS.isdisjoint(parts):
            recordings = self.recordings.for_products(terms, self.layout.unflatten(rows[0])) if len(rows) else None
            found = self.averaged(rows, (), lambda recording, v: self._vectors(recording, v, terms), terms, recordings)
        else:
            found = self.dissected(rows, ("activation",), lambda _: "activation_nme", terms.__contains__)
            for term in terms:  # a model without activations
                found.setdefault(term, torch.zeros_like(rows))
        for whole, halves in SUMS.items():
            if whole not in found and found.keys() >= set(halves):
                found[whole] = found[halves[0]] + found[halves[1]]
        return [found[part] for part in parts]

    def _vectors(
        self, recording: Any, v: list[Tensor], terms: Sequence[Matrix]
    ) -> Iterator[tuple[Matrix, Float[Tensor, "P"]]]:
        """Yield the products of one batch, each gathered into a vector as it is computed."""
        with Gathering(getattr(recording, "parameters", ()), self.layout) as gathering:  # a program has none
            for name, product in recording.products(v, terms):
                yield name, gathering.vector(product)

    @full_precision()
    def dissected(
        self,
        rows: Float[Tensor, "K P"],
        kinds: Sequence[str],
        group: Callable[[Operation], Group],
        wanted: Callable[[Group], bool],
    ) -> dict[Any, Float[Tensor, "K P"]]:
        """Return what groups of operations add to the Hessian, times K vectors; see `Dissection.dissect`.

        Args:
            rows: the vectors, [K, P].
            kinds: which kinds of operation are told apart.
            group: the group that an operation belongs to.
            wanted: which groups to compute.
        """
        flatten = self.layout.flatten
        return self.averaged(
            rows,
            kinds,
            lambda recording, v: ((name, flatten(part)) for name, part in recording.dissect(v, group, wanted).items()),
        )

    @full_precision()
    def forms(
        self, rows: Float[Tensor, "K P"], kinds: Sequence[str], group: Callable[[Operation], Group]
    ) -> dict[Any, Float[Tensor, "K K"]]:
        """Return v_i'A v_j of all groups of operations; see `Dissection.forms`."""
        vectors, zero = [self.layout.unflatten(row) for row in rows], torch.zeros(len(rows), len(rows)).double()
        averages: dict[Any, Tensor] = {}
        with together(self.group):
            total = 0.0
            for recording, total in self._counted(self.recordings(kinds)):
                found = recording.forms(vectors, group)
                for name in averages.keys() | found.keys():
                    known = averages.setdefault(name, zero.clone())
                    self._average_in(known, found.get(name, zero), recording.count, total)
                del recording
            return self._over_ranks(averages, zero, total, rows)

    @full_precision()
    def quadratic_forms(self, rows: Float[Tensor, "K P"], parts: Sequence[Matrix]) -> dict[Matrix, Float[Tensor, "K"]]:
        """Return v_k'A v_k of each named matrix, in float64 on the CPU.

        By jets, with no graph, where every operation of the model is known to them; from recordings otherwise, and
        where only GN is asked for, whose J v they have for less.

        Args:
            rows: the vectors, [K, P].
            parts: which matrices.
        """
        terms = _terms(parts)
        if self.watch is not None:
            self.watch(len(rows))
        with together(self.group):
            self.recordings.refresh()
            local = self._forms_if_carried(rows, terms)
            self.path = "jets"
            if local is None:
                local = self._forms_averaged(self._forms_by_recordings(rows, terms))
                unknown = self.recordings.not_carried
                self.path = "recorded graph" + (f" (jets do not know {unknown})" if unknown else "")
            averages, total = local
            like = torch.zeros(len(rows), dtype=torch.float64)
            found: dict[Any, Tensor] = self._over_ranks(averages, like, total, rows, terms)
        for whole, halves in SUMS.items():
            if whole not in found and found.keys() >= set(halves):
                found[whole] = found[halves[0]] + found[halves[1]]
        return {part: found[part] for part in parts}

    def _forms_if_carried(
        self, rows: Float[Tensor, "K P"], terms: list[Matrix]
    ) -> tuple[dict[Any, Tensor], float] | None:
        """The forms by jets; None where the jets do not know an operation, or recordings have them for less."""
        recordings, local = self.recordings, None
        if terms == ["gauss_newton"] or recordings.not_carried is not None:
            return None
        try:
            local = self._forms_averaged(self._forms_by_jets(rows, terms))
        except NotCarriedError as error:
            recordings.not_carried = str(error)
        if not all(carried for (carried,) in agree(self.group, [float(local is not None)])):
            recordings.not_carried = recordings.not_carried or "an operation on another rank"
            return None
        return local

    def _forms_averaged(
        self, batches: Iterable[tuple[float, Sequence[Mapping[Any, Tensor]]]]
    ) -> tuple[dict[Any, Float[Tensor, "K"]], float]:
        averages: dict[Any, Tensor] = {}
        total = 0.0
        for count, forms in batches:
            if count == 0:
                continue
            total += count
            for name in forms[0]:
                found = torch.stack([form[name].double().cpu() for form in forms])
                self._average_in(averages.setdefault(name, torch.zeros_like(found)), found, count, total)
        return averages, total

    def _forms_by_recordings(
        self, rows: Float[Tensor, "K P"], terms: Sequence[Matrix]
    ) -> Iterator[tuple[float, list[Mapping[Any, Tensor]]]]:
        vectors = [self.layout.unflatten(row) for row in rows]
        if ACTIVATIONS.isdisjoint(terms):
            for recording in self.recordings():
                forms = [recording.quadratic_forms(v, terms) for v in vectors] if recording.count else []
                yield recording.count, forms
            return
        for recording in self.recordings(("activation",)):
            parted: list[Mapping[Any, Tensor]] = []
            for vector in vectors if recording.count else []:
                of = {name: form[0, 0] for name, form in recording.forms([vector], lambda _: "activation_nme").items()}
                parted.append({term: of.get(term, torch.zeros(())) for term in terms})
            yield recording.count, parted

    def _forms_by_jets(
        self, rows: Float[Tensor, "K P"], terms: Sequence[Matrix]
    ) -> Iterator[tuple[float, list[Mapping[Any, Tensor]]]]:
        vectors = [self.layout.unflatten(row) for row in rows]
        sources: dict[Matrix, Sources] = {"nme": "all", "activation_nme": "activation", "rest": "rest"}
        wanted = [term for term in terms if term in sources]
        for piece in self.recordings.pieces():
            at_outputs, forms = None, []
            for vector in vectors:
                of: dict[Any, Tensor] = {}
                for term in wanted:
                    jets, at_outputs = self.recordings.jets(piece, vector, sources[term], at_outputs)
                    if at_outputs.count == 0:
                        break
                    found = forms_of(jets, at_outputs)
                    of |= {"gauss_newton": found["gauss_newton"], term: found["nme"]}
                forms.append(of)
            assert at_outputs is not None
            yield at_outputs.count, forms

    @full_precision()
    def averaged(
        self,
        rows: Float[Tensor, "K P"],
        kinds: Sequence[str],
        products: Callable[[Any, list[Tensor]], Iterable[tuple[Any, Float[Tensor, "P"]]]],
        names: Sequence[Any] | None = None,
        recordings: Iterator[Any] | None = None,
    ) -> dict[Any, Float[Tensor, "K P"]]:
        """Average named products(recording, v) over the batches, for each of K vectors.

        Args:
            rows: the vectors, [K, P].
            kinds: which kinds of operation the recordings tell apart.
            products: takes a recording and v, one tensor per parameter, and yields pairs (name, a vector [P] of its
                own memory).
            names: the names that it gives, where they do not depend on the batch.
            recordings: what stands in the place of the recordings.
        """
        averages: dict[Any, Tensor] = {}
        with together(self.group):
            total, first = 0.0, True
            for recording, total in self._counted(recordings or self.recordings(kinds)):
                for k, row in enumerate(rows):
                    found = set()
                    for name, product in products(recording, self.layout.unflatten(row)):
                        found.add(name)
                        if first and len(rows) == 1:
                            averages[name] = product.unsqueeze(0)
                        else:
                            if name not in averages:
                                averages[name] = torch.zeros_like(rows)
                            self._average_in(averages[name][k], product, recording.count, total)
                        del product
                    for name in averages.keys() - found:
                        self._average_in(averages[name][k], torch.zeros_like(row), recording.count, total)
                first = False
                del recording
            averages = self._over_ranks(averages, rows, total, rows, names)
        if self.watch is not None:
            self.watch(len(rows))
        return averages

    @full_precision()
    def each(self, f: Callable[[Recording], T]) -> list[T]:
        """Return f of every batch's recording, in order."""
        return [f(recording) for recording in self.recordings()]

    @full_precision()
    def loss_and_gradient(
        self, kinds: Sequence[str] = (), step: Float[Tensor, "P"] | None = None
    ) -> tuple[float, Float[Tensor, "P"]]:
        """Return the loss of the whole set and its gradient [P].

        Args:
            kinds: take the recordings that tell these apart.
            step: take them at theta + step, with the same dropout masks; the weights stay where they are.
        """
        value = torch.zeros((), dtype=torch.float64)
        gradient = torch.zeros(self.layout.size, dtype=self.layout.dtype, device=self.layout.device)
        with together(self.group):
            total = 0.0
            for recording, total in self._counted(self.recordings(kinds) if step is None else self.recordings.at(step)):
                self._average_in(value, recording.value.double().cpu(), recording.count, total)
                with Gathering(recording.parameters, self.layout) as gathering:
                    self._average_in(gradient, gathering.vector(recording.gradient), recording.count, total)
                del recording
            share = self._share(total, [] if step is None else [step])
            return summed(value.mul_(share), self.group).item(), summed(gradient.mul_(share), self.group)

    @full_precision()
    def check_resolved(self, what: str) -> None:
        """Refuse half precision, of the chosen parameters or of the outputs, for what compares theta with theta + step.

        Args:
            what: cannot be done then, for the message.
        """
        with together(self.group):
            first = next(iter(self.recordings()))
            dtype = half_precision_among([*self.parameters.values(), *first.outputs, first.value])
            if dtype is not None:
                raise TwofoldError(HALF_PRECISION.format(what=what, dtype=dtype, remedy=_WIDER))
            agree(self.group)

    @full_precision()
    def loss_at(self, step: Float[Tensor, "P"]) -> float:
        """Return the loss of the whole set at theta + step, by forward passes alone, with the same dropout masks."""
        value, total = torch.zeros((), dtype=torch.float64), 0.0
        with together(self.group):
            for loss, count in self.recordings.losses_at(step):
                if count > 0:
                    total += count
                    self._average_in(value, loss.double().cpu(), count, total)
            return summed(value.mul_(self._share(total, [step])), self.group).item()

    def _counted(self, recordings: Iterator[Any]) -> Iterator[tuple[Any, float]]:
        """Leave out recordings without a term; yield the others with the number of terms so far."""
        total = 0.0
        for recording in recordings:
            if recording.count > 0:
                total += recording.count
                yield recording, total
            del recording

    @property
    def num_batches(self) -> int:
        """How many batches the data has, that of all ranks."""
        if not self.recordings.num_batches:
            self.loss_and_gradient()
        with together(self.group):
            return int(sum(count for (count,) in agree(self.group, [self.recordings.num_batches])))

    @property
    def num_terms(self) -> float | None:
        """How many terms the loss averages over the whole set; None where it sums."""
        if self._num_terms is None:
            self.loss_and_gradient()
        return self._num_terms if self.loss.averages else None

    def forget(self) -> None:
        """Drop the recordings kept and what they are checked against, to free memory; products make them anew."""
        self.recordings.forget()

    def _average_in(self, average: Tensor, part: Tensor, count: float, total: float) -> None:
        if self.loss.averages:
            average.lerp_(part, count / total)
        else:
            average.add_(part)

    def _over_ranks(
        self, averages: dict[Any, Tensor], like: Tensor, total: float, rows: Tensor, names: Sequence[Any] | None = None
    ) -> dict[Any, Tensor]:
        """Average over the ranks what each found for its shard, by one sum.

        Args:
            averages: by name; what a rank has no name for is zero there.
            like: a tensor of the averages' shape.
            total: how many terms this rank's shard has.
            rows: the vectors, which must be the same on all ranks.
            names: all names, where they are known.
        """
        share = self._share(total, [rows])
        if world_size(self.group) == 1:
            return averages
        if names is None:
            names = list(dict.fromkeys(name for every in gathered(list(averages), self.group) for name in every))
        if not names:
            return {}
        zero = torch.zeros_like(like)
        stacked = torch.stack([averages.get(name, zero) for name in names]).mul_(share)
        return dict(zip(names, summed(stacked, self.group), strict=True))

    def _share(self, total: float, vectors: Sequence[Tensor]) -> float:
        """The weight of this rank's shard, once all ranks have come here with the same vectors and parameters."""
        if world_size(self.group) == 1:
            totals = [total]
        else:
            every = agree(self.group, [total, *checksum(vectors), *self._parameters_checksum()])
            for what, part in (("parameters", slice(9, 17)), ("vectors", slice(1, 9))):
                if not all(alike(numbers[part], every[0][part], _DRIFT) for numbers in every):
                    raise TwofoldError(RANKS_DIFFER.format(what=what, remedy=_SAME[what]))
            totals = [numbers[0] for numbers in every]
        if sum(totals) == 0:
            raise TwofoldError(
                "The loss averages over no term at all: every target is ignored (ignore_index), or every weight is 0."
            )
        self._num_terms = sum(totals)
        return total / self._num_terms if self.loss.averages else 1.0

    def _parameters_checksum(self) -> list[float]:
        changes = self.recordings.changes
        if self._checksum is None or self._checksum[0] != changes:
            self._checksum = changes, checksum(self.parameters.values())
        return self._checksum[1]


def _terms(parts: Sequence[Matrix]) -> list[Matrix]:
    """The fewest matrices that others are sums of, in a fixed order."""
    wanted = set(parts)
    if "hessian" in wanted:
        wanted |= set(SUMS["hessian"])
    if "nme" in wanted and not ACTIVATIONS.isdisjoint(wanted):
        wanted = (wanted | ACTIVATIONS) - {"nme"}
    return [term for term in ("gauss_newton", "nme", "activation_nme", "rest") if term in wanted]
