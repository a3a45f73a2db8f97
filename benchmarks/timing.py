"""Ratios that can be trusted on a noisy machine: every variant once a round, in shuffled order, medians over rounds.

Time is this process's on the processor, with one thread: what else runs on the machine moves it little.
"""

import random
import statistics
import time
from collections.abc import Callable

import torch

torch.set_num_threads(1)


def interleaved(
    variants: dict[str, Callable[[], object]], *, base: str, rounds: int = 15, warm_up: int = 2, seconds: float = 0
) -> dict[str, float]:
    """Return the median time of each variant over the median time of `base`, and base's milliseconds as "ms".

    There are `rounds` rounds, and more until `seconds` are spent.
    """
    for _ in range(warm_up):
        for run in variants.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    names, shuffle = list(variants), random.Random(0).shuffle
    begin = time.process_time()
    while len(times[base]) < rounds or time.process_time() - begin < seconds:
        # Each pays for the memory that the one before gave back, so all follow all.
        shuffle(names)
        for name in names:
            run = variants[name]
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {name: value / middle[base] for name, value in middle.items()} | {"ms": 1000 * middle[base]}
