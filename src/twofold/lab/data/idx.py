"""The IDX format of the MNIST family: a magic number, the sizes, then bytes; often gzipped."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from twofold.errors import TwofoldError

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped or plain, as a uint8 tensor of its own shape.

    Raises:
        TwofoldError: the file cannot be read, is no IDX file of bytes, or is shorter or longer than its header says.
    """
    content = read_maybe_gzipped(path)
    if len(content) < 4 or content[:3] != bytes([0, 0, _UNSIGNED_BYTE]):
        raise TwofoldError(
            f"{path} is no IDX file of unsigned bytes: it starts with {content[:4].hex(' ') or 'nothing'}, "
            f"expected 00 00 08 and the number of dimensions. {_AGAIN}"
        )
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise TwofoldError(f"{path} is truncated: {len(content)} bytes, expected a header of {start}. {_AGAIN}")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    expected = start + math.prod(shape)
    if len(content) != expected:
        what = "truncated" if len(content) < expected else "too long"
        raise TwofoldError(
            f"{path} is {what}: {len(content)} bytes of content, expected {expected} for the shape {shape} "
            f"in its header. {_AGAIN}"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).copy()).reshape(shape)


def read_maybe_gzipped(path: Path) -> bytes:
    """The bytes of a file, decompressed where it is gzipped.

    Raises:
        TwofoldError: the file cannot be read or decompressed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TwofoldError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise TwofoldError(
            f"{path} is damaged: its {len(content)} bytes of gzip do not decompress ({error}). {_AGAIN}"
        ) from error


_AGAIN = "Remove the file and fetch it again."
