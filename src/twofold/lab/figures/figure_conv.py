"""Beyond the paper's small networks: figures 1, 2 and 10 on a conv net with BatchNorm.

Settings and grids come from trial runs with seeds 0 to 4; all of this was fixed before the runs with seeds from 100.
"""

from dataclasses import replace

from twofold.lab.config import RunConfig, conv
from twofold.lab.figures import figure_1
from twofold.lab.figures.figure_2 import WITHOUT
from twofold.lab.figures.figure_10 import GAUSS_NEWTON
from twofold.lab.figures.penalties import GELU_PSAM, GELU_SAM, POINTS, RELU_PSAM, RELU_SAM
from twofold.lab.figures.scales import Scale
from twofold.lab.figures.strength_figure import contrast_findings, strength_figure
from twofold.lab.figures.style import COLOURS
from twofold.lab.figures.tracking import tracking_finding

RHO = {"smoke": (0.1, 0.3), "quick": (0.1, 0.3), "cpu": (0.1, 0.3), "paper": figure_1.RHO["paper"]}
QUICK_STEPS = 160

SETTING = (
    "A conv net of three layers with 16 channels and BatchNorm, trained on 1000 examples (scale quick: 160 steps); "
    "scale paper has WideResNet-28-10 and all of CIFAR-10. As everywhere in this library, every pass of a step is "
    "normalised with the batch's own statistics, and the running ones move in the first pass only."
)


def recipe(scale: Scale, data: str) -> RunConfig:
    """The scale's data on the conv net with its own optimiser and length; a net that has BatchNorm stays."""
    found, own = scale.recipe(data), conv()
    if found.model.norm == "batch":
        return found
    return replace(
        found,
        data=replace(found.data, num_train=own.data.num_train),
        model=own.model,
        optimizer=own.optimizer,
        epochs=own.epochs,
        max_steps=QUICK_STEPS if scale.name == "quick" else found.max_steps,
    )


FIGURE = strength_figure(
    name="conv",
    title="SAM and PSAM against rho in a conv net with BatchNorm",
    caption=(
        "Accuracy against rho for SAM, and for PSAM with the Hessian, with phi'' := 0 and with GN only, all with GELU; "
        f"for SAM and PSAM with ReLU. {SETTING} {POINTS}"
    ),
    differs=(
        "The paper's networks have BatchNorm, those of figures 1 to 10 here have none.",
        SETTING,
        figure_1.DIFFERS[1],
        *figure_1.DIFFERS[3:],
    ),
    rule=figure_1.RULE,
    curves=(
        GELU_SAM,
        GELU_PSAM,
        WITHOUT,
        replace(GAUSS_NEWTON, look=(COLOURS["green"], "^", "--")),
        RELU_SAM,
        RELU_PSAM,
    ),
    values=RHO,
    findings=(
        tracking_finding("conv", RELU_SAM, RELU_PSAM),
        *contrast_findings("2, conv: phi'' := 0 takes from PSAM what GELU gives it", GELU_PSAM, WITHOUT, GELU_SAM),
        *contrast_findings(
            "10, conv: without the NME, PSAM falls behind PSAM with the Hessian", GELU_PSAM, GAUSS_NEWTON, GELU_SAM
        ),
    ),
    recipe=recipe,
)
