"""Two processes under gloo that run a function of a test and report what they found."""

import pickle
import socket
import traceback
from datetime import timedelta

import torch
import torch.multiprocessing as mp
from torch import distributed as dist

NUM_RANKS = 2


def on_ranks(function):
    """Run function(rank) in two processes of one group and return what each gave.

    The function is to be defined in a module that is no test, so that a new process can import it.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_run, args=(function, rank, port, queue)) for rank in range(NUM_RANKS)]
    for process in processes:
        process.start()
    found = {rank: pickle.loads(result) for rank, result in (queue.get() for _ in processes)}
    for process in processes:
        process.join()
    failed = [result for result in found.values() if isinstance(result, str)]
    assert not failed, "\n".join(failed)
    return [found[rank] for rank in range(NUM_RANKS)]


def _run(function, rank, port, queue):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://localhost:{port}",
            rank=rank,
            world_size=NUM_RANKS,
            timeout=timedelta(seconds=60),
        )
        result = function(rank)
    except BaseException:
        result = f"rank {rank}: {traceback.format_exc()}"
    queue.put((rank, pickle.dumps(result)))  # tensors by value, since this process ends


def raised(f):
    """The text of the exception that f raises; None where it raises none."""
    try:
        f()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
