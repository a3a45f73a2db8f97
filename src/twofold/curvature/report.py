"""CurvatureReport: what `twofold.measure` found, as an object, as text, as a figure and as JSON."""

import json
import math
import os
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.types import BlockNorms, Estimate, SpectralDensity

SYMBOLS = {"hessian": "H", "gauss_newton": "GN", "nme": "NME", "activation_nme": "phi'' of NME", "rest": "rest of NME"}
"""How reports write the matrices; the last two are the NME's parts, with phi'' and without."""

_FORMAT = "twofold.CurvatureReport/1"

Estimates: TypeAlias = Mapping[str, Estimate]
"""{matrix: Estimate}"""


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue of H and what each half has of it, lambda = v'GN v + v'NME v for its unit eigenvector v.

    Attributes:
        value: lambda.
        residual: ||H v - lambda v||; some eigenvalue of H lies within this distance of lambda.
        gauss_newton: v'GN v.
        nme: v'NME v.
    """

    value: float
    residual: float
    gauss_newton: float
    nme: float


@dataclass(frozen=True)
class AnatomyFigures:
    """What one kind of operation adds to H; see `twofold.anatomy`.

    Attributes:
        trace: the trace of its part.
        frobenius: its Frobenius norm.
        share: its share of g'H g along the gradient; the shares of all kinds add up to 1.
    """

    trace: Estimate
    frobenius: Estimate
    share: float


@dataclass(frozen=True)
class Cost:
    """What measuring took.

    Attributes:
        seconds: by the clock.
        num_matvecs: directions along which products were taken.
        peak_memory: the most bytes that the process has held so far (of a GPU's memory, where the model is on one).
    """

    seconds: float
    num_matvecs: int
    peak_memory: int


@dataclass(frozen=True, eq=False)
class CurvatureReport:
    """Both halves of a loss Hessian, H = GN + NME, as measured at one point; made by `twofold.measure`.

    Matrices are named "hessian", "gauss_newton", "nme" and, where activations could be told apart, "activation_nme"
    (the part of the NME that carries phi'') and "rest". Print it, `.plot()` it, `.save()` it; `CurvatureReport.load`
    gives an equal one back.

    Attributes:
        model: the class of the model.
        num_parameters: P.
        loss: L(theta) over the data.
        gradient_norm: ||g||, g the gradient of the loss.
        frobenius: {matrix: ||A||_F}.
        nme_ratio: ||NME||_F / ||GN||_F.
        cosine: <GN, NME>_F / (||GN||_F ||NME||_F): whether the halves add up or cancel.
        along_gradient: {matrix: g'A g / g'g}.
        traces: {matrix: tr A}.
        block_traces: {parameter or module: {matrix: trace of its diagonal block}}, for each prefix of a dotted name.
        eigenvalues: some eigenvalues of H from both ends, ascending, each split into halves.
        block_norms: {"hessian", "gauss_newton", "nme": BlockNorms}, the norms of the blocks A_bc between groups of
            parameters, or empty.
        densities: {"hessian", "gauss_newton", "nme": SpectralDensity}, on a common grid, or empty.
        anatomy: {kind of operation: AnatomyFigures}, or empty.
        live_fraction: the fraction of activation inputs at which phi'' is not 0, or None.
        policy: how it was measured: mode, precision, data, probes, versions.
        left_out: {what was not measured, or less exactly than by default: why}.
        cost: seconds, products, memory.
    """

    model: str
    num_parameters: int
    loss: float
    gradient_norm: float
    frobenius: Estimates
    nme_ratio: Estimate
    cosine: Estimate
    along_gradient: Mapping[str, float]
    traces: Estimates
    block_traces: Mapping[str, Estimates]
    eigenvalues: tuple[Eigenvalue, ...]
    block_norms: Mapping[str, BlockNorms]
    densities: Mapping[str, SpectralDensity]
    anatomy: Mapping[str, AnatomyFigures]
    live_fraction: float | None
    policy: Mapping[str, str | int | float | None]
    left_out: Mapping[str, str]
    cost: Cost

    @property
    def gradient_shares(self) -> dict[str, float]:
        """{matrix: g'A g / g'H g}: the shares of GN and NME add up to 1; nan where g'H g is 0."""
        whole = self.along_gradient["hessian"]
        return {name: value / whole if whole else math.nan for name, value in self.along_gradient.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CurvatureReport) and self.to_dict() == other.to_dict()

    __hash__ = None  # it holds mappings

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def plot(self) -> Any:
        """Draw the report: spectra of H and both halves, norms and shares, eigenvalues, blocks, anatomy.

        Returns:
            A matplotlib Figure, of no global state: `report.plot().savefig("report.png")`.

        Raises:
            TwofoldError: matplotlib is not installed.
        """
        try:
            from twofold.curvature.report_figure import draw
        except ImportError as error:
            raise TwofoldError("plot needs matplotlib: pip install matplotlib (or 'twofold[lab]').") from error
        return draw(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; numbers that are not finite as "NaN", "Infinity" and "-Infinity"."""
        return {"format": _FORMAT} | {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CurvatureReport":
        """Build from `to_dict`'s form.

        Raises:
            TwofoldError: it is no such form, or lacks what printing and drawing need; the message names the field.
        """
        if not isinstance(values, Mapping) or values.get("format") != _FORMAT:
            came = values.get("format") if isinstance(values, Mapping) else type(values).__name__
            raise TwofoldError(f"Expected a report of format {_FORMAT!r}; {came!r} came.")
        found = {}
        for name in (field.name for field in fields(cls)):
            if name not in values:
                raise TwofoldError(f"The report is damaged: {name} is missing.")
            try:
                found[name] = _READERS[name](values[name])
            except KeyError as error:
                raise TwofoldError(f"The report is damaged: {name} has no {error}.") from error
            except (TypeError, ValueError, AttributeError) as error:
                raise TwofoldError(f"The report is damaged: {name}: {error}.") from error
        report = cls(**found)
        for where, named, needed in _needed(report):
            missing = [name for name in needed if name not in named]
            if missing:
                raise TwofoldError(f"The report is damaged: {where} has no {', '.join(map(repr, missing))}.")
        return report

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON; the file is whole or, on any error, as it was before."""
        path = Path(path)
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        try:
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        except OSError as error:
            raise TwofoldError(f"The report cannot be written to {path}: {error.strerror or error}.") from error
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            umask = os.umask(0)
            os.umask(umask)
            Path(temporary).chmod(0o666 & ~umask)  # mkstemp makes private files
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CurvatureReport":
        """Read a report that `save` wrote.

        Raises:
            TwofoldError: the file cannot be read, or holds no whole report.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise TwofoldError(f"{path} cannot be read: {error.strerror or error}.") from error
        except ValueError as error:
            raise TwofoldError(f"{path} holds no curvature report: {error}") from error


def _plain(value: Any) -> Any:
    """A value as JSON knows it."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _estimate(values: Mapping[str, Any]) -> Estimate:
    return Estimate(float(values["value"]), float(values["stderr"]), int(values["num_matvecs"]))


def _estimates(values: Mapping[str, Any]) -> dict[str, Estimate]:
    return {name: _estimate(item) for name, item in values.items()}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text is needed where {value!r} stands")
    return value


def _floats(values: Any) -> Any:
    return tuple(_floats(item) for item in values) if isinstance(values, list | tuple) else float(values)


def _matrices(values: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = [name for name in values if name not in SYMBOLS]
    if unknown:
        raise ValueError(f"{', '.join(map(repr, unknown))} is none of {', '.join(SYMBOLS)}")
    return values


def _policy(values: Mapping[str, Any]) -> dict[str, str | int | float | None]:
    terms = values["num_terms"]
    if terms is not None and not isinstance(terms, int | float):
        raise TypeError(f"num_terms must be a number or null where {terms!r} stands")
    return dict(values.items())


def _same_shapes(*tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors}) > 1 or not tensors[0].numel():
        raise ValueError(f"shapes {', '.join(str(list(tensor.shape)) for tensor in tensors)} do not fit")


def _density(values: Mapping[str, Any]) -> SpectralDensity:
    curves = {name: torch.tensor(_floats(values[name]), dtype=torch.float64) for name in _CURVES}
    _same_shapes(curves["grid"], curves["density"], curves["stderr"])
    _same_shapes(curves["nodes"], curves["weights"])
    return SpectralDensity(**curves, sigma=float(values["sigma"]), num_matvecs=int(values["num_matvecs"]))


def _block_norms(values: Mapping[str, Any]) -> BlockNorms:
    value, stderr = (torch.tensor(_floats(values[name]), dtype=torch.float64) for name in ("value", "stderr"))
    blocks = tuple(_text(name) for name in values["blocks"])
    _same_shapes(value, stderr, torch.empty(len(blocks), len(blocks)))
    return BlockNorms(blocks, value, stderr, int(values["num_matvecs"]))


def _anatomy(values: Mapping[str, Any]) -> AnatomyFigures:
    return AnatomyFigures(_estimate(values["trace"]), _estimate(values["frobenius"]), float(values["share"]))


_CURVES = ("grid", "density", "stderr", "nodes", "weights")
_READERS: dict[str, Any] = {
    "model": _text,
    "num_parameters": int,
    "loss": float,
    "gradient_norm": float,
    "frobenius": lambda values: _estimates(_matrices(values)),
    "nme_ratio": _estimate,
    "cosine": _estimate,
    "along_gradient": lambda values: {name: float(value) for name, value in _matrices(values).items()},
    "traces": lambda values: _estimates(_matrices(values)),
    "block_traces": lambda values: {name: _estimates(_matrices(item)) for name, item in values.items()},
    "eigenvalues": lambda values: tuple(Eigenvalue(**{n: float(v) for n, v in item.items()}) for item in values),
    "block_norms": lambda values: {name: _block_norms(item) for name, item in values.items()},
    "densities": lambda values: {name: _density(item) for name, item in values.items()},
    "anatomy": lambda values: {name: _anatomy(item) for name, item in values.items()},
    "live_fraction": lambda value: None if value is None else float(value),
    "policy": _policy,
    "left_out": lambda values: {name: _text(why) for name, why in values.items()},
    "cost": lambda values: Cost(float(values["seconds"]), int(values["num_matvecs"]), int(values["peak_memory"])),
}
"""How each field is read back from JSON values."""

_TOLD = ("mode", "dtype", "device", "autocast", "num_batches", "num_terms", "num_probes", "probes", "seed", "traces_by")


def _needed(report: CurvatureReport) -> Iterator[tuple[str, Mapping[str, Any], Iterable[str]]]:
    """What printing and drawing need: (where, what is there by name, the names that must be)."""
    halves = ("hessian", "gauss_newton", "nme")
    yield "traces", report.traces, halves
    yield "frobenius", report.frobenius, report.traces
    yield "along_gradient", report.along_gradient, ("hessian", "nme")
    for block, traces in report.block_traces.items():
        yield f"block_traces: {block!r}", traces, report.traces
    for name, parts in (("block_norms", report.block_norms), ("densities", report.densities)):
        yield name, parts, halves if parts else ()
    yield "policy", report.policy, (*_TOLD, "torch")


_LABEL, _COLUMN = 14, 17
_MOST_BLOCKS, _LEVEL = 6, 24


def _lines(report: CurvatureReport) -> Iterator[str]:
    policy = report.policy
    yield f"Curvature of {report.model}: H = GN + NME"
    batches, terms = policy["num_batches"], policy["num_terms"]
    yield (
        f"{report.num_parameters:,} parameters; {batches} batch{'es' * (batches != 1)}"
        f"{'' if terms is None else f', {terms:,.6g} terms'}; "
        f"loss {report.loss:.6g}, gradient norm {report.gradient_norm:.4g}"
    )
    yield ""
    shares = report.gradient_shares
    yield (
        f"NME / GN       {_pm(report.nme_ratio)} (Frobenius), cosine {_pm(report.cosine)}; "
        f"along the gradient NME is {_percent(shares['nme'])} of H"
    )
    yield ""
    names = list(report.traces)
    yield _row("", [SYMBOLS[name] for name in names])
    yield _row("Frobenius norm", [_pm(report.frobenius[name]) for name in names])
    yield _row("trace", [_pm(report.traces[name]) for name in names])
    yield _row("g'A g / g'g", [f"{report.along_gradient.get(name, math.nan):.4g}" for name in names])
    yield _row("share of g'H g", [_percent(shares.get(name, math.nan)) for name in names])
    if report.eigenvalues:
        yield ""
        yield _row("eigenvalues", ["of H", "v'GN v", "v'NME v", "NME's share", "residual"])
        for eigenvalue in reversed(report.eigenvalues):
            share = eigenvalue.nme / eigenvalue.value if eigenvalue.value else math.nan
            figures = (eigenvalue.value, eigenvalue.gauss_newton, eigenvalue.nme)
            texts = [*(f"{x:.4g}" for x in figures), _percent(share), f"{eigenvalue.residual:.1g}"]
            yield _row("", texts)
    blocks = _largest(report.block_traces)
    if len(blocks) > 1:
        yield ""
        yield _row("traces of", [SYMBOLS[name] for name in names])
        for name, traces in blocks.items():
            yield _row(_shortened(name), [_pm(traces[matrix]) for matrix in names])
    if report.anatomy:
        yield ""
        yield _row("anatomy of H", ["Frobenius norm", "trace", "share of g'H g"])
        for kind, part in report.anatomy.items():
            if part.frobenius.value > 0:
                yield _row(kind, [_pm(part.frobenius), _pm(part.trace), _percent(part.share)])
    yield ""
    if report.live_fraction is not None:
        yield f"phi'' is alive at {_percent(report.live_fraction)} of the activations' inputs."
    yield from _wrapped(_told(policy))
    cost = report.cost
    yield f"Took {_seconds(cost.seconds)}, {cost.num_matvecs} products; peak memory {_bytes(cost.peak_memory)}."
    for what, why in report.left_out.items():
        yield from _wrapped(f"Left out: {what}: {why}")


def _told(policy: Mapping[str, Any]) -> str:
    return (
        f"Measured in {policy['mode']}, {policy['dtype']} on {policy['device']}, autocast {policy['autocast']}; "
        f"{policy['num_probes']} {policy['probes']} probes (seed {policy['seed']}), the same for all matrices, "
        f"by {policy['traces_by']}; ± is one standard error. torch {policy['torch']}."
    )


def _row(label: str, texts: Sequence[str]) -> str:
    return (f"{label:<{_LABEL}}" + "".join(f"{text:>{_COLUMN}}" for text in texts)).rstrip()


def _pm(estimate: Estimate) -> str:
    """Value ± error, both to the error's first digit (its second where it begins with 1 or 2), four digits at most."""
    value, stderr = estimate.value, 0.0 if math.isnan(estimate.stderr) else estimate.stderr
    largest = max(abs(value), stderr)
    if not math.isfinite(largest) or largest == 0:
        return f"{value:.4g}"
    exponent = math.floor(math.log10(largest))
    shift = 0 if -3 <= exponent < 6 else exponent
    last = max(math.floor(math.log10(stderr / 3)) if stderr else exponent - 3, exponent - 3) - shift
    value, stderr = (round(x / 10.0**shift, -last) for x in (value, stderr))
    text = f"{value:.{max(-last, 0)}f}" + (f" ± {stderr:.{max(-last, 0)}f}" if stderr else "")
    return text if not shift else f"({text})e{shift:+03d}" if stderr else f"{text}e{shift:+03d}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else "-"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 99, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _shortened(name: str) -> str:
    return name if len(name) <= _LABEL else "…" + name[1 - _LABEL :]


def _largest(traces: Mapping[str, Estimates]) -> dict[str, Estimates]:
    """The blocks of one level with the largest traces, in the model's order."""
    level = blocks_of([name for name in traces if not any(other.startswith(f"{name}.") for other in traces)], _LEVEL)
    size = {name: abs(traces[name]["gauss_newton"].value) + abs(traces[name]["nme"].value) for name in level}
    chosen = sorted(level, key=size.__getitem__, reverse=True)[:_MOST_BLOCKS]
    return {name: traces[name] for name in level if name in chosen}


def blocks_of(names: Sequence[str], most: int) -> dict[str, list[str]]:
    """Group parameters by the first parts of their dotted names, as many parts as leave at most `most` groups.

    Example:
        >>> blocks_of(["a.0.weight", "a.0.bias", "a.1.weight", "b"], 3)
        {'a.0': ['a.0.weight', 'a.0.bias'], 'a.1': ['a.1.weight'], 'b': ['b']}
    """
    groups: dict[str, list[str]] = {}
    for depth in range(max((name.count(".") + 1 for name in names), default=1), 0, -1):
        groups = {}
        for name in names:
            groups.setdefault(".".join(name.split(".")[:depth]), []).append(name)
        if len(groups) <= most:
            break
    return groups
