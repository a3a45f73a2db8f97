"""Every random number of the lab descends from named seeds, so that any part can be drawn again alone."""

from hashlib import blake2b

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) for the thing that `parts` name, unrelated to that of any other parts.

    Example:
        >>> derive_seed("shuffle", 100, 3) == derive_seed("shuffle", 100, 3)
        True
        >>> derive_seed("shuffle", 100, 3) == derive_seed("shuffle", 100, 4)
        False
    """
    digest = blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def derive_generator(*parts: int | str) -> torch.Generator:
    """A private CPU generator seeded with `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))
