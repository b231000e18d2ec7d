r"""Tables 3.I and 3.II of the thesis: loss, second derivatives and Fisher weights in the outputs f, not the logits.

======================  =============================  ==========================  =======================
likelihood              l(f, y)                        ∂²l/∂f² [table 3.I]         D(f) [table 3.II]
======================  =============================  ==========================  =======================
``Gaussian(variance)``  ``½ ‖f − y‖² / variance``      ``I / variance``            ``I / variance``
``Bernoulli``           ``−y log f − (1−y) log(1−f)``  ``y/f² + (1−y)/(1−f)²``     ``1 / (f (1−f))``
``Categorical``         ``−yᵀ log f``                  ``diag(y / f²)``            ``diag(1 / f)``
======================  =============================  ==========================  =======================

f is the mean of p(y | z): z itself, sigmoid(z), softmax(z). The thesis prints I in the first row for ``‖f − y‖²``,
whose second derivative is 2 I: that is ``variance=0.5``. Everything here is per example, divided by nothing; all three
matrices are diagonal and given by their diagonals. ``GaussNewton(linearize="probabilities")`` and
``Fisher(parametrization="probabilities")`` are the same matrices carried to the parameters.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.likelihoods.bernoulli import Bernoulli
from natgrad.likelihoods.categorical import Categorical
from natgrad.likelihoods.gaussian import Gaussian

Tabulated = Gaussian | Bernoulli | Categorical


def loss(likelihood: Tabulated, f: Float[Tensor, "batch *out"], y: Tensor) -> Float[Tensor, " batch"]:
    """l(f, y) of every example.

    Args:
        likelihood: one of the three; its own weights and its normaliser do not enter.
        f: outputs: means, or probabilities in (0, 1).
        y: targets shaped like f; for ``Categorical`` also classes, integers without f's last dimension.

    Raises:
        TypeError: another likelihood.
        ValueError: y does not fit f.
    """
    y = _targets(likelihood, f, y)
    if isinstance(likelihood, Gaussian):
        losses = 0.5 * (f - y).square() / likelihood.variance
    elif isinstance(likelihood, Bernoulli):
        losses = -(torch.xlogy(y, f) + torch.xlogy(1 - y, 1 - f))
    else:
        losses = -torch.xlogy(y, f)
    return losses.flatten(1).sum(1)


def derivative(likelihood: Tabulated, f: Float[Tensor, "batch *out"], y: Tensor) -> Float[Tensor, "batch *out"]:
    """∂l/∂f of every example [THESIS, app. A], f's entries taken as free (those of a softmax too)."""
    y = _targets(likelihood, f, y)
    if isinstance(likelihood, Gaussian):
        return (f - y) / likelihood.variance
    if isinstance(likelihood, Bernoulli):
        return (1 - y) / (1 - f) - y / f
    return -y / f


def second_derivative(likelihood: Tabulated, f: Float[Tensor, "batch *out"], y: Tensor) -> Float[Tensor, "batch *out"]:
    """The diagonal of ∂²l/∂f² of every example [THESIS, table 3.I]: the Gauss-Newton weight; targets appear in it."""
    y = _targets(likelihood, f, y)
    if isinstance(likelihood, Gaussian):
        return torch.full_like(f, 1 / likelihood.variance)
    if isinstance(likelihood, Bernoulli):
        return y / f.square() + (1 - y) / (1 - f).square()
    return y / f.square()


def fisher_weight(likelihood: Tabulated, f: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *out"]:
    """The diagonal of D(f) of every example [THESIS, table 3.II]: E_y of ∂²l/∂f², y drawn from the model."""
    _check(likelihood)
    if isinstance(likelihood, Gaussian):
        return torch.full_like(f, 1 / likelihood.variance)
    if isinstance(likelihood, Bernoulli):
        return 1 / (f * (1 - f))
    return 1 / f


def outer_product_excess(
    likelihood: Tabulated, f: Float[Tensor, "batch *out"], y: Tensor
) -> Float[Tensor, "batch size size"]:
    r"""``∂²l/∂f² − (∂l/∂f)ᵀ (∂l/∂f)`` of every example: what the identity of [THESIS, sec. 3.3.3] leaves.

    Zero for one binary output with a hard target and for one-hot classes: then the Gauss-Newton matrix in the
    probabilities is the second moment of the gradients, the outer-product metric. Not zero for soft targets, for
    several binary outputs of one example (whose products with each other remain), and for the quadratic error.
    """
    gradient = derivative(likelihood, f, y).flatten(1)
    diagonal = torch.diag_embed(second_derivative(likelihood, f, y).flatten(1))
    return diagonal - gradient[:, :, None] * gradient[:, None, :]


def _check(likelihood: Tabulated) -> None:
    if not isinstance(likelihood, Gaussian | Bernoulli | Categorical):
        raise TypeError(
            f"likelihood: the tables know Gaussian, Bernoulli and Categorical, not {type(likelihood).__name__}"
        )


def _targets(likelihood: Tabulated, f: Tensor, y: Tensor) -> Tensor:
    _check(likelihood)
    if isinstance(likelihood, Categorical) and not y.dtype.is_floating_point and y.shape == f.shape[:-1]:
        y = torch.nn.functional.one_hot(y, f.shape[-1])
    if y.shape != f.shape:
        raise ValueError(f"y: expected targets of shape {tuple(f.shape)}, like f; got {tuple(y.shape)}")
    return y.to(f.dtype)
