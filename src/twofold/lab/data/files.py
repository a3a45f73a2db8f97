"""Where data files are looked for, and how they are downloaded."""

import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from twofold.errors import TwofoldError

_TIMEOUT_SECONDS = 30


def places(data_dir: Path | None, *folders: str) -> list[Path]:
    """Directories that may hold a data set: `data_dir` and $TWOFOLD_DATA, and these folders in each."""
    roots = [Path(root) for root in (data_dir, os.environ.get("TWOFOLD_DATA")) if root]
    return [place for root in roots for place in (root, *(root / folder for folder in folders))]


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(
    url: str, target: Path, expected: str, *, data_set: str, otherwise: str, digest: Callable[[Path], str] = file_digest
) -> None:
    """Download a file into its place if its digest is the expected one.

    Args:
        url: where it is.
        target: where it goes.
        expected: what `digest` gives for the right file.
        data_set: its name, for errors.
        otherwise: what to do without a network, for errors.
        digest: SHA-256, of the file or of what is in it.

    Raises:
        TwofoldError: the download or the disk failed, or the digest is wrong. Then nothing half-written is left.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise TwofoldError(f"{target.parent} cannot be written to: {error.strerror or error}.") from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            while chunk := response.read(1 << 20):
                file.write(chunk)
        if (came := digest(temporary)) != expected:
            raise TwofoldError(f"{url} did not give {target.name}: SHA-256 of its content {came}, expected {expected}.")
        temporary.chmod(0o644)  # mkstemp made it private
        temporary.replace(target)
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise TwofoldError(f"{data_set} could not be fetched from {url}: {reason}.\n{otherwise}") from error
    finally:
        temporary.unlink(missing_ok=True)
