"""What counts as a batch and as data, and how a batch goes through the model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from twofold.errors import EMPTY_DATA, NOT_A_BATCH, ONE_SHOT, SHUFFLING, TwofoldError
from twofold.types import Forward


def describe(value: object) -> str:
    """Say what a value is, for an error message.

    Example:
        >>> describe([torch.zeros(3, 2), None])
        '[float32 tensor of shape (3, 2), NoneType]'
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple) and len(value) <= 4:
        inside = ", ".join(describe(item) for item in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)} items, the first {describe(value[0])}"
    return type(value).__name__


def is_single_batch(data: object) -> bool:
    """Tell one batch from data that yields batches.

    A mapping, a tuple, or a list made only of tensors (a DataLoader yields lists) is one batch.
    """
    if isinstance(data, Mapping | tuple):
        return True
    return isinstance(data, list) and len(data) > 0 and all(isinstance(item, Tensor) for item in data)


def as_batches(data: Any) -> Iterable[Any]:
    """Return something that yields the batches of `data` anew at each iteration, in the same order.

    Args:
        data: one batch (see `is_single_batch`), or a re-iterable of batches.

    Raises:
        TwofoldError: for a one-shot iterator, a shuffling DataLoader, or what cannot be iterated.
    """
    if is_single_batch(data):
        return [data]
    if isinstance(data, Tensor) or not isinstance(data, Iterable | Sequence):
        raise TwofoldError(f"data must be a batch or an iterable of batches. {NOT_A_BATCH.format(came=describe(data))}")
    if isinstance(data, Iterator):
        raise TwofoldError(ONE_SHOT.format(came=f"a one-shot {type(data).__name__}"))
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
        _refuse_shuffling(data)
    if _length(data) == 0:
        raise TwofoldError(EMPTY_DATA.format(came=describe(data)))
    return data


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _refuse_shuffling(loader: DataLoader) -> None:
    """Refuse torch's random samplers; a sampler of the user's own is trusted to repeat itself."""
    sampler = loader.sampler
    if isinstance(loader.batch_sampler, BatchSampler):
        sampler = loader.batch_sampler.sampler
    random = type(sampler).__module__ == SequentialSampler.__module__ and "Random" in type(sampler).__name__
    if random:
        raise TwofoldError(SHUFFLING.format(sampler=type(sampler).__name__))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors inside any nest of mappings (of any class), lists, tuples and pytree nodes."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from tensors_in(dict(leaf))


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a batch to `device`, off inference mode; a batch that is fine is returned as it is."""
    if all(tensor.device == device and not tensor.is_inference() for tensor in tensors_in(batch)):
        return batch
    return tree_map_only(Tensor, lambda t: t.to(device).clone() if t.is_inference() else t.to(device), _plain(batch))


def _plain(batch: Any) -> Any:
    """Turn mappings of any class inside a batch, such as those of a tokenizer, into dicts."""
    return tree_map(lambda leaf: _plain(dict(leaf)) if isinstance(leaf, Mapping) else leaf, batch)


def split(batch: Any, num_parts: int) -> list[Any]:
    """Split every tensor of a batch along its first dimension.

    Raises:
        TwofoldError: the first dimensions differ, or are shorter than the number of parts.
    """
    leaves, spec = tree_flatten(_plain(batch))
    sizes = {leaf.shape[0] if leaf.dim() else 0 for leaf in leaves if isinstance(leaf, Tensor)}
    if len(sizes) != 1 or not num_parts <= min(sizes):
        raise TwofoldError(
            f"microbatches={num_parts} splits every tensor of the batch along its first dimension, which must be the "
            f"same and at least {num_parts}; the batch is {describe(batch)}."
        )
    cut = [leaf.tensor_split(num_parts) if isinstance(leaf, Tensor) else [leaf] * num_parts for leaf in leaves]
    return [tree_unflatten([pieces[i] for pieces in cut], spec) for i in range(num_parts)]


def default_forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Run the model on one batch and return (outputs, targets).

    A batch is (inputs, targets); inputs a tensor -> model(x), a tuple or list -> model(*x), a mapping -> model(**x).
    A mapping with "labels" goes in without them. Outputs with a tensor `.logits` (as transformers returns) give their
    logits.

    Raises:
        TwofoldError: when the batch has another form.
    """
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise TwofoldError(NOT_A_BATCH.format(came=describe(batch)))
        inputs, targets = {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, targets = batch
    else:
        raise TwofoldError(NOT_A_BATCH.format(came=describe(batch)))

    if isinstance(inputs, Mapping):
        outputs = model(**inputs)
    elif isinstance(inputs, tuple | list):
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    logits = getattr(outputs, "logits", None)
    return (logits if isinstance(logits, Tensor) else outputs), targets


def causal_lm_forward(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Run a causal language model on a mapping batch: logits at t against the label at t + 1.

    Returns:
        (logits [N, C], labels [N]); labels of -100 are left in, as cross-entropy ignores them by default.

    Example:
        >>> class Bigram(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = nn.Embedding(5, 5)
        ...
        ...     def forward(self, input_ids):
        ...         return self.table(input_ids)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> outputs, targets = causal_lm_forward(Bigram(), {"input_ids": ids, "labels": ids})
        >>> outputs.shape, targets
        (torch.Size([2, 5]), tensor([2, 3]))
    """
    logits, labels = default_forward(model, batch)
    return logits[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten()


def run_forward(forward: Forward | None, model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Run `forward`, or the default one, and check that a pair (outputs, targets) came back."""
    if forward is None:
        return default_forward(model, batch)
    result = forward(model, batch)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TwofoldError(f"forward must return (outputs, targets); it returned {describe(result)}.")
    return result
