"""What figures 8 and 9 share: beta-GELU, x Phi(beta x), from GELU (beta = 1) towards ReLU, with SGD, PSAM and SAM."""

from dataclasses import replace

import pandas as pd

from twofold.lab.config import RegularizerConfig, RunConfig
from twofold.lab.figures.penalties import PSAM
from twofold.lab.figures.scales import Scale
from twofold.lab.figures.style import COLOURS

AXIS = "model.beta"
BETAS = {
    "smoke": (1.0, 16.0),
    "quick": (1.0, 4.0, 16.0, 64.0),
    "cpu": (1.0, 4.0, 16.0, 64.0),
    "paper": (1.0, 10.0, 100.0, 1000.0, 10000.0),
}
RHO = 0.1
METHODS = {
    "SGD": RegularizerConfig(),
    "PSAM": replace(PSAM, strength=RHO),
    "SAM": RegularizerConfig("sam", RHO),
}
LOOKS = {
    "SGD": (COLOURS["purple"], "o", ":"),
    "PSAM": (COLOURS["gelu"], "s", "-"),
    "SAM": (COLOURS["relu"], "o", "--"),
}


def beta_configs(scale: Scale, data: str, methods: tuple[str, ...]) -> list[RunConfig]:
    """These methods over beta, with curvature and phi'' measured before and after training."""
    recipe = scale.recipe(data)
    recipe = replace(recipe, curvature_every=recipe.epochs, curvature_matvecs=1)
    return [
        replace(
            recipe,
            model=replace(recipe.model, activation="beta_gelu", beta=beta),
            regularizer=METHODS[method],
            seed=seed,
        )
        for beta in BETAS[scale.name]
        for method in methods
        for seed in scale.seeds
    ]


def of_method(table: pd.DataFrame, method: str) -> pd.DataFrame:
    """The runs of one method over beta."""
    return table[table["regularizer.name"].eq(METHODS[method].name)]
