"""The frameworks' columns of the table of which method runs where; see tests/regularizers/where.py."""

import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from integrations import test_lightning, test_transformers
from regularizers import where


def lightning(row):
    test_lightning.steps_as_by_hand(row, "fp32")


def trainer(row):
    with tempfile.TemporaryDirectory() as path:
        test_transformers.steps_as_by_hand(row, "fp32", path)


SETTINGS = {"Lightning": lightning, "HF Trainer": trainer}

if __name__ == "__main__":
    where.write(SETTINGS)
