"""`likelihood_of(L)` is L, value and derivatives, for every loss with a likelihood; the others are refused by name."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.modules.loss
from torch import Tensor, nn

import natgrad as ng
from natgrad.losses import likelihood_of

CLASS_WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.3], dtype=torch.float64)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _soft(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _counts(*shape: int) -> Tensor:
    return torch.floor(4 * _soft(*shape))


def _classes(*shape: int) -> Tensor:
    return torch.randint(4, shape, generator=torch.Generator().manual_seed(2))


def _with_holes(value: int) -> Tensor:
    y = _classes(3, 2)
    y[0, 1] = y[2, 0] = value
    return y


REPRESENTED: dict[str, tuple[Callable[[str], nn.Module], Tensor, Tensor]] = {
    "MSELoss": (lambda r: nn.MSELoss(reduction=r), _normal(5, 4), _normal(5, 4, seed=1)),
    "MSELoss, images": (lambda r: nn.MSELoss(reduction=r), _normal(2, 1, 2, 2), _normal(2, 1, 2, 2, seed=1)),
    "MSELoss, one number": (lambda r: nn.MSELoss(reduction=r), _normal(5), _normal(5, seed=1)),
    "BCEWithLogitsLoss": (lambda r: nn.BCEWithLogitsLoss(reduction=r), _normal(5, 4), _soft(5, 4)),
    "BCEWithLogitsLoss, pos_weight": (
        lambda r: nn.BCEWithLogitsLoss(reduction=r, pos_weight=CLASS_WEIGHT),
        _normal(5, 4),
        _soft(5, 4),
    ),
    "BCEWithLogitsLoss, weights": (
        lambda r: nn.BCEWithLogitsLoss(weight=_soft(5, 1), reduction=r, pos_weight=CLASS_WEIGHT),
        _normal(5, 4),
        _soft(5, 4).round(),
    ),
    "BCEWithLogitsLoss, weights per pixel": (
        lambda r: nn.BCEWithLogitsLoss(weight=_soft(2, 3), reduction=r, pos_weight=_soft(2, 1)),
        _normal(4, 2, 3),
        _soft(4, 2, 3),
    ),
    "CrossEntropyLoss": (lambda r: nn.CrossEntropyLoss(reduction=r), _normal(5, 4), _classes(5)),
    "CrossEntropyLoss, positions": (lambda r: nn.CrossEntropyLoss(reduction=r), _normal(3, 4, 2), _classes(3, 2)),
    "CrossEntropyLoss, images": (lambda r: nn.CrossEntropyLoss(reduction=r), _normal(2, 4, 3, 2), _classes(2, 3, 2)),
    "CrossEntropyLoss, weight": (
        lambda r: nn.CrossEntropyLoss(CLASS_WEIGHT, reduction=r),
        _normal(3, 4, 2),
        _classes(3, 2),
    ),
    "CrossEntropyLoss, default holes": (
        lambda r: nn.CrossEntropyLoss(reduction=r),
        _normal(3, 4, 2),
        _with_holes(-100),
    ),
    "CrossEntropyLoss, ignore_index": (
        lambda r: nn.CrossEntropyLoss(ignore_index=1, reduction=r),
        _normal(3, 4, 2),
        _with_holes(1),
    ),
    "CrossEntropyLoss, label_smoothing": (
        lambda r: nn.CrossEntropyLoss(label_smoothing=0.3, reduction=r),
        _normal(5, 4),
        _classes(5),
    ),
    "CrossEntropyLoss, every option": (
        lambda r: nn.CrossEntropyLoss(CLASS_WEIGHT, ignore_index=-5, label_smoothing=0.3, reduction=r),
        _normal(3, 4, 2),
        _with_holes(-5),
    ),
    "CrossEntropyLoss, probabilities": (
        lambda r: nn.CrossEntropyLoss(reduction=r),
        _normal(5, 4),
        torch.softmax(_normal(5, 4, seed=3), 1),
    ),
    "CrossEntropyLoss, probabilities, every option": (
        lambda r: nn.CrossEntropyLoss(CLASS_WEIGHT, label_smoothing=0.3, reduction=r),
        _normal(3, 4, 2),
        torch.softmax(_normal(3, 4, 2, seed=3), 1),
    ),
    "PoissonNLLLoss": (lambda r: nn.PoissonNLLLoss(reduction=r), _normal(5, 4), _counts(5, 4)),
}


@pytest.fixture(params=REPRESENTED, ids=str)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("reduction", ["mean", "sum"])
class TestRepresented:
    def test_value_and_gradient(self, name: str, reduction: str) -> None:
        make, z, y = REPRESENTED[name]
        loss = make(reduction)
        likelihood = likelihood_of(loss)
        likelihood.validate(z, y)
        torch.testing.assert_close(likelihood.nll(z, y), loss(z, y))
        ours, theirs = (torch.func.grad(f)(z) for f in (lambda z: likelihood.nll(z, y), lambda z: loss(z, y)))
        torch.testing.assert_close(ours, theirs)

    def test_float32(self, name: str, reduction: str) -> None:
        make, z, y = REPRESENTED[name]
        loss, z = make(reduction).float(), z.float()
        y = y.float() if y.is_floating_point() else y
        value = likelihood_of(loss).nll(z, y)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(z, y))

    def test_curvature_is_the_hessian_of_a_linear_model(self, name: str, reduction: str) -> None:
        """z is linear in θ: Hessian, Gauss-Newton matrix and Fisher of the loss are one matrix."""
        make, z, y = REPRESENTED[name]
        loss = make(reduction)
        model = Linear(z)
        x = torch.arange(len(z))
        theta = torch.zeros(2, dtype=torch.float64)
        hessian = torch.func.hessian(lambda t: loss(torch.func.functional_call(model, {"theta": t}, (x,)), y))(theta)
        likelihood = likelihood_of(loss)
        torch.testing.assert_close(ng.Fisher(model, likelihood, x, y=y).to_dense(), hessian)
        torch.testing.assert_close(ng.GaussNewton(model, likelihood, x, y).to_dense(), hessian)
        torch.testing.assert_close(ng.Hessian(model, likelihood, x, y).to_dense(), hessian)

    def test_normaliser_is_that_of_the_loss(self, name: str, reduction: str) -> None:
        """The nll of the parts, each with the count of the whole, add up: mini-batches may be cut."""
        make, z, y = REPRESENTED[name]
        if "weights" in name and "pixel" not in name:
            pytest.skip("this loss has one weight per example of a fixed batch, which cannot be cut")
        likelihood = likelihood_of(make(reduction))
        count = likelihood.count(z, y)
        parts = [likelihood.nll(z[n : n + 1], y[n : n + 1], count=count) for n in range(len(z))]
        torch.testing.assert_close(torch.stack(parts).sum(), make(reduction)(z, y))


class Linear(nn.Module):
    """z = base + θ₁ B₁ + θ₂ B₂ for each example, at θ = 0."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2, dtype=z.dtype))
        self.register_buffer("base", z)
        self.register_buffer("directions", _normal(2, *z.shape, seed=7))

    def forward(self, index: Tensor) -> Tensor:
        return (self.base + torch.einsum("k,k...->...", self.theta, self.directions))[index]


@pytest.mark.parametrize("weight", [None, CLASS_WEIGHT])
def test_multi_label_soft_margin(weight: Tensor | None) -> None:
    loss = nn.MultiLabelSoftMarginLoss(weight)
    z, y = _normal(5, 4), _soft(5, 4).round()
    torch.testing.assert_close(likelihood_of(loss).nll(z, y), loss(z, y))
    with pytest.raises(ValueError, match=r"MultiLabelSoftMarginLoss\(reduction='sum'\)"):
        likelihood_of(nn.MultiLabelSoftMarginLoss(weight, reduction="sum"))


# Losses whose constructor has required arguments.
ARGUMENTS: dict[str, tuple] = {
    "AdaptiveLogSoftmaxWithLoss": (4, 6, [2]),
    "LinearCrossEntropyLoss": (4, 6),
}
REPRESENTED_KINDS = {
    "MSELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "MultiLabelSoftMarginLoss",
    "PoissonNLLLoss",
}


def _loss_classes() -> list[type[nn.Module]]:
    """Every class of torch.nn that its name or its module calls a loss."""
    in_module = [
        kind
        for name, kind in vars(torch.nn.modules.loss).items()
        if inspect.isclass(kind) and kind.__module__ == torch.nn.modules.loss.__name__ and not name.startswith("_")
    ]
    by_name = [getattr(nn, name) for name in dir(nn) if name.endswith("Loss")]
    return sorted({k for k in in_module + by_name if issubclass(k, nn.Module)}, key=lambda k: k.__name__)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # NLLLoss2d
@pytest.mark.parametrize("kind", _loss_classes(), ids=lambda kind: kind.__name__)
def test_every_loss_of_torch_is_represented_or_refused_by_name(kind: type[nn.Module]) -> None:
    loss = kind(*ARGUMENTS.get(kind.__name__, ()))
    if kind.__name__ in REPRESENTED_KINDS:
        assert isinstance(likelihood_of(loss), ng.Likelihood)
        with pytest.raises(ValueError, match=rf"{kind.__name__}\(reduction='none'\)"):
            likelihood_of(kind(reduction="none"))
    else:
        with pytest.raises(ValueError, match=f"{kind.__name__} cannot be represented: "):
            likelihood_of(loss)


def test_all_losses_were_found() -> None:
    found = {kind.__name__ for kind in _loss_classes()}
    assert (
        found >= {"L1Loss", "NLLLoss", "CTCLoss", "TripletMarginLoss", "AdaptiveLogSoftmaxWithLoss"} | REPRESENTED_KINDS
    )


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (nn.MSELoss, TypeError, "an instance, such as torch.nn.MSELoss()"),
        (nn.functional.mse_loss, TypeError, "a loss module of torch.nn"),
        ("mse", TypeError, "'mse'"),
        (nn.Linear(2, 2), ValueError, "Linear cannot be represented"),
        (nn.PoissonNLLLoss(log_input=False), ValueError, "PoissonNLLLoss.*log_input=True"),
        (nn.PoissonNLLLoss(full=True), ValueError, "PoissonNLLLoss.*full=False"),
        (nn.CrossEntropyLoss(torch.tensor([1.0, -1.0])), ValueError, "class_weight.*-1"),
        (nn.NLLLoss(), ValueError, "NLLLoss.*CrossEntropyLoss on the logits"),
        (nn.BCELoss(), ValueError, "BCELoss.*BCEWithLogitsLoss on the logits"),
        (nn.GaussianNLLLoss(), ValueError, "GaussianNLLLoss.*variance"),
    ],
)
def test_refusals(loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message) if "(" in message else message):
        likelihood_of(loss)


def test_a_subclass_may_compute_something_else() -> None:
    class Halved(nn.MSELoss):
        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return super().forward(z, y) / 2

    with pytest.raises(ValueError, match="Halved cannot be represented: a subclass"):
        likelihood_of(Halved())


def test_curvature_asks_for_the_targets_of_a_weighted_loss() -> None:
    model, x = nn.Linear(2, 4).double(), _normal(5, 2)
    for loss in (nn.CrossEntropyLoss(CLASS_WEIGHT), nn.CrossEntropyLoss(ignore_index=2)):
        with pytest.raises(ValueError, match="y"):
            ng.Fisher(model, likelihood_of(loss), x)
        with pytest.raises(ValueError, match="y="):
            ng.kronecker_fisher(model, likelihood_of(loss), x, structure="block_diagonal", expectation="exact")
