"""Images that stay where they are stored and are decoded when a batch needs them."""

import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from twofold.errors import TwofoldError
from twofold.lab.seeding import derive_seed

if TYPE_CHECKING:
    from PIL.Image import Image

FEW = 1000
"""So many images are decoded sooner than processes that help are started."""

_MOST_PROCESSES = 16
_AREA, _RATIO, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
_SHORT_SIDE = 256 / 224  # of the image that the centre is cut from, in units of the centre's side


class Pictures(Protocol):
    """Images by number; where they lie is the affair of whoever made it."""

    def __getitem__(self, i: int, /) -> "Image":
        """Image number i, decoded."""
        ...


@dataclass(frozen=True)
class StoredImages:
    """Examples whose images [3, size, size] are decoded, cropped and scaled when they are asked for.

    Attributes:
        pictures: where the images are.
        rows: which of them these examples are, in this order.
        targets: labels [N] in int64.
        size: side of the square that they are brought to.
        pixel_mean, pixel_std: of each channel on [0, 1]; what is handed out has mean 0 and standard deviation 1.
        device: where batches go.
    """

    pictures: Pictures
    rows: Tensor
    targets: Tensor
    size: int
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    device: str = "cpu"

    @classmethod
    def all_of(
        cls,
        pictures: Pictures,
        targets: Tensor,
        size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> Self:
        """All pictures of a split, in their order."""
        return cls(pictures, torch.arange(len(targets)), targets, size, mean, std)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return (3, self.size, self.size)

    def take(self, rows: Tensor) -> Self:
        """These rows, in this order."""
        return replace(self, rows=self.rows[rows], targets=self.targets[rows])

    def to(self, device: str) -> Self:
        """The same with batches on another device."""
        return replace(self, device=device)

    def relabelled(self, targets: Tensor) -> Self:
        """The same images with other labels."""
        return replace(self, targets=targets)

    def resized(self, size: int) -> Self:
        """The same images, brought to another size."""
        return replace(self, size=size)

    def batches(self, rows: Iterable[Tensor], *, crop_seed: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of each set of rows, decoded ahead by other processes.

        Args:
            rows: numbers of examples, a tensor for each batch.
            crop_seed: cut a random part of each image as `random_crop` does, drawn from this seed and the example's
                number, whoever decodes it; None takes the centre.

        Raises:
            TwofoldError: an image cannot be decoded.
        """
        wanted = [chosen.tolist() for chosen in rows]
        processes = _processes() if sum(map(len, wanted)) > FEW else 0
        cuda = self.device.startswith("cuda")
        loader = DataLoader(
            _Decoded(self, crop_seed),  # pyrefly: ignore
            batch_sampler=wanted,  # pyrefly: ignore
            num_workers=processes,
            collate_fn=_stacked,
            pin_memory=cuda,
            generator=torch.Generator(),  # otherwise it draws from the global one
        )
        mean, std = (torch.tensor(x, device=self.device).view(3, 1, 1) for x in (self.pixel_mean, self.pixel_std))
        for decoded in loader:
            if isinstance(decoded, TwofoldError):
                raise decoded
            images, targets = decoded
            pixels = images.to(self.device, non_blocking=cuda)
            yield (pixels.float() / 255 - mean) / std, targets.to(self.device, non_blocking=cuda)


@dataclass(frozen=True)
class _Decoded:
    """What the loader's processes read: one example as uint8 pixels and a label, or why it cannot be read.

    An error that is raised in such a process would come out buried in a traceback.
    """

    examples: StoredImages
    crop_seed: int | None

    def __len__(self) -> int:
        return len(self.examples.targets)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor] | TwofoldError:
        try:
            picture, size = self.examples.pictures[int(self.examples.rows[i])].convert("RGB"), self.examples.size
        except TwofoldError as error:
            return error
        if self.crop_seed is None:
            picture = centre(picture, size)
        else:
            picture = random_crop(picture, size, random.Random(derive_seed(self.crop_seed, i)))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1), self.examples.targets[i]


def random_crop(picture: "Image", size: int, draw: random.Random) -> "Image":
    """A random part of an image as a square of `size`, mirrored with probability 1/2.

    The part has 8 to 100 % of the area and a ratio of sides of 3/4 to 4/3 (Szegedy et al. 2015, arXiv 1409.4842). After
    ten tries that do not fit, the largest part of an allowed ratio in the centre is taken.
    """
    from PIL.Image import Resampling, Transpose

    width, height = picture.size
    for _ in range(_TRIES):
        area = width * height * draw.uniform(*_AREA)
        ratio = np.exp(draw.uniform(*np.log(_RATIO)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            break
    else:
        w, h = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
        left, top = (width - w) // 2, (height - h) // 2
    part = picture.crop((left, top, left + w, top + h)).resize((size, size), Resampling.BILINEAR)
    return part.transpose(Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else part


def centre(picture: "Image", size: int) -> "Image":
    """The central square of `size` of an image whose shorter side is brought to 8/7 of it (256 for 224)."""
    from PIL.Image import Resampling

    width, height = picture.size
    scale = round(size * _SHORT_SIDE) / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    left, top = (width - size) // 2, (height - size) // 2
    return picture.resize((width, height), Resampling.BILINEAR).crop((left, top, left + size, top + size))


def _stacked(examples: list[tuple[Tensor, Tensor] | TwofoldError]) -> tuple[Tensor, Tensor] | TwofoldError:
    for example in examples:
        if isinstance(example, TwofoldError):
            return example
    images, targets = zip(*examples, strict=True)
    return torch.stack(images), torch.stack(targets)


def _processes() -> int:
    """How many processes decode: this process's share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST_PROCESSES, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
