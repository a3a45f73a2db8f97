"""Files that are there whole or not at all, and that are read without being trusted."""

import csv
import errno
import io
import json
import os
import secrets
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors
from torch import Tensor

from twofold.errors import TwofoldError, TwofoldWarning
from twofold.lab.data.files import file_digest


class UnwritableError(TwofoldError):
    """Results cannot be written: the disk is full, read-only or gone. No fault of a run; what is finished stays."""


class UnreadableError(TwofoldError):
    """A file is there and cannot be read at the moment: too many open files, no permission. It may be whole."""


def unwritable(path: Path, error: OSError | NotImplementedError) -> UnwritableError:
    """The error to raise where writing `path` ended with `error`."""
    reason = getattr(error, "strerror", None) or error
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    remedy = "Free some space" if full else "Make it a place that can be written to"
    return UnwritableError(
        f"{path} cannot be written to ({reason}). {remedy}, and the same command goes on from what is kept; or name "
        "another directory with --out."
    )


def write_whole(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write beside the place and rename into it, so that a reader sees the whole file or none.

    Args:
        path: the file; its directory is made.
        content: what goes in.
        durable: whether it is on the disk, not only in its cache, before it is there.

    Raises:
        UnwritableError: it cannot be written; then nothing has changed.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def make_room(path: Path) -> None:
    """Remove a file of ours; what is a directory instead is not ours, and is moved aside (a TwofoldWarning)."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    number = 1
    while (aside := path.with_name(f"{path.name}.moved-{number}")).exists():
        number += 1
    path.rename(aside)
    warnings.warn(f"{path} was a directory; it is {aside.name} now.", TwofoldWarning, stacklevel=2)


def checksum(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        TwofoldError: it is missing, is no file, or (an UnreadableError) cannot be read.
    """
    try:
        return file_digest(path)
    except FileNotFoundError as error:
        raise TwofoldError(f"{path} is missing.") from error
    except OSError as error:
        raise _damaged(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        TwofoldError: there is none, or (an UnreadableError) it cannot be read.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not isinstance(values, dict):
        raise TwofoldError(f"{path} is damaged: it holds no JSON object.")
    return values


def read_table(path: Path) -> pd.DataFrame:
    """Read a table of numbers exactly as written (pandas' own reader may change a last bit).

    Raises:
        TwofoldError: it is none, or (an UnreadableError) cannot be read.
    """
    try:
        with path.open(newline="") as file:
            columns, *rows = csv.reader(file)
        values = [[float(text or "nan") for text in row] for row in rows]
        table = pd.DataFrame(values, columns=columns)
        return table.astype({name: int for name in ("epoch", "step") if name in table})
    except (OSError, ValueError, csv.Error) as error:
        raise _damaged(path, error) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a safetensors file; nothing in it is executed.

    Raises:
        TwofoldError: it is none, or (an UnreadableError) cannot be read.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def to_json(values: Any) -> bytes:
    """As indented JSON; a text that is no Unicode (a file's name may be) keeps its escapes."""
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def to_csv(rows: Sequence[Mapping[str, float]]) -> bytes:
    """As CSV: one column for every name in some row."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _damaged(path: Path, error: Exception) -> TwofoldError:
    reason = (isinstance(error, OSError) and error.strerror) or f"{error}".partition("\n")[0]
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return UnreadableError(f"{path} cannot be read ({reason}). It stays as it is; remove it to have it made anew.")
    return TwofoldError(f"{path} is damaged: {reason}.")
