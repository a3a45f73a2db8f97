"""What a loss gives to curvature: its value, how many terms it averages, H_z products and sampled residuals.

Cross-entropy, BCE-with-logits and MSE have H_z in closed form; any other callable is differentiated twice, in its
outputs only. Which of torch's losses is which is told in `torch_losses`.

With p = softmax(z) and S_n the total target weight of term n over the batch's denominator,

    cross-entropy     H_z,n = S_n (diag p_n - p_n p_n')
    BCE with logits   H_z   = s sigma(z) (1 - sigma(z))
    MSE               H_z   = 2 w / sum w
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from twofold.batches import describe
from twofold.errors import LOSS_ARGUMENTS, NOT_SCALAR, TwofoldError
from twofold.types import LossFn, Weight

Residual: TypeAlias = Literal["labels", "gaussian"]
OutputProduct: TypeAlias = Callable[[Sequence[Tensor]], list[Tensor]]


class Loss:
    """A loss seen as a function of the outputs only; this class serves any callable, its subclasses the closed forms.

    Args:
        loss_fn: loss_fn(outputs, targets) -> scalar.
        weight: how many terms the loss averages in a batch; None counts the outputs' first dimension.

    Attributes:
        averages: True when the loss is a mean over its terms, False when it is a sum.
        tensors_only: True for torch's own losses, which take one tensor of outputs.
    """

    tensors_only = False

    def __init__(self, loss_fn: LossFn, weight: Weight | None = None, *, averages: bool = True) -> None:
        self.loss_fn = loss_fn
        self.averages = averages
        self._weight = weight

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss, a scalar tensor.

        Raises:
            TwofoldError: when it is anything else.
        """
        if self.tensors_only and not isinstance(outputs, Tensor):
            raise TwofoldError(
                f"{describe_loss(self.loss_fn)} takes one tensor; the model's outputs are {describe(outputs)}. "
                "Pass forward=f with f(model, batch) -> (outputs, targets) that picks it."
            )
        value = called(self.loss_fn, outputs, targets)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            raise TwofoldError(NOT_SCALAR.format(came=describe(value)))
        return value.reshape(())

    def count(self, outputs: Any, targets: Any) -> float:
        """Return the weight of this batch in the average over a data set; 1 where the loss is a sum."""
        if self._weight is not None:
            count = float(self._weight(outputs, targets))
            if not 0 <= count < float("inf"):
                raise TwofoldError(f"weight(outputs, targets) must be finite and not negative; it gave {count}.")
            return count
        return self._terms(outputs, targets) if self.averages else 1.0

    def _terms(self, outputs: Any, targets: Any) -> float:
        first = next(leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor))
        return float(first.shape[0]) if first.dim() else 1.0

    def output_hessian(self, outputs: Any, targets: Any) -> OutputProduct:
        """Return t -> H_z t, over the differentiable tensors among the outputs.

        Args:
            outputs: detached outputs (a tensor or any nest of them).
            targets: the batch's targets.
        """
        leaves, rebuilt = detached_leaves(outputs)
        value = self(rebuilt, targets)
        if not value.requires_grad:
            return lambda tangents: [torch.zeros_like(leaf) for leaf in leaves]
        gradients = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
        curved = [gradient for gradient in gradients if gradient.requires_grad]

        def product(tangents: Sequence[Tensor]) -> list[Tensor]:
            if not curved:
                return [torch.zeros_like(leaf) for leaf in leaves]
            chosen = [t for gradient, t in zip(gradients, tangents, strict=True) if gradient.requires_grad]
            return list(torch.autograd.grad(curved, leaves, chosen, retain_graph=True, materialize_grads=True))

        return product

    def term_weights(self, outputs: Any, targets: Any) -> list[Tensor]:
        """Return w_n of l = sum_n w_n l_n, for each differentiable tensor of the outputs; shapes broadcast to theirs.

        The terms of any callable are the rows of the outputs' first dimension.
        """
        leaves = [leaf for leaf in tree_flatten(outputs)[0] if is_differentiable(leaf)]
        rows = {leaf.shape[0] if leaf.dim() else 1 for leaf in leaves}
        if len(rows) > 1:
            raise TwofoldError(
                f"{describe_loss(self.loss_fn)} counts a term for each row of the outputs, and these have "
                f"{' and '.join(map(str, sorted(rows)))} rows: {describe(outputs)}."
            )
        weight = 1 / rows.pop() if self.averages else 1.0
        return [torch.full((), weight, dtype=_wide(leaf), device=leaf.device) for leaf in leaves]

    def within_terms(self, entries: Sequence[Tensor]) -> list[Tensor]:
        """Sum over the entries of each term, in shapes that broadcast to those of the outputs."""
        sums = [one.reshape(len(one), -1).sum(1) if one.dim() else one for one in entries]
        total = torch.stack([one.to(sums[0]) for one in sums]).sum(0)
        return [total.to(one).view(-1, *[1] * (one.dim() - 1)) if one.dim() else total.to(one) for one in entries]

    def output_third(self, outputs: Any, targets: Any) -> OutputProduct:
        """Return t -> the gradient of t'H_z t in the outputs, t held fixed; arguments are those of `output_hessian`."""

        def third(tangents: Sequence[Tensor]) -> list[Tensor]:
            leaves, rebuilt = detached_leaves(outputs)
            with torch.enable_grad():
                value = self(rebuilt, targets)
                for _ in range(2):
                    value = _along(value, leaves, tangents)
                if not value.requires_grad:
                    return [torch.zeros_like(leaf) for leaf in leaves]
                return list(torch.autograd.grad(value, leaves, materialize_grads=True))

        return third

    def residual(self, outputs: Tensor, targets: Any, kind: Residual, generator: torch.Generator | None) -> Tensor:
        """Draw r with covariance H_z, so that E ||J' r||^2 = tr GN.

        Args:
            outputs: z; the residual is a differentiable function of it.
            targets: the batch's targets.
            kind: "labels" draws labels from the model, r = sqrt(w) (p - onehot(y^)); "gaussian" draws
                r = H_z^(1/2) xi, whose square has the true gradient in z too.
            generator: None draws from torch's global generator.

        Raises:
            TwofoldError: the loss is not one whose predictive distribution is known.
        """
        raise TwofoldError(
            f"No predictive distribution is known for {describe_loss(self.loss_fn)}: no labels can be drawn from it. "
            "Use cross-entropy, BCE-with-logits or MSE from torch, or what needs no labels: estimator='hutchinson' for "
            "a penalty, kind='empirical' for the Fisher matrix."
        )


class CrossEntropy(Loss):
    """torch's cross_entropy with all its options: class weights, ignore_index, smoothing, soft targets, any rank."""

    tensors_only = True

    def __init__(self, loss_fn: LossFn, weight: Weight | None, *, averages: bool, options: dict[str, Any]) -> None:
        super().__init__(loss_fn, weight, averages=averages)
        self._class_weights: Tensor | None = options.get("weight")
        self._ignore_index: int = options.get("ignore_index", -100)
        self._smoothing: float = options.get("label_smoothing", 0.0)

    def _terms(self, outputs: Tensor, targets: Tensor) -> float:
        return float(self._denominator(outputs, targets))

    def _denominator(self, outputs: Tensor, targets: Tensor) -> Tensor | float:
        if targets.is_floating_point():
            return outputs.numel() / outputs.shape[_class_dim(outputs)]
        kept = targets != self._ignore_index
        if self._class_weights is None:
            return kept.sum()
        return self._class_weights.to(outputs.device, _wide(outputs))[targets[kept].long()].sum()

    def _scale(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """S_n over the denominator, with a class dimension of 1."""
        dim, classes = _class_dim(outputs), outputs.shape[_class_dim(outputs)]
        weights = None if self._class_weights is None else self._class_weights.to(outputs.device, _wide(outputs))
        if targets.is_floating_point():
            smooth = targets.to(_wide(outputs)) * (1 - self._smoothing) + self._smoothing / classes
            shape = [-1 if axis == dim else 1 for axis in range(outputs.dim())]
            total = (smooth if weights is None else smooth * weights.view(shape)).sum(dim, keepdim=True)
        else:
            kept = targets != self._ignore_index
            if weights is None:
                total = kept.to(_wide(outputs))
            else:
                picked = weights[torch.where(kept, targets, 0).long()]
                total = torch.where(kept, (1 - self._smoothing) * picked + self._smoothing * weights.mean(), 0.0)
            total = total.unsqueeze(dim)
        return total / self._denominator(outputs, targets) if self.averages else total

    def term_weights(self, outputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Return S_n: a term is what shares one softmax."""
        return [self._scale(outputs, targets)]

    def within_terms(self, entries: Sequence[Tensor]) -> list[Tensor]:
        """Sum over the classes."""
        return [one.sum(_class_dim(one), keepdim=True) for one in entries]

    def output_hessian(self, outputs: Tensor, targets: Tensor) -> OutputProduct:
        """Return t -> S (p t - p <p, t>)."""
        dim = _class_dim(outputs)
        p = outputs.detach().to(_wide(outputs)).softmax(dim)
        scale = self._scale(outputs, targets)

        def product(tangents: Sequence[Tensor]) -> list[Tensor]:
            weighted = p * tangents[0]
            weighted.addcmul_(p, weighted.sum(dim, keepdim=True), value=-1).mul_(scale)
            return [weighted.to(tangents[0].dtype)]

        return product

    def output_third(self, outputs: Tensor, targets: Tensor) -> OutputProduct:
        """Return t -> H_z d^2 with d = t - <p, t>."""
        dim = _class_dim(outputs)
        p, product = outputs.detach().to(_wide(outputs)).softmax(dim), self.output_hessian(outputs, targets)
        return lambda tangents: product([(tangents[0] - (p * tangents[0]).sum(dim, keepdim=True)).square()])

    def residual(self, outputs: Tensor, targets: Any, kind: Residual, generator: torch.Generator | None) -> Tensor:
        """Draw sqrt(S) (p - onehot(y^)), or sqrt(S) (diag sqrt(p) - p sqrt(p)') xi."""
        dim = _class_dim(outputs)
        log_p = outputs.to(_wide(outputs)).log_softmax(dim)
        root = self._scale(outputs, targets).sqrt()
        if kind == "labels":
            rows = log_p.detach().exp().movedim(dim, -1)
            drawn = torch.multinomial(rows.reshape(-1, rows.shape[-1]), 1, generator=generator)
            one_hot = torch.zeros_like(rows).reshape(-1, rows.shape[-1]).scatter_(1, drawn, 1.0)
            return (root * (log_p.exp() - one_hot.reshape(rows.shape).movedim(-1, dim))).to(outputs.dtype)
        noise = _normal_like(log_p, generator)
        spread = (0.5 * log_p).exp() * noise
        inner = ((0.5 * log_p).exp() * noise).sum(dim, keepdim=True)
        return (root * (spread - log_p.exp() * inner)).to(outputs.dtype)


class Elementwise(Loss):
    """A mean or sum of one term per output entry; subclasses add H_z, which is diagonal."""

    tensors_only = True

    def __init__(self, loss_fn: LossFn, weight: Weight | None, *, averages: bool, options: dict[str, Any]) -> None:
        super().__init__(loss_fn, weight, averages=averages)
        self._options = options

    def _terms(self, outputs: Tensor, targets: Tensor) -> float:
        return _entries(outputs, targets)

    def term_weights(self, outputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Return the weight of every entry, each a term."""
        _refuse_broadcast(self.loss_fn, outputs, targets)
        weights = self._options.get("weight")
        ones = torch.ones((), dtype=_wide(outputs), device=outputs.device)
        return [torch.as_tensor(self._per_entry(ones if weights is None else weights.to(ones), outputs, targets))]

    def within_terms(self, entries: Sequence[Tensor]) -> list[Tensor]:
        """Return the entries."""
        return list(entries)

    def _per_entry(self, weights: Tensor | float, outputs: Tensor, targets: Tensor) -> Tensor | float:
        return weights / self._terms(outputs, targets) if self.averages else weights


class BCEWithLogits(Elementwise):
    """torch's binary_cross_entropy_with_logits, with weight and pos_weight."""

    def _scale(self, outputs: Tensor, targets: Tensor) -> Tensor:
        y = targets.to(_wide(outputs))
        positive = self._options.get("pos_weight")
        scale = torch.ones_like(y) if positive is None else 1 - y + positive.to(y) * y
        weights = self._options.get("weight")
        scale = scale if weights is None else scale * weights.to(y)
        return torch.as_tensor(self._per_entry(scale, outputs, targets))

    def term_weights(self, outputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Return s: the weight of an entry, pos_weight among it."""
        return [self._scale(outputs, targets)]

    def output_hessian(self, outputs: Tensor, targets: Tensor) -> OutputProduct:
        """Return t -> s sigma (1 - sigma) t."""
        p = outputs.detach().to(_wide(outputs)).sigmoid()
        diagonal = self._scale(outputs, targets) * p * (1 - p)
        return lambda tangents: [(diagonal * tangents[0]).to(tangents[0].dtype)]

    def output_third(self, outputs: Tensor, targets: Tensor) -> OutputProduct:
        """Return t -> s sigma (1 - sigma) (1 - 2 sigma) t^2."""
        bend, product = 1 - 2 * outputs.detach().to(_wide(outputs)).sigmoid(), self.output_hessian(outputs, targets)
        return lambda tangents: product([(bend * tangents[0].square()).to(tangents[0].dtype)])

    def residual(self, outputs: Tensor, targets: Any, kind: Residual, generator: torch.Generator | None) -> Tensor:
        """Draw sqrt(s) (sigma - Bernoulli(sigma)), or sqrt(s sigma (1 - sigma)) xi."""
        z = outputs.to(_wide(outputs))
        root = self._scale(outputs, targets).sqrt()
        if kind == "labels":
            return (root * (z.sigmoid() - torch.bernoulli(z.detach().sigmoid(), generator=generator))).to(outputs.dtype)
        spread = (0.5 * (F.logsigmoid(z) + F.logsigmoid(-z))).exp()
        return (root * spread * _normal_like(z, generator)).to(outputs.dtype)


class MSE(Elementwise):
    """torch's mse_loss, with its entry weights."""

    def _terms(self, outputs: Tensor, targets: Tensor) -> float:
        weights = self._options.get("weight")
        return super()._terms(outputs, targets) if weights is None else float(weights.sum())

    def _scale(self, outputs: Tensor, targets: Tensor) -> Tensor:
        _refuse_broadcast(self.loss_fn, outputs, targets)
        weights = self._options.get("weight")
        ones = torch.ones((), dtype=_wide(outputs), device=outputs.device)
        scale = 2 * (ones if weights is None else weights.to(ones))
        return torch.as_tensor(self._per_entry(scale, outputs, targets))

    def output_hessian(self, outputs: Tensor, targets: Tensor) -> OutputProduct:
        """Return t -> 2 w t / sum w."""
        scale = self._scale(outputs, targets)
        return lambda tangents: [(scale * tangents[0]).to(tangents[0].dtype)]

    def output_third(self, outputs: Tensor, targets: Tensor) -> OutputProduct:
        """Return t -> 0."""
        return lambda tangents: [torch.zeros_like(tangents[0])]

    def residual(self, outputs: Tensor, targets: Any, kind: Residual, generator: torch.Generator | None) -> Tensor:
        """Draw from a Gaussian with covariance H_z, which does not depend on z."""
        return self._scale(outputs, targets).sqrt().to(outputs.dtype) * _normal_like(outputs, generator)


def _refuse_broadcast(loss_fn: LossFn, outputs: Tensor, targets: Tensor) -> None:
    if torch.broadcast_shapes(outputs.shape, targets.shape) != outputs.shape:
        raise TwofoldError(
            f"{describe_loss(loss_fn)} broadcasts outputs {tuple(outputs.shape)} against targets "
            f"{tuple(targets.shape)}, which is hardly meant: reshape the targets to the outputs' shape."
        )


def _entries(outputs: Tensor, targets: Tensor) -> float:
    return float(torch.broadcast_shapes(outputs.shape, targets.shape).numel())


def called(loss_fn: LossFn, outputs: Any, targets: Any) -> Any:
    """Return loss_fn(outputs, targets).

    Raises:
        TwofoldError: it takes other arguments than these two.
    """
    try:
        return loss_fn(outputs, targets)
    except TypeError as error:
        try:
            signature = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
        except (TypeError, ValueError):
            raise error from None
        try:
            signature.bind(outputs, targets)
        except TypeError:
            name = describe_loss(loss_fn)
            raise TwofoldError(LOSS_ARGUMENTS.format(name=name, takes=", ".join(signature.parameters))) from error
        raise


def describe_loss(loss_fn: Any) -> str:
    """Name a loss function for a message."""
    if isinstance(loss_fn, functools.partial):
        return f"partial({describe_loss(loss_fn.func)})"
    return getattr(loss_fn, "__name__", type(loss_fn).__name__)


def detached_leaves(outputs: Any) -> tuple[list[Tensor], Any]:
    """Take the outputs off their graph: the floating-point tensors as leaves, and the same nest with copies of them.

    Copies, since a loss may work in place.
    """
    flat, spec = tree_flatten(outputs)
    flat = [leaf.detach().requires_grad_() if is_differentiable(leaf) else leaf for leaf in flat]
    with torch.enable_grad():
        copies = [leaf.clone() if is_differentiable(leaf) else leaf for leaf in flat]
    return [leaf for leaf in flat if is_differentiable(leaf)], tree_unflatten(copies, spec)


def _along(value: Tensor, leaves: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """The derivative of a scalar along tangents, with a graph of its own."""
    if not value.requires_grad:
        return value
    slopes = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
    return torch.stack([(slope * t).sum() for slope, t in zip(slopes, tangents, strict=True)]).sum()


def is_differentiable(leaf: Any) -> bool:
    """Tell whether a loss can be differentiated in this leaf of the outputs."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _class_dim(outputs: Tensor) -> int:
    return 1 if outputs.dim() > 1 else 0


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _normal_like(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device, generator=generator)
