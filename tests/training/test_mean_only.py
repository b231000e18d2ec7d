"""Mean-only batch normalisation against its definition and against nn.BatchNorm1d."""

import pytest
import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad.curvature.uncovered import couples_examples
from natgrad.training import MeanOnlyBatchNorm


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2


def test_it_centres_and_has_a_gradient_through_the_mean() -> None:
    layer, t = MeanOnlyBatchNorm(3).double(), data(6, 3).requires_grad_()
    layer.bias.data = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    out = layer(t)
    torch.testing.assert_close(out, t - t.mean(0) + layer.bias)
    weights = data(6, 3)
    gradient, bias = torch.autograd.grad((out * weights).sum(), [t, layer.bias])
    torch.testing.assert_close(gradient, weights - weights.mean(0))
    torch.testing.assert_close(bias, weights.sum(0))


@pytest.mark.parametrize(("shape", "dim"), [((6, 3), 1), ((6, 3, 5), 1), ((6, 5, 3), -1), ((2, 3, 4, 5), 1)])
def test_running_mean_and_shapes_as_in_batch_norm(shape: tuple[int, ...], dim: int) -> None:
    layer = MeanOnlyBatchNorm(3, momentum=0.3, dim=dim).double()
    twin = nn.BatchNorm1d(3, momentum=0.3, affine=False).double()
    t = data(*shape)
    rows = t.movedim(dim, -1).reshape(-1, 3)
    for k in range(3):
        out = layer(t * k)
        twin(rows * k)
        torch.testing.assert_close(out.movedim(dim, -1).reshape(-1, 3), (rows - rows.mean(0)) * k)
    torch.testing.assert_close(layer.running_mean, twin.running_mean)
    assert layer.num_batches_tracked == 3
    layer.eval()
    torch.testing.assert_close(layer(t).movedim(dim, -1).reshape(-1, 3), rows - twin.running_mean)
    assert layer.num_batches_tracked == 3


def test_its_forward_pass_is_that_of_centred_inputs() -> None:
    """W h − mean(W h) = W (h − h̄): the reparametrised cousin of CenteredSGD [THESIS, sec. 6.4.1]."""
    linear, layer, h = nn.Linear(4, 3, bias=False).double(), MeanOnlyBatchNorm(3).double(), data(7, 4)
    torch.testing.assert_close(layer(linear(h)), linear(h - h.mean(0)))


def test_curvature_knows_that_it_couples_examples_and_leaves_its_buffers() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), MeanOnlyBatchNorm(3), nn.Tanh(), nn.Linear(3, 2)).double()
    assert couples_examples(model) and not couples_examples(model.eval())
    model.train()
    optimizer = ng.KFAC(model, ng.Gaussian(), damping=1.0, uncovered="identity")
    x, y = data(8, 4), data(8, 2)
    first = optimizer.step(x, y)
    for _ in range(5):
        last = optimizer.step(x, y)
    assert last < 0.8 * first and model[1].num_batches_tracked == 6


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="features=0"):
        MeanOnlyBatchNorm(0)
    with pytest.raises(ValueError, match="momentum=2"):
        MeanOnlyBatchNorm(3, momentum=2.0)
    with pytest.raises(ValueError, match=r"expected 3 features in dimension 1, got a tensor of shape \(2, 4\)"):
        MeanOnlyBatchNorm(3)(torch.zeros(2, 4))
