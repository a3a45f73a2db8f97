"""How large a reproduction is: from a CI check of seconds to the paper's own set-ups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from twofold.errors import TwofoldError
from twofold.lab import recipes
from twofold.lab.config import RunConfig, fashion_mnist, mnist1d


@dataclass(frozen=True)
class Scale:
    """A size of reproduction.

    Attributes:
        name: its name on the command line.
        summary: what it is for.
        seeds: seeds of every curve, shared by all methods, so that differences are paired.
        recipes: data set's name -> the recipe that its figures start from; the data sets it can run.
        default_data: the data sets that run where none is named.
        fewer_data: figure's name -> the data sets that it runs where none is named, if not all of `default_data`.
        core_minutes: figure's name -> what its runs may take of one core, were they alone; "" for all figures together.
    """

    name: str
    summary: str
    seeds: tuple[int, ...]
    recipes: dict[str, Callable[[], RunConfig]]
    default_data: tuple[str, ...]
    fewer_data: dict[str, tuple[str, ...]] = field(default_factory=dict)
    core_minutes: dict[str, float] = field(default_factory=dict)

    def data_of(self, figure: str) -> tuple[str, ...]:
        """The data sets that a figure runs where none is named."""
        return self.fewer_data.get(figure, self.default_data)

    def recipe(self, data: str) -> RunConfig:
        """The configuration that the figures vary, for one data set.

        Raises:
            TwofoldError: this scale does not run that data set.
        """
        if data not in self.recipes:
            raise TwofoldError(f"Scale {self.name!r} does not run {data!r}; it runs {', '.join(self.recipes)}.")
        return self.recipes[data]()


def _short(recipe: Callable[[], RunConfig]) -> Callable[[], RunConfig]:
    """The same recipe, stopped (with its whole schedule) after 30 steps."""
    return lambda: replace(recipe(), max_steps=30)


def _seeds(count: int, first: int = 100) -> tuple[int, ...]:
    """Fresh seeds: the settings were chosen with seeds 0 to 4, so judging starts at 100, at scale cpu at 200."""
    return tuple(range(first, first + count))


_BEYOND = ("conv", "leaky", "samples", "siblings", "slow", "transformer")
"""Figures that the paper does not have: one data set is enough."""

_PUBLISHED = {
    "imagenet": recipes.imagenet,
    "cifar10": recipes.cifar10,
    "fashion-mnist": recipes.fashion_mnist_wideresnet,
}
_SMALL = {"mnist1d": mnist1d, "fashion-mnist": fashion_mnist}

_QUICK_CORE_MINUTES = {
    **{"1": 3, "2": 3, "3": 3, "4": 1.5, "5": 1.25, "6": 0.75, "8": 2, "9": 1.25, "10": 2.5},
    **{"conv": 2, "leaky": 1.5, "mechanism": 0.5, "samples": 1.25, "share": 1.25, "siblings": 1.5, "slow": 1.5},
    "transformer": 1,
    "": 20,  # ten minutes on two cores
}
"""Half as much again as --dry-run says, or more: it does not know how busy a machine is."""

SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "smoke",
            "under a minute: every part runs, most verdicts stay undecided",
            _seeds(2),
            {name: _short(recipe) for name, recipe in _SMALL.items()},
            ("mnist1d",),
        ),
        Scale(
            "quick",
            "within ten minutes on two cores: small networks, three seeds",
            _seeds(3),
            dict(_SMALL),
            ("mnist1d",),
            core_minutes=_QUICK_CORE_MINUTES,
        ),
        Scale(
            "cpu",
            "about an hour on two idle cores: small networks, ten seeds, full grids",
            _seeds(10, first=200),  # those from 100 were seen before figure 6 had its strengths
            dict(_SMALL),
            ("mnist1d", "fashion-mnist"),
            fewer_data=dict.fromkeys(("5", *_BEYOND), ("mnist1d",)),
        ),
        Scale(
            "paper",
            "the published set-ups on GPUs, for as long as --dry-run says",
            _seeds(5),
            dict(_PUBLISHED),
            tuple(_PUBLISHED),
            fewer_data={
                **dict.fromkeys(("3", "6"), ("imagenet",)),
                **dict.fromkeys(("8", "9", "10"), ("imagenet", "cifar10")),
                **dict.fromkeys(("5", "mechanism", "share", *_BEYOND), ("cifar10",)),
            },
        ),
    )
}


def find_scale(name: str) -> Scale:
    """The scale of that name.

    Raises:
        TwofoldError: there is none.
    """
    if name not in SCALES:
        raise TwofoldError(f"There is no scale {name!r}; known: {', '.join(SCALES)}.")
    return SCALES[name]
