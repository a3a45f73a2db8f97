"""What `twofold measure` measures: a trained run, or what a function of the user's own returns."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from twofold.batches import describe
from twofold.errors import TwofoldError
from twofold.lab.data import Batches, load
from twofold.lab.runs import load_model
from twofold.types import LossFn

_BATCH = 1000


@dataclass(frozen=True)
class Target:
    """A model, its loss and data.

    Attributes:
        title: what is measured, for people.
        model, loss_fn, data: the first arguments of `twofold.measure`.
        options: further arguments of it.
    """

    title: str
    model: nn.Module
    loss_fn: LossFn
    data: Any
    options: Mapping[str, Any] = field(default_factory=dict)


def load_target(text: str, *, num_examples: int | None = None, data_dir: Path | None = None) -> Target:
    """Load what a text names: a run's directory, "module:function" or "path/to/file.py:function".

    Args:
        text: the directory of a finished run, measured in eval mode on its training examples; or a function that takes
            no arguments and returns (model, loss_fn, data), with a mapping of further arguments of `twofold.measure`
            as a fourth item if it likes.
        num_examples: how many training examples of a run, from the first on; None takes all.
        data_dir: where data files of a run lie.

    Raises:
        TwofoldError: there is no such thing, or it cannot be used.
    """
    if Path(text).is_dir() or ":" not in text:
        return _run(Path(text), num_examples, data_dir)
    if num_examples is not None:
        raise TwofoldError("--num-examples is for runs; let your function return the data to measure on.")
    place, _, name = text.rpartition(":")
    if not place or not name:
        missing = "function" if place else "module"
        raise TwofoldError(
            f"{text!r} names no {missing}; expected a run's directory, module:function or file.py:function."
        )
    return _from_function(_function(place, name), text)


def _run(directory: Path, num_examples: int | None, data_dir: Path | None) -> Target:
    if num_examples is not None and num_examples < 1:
        raise TwofoldError(f"--num-examples is {num_examples}; expected at least 1.")
    if not directory.exists():
        raise TwofoldError(
            f"{directory} does not exist. Name a run's directory, or a function as module:function or file.py:function."
        )
    model, config = load_model(directory)
    # As the run was trained; more threads than idle cores make a small model many times slower.
    torch.set_num_threads(config.threads)
    train_set = load(config.data, data_dir).train
    count = len(train_set.targets) if num_examples is None else min(num_examples, len(train_set.targets))
    batches = Batches(train_set, count, _BATCH)
    title = f"{config.label()}: {count} of {len(train_set.targets)} training examples (labels as trained on)"
    return Target(title, model, F.cross_entropy, batches, {"mode": "eval"})


def _function(place: str, name: str) -> Callable[[], Any]:
    """The function `name` of a module, or of a file that ends in .py."""
    module = _module(place)
    function = getattr(module, name, None)
    if not callable(function):
        own = [n for n, f in vars(module).items() if callable(f) and getattr(f, "__module__", "") == module.__name__]
        raise TwofoldError(f"{place} has no function {name!r}; it defines {', '.join(own) or 'none'}.")
    return function


def _module(place: str) -> ModuleType:
    """Import a module from here as Python would, or a file from where it lies."""
    path = Path(place)
    try:
        if path.suffix == ".py":
            return _from_file(path)
        sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(place)
    except TwofoldError:
        raise
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if place == missing or place.startswith(f"{missing}."):
            raise TwofoldError(f"There is no module {missing!r}, neither here nor installed.") from error
        raise TwofoldError(f"{place} cannot be imported: {error}.") from error
    except Exception as error:
        raise TwofoldError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TwofoldError(f"The file {path} does not exist.")
    sys.path.insert(0, str(path.resolve().parent))
    name = f"twofold_target_{path.stem}"  # a file may be called like a module that others need
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TwofoldError(f"The file {path} cannot be imported as Python.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _from_function(function: Callable[[], Any], text: str) -> Target:
    try:
        came = function()
    except Exception as error:
        raise TwofoldError(f"{text} raised {type(error).__name__}: {error}") from error
    parts = came if isinstance(came, tuple | list) else ()
    if not (
        len(parts) in (3, 4)
        and isinstance(parts[0], nn.Module)
        and callable(parts[1])
        and (len(parts) == 3 or isinstance(parts[3], Mapping))
    ):
        raise TwofoldError(
            f"{text} returned {describe(came)}; expected (model, loss_fn, data): a torch.nn.Module, a callable "
            "loss_fn(outputs, targets) and batches; a mapping of further arguments of twofold.measure may follow."
        )
    return Target(text, *parts)
