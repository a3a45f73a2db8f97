"""How each operation carries an order-2 jet: y(x0 + e x1 + e^2/2 x2) = y0 + e y1 + e^2/2 y2.

    y1 = f'(x0) x1,        y2 = f'(x0) x2 + f''(x0)(x1, x1)

A rule takes the operation and its arguments with jets in the places of tensors, and returns jets. What has no rule is
not carried: nothing here guesses. A new operation is a name in `table`, or a function in the file of its like and its
name there. Rules are made of operations whose derivatives torch gets right, so that jets can be differentiated in turn.
"""

from twofold.curvature.jet_rules.entries import chained
from twofold.curvature.jet_rules.jet import Jet, NotCarriedError, filled, leaves
from twofold.curvature.jet_rules.table import FLAT, OUT_OF_PLACE, RULES

__all__ = ["FLAT", "OUT_OF_PLACE", "RULES", "Jet", "NotCarriedError", "chained", "filled", "leaves"]
