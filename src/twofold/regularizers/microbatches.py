"""The outputs of the parts of a batch, joined again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


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
