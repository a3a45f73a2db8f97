"""The command line: twofold train | sweep | reproduce | report | measure | data.

The only place that prints. Results go to stdout, progress and errors to stderr.
"""

import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import twofold
from twofold.errors import TwofoldError, TwofoldWarning

try:
    import tyro
    from rich.console import Console
    from rich.markup import escape
    from tyro.conf import FlagCreatePairsOff, Positional, arg
except ImportError as error:
    print(f"twofold: the command line needs the lab extra ({error}): pip install 'twofold[lab]'", file=sys.stderr)
    raise SystemExit(2) from error

if TYPE_CHECKING:
    from twofold.lab.config import RunConfig
    from twofold.lab.report import Reproduction
    from twofold.lab.sweep import SweepResult

T = TypeVar("T")

Recipe = Annotated[Positional[str], arg(metavar="RECIPE", help_behavior_hint="(required)")]
DataDir = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: $TWOFOLD_DATA or ./data)")]
Out = Annotated[Path, arg(metavar="DIR")]
Workers = Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: as many as fit)")]
WhereToRun = Annotated[str, arg(metavar="PLACE")]

DESCRIPTION = """Measure and regularise both halves of the Hessian, H = GN + NME.

--version prints the version; --debug, with any command, shows the traceback of an error."""

_python_format_warning = warnings.formatwarning


class _Stopped(KeyboardInterrupt):
    """A signal that asks this process to end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 where runs failed, 2 for an error, 128 + n for signal n."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if given == ["--version"]:
        print(f"twofold {twofold.__version__}")
        return 0
    warnings.formatwarning = _format_warning
    if int(os.environ.get("RANK", "0")):  # of the processes that torchrun starts, the first speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may be no text
    commands = {f.__name__: f for f in (train, sweep, reproduce, report, measure, data)}
    try:
        with _stoppable():
            result = tyro.extras.subcommand_cli_from_dict(
                commands, prog="twofold", description=DESCRIPTION, args=given or ["--help"]
            )
        return result or 0
    except KeyboardInterrupt as stop:
        number = stop.args[0] if isinstance(stop, _Stopped) else signal.SIGINT
        how = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        print(f"twofold: {how}; finished runs are kept, the same command goes on.", file=sys.stderr)
        return 128 + number
    except BrokenPipeError:  # the reader of our output has left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        elif isinstance(error, TwofoldError | OSError):
            print(f"twofold: {error}", file=sys.stderr)
        else:
            print(f"twofold: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        return 2


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM and a lost terminal (SIGHUP) end a command as Ctrl-C does, unless they are dealt with already."""

    def stop(number: int, _frame: object) -> None:
        raise _Stopped(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)}
        before = {s: handler for s, handler in before.items() if handler is signal.SIG_DFL}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    recipe: Recipe,
    /,
    *,
    activation: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the recipe's)")] = None,
    regularizer: Annotated[str, arg(metavar="NAME")] = "none",
    strength: Annotated[float, arg(metavar="X")] = 0.0,
    epochs: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the recipe's)")] = None,
    seed: Annotated[int, arg(metavar="N")] = 100,
    log: Annotated[tuple[Literal["tensorboard", "wandb"], ...], arg(metavar="NAME ...")] = (),
    out: Out = Path("results"),
    data_dir: DataDir = None,
) -> None:
    """Train one model.

    Args:
        recipe: mnist1d, fashion-mnist, cifar10, imagenet, ...
        activation: gelu, relu, beta_gelu, ...
        regularizer: none, sam, gradient_penalty, ...
        strength: rho, sigma or the factor of a trace.
        epochs: passes over the training examples.
        seed: of initialisation, order and noise.
        log: tensorboard, wandb (offline unless WANDB_MODE says otherwise).
        out: the run goes to DIR/runs/<id>.
        data_dir: where data files lie.
    """
    from twofold.lab.config import RegularizerConfig
    from twofold.lab.data import load
    from twofold.lab.ranks import is_first
    from twofold.lab.runs import RunDirectory, prepare_output
    from twofold.lab.training import train as train_run

    config = replace(_recipe(recipe), regularizer=RegularizerConfig(regularizer, strength), seed=seed)
    if activation is not None:
        config = replace(config, model=replace(config.model, activation=activation))
    if epochs is not None:
        config = replace(config, epochs=epochs)
    load(config.data, _data_dir(data_dir))
    prepare_output(out)
    directory = RunDirectory(out, config)
    print(config.label())

    def tell(row: dict[str, float]) -> None:
        accuracies = "  ".join(f"{split} {row[f'{split}/accuracy']:.1%}" for split in ("train", "validation", "test"))
        print(f"epoch {row['epoch']:3.0f}  loss {row['train/loss']:.4f}  {accuracies}", flush=True)

    reused = directory.result() is not None
    metrics = train_run(config, data_dir=_data_dir(data_dir), directory=directory, progress=tell, loggers=log)
    if reused:
        tell(metrics.iloc[-1].to_dict())
    run = directory.result() if is_first() else None
    told = ["already there"] * reused + ["diverged"] * (run is not None and run.status == "diverged")
    print(f"{', '.join(told) or 'done'}: {directory.path}")


def sweep(
    recipe: Recipe,
    /,
    *,
    activations: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="(default: the recipe's)")] = (),
    regularizers: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ("sam",),
    strengths: Annotated[tuple[float, ...], arg(metavar="X ...")] = (0.05, 0.1, 0.2),
    seeds: Annotated[tuple[int, ...], arg(metavar="N ...")] = (100, 101, 102),
    out: Out = Path("results"),
    data_dir: DataDir = None,
    workers: Workers = None,
    place: WhereToRun = "local",
) -> int:
    """Train every combination of the lists given.

    Args:
        recipe: mnist1d, fashion-mnist, cifar10, imagenet, ...
        activations: gelu, relu, beta_gelu, ...
        regularizers: none, sam, gradient_penalty, ...
        strengths: for every regularizer but none.
        seeds: shared by all combinations.
        out: the runs go to DIR/runs/<id>.
        data_dir: where data files lie.
        workers: runs at once.
        place: local, ray[:ADDRESS] or slurm[:OPTION=VALUE,...].
    """
    from twofold.lab.config import RegularizerConfig
    from twofold.lab.runs import load_table, run_id
    from twofold.lab.sweep import sweep as sweep_runs
    from twofold.lab.terminal import sweep_progress, table

    base = _recipe(recipe)
    chosen = [RegularizerConfig(n, s) for n in regularizers for s in (strengths if n != "none" else (0.0,))]
    configs = [
        replace(base, model=replace(base.model, activation=activation), regularizer=regularizer, seed=seed)
        for activation in activations or (base.model.activation,)
        for regularizer in chosen
        for seed in seeds
    ]
    if not configs:
        raise TwofoldError("There is nothing to run: --regularizers, --strengths and --seeds need a value each.")
    with sweep_progress() as progress:
        result = sweep_runs(configs, out, place=place, workers=workers, data_dir=_data_dir(data_dir), progress=progress)
    keys = ["model.activation", "regularizer.name", "regularizer.strength"]
    runs = load_table(out, list(dict.fromkeys(map(run_id, configs))))
    found = table("Accuracy in percent: mean ± standard deviation over seeds", ("setting",))
    for name in ("seeds", "div.", "train", "validation", "test"):
        found.add_column(name, justify="right", no_wrap=True)
    for (activation, name, strength), group in runs.groupby(keys, sort=False):
        accuracies = []
        for split in ("train", "validation", "test"):
            percent = 100 * group[f"{split}/accuracy"] if f"{split}/accuracy" in group else group["seed"] * float("nan")
            accuracies.append(f"{percent.mean():.1f} ± {percent.std():.1f}")
        diverged = int((group["status"] == "diverged").sum())
        found.add_row(f"{activation} {name} {strength:g}", str(len(group)), str(diverged), *accuracies)
    Console().print(found)
    return _tell_runs(result, out)


def reproduce(
    figures: Annotated[
        Positional[tuple[str, ...]], arg(metavar="[FIGURE ...]", help_behavior_hint="(default: all)")
    ] = (),
    /,
    *,
    scale: Annotated[Literal["smoke", "quick", "cpu", "paper"], arg(metavar="NAME")] = "quick",
    data: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the scale's)")] = None,
    data_dir: DataDir = None,
    out: Out = Path("reproduction"),
    workers: Workers = None,
    place: WhereToRun = "local",
    dry_run: FlagCreatePairsOff[bool] = False,
) -> int:
    """Reproduce figures of the paper: runs, verdicts, and one page.

    Args:
        figures: numbers, or names of those beyond the paper; none: all.
        scale: smoke (under a minute), quick (minutes), cpu (an hour or two) or paper (GPUs).
        data: one data set.
        data_dir: where data files lie.
        out: where everything goes and is found again.
        workers: runs at once.
        place: local, ray[:ADDRESS] or slurm[:OPTION=VALUE,...].
        dry_run: only tell runs, which are there, and what the rest costs.
    """
    from twofold.lab.report import plan
    from twofold.lab.report import reproduce as run_reproduction
    from twofold.lab.terminal import sweep_progress, verdict_table

    reproduction = plan(figures, scale, data, gpu=place == "local" and not dry_run)
    if dry_run:
        return _tell_costs(reproduction, out)
    with sweep_progress() as progress:
        result, runs = run_reproduction(
            reproduction, out, place=place, workers=workers, data_dir=_data_dir(data_dir), progress=progress
        )
    if result is not None:
        Console().print(verdict_table(result.verdicts))
        print(f"page: {result.page}")
    return _tell_runs(runs, out)


def report(directory: Annotated[Positional[Path], arg(metavar="DIR")], /) -> None:
    """Write the page of a reproduction anew.

    Args:
        directory: what `twofold reproduce --out` named.
    """
    from twofold.lab.report import write_report
    from twofold.lab.terminal import verdict_table

    result = write_report(directory)
    Console().print(verdict_table(result.verdicts))
    print(f"page: {result.page}")


def measure(
    target: Annotated[Positional[str], arg(metavar="TARGET", help_behavior_hint="")],
    /,
    *,
    budget: Annotated[str, arg(metavar="TIME")] = "5min",
    params: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="(default: all)")] = (),
    mode: Annotated[Literal["train", "eval"] | None, arg(help_behavior_hint="(default: as it is)")] = None,
    num_probes: Annotated[int, arg(metavar="N")] = 32,
    num_examples: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None,
    out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    plot: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    data_dir: DataDir = None,
) -> None:
    """Measure both halves of a Hessian, of a run or of a model of your own.

    Args:
        target: DIR/runs/<id>; or module:function or file.py:function of yours that returns (model, loss_fn, data).
        budget: time it may take: 60s, 5min, 1h.
        params: names or glob patterns.
        mode: train or eval.
        num_probes: random probes.
        num_examples: first training examples of a run.
        out: write the report there as JSON.
        plot: draw it there: .png, .svg or .pdf.
        data_dir: where data files of a run lie.
    """
    from twofold.curvature.budget import seconds_of
    from twofold.lab.targets import load_target
    from twofold.lab.terminal import stages

    seconds_of(budget)
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise TwofoldError(f"--plot is {plot}; expected a name that ends in .png, .svg or .pdf.")
    for path in (out, plot):
        if path is not None and not path.parent.is_dir():
            raise TwofoldError(f"{path} cannot be written: there is no directory {path.parent}.")
    found = load_target(target, num_examples=num_examples, data_dir=_data_dir(data_dir))
    options: dict[str, Any] = {"budget": budget, "num_probes": num_probes, **found.options}
    options |= {"params": params} if params else {}
    options |= {"mode": mode} if mode else {}
    with stages() as progress:
        result = twofold.measure(found.model, found.loss_fn, found.data, progress=progress, **options)
    console = Console()
    console.print(escape(found.title), style="bold", soft_wrap=True, highlight=False)
    console.print(escape(str(result)), soft_wrap=True)
    if out is not None:
        result.save(out)
        print(f"report: {out}")
    if plot is not None:
        result.plot().savefig(plot, dpi=150)
        print(f"figure: {plot}")


def data(
    action: Positional[Literal["list", "fetch"]],
    names: Annotated[Positional[tuple[str, ...]], arg(metavar="NAME ...", help_behavior_hint="(default: all)")] = (),
    /,
    *,
    data_dir: DataDir = None,
) -> int:
    """List the data sets, or fetch some.

    Args:
        action: list says what is there; fetch downloads and checks.
        names: data sets.
        data_dir: where data files lie.
    """
    from twofold.lab.data import DATA_SETS, fetch

    if action == "fetch" and data_dir is not None:
        data_dir.mkdir(parents=True, exist_ok=True)
    place = _data_dir(data_dir)
    chosen = {name: _choose("data set", name, DATA_SETS) for name in names or DATA_SETS}
    missing = False
    for name, load_source in chosen.items():
        if action == "fetch":
            fetch(name, place)
        try:
            source = load_source(place)
            print(f"{name}: ready, {len(source.train.targets)} training and {len(source.test.targets)} test examples")
        except TwofoldError as error:
            print(f"{name}: {error}")
            missing = True
    return int(action == "fetch" and bool(names) and missing)


def _recipe(name: str) -> "RunConfig":
    from twofold.lab.ranks import launched
    from twofold.lab.recipes import RECIPES

    return replace(_choose("recipe", name, RECIPES)(), ranks=launched())


def _choose(kind: str, name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        raise TwofoldError(f"There is no {kind} {name!r}; known: {', '.join(known)}.")
    return known[name]


def _data_dir(given: Path | None) -> Path:
    if given is not None and not given.is_dir():
        raise TwofoldError(f"--data-dir {given} is no directory.")
    return given or Path(os.environ.get("TWOFOLD_DATA") or "data")


def _tell_costs(reproduction: "Reproduction", out: Path) -> int:
    from twofold.lab.costs import SPEEDS, estimate
    from twofold.lab.terminal import cost_table

    costs = estimate(reproduction, out)
    Console().print(cost_table(costs))
    for speed in SPEEDS.values():
        if speed.unit in costs[-1].unit:
            print(f"Assumed: {speed.flops / 1e12:g} TFLOP/s sustained a {speed.unit}, {speed.basis};")
    print("floating-point operations of the model, times what a step of each regularizer costs (docs/benchmarks.md).")
    return 0


def _tell_runs(result: "SweepResult", out: Path) -> int:
    computed = len(result.finished) + len(result.diverged) - result.reused
    print(f"runs: {computed} computed, {result.reused} reused, {len(result.diverged)} diverged, in {out / 'runs'}")
    alike: dict[str, list[str]] = {}
    for name, error in result.failed.items():
        alike.setdefault(error, []).append(name)
    for error, names in alike.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"twofold: run {names[0]}{others} failed: {error.partition(chr(10))[0]}", file=sys.stderr)
    return 1 if result.failed else 0


def _format_warning(message: Warning | str, category: type[Warning], *place, **line) -> str:
    if issubclass(category, TwofoldWarning):
        return f"twofold: warning: {message}\n"
    return _python_format_warning(message, category, *place, **line)
