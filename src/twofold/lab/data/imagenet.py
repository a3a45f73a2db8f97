"""ImageNet (Russakovsky et al. 2015, arXiv 1409.0575): 1.28 million and 50000 pictures of a thousand classes.

The pictures stay where they are. Any data set of pictures in this layout can stand in its place.
"""

from pathlib import Path

from twofold.errors import TwofoldError
from twofold.lab.data import pictures
from twofold.lab.data.dataset import Source
from twofold.lab.data.files import places
from twofold.lab.data.stored import StoredImages

_SIZE = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MISSING = """\
ImageNet was not found: none of {places} holds train/<class>/*.JPEG and val/<class>/*.JPEG, or a Hugging Face copy.
It cannot be fetched without an account: https://image-net.org or https://huggingface.co/datasets/ILSVRC/imagenet-1k.
Name the directory that holds "imagenet" with --data-dir or TWOFOLD_DATA."""


def load_source(data_dir: Path | None = None) -> Source:
    """Find the pictures in the folder "imagenet" of `data_dir` or $TWOFOLD_DATA; its validation set is tested on.

    Raises:
        TwofoldError: there are none.
    """
    found = pictures.find("imagenet", data_dir)
    if found is None:
        looked_in = [place for place in places(data_dir, "imagenet") if place.name == "imagenet"]
        raise TwofoldError(_MISSING.format(places=", ".join(map(str, looked_in)) or "no directory"))
    train, test = (StoredImages.all_of(*found.splits[split], _SIZE, _MEAN, _STD) for split in ("train", "test"))
    return Source(train, test, num_classes=len(found.classes))
