"""Curvature: the operators of one model and data set, sharing passes and probes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.curvature.blocks import Blocks, Partition
from twofold.curvature.density import spectral_densities
from twofold.curvature.eigen import Which, eigsh
from twofold.curvature.fisher import Fisher, FisherKind
from twofold.curvature.jacobian import Jacobian
from twofold.curvature.operators import NME, ActivationNME, GaussNewton, Hessian, RestOfNME, rows_of, same_kind
from twofold.curvature.probes import (
    check_atol,
    check_count,
    cosine_of,
    precise,
    rademacher,
    root_of,
    summarise,
    warn_imprecise,
)
from twofold.curvature.products import Products
from twofold.errors import TwofoldError
from twofold.types import (
    BlockNorms,
    Eigenpairs,
    Estimate,
    Forward,
    InnerProduct,
    LossFn,
    Matrix,
    Mode,
    Params,
    ProcessGroup,
    SpectralDensity,
    Vectors,
    Weight,
)

HALVES: tuple[Matrix, ...] = ("hessian", "gauss_newton", "nme")
MATRICES: tuple[Matrix, ...] = get_args(Matrix)
_WHOLE = "*"


class Curvature:
    """Both halves of the Hessian of a loss over data, H = GN + NME (2401.10809, eq. 2).

    The loss is the average over the whole data set: ragged batches, ignore_index, class weights and reduction="sum" are
    exact. Measuring leaves the model as it was: parameters, buffers, .grad, modes, hooks and random states. Autocast is
    off while measuring.

    Args:
        model: any module; compiled and DDP wrappers are looked through.
        loss_fn: loss_fn(outputs, targets) -> scalar; torch's losses are recognised, any other callable counts as a mean
            over the outputs' first dimension unless `weight` says otherwise.
        data: a batch (inputs, targets), or a re-iterable of batches.
        params: names or glob patterns; None for all parameters that require a gradient.
        forward: forward(model, batch) -> (outputs, targets), for batches of another form.
        mode: "train", "eval", or None for the model as it is. Dropout masks are fixed for each batch at construction.
        memory: bytes for kept recordings of a set of several batches (1 GiB when None); one batch is always kept.
        weight: weight(outputs, targets) -> how many terms a batch's loss averages.
        microbatches: run each batch in so many pieces, at most, cut along the first dimension; the average is exact and
            memory is that of a piece. Refused where splitting changes the loss (BatchNorm in train mode). In train mode
            each piece draws its own dropout masks.
        compile: run each product as one compiled program that holds nothing between products. It takes up to a minute
            to compile, anew when the model changes, and then a product of a batch costs about what one from a
            recording does, a quarter to a third less than recording and multiplying: for hundreds of batches of one
            shape whose recordings `memory` cannot keep, and not with BatchNorm in train mode. Where it does not work
            (random draws, shapes that depend on values) it warns and records.
        group: None for this process alone; a torch.distributed process group means that `data` is this rank's shard
            and everything is averaged over the shards of all ranks. Then every call is collective: all ranks make it,
            with the same vectors. A generator's state is taken from the first rank.

    Raises:
        TwofoldError: data of another form, a loss that is not scalar or not finite, unknown parameters, an operation
            without a second derivative; data or a model that give other numbers when they are asked again (see
            `check_determinism`). On the other ranks of a group too.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
        >>> batch = (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> c = Curvature(model, nn.CrossEntropyLoss(), batch)
        >>> v = torch.randn(c.hessian.shape[0])
        >>> h, g, n = c.products(v)
        >>> torch.allclose(h, g + n)
        True
    """

    def __init__(
        self,
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
        compile: bool = False,
        group: ProcessGroup = None,
    ) -> None:
        options: dict[str, Any] = {"params": params, "forward": forward, "mode": mode, "memory": memory}
        options |= {"weight": weight, "microbatches": microbatches, "compile": compile, "group": group}
        self._products = Products(model, loss_fn, data, **options)
        self.layout = self._products.layout

    @cached_property
    def hessian(self) -> Hessian:
        """H, the whole Hessian."""
        return Hessian.of(self._products)

    @cached_property
    def gauss_newton(self) -> GaussNewton:
        """GN, the Gauss-Newton matrix."""
        return GaussNewton.of(self._products)

    @cached_property
    def nme(self) -> NME:
        """NME, the nonlinear modeling error."""
        return NME.of(self._products)

    @cached_property
    def activation_nme(self) -> ActivationNME:
        """The part of the NME that carries phi'', the activations' second derivatives."""
        return ActivationNME.of(self._products)

    @cached_property
    def rest(self) -> RestOfNME:
        """The rest of the NME: that of the same model with phi'' = 0."""
        return RestOfNME.of(self._products)

    @cached_property
    def jacobian(self) -> Jacobian:
        """J [M, P] of all M outputs in the parameters; made by reading the data once."""
        return Jacobian.of(self._products)

    def fisher(
        self, kind: FisherKind = "mc", num_samples: int = 1, *, generator: torch.Generator | None = None
    ) -> Fisher:
        """Return the Fisher matrix with sampled labels ("mc"), or with the data's own ("empirical"); see `Fisher`."""
        return Fisher.of(self._products, kind, num_samples, generator)

    def products(self, vectors: Vectors, parts: Sequence[Matrix] = HALVES) -> tuple[Any, ...]:
        """Return the named matrices times v, sharing passes: H, GN and NME together cost 8/3 of a gradient.

        NME = activation NME + rest, where the first carries the activations' phi'' and the rest is the NME with
        phi'' = 0; with GN they cost 10/3 of a gradient.

        Args:
            vectors: [P], [P, K] or a mapping from parameter names to tensors.
            parts: which of "hessian", "gauss_newton", "nme", "activation_nme", "rest", in the order wanted.

        Returns:
            One result for each part, of the same kind as v.

        Raises:
            TwofoldError: an unknown part, or vectors of another form.
        """
        rows = self._products.matmat(rows_of(self.layout, vectors), _check_parts(parts))
        return tuple(same_kind(self.layout, vectors, part) for part in rows)

    def quadratic_forms(self, vectors: Vectors, parts: Sequence[Matrix] = HALVES) -> dict[Matrix, Float[Tensor, "K"]]:
        """Return v'Av of the named matrices, by order-2 jets: v'GNv = z1'H_z z1 and v'NMEv = <dl/dz, z2>.

        z(theta + e v) = z0 + e z1 + e^2/2 z2 takes one forward pass and keeps no graph: 1.5 to 2 gradients a vector for
        H, GN and NME together. Where the model has an operation that jets do not know, they are taken from the recorded
        graph, as exactly; `path` says which way was taken.

        Args:
            vectors: [P], [P, K] or a mapping from parameter names to tensors.
            parts: which of "hessian", "gauss_newton", "nme", "activation_nme", "rest".

        Returns:
            {part: [K]} in float64 on the CPU, K = 1 for one vector.

        Raises:
            TwofoldError: an unknown part, or vectors of another form.

        Example:
            >>> _ = torch.manual_seed(0)
            >>> model, batch = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), (torch.randn(8, 3), torch.randn(8, 4))
            >>> c = twofold.Curvature(model, nn.MSELoss(), batch)
            >>> v = torch.randn(c.hessian.shape[0])
            >>> torch.allclose(c.quadratic_forms(v)["hessian"].float(), v @ (c.hessian @ v)), c.path
            (True, 'jets')
        """
        return self._products.quadratic_forms(rows_of(self.layout, vectors), _check_parts(parts))

    @property
    def path(self) -> str | None:
        """How the last quadratic forms and traces were taken: "jets" or "recorded graph", with the reason."""
        return self._products.path

    def loss(self) -> float:
        """Return the loss of the whole set."""
        return self._products.loss_and_gradient()[0]

    def gradient(self) -> Float[Tensor, "P"]:
        """Return the gradient of the loss of the whole set, [P]."""
        return self._products.loss_and_gradient()[1]

    def check_determinism(self) -> None:
        """Read the data twice and run each batch twice; cheaper checks are always made where something is read again.

        Random draws are no fault where they come from the global generators of torch, NumPy or Python, whose states
        are replayed.

        Raises:
            TwofoldError: a batch changed, or a loss; it names the batch and the module that gives other outputs.

        Example:
            >>> class Noise(nn.Module):
            ...     generator = torch.Generator()
            ...
            ...     def forward(self, x):
            ...         return x + torch.randn(x.shape, generator=self.generator)
            >>> model = nn.Sequential(nn.Linear(3, 2), Noise())
            >>> c = Curvature(model, nn.CrossEntropyLoss(), (torch.randn(8, 3), torch.randint(2, (8,))))
            >>> c.check_determinism()
            Traceback (most recent call last):
            ...
            twofold.errors.TwofoldError: ... module '1' (Noise) gives different outputs for the same inputs...
        """
        self._products.check_determinism()

    def traces(
        self,
        num_matvecs: int = 64,
        *,
        parts: Sequence[Matrix] = HALVES,
        by_block: bool | Blocks = False,
        atol: float | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[Matrix, Any]:
        """Estimate the traces of H, GN and NME from the same Rademacher probes, E v'Av; see `quadratic_forms`.

        Args:
            num_matvecs: the number of probes.
            parts: which matrices.
            by_block: True or "parameter" for the trace of each parameter's diagonal block, E v_b'(Av)_b, "module" for
                each module's, a list of names or glob patterns for one block each, or {block: patterns}. The traces of
                all blocks come from the same products.
            atol: stop as soon as all standard errors are this at most, in the results' own units (absolute, since the
                trace of the NME may be near 0), after 10 probes at least; num_matvecs is then the most.
            generator: source of the probes; None takes a private one with a fixed seed.

        Returns:
            {part: Estimate}, or {part: {block: Estimate}}; with common probes the estimates add up as the matrices do.

        Raises:
            TwofoldError: an unknown part, or a pattern that matches nothing.

        Warns:
            TwofoldWarning: a standard error did not come down to atol.

        Example:
            >>> model, batch = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (torch.randn(8, 3), torch.randn(8, 2))
            >>> c = twofold.Curvature(model, nn.MSELoss(), batch)
            >>> whole, blocks = c.traces(8)["hessian"], c.traces(8, by_block="module")["hessian"]
            >>> list(blocks), abs(sum(map(float, blocks.values())) - float(whole)) < 1e-4
            (['0', '1'], True)
        """
        chosen = _check_parts(parts)
        if by_block is not False:
            partition = Partition(self.layout, by_block)
            sampled = self._sampled(lambda probe, product: probe * product, chosen, partition)
            return self._estimated(sampled, num_matvecs, atol, generator)

        def forms(probe: Tensor) -> dict[Matrix, dict[str, float]]:
            found = self._products.quadratic_forms(probe.unsqueeze(0), chosen)
            return {part: {_WHOLE: form.item()} for part, form in found.items()}

        return _wholes(self._estimated(forms, num_matvecs, atol, generator))

    def frobenius(
        self,
        num_matvecs: int = 64,
        *,
        parts: Sequence[Matrix] = HALVES,
        by_block: bool | Blocks = False,
        atol: float | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[Matrix, Any]:
        """Estimate the Frobenius norms of H, GN and NME from the same Rademacher probes, E ||Av||^2.

        By block these are the norms of the blocks' rows A_b [p, P], E ||(Av)_b||^2, whose squares sum to ||A||_F^2.
        What a block's rows hold in each column block is told by `block_norms`, at more products.

        Args and returns are those of `traces`.
        """
        partition = Partition(self.layout, [_WHOLE] if by_block is False else by_block)
        squares = self._sampled(lambda _, product: product.double().square(), _check_parts(parts), partition)
        roots = self._estimated(
            squares, num_matvecs, atol, generator, conclude=lambda samples: root_of(summarise(samples))
        )
        return _wholes(roots) if by_block is False else roots

    def block_norms(
        self,
        num_probes: int = 8,
        *,
        parts: Sequence[Matrix] = HALVES,
        blocks: Blocks = "parameter",
        generator: torch.Generator | None = None,
    ) -> dict[Matrix, BlockNorms]:
        """Estimate the Frobenius norms of all blocks A_bc of H, GN and NME: how strongly parameters b and c interact.

        E ||A_bc v_c||^2 = ||A_bc||_F^2 with Rademacher probes v_c on one column block at a time, so that a product
        samples the blocks of one column; since A is symmetric, each block is sampled in its row and in its column.

        Args:
            num_probes: probes for each column block, each taking one product of all parts.
            parts: which matrices.
            blocks: "parameter", "module", a list of names or glob patterns, or {block: patterns}.
            generator: source of the probes; None takes a private one with a fixed seed.

        Returns:
            {part: BlockNorms(blocks, value [blocks, blocks], stderr, num_matvecs)}, in float64 on the CPU.

        Raises:
            TwofoldError: an unknown part, or a pattern that matches nothing.

        Example:
            >>> model, batch = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (torch.randn(8, 3), torch.randn(8, 2))
            >>> norms = twofold.Curvature(model, nn.MSELoss(), batch).block_norms(blocks="module")["nme"]
            >>> norms.blocks, norms["0", "0"].value, norms["0", "1"].value > 0  # a linear network is bilinear
            (('0', '1'), 0.0, True)
        """
        check_count(num_probes, "num_probes")
        chosen, partition = _check_parts(parts), Partition(self.layout, blocks)
        squares: dict[Matrix, list[Tensor]] = {part: [] for part in chosen}
        for probe in rademacher(self.hessian, num_probes, generator):
            tables: dict[Matrix, list[Tensor]] = {part: [] for part in chosen}
            for block in partition.members:
                rows = self._products.matmat(partition.restricted(probe, block).unsqueeze(0), chosen)
                for part, row in zip(chosen, rows, strict=True):
                    tables[part].append(partition.sums(row[0].double().square()))
            for part, columns in tables.items():
                table = torch.stack(columns)
                squares[part].append((table + table.T) / 2)
        return {part: partition.norms(torch.stack(samples)) for part, samples in squares.items()}

    def eigsh(self, k: int = 6, *, which: Which = "LA", part: Matrix = "hessian", **options: Any) -> Eigenpairs:
        """Find k eigenpairs of a matrix, and what each half of the Hessian has of them: v'Hv = v'GN v + v'NME v.

        For part="hessian" the two add up to the eigenvalue: an outlier is of the Gauss-Newton half where v'GN v makes
        it up. For another part they tell what the halves are along its eigenvectors.

        Args:
            k: how many eigenpairs.
            which: "LA" the largest, "SA" the smallest, "LM" the largest in magnitude, "BE" from both ends.
            part: "hessian", "gauss_newton", "nme", "activation_nme" or "rest".
            options: tol, max_matvecs, block_size, basis_size, v0 and generator, as in `twofold.eigsh`.

        Returns:
            Eigenpairs, with .parts = {"gauss_newton": v'GN v, "nme": v'NME v}, each [k]; they take as many products
            more as there are pairs.

        Raises:
            TwofoldError: an unknown part, or what `twofold.eigsh` refuses.

        Example:
            >>> _ = torch.manual_seed(0)
            >>> model, batch = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), (torch.randn(8, 3), torch.randn(8, 4))
            >>> pairs = twofold.Curvature(model, nn.MSELoss(), batch).eigsh(2)
            >>> torch.allclose(pairs.values, pairs.parts["gauss_newton"] + pairs.parts["nme"])
            True
        """
        (part,) = _check_parts((part,))
        pairs = eigsh(getattr(self, part), k, which=which, **options)
        forms = self._products.quadratic_forms(pairs.vectors.T.contiguous(), ("gauss_newton", "nme"))
        return replace(pairs, parts={name: form.to(pairs.values) for name, form in forms.items()})

    def spectral_densities(
        self,
        *,
        parts: Sequence[Matrix] = HALVES,
        num_probes: int = 8,
        steps: int = 50,
        grid: Float[Tensor, "G"] | None = None,
        sigma: float | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[Matrix, SpectralDensity]:
        """Estimate the spectral densities of H, GN and NME from the same probes, on a common grid of equal width.

        Args:
            parts: which matrices.
            num_probes: how many probes.
            steps: products for each probe and part.
            grid: ascending points for the curves; None covers the nodes of all parts.
            sigma: the curves' width; None takes 1/100 of the range of all nodes.
            generator: source of the probes; None takes a private one with a fixed seed.

        Returns:
            {part: SpectralDensity}.

        Raises:
            TwofoldError: an unknown part, or what `twofold.spectral_density` refuses.

        Example:
            >>> model, batch = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), (torch.randn(8, 3), torch.randn(8, 4))
            >>> densities = twofold.Curvature(model, nn.MSELoss(), batch).spectral_densities(num_probes=2)
            >>> list(densities), torch.equal(densities["nme"].grid, densities["gauss_newton"].grid)
            (['hessian', 'gauss_newton', 'nme'], True)
        """
        operators = {part: getattr(self, part) for part in _check_parts(parts)}
        return spectral_densities(
            operators, num_probes=num_probes, steps=steps, grid=grid, sigma=sigma, generator=generator
        )

    def inner(self, num_matvecs: int = 64, *, generator: torch.Generator | None = None) -> InnerProduct:
        """Estimate <GN, NME>_F = E (GN v)'(NME v) and its cosine from the same Rademacher probes.

        The cosine, <GN, NME>_F / (||GN||_F ||NME||_F), says whether the halves add up or cancel:
        ||H||_F^2 = ||GN||_F^2 + 2 <GN, NME>_F + ||NME||_F^2. Its error is that of the delta method.

        Args:
            num_matvecs: the number of probes.
            generator: source of the probes; None takes a private one with a fixed seed.

        Returns:
            InnerProduct(value, cosine), each an Estimate; the cosine is nan where a half is zero.
        """
        check_count(num_matvecs)
        dots, gauss_newton, nme = [], [], []
        for probe in rademacher(self.hessian, num_matvecs, generator):
            g, n = (rows[0].double() for rows in self._products.matmat(probe.unsqueeze(0), ("gauss_newton", "nme")))
            dots.append(torch.dot(g, n).item())
            gauss_newton.append(torch.dot(g, g).item())
            nme.append(torch.dot(n, n).item())
        return InnerProduct(summarise(dots), cosine_of(dots, gauss_newton, nme))

    def _sampled(
        self, entries: Callable[[Tensor, Tensor], Tensor], parts: Sequence[Matrix], partition: Partition
    ) -> Callable[[Tensor], dict[Matrix, dict[str, float]]]:
        """What a probe samples: sums over each block of what every entry of the probe and its product adds."""

        def sample(probe: Tensor) -> dict[Matrix, dict[str, float]]:
            rows = self._products.matmat(probe.unsqueeze(0), parts)
            return {
                part: dict(zip(partition.members, partition.sums(entries(probe, row[0])).tolist(), strict=True))
                for part, row in zip(parts, rows, strict=True)
            }

        return sample

    def _estimated(
        self,
        sample: Callable[[Tensor], dict[Matrix, dict[str, float]]],
        num_matvecs: int,
        atol: float | None,
        generator: torch.Generator | None,
        *,
        conclude: Callable[[Sequence[float]], Estimate] = summarise,
    ) -> dict[Matrix, dict[str, Estimate]]:
        """Conclude from the samples of Rademacher probes, as many as it takes to come down to atol."""
        check_count(num_matvecs)
        check_atol(atol)
        samples: dict[Matrix, dict[str, list[float]]] = {}
        found: dict[Matrix, dict[str, Estimate]] = {}
        for count, probe in enumerate(rademacher(self.hessian, num_matvecs, generator), start=1):
            for part, of in sample(probe).items():
                for block, value in of.items():
                    samples.setdefault(part, {}).setdefault(block, []).append(value)
            if atol is None and count < num_matvecs:
                continue
            found = {part: {block: conclude(values) for block, values in of.items()} for part, of in samples.items()}
            every = [estimate for of in found.values() for estimate in of.values()]
            if atol is not None and precise(every, atol):
                return found
        worst = max(estimate.stderr for of in found.values() for estimate in of.values())
        warn_imprecise("curvature", worst, num_matvecs, atol)
        return found


def _wholes(estimates: dict[Matrix, dict[str, Estimate]]) -> dict[Matrix, Estimate]:
    return {part: of[_WHOLE] for part, of in estimates.items()}


def _check_parts(parts: Sequence[Matrix]) -> tuple[Matrix, ...]:
    parts = parts if isinstance(parts, str) else tuple(parts)
    unknown = [part for part in parts if part not in MATRICES]
    if isinstance(parts, str) or unknown or not parts:
        raise TwofoldError(f"parts must name matrices among {', '.join(MATRICES)}; {parts!r} came.")
    return tuple(parts)
