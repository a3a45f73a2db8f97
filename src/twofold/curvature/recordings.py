"""The recordings of a whole data set: kept while they are true, made anew for what does not fit in memory.

Whatever is run more than once is held to have given the same numbers: batches that change between readings and models
that change between passes are refused by name.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from twofold.batches import as_batches, describe, run_forward, split, tensors_in, to_device
from twofold.curvature.compiled import Compiled, NotCompiledError, Program, agree_within_rounding, shapes
from twofold.curvature.determinism import Event, alike, checksum, culprit, same_value, watched
from twofold.curvature.differentiable import Frugal, RandomState, borrowed, composed_kernels, differentiable_twice
from twofold.curvature.dissection import Dissection, Held
from twofold.curvature.freshness import Snapshot
from twofold.curvature.jet_rules import Jet
from twofold.curvature.jets import Jets, Sources, carried, output_jets
from twofold.curvature.kinds import recorded_apart
from twofold.curvature.losses import Loss
from twofold.curvature.recording import OutputLoss, Recording, check_reached, saved_bytes
from twofold.errors import (
    DATA_CHANGED,
    EMPTY_DATA,
    NOT_DETERMINISTIC,
    NOT_FINITE,
    SPLITTING_MIXES,
    NotFiniteError,
    TwofoldError,
    TwofoldWarning,
)
from twofold.parameters import ParameterLayout
from twofold.types import Forward, Matrix, Mode

DEFAULT_MEMORY = 2**30

Piece: TypeAlias = tuple[int, str, Any]
"""A batch, or a piece of one: its index, its place for a message, and itself."""


class Recordings:
    """One recording for each batch, or for each piece of a batch.

    They are kept for as many as `memory` allows and made anew when parameters, buffers, modes or the second_derivative
    context have changed. Recordings that tell kinds of operation apart are made when first asked for.

    Args:
        model: a plain module.
        loss: the recognised loss.
        parameters: the chosen parameters by name.
        data: one batch, or a re-iterable of batches.
        forward: forward(model, batch) -> (outputs, targets).
        mode: "train", "eval", or None for the model as it is. Dropout masks are fixed for each batch now.
        memory: bytes for kept recordings of several (1 GiB when None); a single one is always kept.
        microbatches: how many pieces a batch is run in, at most.
        compile: run products as compiled programs, for batches of the first one's shapes, where that can be done.

    Attributes:
        parameters: the chosen parameters by name, those that the model has at present.
        layout: where each lies in a vector.
        kept: the recordings that are kept.
        changes: how often parameters, buffers, modes or the context were found changed.
        num_batches: how many batches the data has, 0 before they were read.
        not_carried: the operation that jets were found not to know.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        parameters: Mapping[str, nn.Parameter],
        data: Any,
        *,
        forward: Forward | None,
        mode: Mode,
        memory: int | None,
        microbatches: int,
        compile: bool,
    ) -> None:
        if mode not in (None, "train", "eval"):
            raise TwofoldError(f'mode must be "train", "eval" or None; {mode!r} came.')
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory < 0):
            raise TwofoldError(f"memory is a number of bytes, 0 or more; {memory!r} came.")
        if isinstance(microbatches, bool) or not isinstance(microbatches, int) or microbatches < 1:
            raise TwofoldError(f"microbatches must be a positive integer; {microbatches!r} came.")
        if not isinstance(compile, bool):
            raise TwofoldError(f"compile must be True or False; {compile!r} came.")
        self.compile = compile
        self._programs: dict[tuple[Matrix, ...], Program] = {}
        self.parameters = dict(parameters)
        self.layout = ParameterLayout(parameters, model)
        self.num_batches = 0
        self.not_carried: str | None = None
        self.changes = 0
        self._model = model
        self._loss = loss
        self._batches = as_batches(data)
        self._in_memory: Sequence[Any] = self._batches if isinstance(self._batches, list | tuple) else ()
        self._forward = forward
        self._mode: Mode = mode
        self._memory = DEFAULT_MEMORY if memory is None else memory
        self._microbatches = microbatches
        self._random_states = [RandomState()]
        self.kept: dict[tuple[int, tuple[str, ...]], Recording] = {}
        self._warned: set[str] = set()
        self._num_pieces: int | None = None
        self._bytes_each = 0
        self._snapshot: Snapshot | None = None
        self._batches_were: list[list[float]] = []
        self._losses_were: dict[int, float] = {}
        self._at_outputs: dict[int, OutputLoss] = {}
        self._splitting_checked = microbatches == 1
        generator = getattr(data, "generator", None)
        self._loader_state = generator.get_state() if isinstance(generator, torch.Generator) else None

    def of(self, names: Sequence[str]) -> "Recordings":
        """Recordings of the same passes with all but the named parameters held constant."""
        part = copy.copy(self)  # without what is kept
        part.parameters = {name: self.parameters[name] for name in names}
        part.layout = ParameterLayout(part.parameters, self._model)
        part._bytes_each = 0
        return part

    def __call__(self, kinds: Sequence[str] = ()) -> Iterator[Any]:
        """Yield the recordings, those that tell `kinds` of operation apart."""
        kinds = tuple(kinds)
        self.refresh()
        kept = {index: recording for (index, of), recording in self.kept.items() if of == kinds}
        if self._num_pieces is not None and len(kept) == self._num_pieces:
            yield from kept.values()
            return
        del kept
        for index, place, batch in self._pieces():
            recording = self.kept.get((index, kinds))
            if recording is None:
                recording = self._record(index, place, batch, kinds)
                if index == 1 and not self._bytes_each:
                    self._bytes_each = saved_bytes(recording)
                    if self._bytes_each > self._memory:
                        self.kept.clear()
                if index == 0 or (len(self.kept) + 1) * self._bytes_each <= self._memory:
                    self.kept[index, kinds] = recording
            yield recording
            del recording
        if self._num_pieces != 1 and self._bytes_each > self._memory:
            self.kept.clear()

    def for_products(self, terms: Sequence[Matrix], vector: Sequence[Tensor]) -> Iterator[Any]:
        """Yield what gives products of each batch: recordings, or with `compile` programs, first asked for `vector`."""
        if self.compile:
            self.refresh()
        if not self.compile:
            yield from self()
            return
        for piece in self._pieces():
            index, place, batch = piece
            program = self._programs.get(tuple(terms)) or self._compiled(piece, vector, terms)
            if not self.compile or program is None or shapes(batch) != program.shapes:
                yield self._record(index, place, batch, ())
                continue
            if len(self._random_states) == index + 1:  # a program draws nothing
                self._random_states.append(self._random_states[index])
            here = to_device(batch, self.layout.device)
            check = partial(self._check_loss, index, place, batch)
            yield Compiled(index, partial(program, here), self._loss, check).begin(vector)

    def _compiled(self, piece: Piece, vector: Sequence[Tensor], terms: Sequence[Matrix]) -> Program | None:
        """Make the program of this batch's shapes; where that fails, say why and compile no more."""
        index, place, batch = piece
        uncounted = copy.copy(self._loss)
        vars(uncounted)["count"] = lambda outputs, targets: 1.0  # it is a number, and may depend on values

        def record(batch: Any) -> tuple[Recording, Any]:
            return self._recorded(index, batch, (), uncounted)

        try:
            if self._draws(index, batch):
                raise NotCompiledError("the forward pass draws random numbers")
            program = Program(record, to_device(batch, self.layout.device), vector, terms)
            found = program(to_device(batch, self.layout.device), vector)[3]
            if not agree_within_rounding(found, self._record(index, place, batch, ()).products(vector, terms)):
                raise NotCompiledError("the compiled program gives other numbers")
        except (NotCompiledError, BackendCompilerFailed) as error:
            warnings.warn(f"compile=True does not work here, passes are recorded instead: {error}.", TwofoldWarning)
            self.compile = False
            return None
        self._programs[tuple(terms)] = program
        return program

    def _draws(self, index: int, batch: Any) -> bool:
        """Whether the forward pass draws random numbers."""
        self._run(index, batch)
        return self._random_states[index] is not self._random_states[index + 1]

    def at(self, step: Float[Tensor, "P"]) -> Iterator[Recording]:
        """Yield recordings at theta + step, none of them kept."""
        self.refresh()
        for index, place, batch in self._pieces():
            yield self._record(index, place, batch, (), self._moved(step))

    def losses_at(self, step: Float[Tensor, "P"]) -> Iterator[tuple[Tensor, float]]:
        """Yield the loss of each batch at theta + step and how many terms it averages, by forward passes alone."""
        self.refresh()
        moved = self._moved(step)
        for index, _, batch in self._pieces():
            with (
                borrowed(self._model, self.parameters, self._mode, moved),
                differentiable_twice(self._model),  # the kernels of recorded passes, so that losses compare
                torch.no_grad(),
            ):
                outputs, targets = self._forwarded(index, batch)
                found = self._loss(outputs, targets), self._loss.count(outputs, targets)
            yield found

    def _moved(self, step: Float[Tensor, "P"]) -> dict[str, Tensor]:
        """The chosen parameters at theta + step."""
        pairs = zip(self.parameters.items(), self.layout.unflatten(step), strict=True)
        return {name: weight.detach() + move for (name, weight), move in pairs}

    def pieces(self) -> Iterator[Piece]:
        """Yield the batches or their pieces, to be run otherwise than recorded."""
        self.refresh()
        yield from self._pieces()

    def jets(
        self, piece: Piece, vector: Sequence[Tensor], sources: Sources, known: OutputLoss | None
    ) -> tuple[list[Jet], OutputLoss]:
        """Run one forward pass in the direction of a vector.

        Args:
            piece: one of `pieces`.
            vector: one tensor per parameter.
            sources: which second derivatives count.
            known: what an earlier pass over the piece returned of the loss.

        Returns:
            The outputs' jets, and the loss at the outputs.

        Raises:
            NotCarriedError: the jets do not know an operation.
        """
        index, place, batch = piece
        jets = Jets(sources=sources, warned=self._warned)
        with (
            borrowed(self._model, self.parameters, self._mode) as aliases,
            composed_kernels(self._model),
            carried(aliases, vector, jets),
        ):
            outputs, targets = self._forwarded(index, batch)
            found = output_jets(jets, outputs)
        known = known or self._at_outputs.get(index)
        if known is None:
            detached = tree_map_only(Tensor, Tensor.detach, outputs)
            known = OutputLoss(detached, targets, self._loss, self.parameters)
            self._check_loss(index, place, batch, known.value, known.count)
            if index == 0:
                self._at_outputs[index] = known
        return found, known

    def check_determinism(self) -> None:
        """Read everything twice and run each batch twice; raise by name of what gave different numbers."""
        self.refresh()
        for _ in range(2):
            for index, place, batch in self._pieces():
                for _ in range(2):
                    self._check_loss(index, place, batch, *self._run(index, batch))

    def forget(self) -> None:
        """Drop what is kept, and what it is checked against."""
        self.kept.clear()
        self._snapshot = None

    def refresh(self) -> None:
        """Drop what was recorded from other tensors, modes or second derivatives than the present ones."""
        if self._snapshot is not None and self._snapshot.holds(self._model, self._loss.loss_fn, self._in_memory):
            return
        self.kept.clear()
        self._at_outputs.clear()
        self._programs.clear()
        self._losses_were.clear()
        self._snapshot = self.not_carried = None
        self.parameters = self.layout.find(dict(self._model.named_parameters()))
        self._snapshot = Snapshot(self._model, self._loss.loss_fn, self._in_memory)
        self.changes += 1

    def _pieces(self) -> Iterator[Piece]:
        count, index = 0, -1
        for index, batch in enumerate(_replayed(self._batches, self._random_states[0], self._loader_state)):
            if not self._in_memory:
                self._check_batch(index, batch)
            if self._microbatches == 1:
                yield count, f"batch {index}", batch
                count += 1
                continue
            lengths = [tensor.shape[0] for tensor in tensors_in(batch) if tensor.dim()]
            pieces = split(batch, max(1, min([self._microbatches, *lengths])))
            self._check_splitting(batch, pieces)
            for number, piece in enumerate(pieces):
                yield count, f"batch {index}, micro-batch {number}", piece
                count += 1
        if count == 0:
            raise TwofoldError(EMPTY_DATA.format(came=describe(self._batches)))
        if self._num_pieces not in (None, count):
            raise TwofoldError(
                f"data yielded {self._num_pieces} batches before and {count} now; a curvature matrix needs the same "
                "batches each time. Pass list(loader)."
            )
        self._num_pieces, self.num_batches = count, index + 1

    def _record(
        self, index: int, place: str, batch: Any, kinds: Sequence[str], at: Mapping[str, Tensor] | None = None
    ) -> Recording:
        recording, _ = self._recorded(index, batch, kinds, self._loss, at)
        if at is None:
            self._check_loss(index, place, batch, recording.value, recording.count)
        return recording

    def _recorded(
        self, index: int, batch: Any, kinds: Sequence[str], loss: Loss, at: Mapping[str, Tensor] | None = None
    ) -> tuple[Recording, Any]:
        """The recording and the targets."""
        held = Held()
        with borrowed(self._model, self.parameters, self._mode, at) as aliases:
            with ExitStack() as stack:
                repairs = stack.enter_context(differentiable_twice(self._model))
                stack.enter_context(Frugal())
                if kinds:
                    warned = self._warned if len(kinds) == 1 else None
                    stack.enter_context(recorded_apart(self._model, kinds, held, warned))
                outputs, targets = self._forwarded(index, batch)
            check_reached(outputs, self.parameters)
            around = self._recomputing(aliases) if repairs.checkpointed else nullcontext
            recorded = (outputs, targets, loss, aliases, around)
            recording = Dissection(held, *recorded) if kinds else Recording(*recorded)
            recording.index = index
        return recording, targets

    def _forwarded(self, index: int, batch: Any) -> tuple[Any, Any]:
        """Run the model with the random draws that belong to this batch; for use inside `borrowed`."""
        self._random_states[index].restore()
        result = run_forward(self._forward, self._model, to_device(batch, self.layout.device))
        if len(self._random_states) == index + 1:
            after = RandomState()
            same = after == self._random_states[index]
            self._random_states.append(self._random_states[index] if same else after)
        return result

    def _recomputing(self, aliases: dict[str, Tensor]) -> Callable[[], AbstractContextManager[None]]:
        """What segments under a checkpoint are recomputed in: the model as it was lent when they were recorded."""
        model, parameters, mode = self._model, self.parameters, self._mode

        @contextmanager
        def around() -> Iterator[None]:
            with borrowed(model, parameters, mode, aliases), composed_kernels(model):
                yield

        return around

    def _check_batch(self, index: int, batch: Any) -> None:
        found = checksum(tensors_in(batch))
        if index == len(self._batches_were):
            self._batches_were.append(found)
        elif not alike(found, self._batches_were[index]):
            raise TwofoldError(DATA_CHANGED.format(index=index))

    def _check_loss(self, index: int, place: str, batch: Any, value: Tensor, count: float) -> None:
        """Refuse a loss that is not finite, or another one than that of an earlier pass at the same parameters."""
        if count == 0:
            return
        loss = value.item()
        if not math.isfinite(loss):
            raise NotFiniteError(NOT_FINITE.format(what="loss", came=loss, where=f" ({place})"))
        before = self._losses_were.setdefault(index, loss)
        if same_value(loss, before, self.layout.dtype):
            return

        def run() -> list[Event]:
            with watched(self._model) as events:
                self._run(index, batch)
            return events

        found = culprit(self._model, run, torch.finfo(self.layout.dtype).eps ** 0.5)
        found = found or (
            f"it was {before:.6g} and is {loss:.6g}, though all modules agree in two passes in a row (is it loss_fn?)"
        )
        raise TwofoldError(NOT_DETERMINISTIC.format(where=place, culprit=found))

    def _run(self, index: int, batch: Any) -> tuple[Tensor, float]:
        """The loss of a batch with its random draws, without a graph, and how many terms it averages."""
        with borrowed(self._model, {}, self._mode), torch.no_grad():
            outputs, targets = self._forwarded(index, batch)
            return self._loss(outputs, targets), self._loss.count(outputs, targets)

    def _check_splitting(self, batch: Any, pieces: Sequence[Any]) -> None:
        """Refuse pieces whose losses do not average to the loss of their batch."""
        for name, module in self._model.named_modules():
            training = module.training if self._mode is None else self._mode == "train"
            if isinstance(module, _BatchNorm) and (training or module.running_mean is None):
                reason = f"module {name!r} ({type(module).__name__}) normalises over the whole batch"
                raise TwofoldError(SPLITTING_MIXES.format(count=self._microbatches, reason=reason))
        if self._splitting_checked:
            return
        before, known = self._random_states[0], list(self._random_states)
        found, drew = [], False
        for part in (batch, *pieces):
            self._random_states = [before]
            value, terms = self._run(0, part)
            found.append((value.item(), terms))
            drew |= self._random_states[1] is not before
        self._random_states = known
        self._splitting_checked = True
        (whole, _), parts = found[0], [(loss, count) for loss, count in found[1:] if count > 0]
        total = sum(count for _, count in parts) if self._loss.averages else 1.0
        if drew or not total:
            return  # each piece draws masks of its own; or no term at all, which is told elsewhere
        pieced = sum(loss * count for loss, count in parts) / total
        if not same_value(whole, pieced, self.layout.dtype):
            reason = f"the loss of the first batch is {whole:.6g}, that of its pieces {pieced:.6g} on average"
            raise TwofoldError(SPLITTING_MIXES.format(count=self._microbatches, reason=reason))

    def __getstate__(self) -> dict[str, Any]:
        """Without recordings, which cannot be copied; a copy makes its own."""
        return self.__dict__ | {"kept": {}, "_programs": {}, "_at_outputs": {}, "_snapshot": None, "_losses_were": {}}


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
