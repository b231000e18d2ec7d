"""From a loss module of ``torch.nn`` to the likelihood that it is, or a refusal by name."""

from collections.abc import Callable

from torch import nn

from natgrad.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson

_NORMALIZER = {"mean": "element", "sum": "none"}

# Why a loss is no negative log-likelihood with a Fisher matrix in closed form, and what to use instead.
_REFUSED: dict[str, str] = {
    "NLLLoss": "its input are log-probabilities, not logits; use CrossEntropyLoss on the logits",
    "BCELoss": "its input are probabilities, not logits; use BCEWithLogitsLoss on the logits",
    "L1Loss": "its second derivative is zero wherever it exists; use MSELoss",
    "SmoothL1Loss": "it is not the negative log-likelihood of a distribution that the library has; use MSELoss",
    "HuberLoss": "it is not the negative log-likelihood of a distribution that the library has; use MSELoss",
    "GaussianNLLLoss": "its variance is a second output of the model; use MSELoss, or write a Likelihood of your own",
    "KLDivLoss": "its input are log-probabilities; use CrossEntropyLoss with probabilities as targets",
    "CTCLoss": "its targets are not one per position; write a Likelihood of your own",
}


def likelihood_of(loss: nn.Module) -> Likelihood:
    """The likelihood with ``likelihood_of(loss).nll(z, y) == loss(z, y)``.

    ``MSELoss`` → :class:`Gaussian` of variance ½; ``BCEWithLogitsLoss`` (with ``weight``, ``pos_weight``) and
    ``MultiLabelSoftMarginLoss`` → :class:`Bernoulli`; ``CrossEntropyLoss`` (classes in dimension 1; ``weight``,
    ``ignore_index``, ``label_smoothing``, probabilities as targets) → :class:`Categorical`; ``PoissonNLLLoss`` →
    :class:`Poisson`.

    Args:
        loss: an instance, with ``reduction="mean"`` or ``"sum"``.

    Raises:
        TypeError: what arrived is no instance of a loss module.
        ValueError: the loss, or one of its settings, cannot be represented; it is named.
    """
    if not isinstance(loss, nn.Module):
        hint = "an instance, such as torch.nn.MSELoss()" if isinstance(loss, type) else "a loss module of torch.nn"
        raise TypeError(f"likelihood_of: expected {hint}; got {loss!r}")
    name = type(loss).__name__
    make = _MAKERS.get(type(loss))
    if make is None:
        reason = _REFUSED.get(name, f"known losses are {', '.join(kind.__name__ for kind in _MAKERS)}")
        if any(isinstance(loss, kind) for kind in _MAKERS):
            reason = "a subclass may compute something else; pass the likelihood itself"
        raise ValueError(f"likelihood_of: {name} cannot be represented: {reason}")
    reduction = getattr(loss, "reduction", "mean")
    if reduction not in _NORMALIZER:
        raise ValueError(f"likelihood_of: {name}(reduction={reduction!r}) is no scalar; use 'mean' or 'sum'")
    return make(loss)


def _gaussian(loss: nn.MSELoss) -> Gaussian:
    return Gaussian(variance=0.5, normalizer=_NORMALIZER[loss.reduction])


def _bernoulli(loss: nn.BCEWithLogitsLoss) -> Bernoulli:
    return Bernoulli(_NORMALIZER[loss.reduction], pos_weight=loss.pos_weight, weight=loss.weight)


def _multi_label(loss: nn.MultiLabelSoftMarginLoss) -> Bernoulli:
    if loss.reduction == "sum":
        raise ValueError(
            "likelihood_of: MultiLabelSoftMarginLoss(reduction='sum') averages over the classes and sums over the "
            "examples; use reduction='mean', or BCEWithLogitsLoss(reduction='sum')"
        )
    return Bernoulli("element", weight=loss.weight)


def _categorical(loss: nn.CrossEntropyLoss) -> Categorical:
    normalizer = _NORMALIZER[loss.reduction]
    return Categorical(
        "weighted" if normalizer == "element" and loss.weight is not None else normalizer,
        class_weight=loss.weight,
        ignore_index=loss.ignore_index,
        label_smoothing=loss.label_smoothing,
        class_dim=1,
    )


def _poisson(loss: nn.PoissonNLLLoss) -> Poisson:
    if not loss.log_input or loss.full:
        raise ValueError("likelihood_of: PoissonNLLLoss is represented with log_input=True and full=False only")
    return Poisson(_NORMALIZER[loss.reduction])


_MAKERS: dict[type[nn.Module], Callable[..., Likelihood]] = {
    nn.MSELoss: _gaussian,
    nn.BCEWithLogitsLoss: _bernoulli,
    nn.MultiLabelSoftMarginLoss: _multi_label,
    nn.CrossEntropyLoss: _categorical,
    nn.PoissonNLLLoss: _poisson,
}
