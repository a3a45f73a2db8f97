"""Where a penalty on the Hessian is blind: activations whose second derivative is zero almost everywhere."""

import re
import warnings
from collections.abc import Sequence

from torch import Tensor

from twofold.curvature.recording import graph_nodes
from twofold.errors import TwofoldWarning

_NAMES = re.compile(r"^(Relu|LeakyRelu|Rrelu\w*|Prelu\w*|Hardtanh|Hardsigmoid|Threshold|Hardshrink|Softshrink)Backward")

CANNOT_SEE = """\
{penalty} on a model with {activation}: phi'' is 0 almost everywhere, so the penalty cannot see the curvature at the
kinks of this activation. Use twofold.second_derivative(twofold.gaussian(beta), of=...) around the step, SAM, or
{remedy}."""


def warn_if_piecewise_linear(outputs: Sequence[Tensor], penalty: str, remedy: str) -> None:
    """Warn when the graph of the outputs holds a piecewise-linear activation with torch's own second derivative.

    Inside `second_derivative` an activation is another node, so one whose phi'' was replaced is not found.
    """
    for node in graph_nodes(outputs):
        found = _NAMES.match(node.name())
        if found:
            warnings.warn(
                CANNOT_SEE.format(penalty=penalty, activation=found[1], remedy=remedy), TwofoldWarning, stacklevel=6
            )
            return
