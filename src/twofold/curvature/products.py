"""Products of H, GN and NME over a whole data set: recordings kept while they are true, averages exact."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from twofold.batches import as_batches, describe, run_forward, to_device
from twofold.curvature.differentiable import (
    Frugal,
    RandomState,
    borrowed,
    composed_kernels,
    differentiable_twice,
    full_precision,
    unwrap,
)
from twofold.curvature.dissection import Dissection, Group, Held, Operation
from twofold.curvature.freshness import Snapshot
from twofold.curvature.jet_rules import Jet, NotCarriedError
from twofold.curvature.jets import Jets, Sources, carried, output_jets
from twofold.curvature.jets import forms as forms_of
from twofold.curvature.kinds import recorded_apart
from twofold.curvature.losses import Loss
from twofold.curvature.recording import OutputLoss, Recording, check_reached, saved_bytes
from twofold.curvature.torch_losses import as_loss
from twofold.errors import EMPTY_DATA, NOT_FINITE, NotFiniteError, TwofoldError
from twofold.parameters import ParameterLayout, select_parameters
from twofold.types import Forward, LossFn, Matrix, Mode, Params, Weight

T = TypeVar("T")
DEFAULT_MEMORY = 2**30
SUMS: dict[Matrix, tuple[Matrix, Matrix]] = {"nme": ("activation_nme", "rest"), "hessian": ("gauss_newton", "nme")}
ACTIVATIONS = frozenset(SUMS["nme"])


class Products:
    """What every curvature operator of one model and data set shares.

    The loss is the average over the whole set, L = sum_b c_b l_b / sum_b c_b with c_b the terms of batch b (or the
    plain sum where the loss sums), and each product is averaged alike. Recordings are kept for as many batches as
    `memory` allows and made anew when parameters, buffers, modes or the second_derivative context have changed. The
    parts of the NME take recordings of their own, made when first asked for.

    Args:
        model: any module; compiled and DDP wrappers are looked through.
        loss_fn: loss_fn(outputs, targets) -> scalar.
        data: one batch, or a re-iterable of batches.
        params: names or glob patterns; None for all that require a gradient.
        forward: forward(model, batch) -> (outputs, targets).
        mode: "train", "eval", or None for the model as it is. Dropout masks are fixed for each batch at construction.
        memory: bytes for kept recordings of a set of several batches (1 GiB when None); one batch is always kept.
        weight: how many terms a batch's loss averages, for losses that are not torch's own.

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
    ) -> None:
        if mode not in (None, "train", "eval"):
            raise TwofoldError(f'mode must be "train", "eval" or None; {mode!r} came.')
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory < 0):
            raise TwofoldError(f"memory is a number of bytes, 0 or more; {memory!r} came.")
        if weight is not None and not callable(weight):
            raise TwofoldError(f"weight must be callable as weight(outputs, targets) -> float; {weight!r} came.")
        self.model = unwrap(model)
        self.loss: Loss = as_loss(loss_fn, weight)
        self.parameters = select_parameters(self.model, params)
        self.layout = ParameterLayout(self.parameters, self.model)
        self._batches = as_batches(data)
        self._forward = forward
        self._mode: Mode = mode
        self._memory = DEFAULT_MEMORY if memory is None else memory
        self._random_states = [RandomState()]
        self._kept: dict[tuple[int, tuple[str, ...]], Recording] = {}
        self._warned: set[str] = set()
        self.watch: Callable[[int], None] | None = None
        self._num_batches: int | None = None
        self._num_terms: float | None = None
        self._bytes_each = 0
        self._snapshot: Snapshot | None = None
        self._at_outputs: dict[int, OutputLoss] = {}
        self._not_carried: str | None = None
        self.path: str | None = None
        generator = getattr(data, "generator", None)
        self._loader_state = generator.get_state() if isinstance(generator, torch.Generator) else None

    def of(self, names: Sequence[str]) -> "Products":
        """The products of the named parameters' diagonal blocks: the same passes with all others held constant."""
        block = copy.copy(self)  # without recordings
        block.parameters = {name: self.parameters[name] for name in names}
        block.layout = ParameterLayout(block.parameters, self.model)
        block._bytes_each = 0
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
            found = self.averaged(
                rows, (), lambda recording, v: dict(zip(terms, recording.products(v, terms), strict=True))
            )
        else:
            found = self.dissected(rows, ("activation",), lambda _: "activation_nme", terms.__contains__)
            for term in terms:  # a model without activations
                found.setdefault(term, torch.zeros_like(rows))
        for whole, halves in SUMS.items():
            if whole not in found and found.keys() >= set(halves):
                found[whole] = found[halves[0]] + found[halves[1]]
        return [found[part] for part in parts]

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
        return self.averaged(rows, kinds, lambda recording, v: recording.dissect(v, group, wanted))

    @full_precision()
    def forms(
        self, rows: Float[Tensor, "K P"], kinds: Sequence[str], group: Callable[[Operation], Group]
    ) -> dict[Any, Float[Tensor, "K K"]]:
        """Return v_i'A v_j of all groups of operations; see `Dissection.forms`."""
        averages: dict[Any, Tensor] = {}
        vectors, total = [self.layout.unflatten(row) for row in rows], 0.0
        for recording in self._recordings(kinds):
            if recording.count == 0:
                continue
            total += recording.count
            found = recording.forms(vectors, group)
            zero = torch.zeros(len(rows), len(rows), dtype=torch.float64)
            for name in averages.keys() | found.keys():
                self._average_in(averages.setdefault(name, zero.clone()), found.get(name, zero), recording.count, total)
        self._check_total(total)
        return averages

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
        self._forget_when_stale()
        if self.watch is not None:
            self.watch(len(rows))
        found = None
        if self._not_carried is None and terms != ["gauss_newton"]:
            try:
                found, self.path = self._forms_averaged(rows, self._forms_by_jets(rows, terms)), "jets"
            except NotCarriedError as error:
                self._not_carried = str(error)
        if found is None:
            found = self._forms_averaged(rows, self._forms_by_recordings(rows, terms))
            self.path = "recorded graph" + (f" (jets do not know {self._not_carried})" if self._not_carried else "")
        for whole, halves in SUMS.items():
            if whole not in found and found.keys() >= set(halves):
                found[whole] = found[halves[0]] + found[halves[1]]
        return {part: found[part] for part in parts}

    def _forms_averaged(
        self, rows: Float[Tensor, "K P"], batches: Iterable[tuple[float, Sequence[Mapping[Any, Tensor]]]]
    ) -> dict[Matrix, Float[Tensor, "K"]]:
        averages: dict[Matrix, Tensor] = {}
        total = 0.0
        for count, forms in batches:
            if count == 0:
                continue
            total += count
            for name in forms[0]:
                found = torch.stack([form[name].double().cpu() for form in forms])
                self._average_in(averages.setdefault(name, torch.zeros_like(found)), found, count, total)
        self._check_total(total)
        return averages

    def _forms_by_recordings(
        self, rows: Float[Tensor, "K P"], terms: Sequence[Matrix]
    ) -> Iterator[tuple[float, list[Mapping[Any, Tensor]]]]:
        vectors = [self.layout.unflatten(row) for row in rows]
        if ACTIVATIONS.isdisjoint(terms):
            for recording in self._recordings():
                forms = [recording.quadratic_forms(v, terms) for v in vectors] if recording.count else []
                yield recording.count, forms
            return
        for recording in self._recordings(("activation",)):
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
        wanted, seen = [term for term in terms if term in sources], 0
        for index, batch in enumerate(_replayed(self._batches, self._random_states[0], self._loader_state)):
            at_outputs, forms = self._at_outputs.get(index), []
            for vector in vectors:
                of: dict[Any, Tensor] = {}
                for term in wanted:
                    jets, outputs, targets = self._jets(index, batch, vector, sources[term])
                    if at_outputs is None:
                        at_outputs = OutputLoss(outputs, targets, self.loss, self.parameters)
                        self._check_finite(at_outputs.value, at_outputs.count, index)
                        if index == 0:
                            self._at_outputs[index] = at_outputs
                    if at_outputs.count == 0:
                        break
                    found = forms_of(jets, at_outputs)
                    of |= {"gauss_newton": found["gauss_newton"], term: found["nme"]}
                forms.append(of)
            assert at_outputs is not None
            seen = index + 1
            yield at_outputs.count, forms
        self._check_seen(seen)

    def _jets(self, index: int, batch: Any, vector: Sequence[Tensor], sources: Sources) -> tuple[list[Jet], Any, Any]:
        """One forward pass in the direction of a vector, with the outputs' jets."""
        jets = Jets(sources=sources, warned=self._warned)
        with borrowed(self.model, self.parameters, self._mode) as aliases:
            self._random_states[index].restore()
            with composed_kernels(self.model), carried(aliases, vector, jets):
                outputs, targets = run_forward(self._forward, self.model, to_device(batch, self.layout.device))
                found = output_jets(jets, outputs)
            self._remember_random_state(index)
        return found, tree_map_only(Tensor, Tensor.detach, outputs), targets

    @full_precision()
    def averaged(
        self,
        rows: Float[Tensor, "K P"],
        kinds: Sequence[str],
        products: Callable[[Any, list[Tensor]], Mapping[Any, list[Tensor]]],
    ) -> dict[Any, Float[Tensor, "K P"]]:
        """Average named products(recording, v) over the batches, for each of K vectors.

        Args:
            rows: the vectors, [K, P].
            kinds: which kinds of operation the recordings tell apart.
            products: takes a recording and v, one tensor per parameter, and returns {name: a vector like v}.
        """
        averages: dict[Any, Tensor] = {}
        total, first = 0.0, True
        for recording in self._recordings(kinds):
            if recording.count == 0:
                continue
            total += recording.count
            for k, row in enumerate(rows):
                found = products(recording, self.layout.unflatten(row))
                for name, product in found.items():
                    if name not in averages:
                        averages[name] = torch.empty_like(rows) if first else torch.zeros_like(rows)
                    if first:
                        self.layout.flatten(product, out=averages[name][k])
                    else:
                        self._average_in(averages[name][k], self.layout.flatten(product), recording.count, total)
                for name in averages.keys() - found.keys():
                    self._average_in(averages[name][k], torch.zeros_like(row), recording.count, total)
                del found
            first = False
        self._check_total(total)
        if self.watch is not None:
            self.watch(len(rows))
        return averages

    @full_precision()
    def each(self, f: Callable[[Recording], T]) -> list[T]:
        """Return f of every batch's recording, in order."""
        return [f(recording) for recording in self._recordings()]

    @full_precision()
    def loss_and_gradient(
        self, kinds: Sequence[str] = (), step: Float[Tensor, "P"] | None = None
    ) -> tuple[float, Float[Tensor, "P"]]:
        """Return the loss of the whole set and its gradient [P].

        Args:
            kinds: take the recordings that tell these apart.
            step: take them at theta + step, with the same dropout masks; the weights stay where they are.
        """
        value, total = torch.zeros((), dtype=torch.float64), 0.0
        gradient = torch.zeros(self.layout.size, dtype=self.layout.dtype, device=self.layout.device)
        for recording in self._recordings(kinds) if step is None else self._recordings_at(step):
            if recording.count == 0:
                continue
            total += recording.count
            self._average_in(value, recording.value.double().cpu(), recording.count, total)
            self._average_in(gradient, self.layout.flatten(recording.gradient), recording.count, total)
        self._check_total(total)
        self._num_terms = total
        return value.item(), gradient

    @property
    def num_batches(self) -> int:
        """How many batches the data has."""
        if self._num_batches is None:
            self.loss_and_gradient()
        return self._num_batches or 0

    @property
    def num_terms(self) -> float | None:
        """How many terms the loss averages over the whole set; None where it sums."""
        if self._num_terms is None:
            self.loss_and_gradient()
        return self._num_terms if self.loss.averages else None

    def forget(self) -> None:
        """Drop the recordings kept and what they are checked against, to free memory; products make them anew."""
        self._kept.clear()
        self._snapshot = None

    def _average_in(self, average: Tensor, part: Tensor, count: float, total: float) -> None:
        if self.loss.averages:
            average.lerp_(part, count / total)
        else:
            average.add_(part)

    def _check_total(self, total: float) -> None:
        if total == 0:
            raise TwofoldError(
                "The loss averages over no term at all: every target is ignored (ignore_index), or every weight is 0."
            )

    def _recordings(self, kinds: Sequence[str] = ()) -> Iterator[Any]:
        kinds = tuple(kinds)
        self._forget_when_stale()
        kept = {index: recording for (index, of), recording in self._kept.items() if of == kinds}
        if self._num_batches is not None and len(kept) == self._num_batches:
            yield from kept.values()
            return
        del kept
        seen = 0
        for index, batch in enumerate(_replayed(self._batches, self._random_states[0], self._loader_state)):
            recording = self._kept.get((index, kinds))
            if recording is None:
                recording = self._record(index, batch, kinds)
                if index == 1 and not self._bytes_each:
                    self._bytes_each = saved_bytes(recording)
                if index == 0 or (len(self._kept) + 1) * self._bytes_each <= self._memory:
                    self._kept[index, kinds] = recording
            seen = index + 1
            yield recording
            del recording
        self._check_seen(seen)
        if seen > 1 and self._bytes_each > self._memory:
            self._kept.clear()

    def _check_seen(self, seen: int) -> None:
        if seen == 0:
            raise TwofoldError(EMPTY_DATA.format(came=describe(self._batches)))
        if self._num_batches not in (None, seen):
            raise TwofoldError(
                f"data yielded {self._num_batches} batches before and {seen} now; a curvature matrix needs the same "
                "batches each time. Pass list(loader)."
            )
        self._num_batches = seen

    def _recordings_at(self, step: Float[Tensor, "P"]) -> Iterator[Recording]:
        """Recordings at theta + step, none of them kept."""
        self._forget_when_stale()
        moves = self.layout.unflatten(step)
        for index, batch in enumerate(_replayed(self._batches, self._random_states[0], self._loader_state)):
            pairs = zip(self.parameters.items(), moves, strict=True)
            yield self._record(index, batch, (), {name: weight.detach() + move for (name, weight), move in pairs})

    def _record(
        self, index: int, batch: Any, kinds: Sequence[str], at: Mapping[str, Tensor] | None = None
    ) -> Recording:
        held = Held()
        with borrowed(self.model, self.parameters, self._mode, at) as aliases:
            self._random_states[index].restore()
            with ExitStack() as stack:
                repairs = stack.enter_context(differentiable_twice(self.model))
                stack.enter_context(Frugal())
                if kinds:
                    warned = self._warned if len(kinds) == 1 else None
                    stack.enter_context(recorded_apart(self.model, kinds, held, warned))
                outputs, targets = run_forward(self._forward, self.model, to_device(batch, self.layout.device))
            self._remember_random_state(index)
            check_reached(outputs, self.parameters)
            around = self._recomputing(aliases) if repairs.checkpointed else nullcontext
            recorded = (outputs, targets, self.loss, aliases, around)
            recording = Dissection(held, *recorded) if kinds else Recording(*recorded)
            recording.index = index
        if at is None:
            self._check_finite(recording.value, recording.count, index)
        return recording

    def _remember_random_state(self, index: int) -> None:
        """Keep the state that the pass over a batch left: that in which the next one starts."""
        if len(self._random_states) == index + 1:
            after = RandomState()
            same = after == self._random_states[index]
            self._random_states.append(self._random_states[index] if same else after)

    def _check_finite(self, loss: Tensor, count: float, index: int) -> None:
        if count > 0 and not torch.isfinite(loss):
            raise NotFiniteError(NOT_FINITE.format(what="loss", came=loss.item(), where=f" (batch {index})"))

    def _recomputing(self, aliases: dict[str, Tensor]) -> Callable[[], AbstractContextManager[None]]:
        """What segments under a checkpoint are recomputed in: the model as it was lent when they were recorded."""
        model, parameters, mode = self.model, self.parameters, self._mode

        @contextmanager
        def around() -> Iterator[None]:
            with borrowed(model, parameters, mode, aliases), composed_kernels(model):
                yield

        return around

    def __getstate__(self) -> dict[str, Any]:
        """Without recordings, which cannot be copied; a copy makes its own."""
        return self.__dict__ | {"_kept": {}, "_at_outputs": {}, "_snapshot": None}

    def _forget_when_stale(self) -> None:
        """Drop what was recorded from other tensors, modes or second derivatives than the present ones."""
        in_memory = self._batches if isinstance(self._batches, list | tuple) else []
        if self._snapshot is not None and self._snapshot.holds(self.model, self.loss.loss_fn, in_memory):
            return
        self._kept.clear()
        self._at_outputs.clear()
        self._snapshot = self._not_carried = None
        self.parameters = self.present_parameters()
        self._snapshot = Snapshot(self.model, self.loss.loss_fn, in_memory)


def _terms(parts: Sequence[Matrix]) -> list[Matrix]:
    """The fewest matrices that others are sums of, in a fixed order."""
    wanted = set(parts)
    if "hessian" in wanted:
        wanted |= set(SUMS["hessian"])
    if "nme" in wanted and not ACTIVATIONS.isdisjoint(wanted):
        wanted = (wanted | ACTIVATIONS) - {"nme"}
    return [term for term in ("gauss_newton", "nme", "activation_nme", "rest") if term in wanted]


def _replayed(batches: Iterable[Any], state: RandomState, own: Tensor | None) -> Iterator[Any]:
    """Yield batches that draw the same random numbers each time, leaving every generator as it was.

    Iterating a DataLoader draws from torch's global generator or from its own, and a data set may draw as it is read.
    """
    if isinstance(batches, list | tuple):
        yield from batches
        return
    generator: Any = getattr(batches, "generator", None)
    iterator = None
    while True:
        outside = RandomState()
        outside_own = None if own is None else generator.get_state()
        state.restore()
        try:
            if iterator is None:
                if own is not None:
                    generator.set_state(own)
                iterator = iter(batches)
            batch = next(iterator)
            state = RandomState()
        except StopIteration:
            return
        finally:
            outside.restore()
            if outside_own is not None:
                generator.set_state(outside_own)
        yield batch
