"""The paper's figures, one file each: `figure_<n>.py` with a `FIGURE`. A new file is found without being listed."""

from importlib import import_module
from pkgutil import iter_modules

from twofold.errors import TwofoldError
from twofold.lab.figures.figure import Figure

__all__ = ["Figure", "figure_numbers", "find_figure", "select_figures"]


def figure_numbers() -> list[int]:
    """Numbers of the figures that can be reproduced, in order."""
    names = [module.name for module in iter_modules(__path__)]
    return sorted(int(name.removeprefix("figure_")) for name in names if name.startswith("figure_"))


def find_figure(number: int | str) -> Figure:
    """The figure of that number.

    Raises:
        TwofoldError: there is none.
    """
    known = figure_numbers()
    text = str(number)
    if not text.isdecimal() or int(text) not in known:
        raise TwofoldError(
            f"There is no figure {text!r}; figures that can be reproduced: {', '.join(map(str, known))}."
        )
    return import_module(f"{__name__}.figure_{int(text)}").FIGURE


def select_figures(numbers: tuple[int | str, ...] = ()) -> list[Figure]:
    """These figures in the order of their numbers, without repetition; none named means all."""
    chosen = {figure.number: figure for figure in map(find_figure, numbers or figure_numbers())}
    return [chosen[number] for number in sorted(chosen)]
