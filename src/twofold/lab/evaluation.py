"""What is measured of a model along training: accuracy, curvature, fidelity."""

import torch
import torch.nn.functional as F
from torch import nn

from twofold.curvature.curvature import Curvature
from twofold.curvature.fidelity import fidelity
from twofold.curvature.liveness import live_fraction
from twofold.curvature.track import Tracker, track
from twofold.distributed import agree, rank, world_size
from twofold.lab.config import RunConfig
from twofold.lab.data import Dataset, Examples, first_batch
from twofold.lab.runs import Row
from twofold.types import ProcessGroup

_BATCH = 1000
MOST_TRAINING_EXAMPLES = 10_000
"""More would cost as much as training on them; the first are random ones."""


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, group: ProcessGroup = None) -> Row:
    """Mean cross-entropy and accuracy (0 to 1) on train, validation and test, in eval mode.

    Of the training examples at most the first 10000 count. The ranks of a group share the work.
    """
    row: Row = {}
    training = model.training
    model.eval()
    for name in ("train", "validation", "test"):
        examples = getattr(data, name)
        count = len(examples.targets)
        if name == "train":
            count = min(count, MOST_TRAINING_EXAMPLES)
        loss, correct = 0.0, 0
        for x, y in examples.batches(torch.arange(rank(group), count, world_size(group)).split(_BATCH)):
            outputs = model(x)
            loss += float(F.cross_entropy(outputs, y, reduction="sum"))
            correct += int((outputs.argmax(1) == y).sum())
        loss, correct = (sum(values) for values in zip(*agree(group, [loss, correct]), strict=True))
        row |= {f"{name}/loss": loss / count, f"{name}/accuracy": correct / count}
    model.train(training)
    return row


def build_tracker(config: RunConfig, model: nn.Module, examples: Examples) -> Tracker:
    """What follows the curvature while the model trains: in eval mode, on the first `curvature_probe` examples."""
    return track(model, F.cross_entropy, first_batch(examples, config.curvature_probe), mode="eval")


def measure_curvature(config: RunConfig, model: nn.Module, examples: Examples) -> Row:
    """Traces and Frobenius norms of H, GN and NME, the live fraction of phi'', and fidelity, in eval mode.

    All on the first `curvature_probe` of the examples.
    """
    batch = first_batch(examples, config.curvature_probe)
    curvature = Curvature(model, F.cross_entropy, batch, mode="eval")
    row: Row = {"activation/live_fraction": live_fraction(model, batch, mode="eval")}
    for quantity, measure in (("trace", curvature.traces), ("frobenius_norm", curvature.frobenius)):
        for matrix, estimate in measure(num_matvecs=config.curvature_matvecs).items():
            key = f"curvature/{matrix}/{quantity}"
            row |= {key: estimate.value, f"{key}_stderr": estimate.stderr}
    if config.fidelity_rho:
        row |= fidelity(model, F.cross_entropy, batch, config.fidelity_rho, mode="eval").metrics()
    return row
