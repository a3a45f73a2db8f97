"""measure: both halves of the Hessian in one call, the most important first, within a budget."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.activations.second_derivative import active_second_derivatives
from twofold.curvature.anatomy import Anatomy, anatomy
from twofold.curvature.budget import peak_memory, seconds_of
from twofold.curvature.curvature import Curvature
from twofold.curvature.density import spectral_density
from twofold.curvature.eigen import eigsh
from twofold.curvature.liveness import live_fraction
from twofold.curvature.operators import NME, GaussNewton, Hessian
from twofold.curvature.probes import check_count, generator_for, rademacher
from twofold.curvature.products import Products
from twofold.curvature.report import AnatomyFigures, Cost, CurvatureReport, Eigenvalue, blocks_of
from twofold.curvature.sampling import HALVES, SPLIT, Samples, gram_of
from twofold.distributed import agree
from twofold.errors import TwofoldError, TwofoldWarning
from twofold.types import BlockNorms, Forward, LossFn, Matrix, Mode, Params, ProcessGroup, SpectralDensity, Weight

Progress: TypeAlias = Callable[[str, float], None]
"""progress(stage, fraction of the stage that is done)."""

DEFAULT_MEMORY = 8 * 2**30
STAGES = ("gradient", "probes", "eigenvalues", "blocks", "densities", "anatomy")

_FEWEST_PROBES = 2
_EIGENVALUE_TOL = 1e-3
_MOST_EIGEN_PRODUCTS = 1000
_HESSIAN_COST, _HALVES_COST = 0.65, 0.8
"""What H v, and GN v with NME v, cost in products of all parts."""
_MOST_BLOCKS, _BLOCK_PROBES = 16, 4
_DENSITY_PROBES, _DENSITY_STEPS, _FEWEST_STEPS = 4, 40, 8
_ANATOMY_PROBES = 16
_ANATOMY_PRODUCTS, _ANATOMY_VECTORS = 4.0, 16
"""What a probe of the anatomy costs in products of all parts, and how many vectors it holds; measured."""


def measure(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    params: Params = None,
    forward: Forward | None = None,
    mode: Mode = None,
    memory: int | None = None,
    weight: Weight | None = None,
    microbatches: int = 1,
    group: ProcessGroup = None,
    budget: str | float | None = None,
    num_probes: int = 32,
    num_eigenvalues: int = 6,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> CurvatureReport:
    """Measure both halves of a loss Hessian, H = GN + NME, and tell it in one report.

    In this order: loss and gradient, and what each half has of the curvature along it; traces, Frobenius norms and
    block traces of H, GN, NME and the NME's parts, all from the same probes; eigenvalues of H from both ends, each
    split as v'GN v + v'NME v; norms of the blocks between modules; spectral densities on a common grid; the anatomy by
    kind of operation. What did not fit the budget or the memory is named in `report.left_out`.

    The model is left as it was: parameters, buffers, .grad, modes, hooks and random states. Everything is computed in
    its own precision, with autocast off.

    Args:
        model: any module, unmodified.
        loss_fn: loss_fn(outputs, targets) -> scalar.
        data: a batch (inputs, targets), or a re-iterable of batches.
        params: names or glob patterns; None for all parameters that require a gradient.
        forward: forward(model, batch) -> (outputs, targets), for batches of another form.
        mode: "train", "eval", or None for the model as it is.
        memory: bytes that may be held beside the model and the recording of one batch: a quarter for recordings of
            further batches, the rest for Lanczos vectors. None means 8 GiB.
        weight: weight(outputs, targets) -> how many terms a batch's loss averages.
        microbatches: run each batch in so many pieces, at most; see `Curvature`.
        group: a process group whose ranks each have a shard of the data; see `Curvature`.
        budget: about how long it may take: seconds, "60s", "5min"; None is without end. Gradient and two probes are
            always taken. Under a budget that binds, how much is measured depends on the speed of the machine.
        num_probes: Rademacher probes; errors fall with the root of their number.
        num_eigenvalues: eigenvalues of H, half of them from each end.
        generator: source of the probes; None takes a private one with a fixed seed (same call, same numbers).
        progress: called as progress(stage, fraction), stages being those of `STAGES`.

    Returns:
        CurvatureReport: print it, `.plot()`, `.to_dict()`, `.save(path)`.

    Raises:
        TwofoldError: as `Curvature` does; a budget or a count that cannot be used.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
        >>> batch = (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> report = measure(model, nn.CrossEntropyLoss(), batch, budget="60s")
        >>> list(report.traces)
        ['hessian', 'gauss_newton', 'nme', 'activation_nme', 'rest']
        >>> math.isclose(report.gradient_shares["gauss_newton"] + report.gradient_shares["nme"], 1.0)
        True

    Source: arXiv 2401.10809.
    """
    check_count(num_probes, "num_probes", at_least=_FEWEST_PROBES)
    check_count(num_eigenvalues, "num_eigenvalues")
    memory = DEFAULT_MEMORY if memory is None else memory
    seconds, start = seconds_of(budget), time.monotonic()
    options: dict[str, Any] = {"params": params, "forward": forward, "mode": mode, "weight": weight}
    options |= {"microbatches": microbatches, "group": group}
    if isinstance(memory, int) and memory > 0:
        options["memory"] = memory // 4
    else:
        options["memory"] = memory  # Products says what is wrong with it
    curvature = Curvature(model, loss_fn, data, **options)
    products, layout = curvature._products, curvature.layout
    vectors = (memory - memory // 4) // (layout.size * layout.dtype.itemsize)
    session = _Session(start, seconds, progress, vectors, generator_for(curvature.hessian, generator), group=group)
    seed = session.generator.initial_seed()

    session.tell("gradient", 0.0)
    loss, gradient = products.loss_and_gradient()
    terms, along, norm = _along_gradient(products, gradient, session)
    live = _live_fraction(model, data, forward, mode, session, group=group)
    session.tell("gradient", 1.0)

    samples = _sample(products, terms, num_probes, session)
    products.forget()
    eigenvalues = _eigenvalues(products, num_eigenvalues, session)
    block_norms = _block_norms(curvature, session)
    densities = _densities(products, session)
    policy = _policy(products, model, mode, samples, seed)
    del curvature, products
    parts = _anatomy(partial(anatomy, model, loss_fn, data, **options), gradient, session)

    names = samples.names
    prefixes = dict.fromkeys(".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 2))
    return CurvatureReport(
        model=type(model).__name__,
        num_parameters=layout.size,
        loss=loss,
        gradient_norm=norm,
        frobenius={matrix: samples.frobenius(matrix) for matrix in samples.matrices},
        nme_ratio=samples.ratio("nme", "gauss_newton"),
        cosine=samples.cosine("gauss_newton", "nme"),
        along_gradient=along,
        traces={matrix: samples.trace(matrix) for matrix in samples.matrices},
        block_traces={
            prefix: {
                matrix: samples.trace(matrix, [n for n in names if n == prefix or n.startswith(f"{prefix}.")])
                for matrix in samples.matrices
            }
            for prefix in prefixes
        },
        eigenvalues=eigenvalues,
        block_norms=block_norms,
        densities=densities,
        anatomy=parts,
        live_fraction=live,
        policy=policy,
        left_out=session.left_out,
        cost=Cost(session.elapsed, session.num_matvecs, peak_memory(layout.device)),
    )


class _Session:
    """What the stages of one measurement share: its clock, its room for vectors, its probes, what it leaves out."""

    def __init__(
        self,
        start: float,
        seconds: float,
        progress: Progress | None,
        vectors: int,
        generator: torch.Generator,
        *,
        group: ProcessGroup,
    ) -> None:
        self._start, self._seconds, self._progress = start, seconds, progress
        self.vectors, self.generator, self._group = vectors, generator, group
        self.left_out: dict[str, str] = {}
        self.num_matvecs = 0
        self.each = 0.0
        """Seconds that products of all parts with one vector take."""

    @property
    def now(self) -> float:
        """Seconds on the first rank's clock, so that all ranks measure alike."""
        return agree(self._group, [time.monotonic()])[0][0]

    @property
    def elapsed(self) -> float:
        return self.now - self._start

    @property
    def left(self) -> float:
        return self._seconds - self.elapsed

    def affordable(self, share: float, each: float, least: int) -> float:
        """How many products fit into a share of the time left, or `least` where these fit into all of it.

        Args:
            share: of the time left.
            each: what a product costs, in products of all parts.
            least: how many are needed for anything.
        """
        if self._seconds == math.inf:
            return math.inf
        most = max(self.left, 0.0) / max(self.each * each, 1e-9)
        return least if share * most < least <= most else share * most

    def tell(self, stage: str, fraction: float) -> None:
        if self._progress is not None:
            self._progress(stage, min(fraction, 1.0))

    @contextmanager
    def stage(self, name: str, products: Products, total: int) -> Iterator[None]:
        """Count products and tell how far a stage of at most so many has come."""
        taken = 0

        def watch(count: int) -> None:
            nonlocal taken
            taken += count
            self.num_matvecs += count
            self.tell(name, taken / total)

        self.tell(name, 0.0)
        products.watch = watch
        try:
            yield
        finally:
            products.watch = None
        self.tell(name, 1.0)

    def leave_out(self, what: str, why: str | TwofoldError) -> None:
        # of an error what came; what to do about it is for those who asked for that alone
        self.left_out[what] = str(why).partition(". ")[0]

    @property
    def budget_was_short(self) -> str:
        return f"the budget of {self._seconds:.4g} s was too short"

    @property
    def memory_was_short(self) -> str:
        return f"{max(self.vectors, 0)} vectors fit the memory"


def _along_gradient(
    products: Products, gradient: Float[Tensor, "P"], session: _Session
) -> tuple[tuple[Matrix, ...], dict[str, float], float]:
    """Which parts can be told apart, g'A g / g'g for each matrix, and ||g||."""
    terms = SPLIT
    try:
        rows = products.matmat(gradient.unsqueeze(0), terms)
    except TwofoldError as error:
        session.leave_out("activation NME and rest", error)
        terms = HALVES
        rows = products.matmat(gradient.unsqueeze(0), terms)
    session.num_matvecs += 1
    gram = gram_of([gradient, *(row[0] for row in rows)])
    square = gram[0, 0].item()
    along = {
        term: value / square if square else math.nan for term, value in zip(terms, gram[0, 1:].tolist(), strict=True)
    }
    nme = math.fsum(value for term, value in along.items() if term != "gauss_newton")
    found: dict[str, float] = {
        "hessian": along["gauss_newton"] + nme,
        "gauss_newton": along["gauss_newton"],
        "nme": nme,
    }
    return terms, found | along, math.sqrt(square)


def _live_fraction(
    model: nn.Module, data: Any, forward: Forward | None, mode: Mode, session: _Session, *, group: ProcessGroup
) -> float | None:
    try:
        return live_fraction(model, data, forward=forward, mode=mode, group=group)
    except TwofoldError as error:
        session.leave_out("live fraction of phi''", error)
        return None


def _sample(products: Products, terms: tuple[Matrix, ...], num_probes: int, session: _Session) -> Samples:
    samples, end = Samples(products, terms), session.now + 0.35 * session.left
    begun = session.now
    with session.stage("probes", products, num_probes):
        for probe in rademacher(Hessian.of(products), num_probes, session.generator):
            if len(samples) >= _FEWEST_PROBES and session.now + session.each > end:
                session.leave_out("probes", f"{len(samples)} of {num_probes}; {session.budget_was_short}")
                break
            samples.take(probe)
            if len(samples) == 1:
                begun = session.now  # the first one records, and warms up
            else:
                session.each = (session.now - begun) / (len(samples) - 1)
    return samples


def _eigenvalues(products: Products, wanted: int, session: _Session) -> tuple[Eigenvalue, ...]:
    size, vectors = products.layout.size, session.vectors
    wanted = min(wanted, size)
    affordable = session.affordable(0.45, _HESSIAN_COST, _fewest_products(min(wanted, 2), size))
    most = int(min(affordable, _MOST_EIGEN_PRODUCTS))
    # The memory holds the basis, one vector more and the eigenvectors; the time, a few products for each pair.
    fitting = [k for k in range(wanted, 0, -1) if 3 * k + 4 <= vectors and _fewest_products(k, size) <= most]
    if vectors < 7:
        session.leave_out("eigenvalues", f"{session.memory_was_short}; 7 are needed")
        return ()
    if not fitting:
        session.leave_out("eigenvalues", f"{session.budget_was_short} for {_fewest_products(1, size)} products")
        return ()
    k = fitting[0]
    if k < wanted:
        short = session.memory_was_short if 3 * wanted + 4 > vectors else session.budget_was_short
        session.leave_out("eigenvalues", f"{k} of {wanted}; {short}")
    basis = min(k + 20, vectors - k - 1) if size > k + 20 else size
    with session.stage("eigenvalues", products, most), warnings.catch_warnings():
        warnings.simplefilter("ignore", TwofoldWarning)
        pairs = eigsh(
            Hessian.of(products),
            k,
            which="BE",
            tol=_EIGENVALUE_TOL,
            max_matvecs=most,
            basis_size=basis,
            generator=session.generator,
        )
    if not pairs.converged:
        session.leave_out(
            "convergence of the eigenvalues", f"residuals are larger than wanted after {pairs.num_matvecs} products"
        )
    found = []
    for value, residual, vector in zip(pairs.values, pairs.residuals, pairs.vectors.T, strict=True):
        row = vector.contiguous()
        rows = products.matmat(row.unsqueeze(0), HALVES)
        halves = gram_of([row, *(half[0] for half in rows)])[0, 1:].tolist()
        found.append(Eigenvalue(value.item(), residual.item(), *halves))
    return tuple(found)


def _fewest_products(k: int, size: int) -> int:
    """With fewer products k eigenpairs are not worth asking for; a small matrix is solved densely."""
    return 2 * k + 10 if size > k + 20 else size + k


def _block_norms(curvature: Curvature, session: _Session) -> Mapping[str, BlockNorms]:
    blocks = blocks_of(list(curvature.layout.shapes), _MOST_BLOCKS)
    probes = int(min(session.affordable(0.3, _HALVES_COST, len(blocks)) / len(blocks), _BLOCK_PROBES))
    if len(blocks) > _MOST_BLOCKS:
        session.leave_out("norms of blocks", f"{len(blocks)} blocks are more than {_MOST_BLOCKS}")
        return {}
    if probes < 1:
        session.leave_out("norms of blocks", f"{session.budget_was_short} for {len(blocks)} products")
        return {}
    with session.stage("blocks", curvature._products, probes * len(blocks)):
        norms = curvature.block_norms(probes, blocks=blocks, generator=session.generator)
    return {str(matrix): table for matrix, table in norms.items()}


def _densities(products: Products, session: _Session) -> Mapping[str, SpectralDensity]:
    operators = {"hessian": Hessian.of(products), "gauss_newton": GaussNewton.of(products), "nme": NME.of(products)}
    room = min(session.vectors - 2, _DENSITY_STEPS)
    available = session.affordable(0.5, _HESSIAN_COST, len(operators) * _FEWEST_STEPS) / len(operators)
    probes = next((n for n in (_DENSITY_PROBES, 2) if available / n >= _DENSITY_STEPS / 2), 1)
    steps = int(min(room, available / probes))
    if room < _FEWEST_STEPS:
        session.leave_out("spectral densities", f"{session.memory_was_short}, {_FEWEST_STEPS + 2} are needed")
        return {}
    if steps < _FEWEST_STEPS:
        session.leave_out("spectral densities", session.budget_was_short)
        return {}
    if (probes, steps) != (_DENSITY_PROBES, _DENSITY_STEPS):
        why = session.memory_was_short if room < _DENSITY_STEPS else session.budget_was_short
        session.leave_out(
            "accuracy of the spectral densities",
            f"{probes} x {steps} Lanczos steps, not {_DENSITY_PROBES} x {_DENSITY_STEPS}; {why}",
        )
    total = len(operators) * probes * min(steps, products.layout.size)
    options: dict[str, Any] = {"num_probes": probes, "steps": steps, "generator": session.generator}
    with session.stage("densities", products, total):
        found = {name: spectral_density(operator, **options) for name, operator in operators.items()}
    low = min(density.grid[0].item() for density in found.values())
    high = max(density.grid[-1].item() for density in found.values())
    sigma = (high - low) / 110  # the grids reach beyond the nodes by 5 widths of a hundredth of their range
    grid = torch.linspace(low, high, 441, dtype=torch.float64)
    return {name: density.on(grid, sigma) for name, density in found.items()}


def _anatomy(
    take: Callable[..., Anatomy], gradient: Float[Tensor, "P"], session: _Session
) -> Mapping[str, AnatomyFigures]:
    if session.vectors < _ANATOMY_VECTORS:
        session.leave_out("anatomy", f"{session.memory_was_short}, {_ANATOMY_VECTORS} are needed")
        return {}
    probes = int(min(session.affordable(1.0, _ANATOMY_PRODUCTS, 1) - 1, _ANATOMY_PROBES))
    if probes < _FEWEST_PROBES:
        session.leave_out("anatomy", session.budget_was_short)
        return {}
    session.tell("anatomy", 0.0)
    try:
        directions = {"gradient": gradient} if gradient.any() else None
        whole = take(num_matvecs=probes, directions=directions, generator=session.generator)
    except TwofoldError as error:
        session.leave_out("anatomy", error)
        return {}
    session.num_matvecs += probes + 1
    session.tell("anatomy", 1.0)
    return {
        kind: AnatomyFigures(part.trace, replace(part.frobenius, num_matvecs=probes), part.share["gradient"])
        for kind, part in whole.kinds.items()
    }


def _policy(
    products: Products, model: nn.Module, mode: Mode, samples: Samples, seed: int
) -> dict[str, str | int | float | None]:
    modes = {module.training for module in model.modules()}
    found = "mixed modes" if len(modes) > 1 else "train mode" if modes.pop() else "eval mode"
    return {
        "mode": f"{mode} mode" if mode else f"{found} (as found)",
        "autocast": "off",
        "dtype": str(products.layout.dtype).removeprefix("torch."),
        "device": str(products.layout.device),
        "num_batches": products.num_batches,
        "num_terms": products.num_terms,
        "probes": "Rademacher",
        "num_probes": len(samples),
        "seed": seed,
        "traces_by": "products from recorded graphs",
        "second_derivatives": "replaced" if active_second_derivatives() else "the model's own",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
