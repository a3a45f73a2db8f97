"""A batch cut into parts, and the outputs of the parts joined again."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from twofold.batches import describe
from twofold.errors import TwofoldError


def split(batch: Any, num_parts: int) -> list[Any]:
    """Split every tensor of a batch along its first dimension.

    Raises:
        TwofoldError: the first dimensions differ, or are shorter than the number of parts.
    """
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) != 1 or not num_parts <= min(sizes):
        raise TwofoldError(
            f"microbatches={num_parts} splits every tensor of the batch along its first dimension, which must be the "
            f"same and at least {num_parts}; the batch is {describe(batch)}."
        )
    leaves, spec = tree_flatten(batch)
    cut = [leaf.tensor_split(num_parts) if isinstance(leaf, Tensor) else [leaf] * num_parts for leaf in leaves]
    return [tree_unflatten([pieces[i] for pieces in cut], spec) for i in range(num_parts)]


def joined(outputs: Sequence[Any]) -> Any:
    """Put the outputs of the parts of a batch together again."""
    if len(outputs) == 1:
        return outputs[0]
    specs = [tree_flatten(one) for one in outputs]
    columns = zip(*[leaves for leaves, _ in specs], strict=True)
    together = [
        torch.cat(column) if isinstance(column[0], Tensor) and column[0].dim() else column[0] for column in columns
    ]
    return tree_unflatten(together, specs[0][1])
