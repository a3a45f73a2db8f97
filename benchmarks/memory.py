"""Memory that a product takes at its peak, above what stood before. Run: python benchmarks/memory.py [model]

Every allocation of tensors is counted, by torch's profiler. The measure is one fresh double backward: forward, gradient
with its graph, product.
"""

import gc
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import twofold
from curvature import LOSS, Row, Setting, arranged, others_win
from models import MODELS
from results import Table, show

os.environ["KINETO_LOG_LEVEL"] = "6"  # the profiler would announce itself

MIB = 2**20


def peak(run: Callable[[], object]) -> int:
    """The most bytes that were held at once while `run` ran, above those held before; its result counts while held."""
    run()  # what is allocated once and stays does not count
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = run()
    del kept
    events = record.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def fresh(setting: Setting) -> object:
    """H v from nothing, by two backward passes."""
    x, y = setting.batch
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(LOSS(setting.model(x), y), setting.parameters, create_graph=True)
    parts = setting.vector().split([p.numel() for p in setting.parameters])
    vector = [part.view_as(p) for part, p in zip(parts, setting.parameters, strict=True)]
    return torch.autograd.grad(gradient, setting.parameters, vector)


def peaks(setting: Setting) -> list[Row]:
    """Peaks of what is made and multiplied once, over that of a fresh double backward."""
    base = peak(lambda: fresh(setting))

    def over(make: Callable[[], Any], use: Callable[[Any], object] = lambda op: op @ setting.vector()) -> float:
        with setting.attention():
            return peak(lambda: (made := make(), use(made))) / base

    def ours() -> twofold.Curvature:
        return setting.curvature(setting.batch)

    problem = (setting.helped_model, LOSS, [setting.batch])
    h: Row = {"measure": "H v", "twofold": over(lambda: ours().hessian)}
    gn: Row = {"measure": "GN v", "twofold": over(lambda: ours().gauss_newton)}
    for name, peer in setting.peers.items():
        h[name] = over(lambda peer=peer: peer.hessian(*problem))
        if peer.gauss_newton:
            gn[name] = over(lambda peer=peer: peer.gauss_newton(*problem))
    three = over(ours, lambda c: c.products(setting.vector()))
    traces = over(ours, lambda c: c.traces(1))
    return [
        {"measure": "double backward, MiB", "twofold": base / MIB},
        h,
        gn,
        {"measure": "all three", "twofold": three},
        {"measure": "all traces", "twofold": traces},
    ]


def table(names: list[str]) -> Table:
    """Every peak on the named models."""
    rows = [arranged(name, row) for name in names for row in peaks(Setting(name))]
    return Table("memory", rows, others_win(rows))


if __name__ == "__main__":
    show(table(sys.argv[1:] or list(MODELS)))
