"""The figures, one file each: `figure_<name>.py` with a `FIGURE`. A new file is found without being listed.

Names are the paper's numbers, and words for what it does not have.
"""

from importlib import import_module
from pkgutil import iter_modules

from twofold.errors import TwofoldError
from twofold.lab.figures.figure import Figure

__all__ = ["Figure", "figure_names", "find_figure", "select_figures"]


def figure_names() -> list[str]:
    """Names of all figures: the paper's by number, then the others by word."""
    modules = [module.name for module in iter_modules(__path__)]
    return sorted((name.removeprefix("figure_") for name in modules if name.startswith("figure_")), key=_place)


def _place(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdecimal() else (10**6, name)


def find_figure(name: int | str) -> Figure:
    """The figure of that name.

    Raises:
        TwofoldError: there is none.
    """
    text, known = str(name), figure_names()
    if text not in known:
        raise TwofoldError(f"There is no figure {text!r}; figures that can be reproduced: {', '.join(known)}.")
    return import_module(f"{__name__}.figure_{text}").FIGURE


def select_figures(names: tuple[int | str, ...] = ()) -> list[Figure]:
    """These figures in the order of `figure_names`, without repetition; none named means all."""
    chosen = {figure.name: figure for figure in map(find_figure, names or tuple(figure_names()))}
    return [chosen[name] for name in sorted(chosen, key=_place)]
