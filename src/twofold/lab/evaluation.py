"""What is measured of a model along training: accuracy, curvature, fidelity."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from twofold.activations import gaussian, second_derivative
from twofold.curvature.curvature import Curvature
from twofold.curvature.fidelity import CURVATURES, CurvatureOf, fidelity
from twofold.curvature.liveness import live_fraction
from twofold.curvature.track import Tracker, track
from twofold.distributed import agree, rank, world_size
from twofold.lab.config import RunConfig
from twofold.lab.data import Dataset, Examples, first_batch
from twofold.lab.runs import Row
from twofold.parameters import norm
from twofold.types import Estimate, Matrix, ProcessGroup

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
        for x, y in examples.batches(torch.arange(count)[rank(group) :: world_size(group)].split(_BATCH)):
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


PARTS: tuple[Matrix, ...] = ("hessian", "gauss_newton", "nme", "activation_nme", "rest")

PREDICTORS: Mapping[str, CurvatureOf] = {
    **CURVATURES,
    **{f"hessian_gaussian_{beta}": second_derivative(gaussian(beta=beta)) for beta in (2, 100)},
}
"""What fidelity is measured of: what `twofold.fidelity` takes, and H with two synthetic phi''."""


def measure_live_fraction(config: RunConfig, model: nn.Module, examples: Examples) -> Row:
    """The live fraction of phi'' on the first `curvature_probe` of the examples, in eval mode.

    Raises:
        NotFiniteError: phi'' is NaN somewhere.
    """
    batch = first_batch(examples, config.curvature_probe)
    return {"activation/live_fraction": live_fraction(model, batch, mode="eval")}


def measure_curvature(config: RunConfig, model: nn.Module, examples: Examples) -> Row:
    """Traces and norms of H, GN and NME and of the NME's parts, also along the gradient and by module; fidelity.

    All on the first `curvature_probe` of the examples, in eval mode.

    Raises:
        NotFiniteError: the loss, phi'' or a product is NaN or infinite.
    """
    batch = first_batch(examples, config.curvature_probe)
    curvature = Curvature(model, F.cross_entropy, batch, mode="eval")
    row: Row = {}

    def note(key: str, estimate: Estimate) -> None:
        row.update({key: estimate.value, f"{key}_stderr": estimate.stderr})

    for quantity, measure in (("trace", curvature.traces), ("frobenius_norm", curvature.frobenius)):
        for matrix, estimate in measure(config.curvature_matvecs, parts=PARTS).items():
            note(f"curvature/{matrix}/{quantity}", estimate)
    for matrix, modules in curvature.frobenius(config.curvature_matvecs, by_block="module").items():
        for module, estimate in modules.items():
            note(f"curvature/{matrix}/frobenius_norm/{module}", estimate)
    gradient = curvature.gradient()
    for matrix, form in curvature.quadratic_forms(gradient / norm([gradient]), PARTS).items():
        row[f"curvature/{matrix}/along_gradient"] = form.item()
    if config.fidelity_rho:
        found = fidelity(model, F.cross_entropy, batch, config.fidelity_rho, curvatures=PREDICTORS, mode="eval")
        row |= found.metrics()
    return row
