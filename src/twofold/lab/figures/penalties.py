"""The curves over rho that several figures share: SAM, and PSAM with what is changed in its Hessian."""

from twofold.lab.config import RegularizerConfig
from twofold.lab.figures.curves import Curve
from twofold.lab.figures.figure_1 import METHODS, PSAM_OPTIONS
from twofold.lab.figures.style import COLOURS

PSAM = RegularizerConfig(METHODS["PSAM"], options=PSAM_OPTIONS)

GELU_SAM = Curve("GELU SAM", "gelu", RegularizerConfig(METHODS["SAM"]), (COLOURS["gelu"], "o", ":"))
RELU_SAM = Curve("ReLU SAM", "relu", RegularizerConfig(METHODS["SAM"]), (COLOURS["relu"], "o", ":"))
GELU_PSAM = Curve("GELU PSAM", "gelu", PSAM, (COLOURS["gelu"], "s", "-"))
RELU_PSAM = Curve("ReLU PSAM", "relu", PSAM, (COLOURS["relu"], "s", "-"))

POINTS = (
    "rho = 0 is plain SGD. Points are means over seeds, bars are 95 % intervals (cut where they would leave the "
    "panel). Diverged runs count with the accuracy they ended with; a hollow marker has some among its runs."
)
