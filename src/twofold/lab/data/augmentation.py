"""What a training batch of images goes through before the model sees it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from twofold.errors import TwofoldError

AUGMENTATIONS = ("none", "flip_crop", "random_resized_crop")
"""Names that DataConfig.augmentation may take."""

_PADDING = 4


def augment(name: str, images: Tensor) -> Tensor:
    """A random version of each image [N, C, H, W], drawn from torch's global RNG.

    "flip_crop" mirrors half of the images left to right, pads by 4 zeros and crops at random to the old size
    (Zagoruyko & Komodakis 2016, arXiv 1605.07146). "random_resized_crop" is done where images are decoded
    (`twofold.lab.data.stored.random_crop`), so nothing is left to do here.

    Raises:
        TwofoldError: the inputs are not images.
    """
    if name in ("none", "random_resized_crop"):
        return images
    if images.ndim != 4:
        raise TwofoldError(
            f"Augmentation {name!r} needs images [N, C, H, W], not inputs of shape {tuple(images.shape)}."
        )
    count, _, height, width = images.shape
    device = images.device
    mirrored = torch.rand(count, 1, 1, 1, device=device) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    rows = torch.randint(2 * _PADDING + 1, (count, 1), device=device) + torch.arange(height, device=device)
    columns = torch.randint(2 * _PADDING + 1, (count, 1), device=device) + torch.arange(width, device=device)
    padded = F.pad(images, (_PADDING,) * 4)
    examples = torch.arange(count, device=device)[:, None, None]
    return padded[examples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
