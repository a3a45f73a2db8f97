"""Beyond the paper: figure 1 on a transformer, whose attention and norms keep an NME where phi'' is lost."""

from dataclasses import replace

from twofold.lab.config import RunConfig, transformer
from twofold.lab.figures.penalties import RELU_PSAM, RELU_SAM
from twofold.lab.figures.scales import Scale
from twofold.lab.figures.tracking import tracking_figure

RHO = {"smoke": (0.1,), "quick": (0.1,), "cpu": (0.1, 0.2), "paper": (0.1, 0.2)}
STEPS = {"quick": 96, "cpu": 256}


def recipe(scale: Scale, data: str) -> RunConfig:
    """The scale's data and length on the transformer with its own optimiser."""
    found, own = scale.recipe(data), transformer()
    warmup_epochs = min(own.warmup_epochs, found.epochs)
    return replace(
        found,
        model=own.model,
        optimizer=own.optimizer,
        warmup_epochs=warmup_epochs,
        max_steps=STEPS.get(scale.name, found.max_steps),
    )


FIGURE = tracking_figure(
    "transformer",
    title="SAM and PSAM against rho on a transformer",
    setting=(
        "A pre-norm transformer of two blocks of width 32 with LayerNorm, trained by AdamW; the learning rate rises "
        "for 64 steps (scale cpu has 256 steps, quick 96)."
    ),
    sam=RELU_SAM,
    psam=RELU_PSAM,
    values=RHO,
    recipe=recipe,
)
