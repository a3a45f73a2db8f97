"""torch's own losses, recognised as modules, functionals and partials of them, so that their averages are exact."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import _reduction
from torch.nn import functional as F

from twofold.batches import describe
from twofold.curvature.losses import MSE, BCEWithLogits, CrossEntropy, Elementwise, Loss, describe_loss
from twofold.errors import NOT_SCALAR, TwofoldError
from twofold.types import LossFn, Weight


class _Counted(Loss):
    """One of torch's other losses: differentiated like any callable, its terms those of another loss."""

    tensors_only = True

    def __init__(self, loss_fn: LossFn, weight: Weight | None, *, averages: bool, like: Loss) -> None:
        super().__init__(loss_fn, weight, averages=averages)
        self._like = like

    def _terms(self, outputs: Any, targets: Any) -> float:
        return self._like._terms(outputs, targets)

    def term_weights(self, outputs: Tensor, targets: Any) -> list[Tensor]:
        """Return the weights of the terms."""
        return self._like.term_weights(outputs, targets)

    def within_terms(self, entries: Sequence[Tensor]) -> list[Tensor]:
        """Sum over the entries of each term."""
        return self._like.within_terms(entries)


class _Rows(Loss):
    """One term for each row; a vector of outputs is one row."""

    def _terms(self, outputs: Tensor, targets: Any) -> float:
        return float(outputs.shape[0]) if outputs.dim() > 1 else 1.0

    def term_weights(self, outputs: Tensor, targets: Any) -> list[Tensor]:
        """Return the weight of a row."""
        return super().term_weights(outputs if outputs.dim() > 1 else outputs.unsqueeze(0), targets)

    def within_terms(self, entries: Sequence[Tensor]) -> list[Tensor]:
        """Sum over the columns."""
        return [
            one.flatten(1).sum(1).view(-1, *[1] * (one.dim() - 1)) if one.dim() > 1 else one.sum() for one in entries
        ]


_MODULES: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.MSELoss: F.mse_loss,
    nn.NLLLoss: F.nll_loss,
    nn.L1Loss: F.l1_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.HuberLoss: F.huber_loss,
    nn.BCELoss: F.binary_cross_entropy,
    nn.KLDivLoss: F.kl_div,
    nn.PoissonNLLLoss: F.poisson_nll_loss,
    nn.SoftMarginLoss: F.soft_margin_loss,
    nn.HingeEmbeddingLoss: F.hinge_embedding_loss,
    nn.MultiMarginLoss: F.multi_margin_loss,
    nn.MultiLabelMarginLoss: F.multilabel_margin_loss,
    nn.MultiLabelSoftMarginLoss: F.multilabel_soft_margin_loss,
}
_CLOSED_FORMS = {
    F.cross_entropy: CrossEntropy,
    F.binary_cross_entropy_with_logits: BCEWithLogits,
    F.mse_loss: MSE,
}
_BY_ROW = {F.multi_margin_loss, F.multilabel_margin_loss, F.multilabel_soft_margin_loss}


def as_loss(loss_fn: LossFn | Loss, weight: Weight | None = None) -> Loss:
    """Recognise a loss function.

    Args:
        loss_fn: a loss module or functional of torch or a partial of one, or any callable (outputs, targets) -> scalar.
        weight: overrides how many terms a batch counts for.

    Raises:
        TwofoldError: when it is not callable, or does not reduce to a scalar.
    """
    if isinstance(loss_fn, Loss):
        return loss_fn
    if not callable(loss_fn):
        raise TwofoldError(f"loss_fn must be callable as loss_fn(outputs, targets); {describe(loss_fn)} came.")
    functional, options = _resolve(loss_fn)
    if functional is None:
        return Loss(loss_fn, weight)
    reduction = options.get("reduction", "mean")
    if options.get("size_average") is not None or options.get("reduce") is not None:
        reduction = _reduction.legacy_get_string(options.get("size_average"), options.get("reduce"), emit_warning=False)
    if reduction == "none":
        raise TwofoldError(NOT_SCALAR.format(came=f'{describe_loss(loss_fn)} with reduction="none"'))
    averages = reduction != "sum"
    if functional in _CLOSED_FORMS:
        return _CLOSED_FORMS[functional](loss_fn, weight, averages=averages, options=options)
    return _Counted(loss_fn, weight, averages=averages, like=_same_terms(functional, averages, reduction, options))


def is_torch_loss(function: Any) -> bool:
    """Tell whether a function is one of torch's own losses."""
    return function in _MODULES.values()


def _same_terms(functional: Callable[..., Tensor], averages: bool, reduction: str, options: dict[str, Any]) -> Loss:
    """A loss with the same terms."""
    if functional is F.nll_loss:
        return CrossEntropy(functional, None, averages=averages, options=options)
    if functional is F.l1_loss:
        return MSE(functional, None, averages=averages, options=options)
    if reduction == "batchmean":
        return Loss(functional, averages=averages)
    if functional in _BY_ROW:
        return _Rows(functional, averages=averages)
    return Elementwise(functional, None, averages=averages, options=options)


def _resolve(loss_fn: Any) -> tuple[Callable[..., Tensor] | None, dict[str, Any]]:
    """Find the functional behind a loss and the options that it was given; (None, {}) when it is not torch's own."""
    if isinstance(loss_fn, functools.partial):
        if loss_fn.args:
            return None, {}
        functional, options = _resolve(loss_fn.func)
        return functional, {**options, **loss_fn.keywords}
    inner = getattr(loss_fn, "_orig_mod", None) or getattr(loss_fn, "_torchdynamo_orig_callable", None)
    if inner is not None:
        return _resolve(inner)
    owner = getattr(loss_fn, "__self__", None)
    if isinstance(owner, nn.Module) and loss_fn == owner.forward:
        return _resolve(owner)
    if isinstance(loss_fn, nn.Module):
        # A subclass that keeps its parent's forward computes its parent's loss.
        parent = next((base for base in type(loss_fn).__mro__ if base in _MODULES), None)
        same = parent is not None and type(loss_fn).forward is parent.forward
        functional = _MODULES[parent] if same else None
        if functional is None or loss_fn._forward_hooks or loss_fn._forward_pre_hooks:
            return None, {}
        known = inspect.signature(functional).parameters
        return functional, {name: getattr(loss_fn, name) for name in known if hasattr(loss_fn, name)}
    return (loss_fn, {}) if loss_fn in _MODULES.values() else (None, {})
