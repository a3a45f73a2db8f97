"""Beyond the paper: LeakyReLU has no dead units, and no phi'' either. Does PSAM still fall behind?"""

from dataclasses import replace

from twofold.lab.figures.penalties import RELU_PSAM, RELU_SAM
from twofold.lab.figures.tracking import tracking_figure

FIGURE = tracking_figure(
    "leaky",
    title="SAM and PSAM against rho with LeakyReLU",
    setting="LeakyReLU has slope 0.2 below 0: its units do not die, so that only the lost phi'' is left as a cause.",
    sam=replace(RELU_SAM, label="LeakyReLU SAM", activation="leaky_relu"),
    psam=replace(RELU_PSAM, label="LeakyReLU PSAM", activation="leaky_relu"),
)
