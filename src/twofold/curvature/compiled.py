"""Products of a batch as one compiled program: forward pass, gradient and second pass together, and nothing recorded.

What a recording does is traced once, operation by operation, below autograd, so that every repair of a recorded pass is
in the program; torch's Inductor compiles it. It serves all batches of the same shapes at the same parameters.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from twofold.curvature.losses import Loss
from twofold.curvature.recording import Recording
from twofold.types import Matrix

Product = list[tuple[Matrix, list[Tensor]]]


class NotCompiledError(Exception):
    """Why a pass cannot become a program."""


class Program:
    """One batch's products with a vector, for all batches of the same shapes.

    Args:
        record: batch -> its recording and its targets.
        batch: the batch to trace with.
        vector: a vector to trace with, one tensor per parameter.
        terms: which matrices; see `Recording.products`.

    Raises:
        NotCompiledError: the pass depends on values in more than its arithmetic.
    """

    def __init__(
        self,
        record: Callable[[Any], tuple[Recording, Any]],
        batch: Any,
        vector: Sequence[Tensor],
        terms: Sequence[Matrix],
    ) -> None:
        self.shapes = shapes(batch)
        self._results: TreeSpec | None = None
        leaves, spec = tree_flatten(batch)

        def passes(tensors: list[Tensor], vector: list[Tensor]) -> list[Any]:
            given = iter(tensors)
            recording, targets = record(
                tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
            )
            found = list(recording.products(vector, terms))
            results = (recording.value, recording.detached, targets, found)
            flat, self._results = tree_flatten(results)
            self._plain = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in flat]
            return [leaf.detach() for leaf in flat if isinstance(leaf, Tensor)]

        try:
            graph = make_fx(passes)(_tensors(batch), list(vector))
        except RuntimeError as error:
            raise NotCompiledError(str(error).splitlines()[0]) from error
        for node in graph.graph.nodes:
            if _of_unknown_shape(node):
                raise NotCompiledError(f"{node.target} gives a shape that depends on values")
        self._program = torch.compile(graph, dynamic=False)

    def __call__(self, batch: Any, vector: Sequence[Tensor]) -> tuple[Tensor, Any, Any, Product]:
        """Return the loss, the outputs, the targets and the products."""
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Inductor's advice on the machine
            given = iter(self._program(_tensors(batch), list(vector)))
        assert self._results is not None
        return tree_unflatten([next(given) if leaf is None else leaf[0] for leaf in self._plain], self._results)


class Compiled:
    """Stands in a recording's place for one batch of which only products are wanted.

    Args:
        index: the batch's place in its data set.
        run: vector -> the loss, the outputs, the targets and the products.
        loss: what counts the terms.
        check: told of the loss and the count.
    """

    def __init__(
        self, index: int, run: Callable[[Sequence[Tensor]], Any], loss: Loss, check: Callable[[Tensor, float], None]
    ) -> None:
        self.index, self._run, self._loss, self._check = index, run, loss, check
        self._first: Product | None = None
        self.count = 1.0

    def begin(self, vector: Sequence[Tensor]) -> "Compiled":
        """Run with the first vector, which tells the count too."""
        value, outputs, targets, found = self._run(vector)
        self.count = self._loss.count(outputs, targets)
        self._check(value, self.count)
        self._first = found
        return self

    def products(self, vector: Sequence[Tensor], terms: Sequence[Matrix]) -> Iterator[tuple[Matrix, list[Tensor]]]:
        """Yield the products that the program was made for; those of the first vector are there."""
        first, self._first = self._first, None
        yield from self._run(vector)[3] if first is None else first


def agree_within_rounding(found: Product, truth: Iterable[tuple[Matrix, list[Tensor]]]) -> bool:
    """Whether products are the same up to the square root of the precision, relative to their norms."""
    return all(
        torch.norm(torch.stack([torch.norm(a - b) for a, b in zip(ours, known, strict=True)]))
        <= torch.finfo(known[0].dtype).eps ** 0.5 * torch.norm(torch.stack([torch.norm(b) for b in known]))
        for (_, ours), (_, known) in zip(found, truth, strict=True)
    )


def shapes(batch: Any) -> tuple[Any, ...]:
    """What two batches must share to be served by one program."""
    leaves, spec = tree_flatten(batch)
    return spec, *((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves)


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)]


def _of_unknown_shape(node: Any) -> bool:
    if node.op != "call_function" or torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    if node.target is not torch.ops.aten.index.Tensor:
        return True
    indices = [index for index in node.args[1] if index is not None]
    return any(index.meta["tensor_meta"].dtype in (torch.bool, torch.uint8) for index in indices)
