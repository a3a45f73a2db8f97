"""The annotated shapes hold: the core runs once with jaxtyping's annotations checked by beartype.

In a process of its own, since beartype draws from Python's random generator, which other tests watch.
"""

import subprocess
import sys

SCRIPT = """
from jaxtyping import install_import_hook

checked = ["parameters", "curvature.products", "curvature.curvature", "curvature.probes"]
install_import_hook([f"twofold.{name}" for name in checked], "beartype.beartype")

import torch
import twofold
from torch import nn

model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))
batches = [(torch.randn(n, 4), torch.randint(3, (n,))) for n in (4, 2)]
c = twofold.Curvature(model, nn.CrossEntropyLoss(), batches)
c.products(torch.randn(43)), c.products(torch.randn(43, 2)), c.products(c.layout.as_dict(torch.randn(43)))
c.traces(2), c.frobenius(2), c.gradient(), c.loss(), twofold.trace(c.nme, 2), c.hessian.to_dense()
try:
    c._products.matmat(torch.randn(43), ("hessian",))
except Exception as error:
    print(type(error).__name__)
"""


def test_annotated_shapes_hold_and_are_checked():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "TypeCheckError" in result.stdout
