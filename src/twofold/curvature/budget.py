"""How long measuring may take, and how much memory it took."""

import math
import re
import sys

import torch

from twofold.errors import TwofoldError

_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


def seconds_of(budget: str | float | None) -> float:
    """Read a budget: seconds, or a text such as "60s", "5min" or "1.5h"; None is without end.

    Raises:
        TwofoldError: it is neither, or not positive.

    Example:
        >>> seconds_of("5min")
        300.0
    """
    if budget is None:
        return math.inf
    seconds = math.nan
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", budget)
        if found and (found[2] or "s") in _UNITS:
            seconds = float(found[1]) * _UNITS[found[2] or "s"]
    elif isinstance(budget, int | float) and not isinstance(budget, bool):
        seconds = float(budget)
    if not 0 < seconds < math.inf:
        raise TwofoldError(f'budget is a positive time: seconds, "60s", "5min" or "1h"; {budget!r} came.')
    return seconds


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far; of a GPU's memory, where `device` is one. 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held
