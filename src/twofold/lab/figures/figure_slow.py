"""Beyond the paper: figure 1 at a fifth of the learning rate. Is it the step size?"""

from dataclasses import replace

from twofold.lab.config import RunConfig
from twofold.lab.figures.penalties import RELU_PSAM, RELU_SAM
from twofold.lab.figures.scales import Scale
from twofold.lab.figures.tracking import tracking_figure


def recipe(scale: Scale, data: str) -> RunConfig:
    """The scale's recipe with a fifth of its learning rate."""
    found = scale.recipe(data)
    return replace(found, optimizer=replace(found.optimizer, lr=found.optimizer.lr / 5))


FIGURE = tracking_figure(
    "slow",
    title="SAM and PSAM against rho at a fifth of the learning rate",
    setting="The learning rate is a fifth of that of figure 1.",
    sam=RELU_SAM,
    psam=RELU_PSAM,
    recipe=recipe,
)
