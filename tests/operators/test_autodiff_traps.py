"""Exact operators where PyTorch is difficult: randomness, buffers, attention, recurrence, checkpoints, wrappers."""

import copy
from typing import Any

import pytest
import torch
from oracles import dense as oracle
from oracles import networks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import natgrad.likelihoods as lik
from natgrad.model_view import ModelView
from natgrad.operators import autodiff, jacobian_products
from natgrad.operators.autodiff import EmpiricalFisher, Fisher, GaussNewton, GradientCovariance, Hessian, Jacobian


class Embedded(nn.Module):
    """Tokens → embedding → body → classes."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(5, 4), body, nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        out = self.body(self.embedding(tokens))
        return self.head((out[0] if isinstance(out, tuple) else out)[:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unsqueeze(1).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=False))


class ForwardModeless(torch.autograd.Function):
    """x³ with a backward that can be differentiated again, and without forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ForwardModeless.apply(x)


def _seeded(build: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().double()


TOKENS = torch.tensor([[0, 1, 2], [3, 4, 0], [2, 2, 1]])
X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).sin()
TRAPS: dict[str, tuple[Any, Any]] = {
    "attention": (lambda: Embedded(Attention()), TOKENS),
    "encoder_eval": (
        lambda: Embedded(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)).eval(),
        TOKENS,
    ),
    "encoder_train": (lambda: Embedded(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)), TOKENS),
    "lstm": (lambda: Embedded(nn.LSTM(4, 4, batch_first=True)), TOKENS),
    "gru": (lambda: Embedded(nn.GRU(4, 4, batch_first=True)), TOKENS),
    "batch_norm_train": (lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)), X),
    "dropout": (lambda: nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 2)), X),
    "checkpoint": (Checkpointed, X),
    "no_forward_mode": (lambda: nn.Sequential(nn.Linear(3, 3), Cube(), nn.Linear(3, 2)), X),
}


@pytest.mark.parametrize("name", TRAPS)
def test_operators_are_exact_and_change_nothing(name: str) -> None:
    build, x = TRAPS[name]
    model = _seeded(build)
    y = torch.arange(len(x)) % 2
    view = ModelView(model)
    # The state at construction is the one whose masks and statistics the operators keep.
    replay, state, rng = view.snapshot(), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    operators = {
        "J": Jacobian(model, x),
        "F": Fisher(model, lik.Categorical(), x),
        "G": GaussNewton(model, lik.Categorical(), x, y),
        "H": Hessian(model, lik.Categorical(), x, y),
    }
    if name != "batch_norm_train":
        operators["E"] = EmpiricalFisher(model, lik.Categorical(), x, y)
    dense = {key: operator.to_dense() for key, operator in operators.items()}
    singles = {key: operator @ torch.ones(view.num_parameters).double() for key, operator in operators.items()}

    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.mkldnn.enabled

    with replay, view.curvature_pass():
        jacobian = oracle.jacobian(model, x)
    with replay, view.curvature_pass():
        z = model(x).detach()
    with replay, view.curvature_pass():
        hessian = oracle.hessian(model, lambda: oracle.nll("categorical")(model(x), y) / len(x))
    p = torch.softmax(z, -1)
    blocks = [torch.diag(row) - torch.outer(row, row) for row in p]
    fisher = jacobian.T @ torch.block_diag(*blocks) @ jacobian / len(x)
    torch.testing.assert_close(dense["J"], jacobian)
    torch.testing.assert_close(dense["F"], fisher)
    torch.testing.assert_close(dense["G"], fisher)
    torch.testing.assert_close(dense["H"], hessian)
    if "E" in dense:
        score = p - nn.functional.one_hot(y, 2)
        g = torch.einsum("no,nop->np", score, jacobian.reshape(len(x), 2, -1))
        torch.testing.assert_close(dense["E"], g.T @ g / len(x))
    for key, product in singles.items():
        torch.testing.assert_close(product, dense[key].sum(1))


def test_each_construction_captures_its_own_masks() -> None:
    model = _seeded(TRAPS["dropout"][0])
    v = torch.ones(ModelView(model).num_parameters, dtype=torch.float64)
    first = Jacobian(model, X)
    torch.rand(5)
    second = Jacobian(model, X)
    torch.testing.assert_close(first @ v, first @ v, rtol=0, atol=0)
    assert not torch.allclose(first @ v, second @ v)


def test_an_operator_keeps_the_parameters_of_its_construction() -> None:
    case = networks.case("mlp")
    fisher = Fisher(case.model, lik.Gaussian(), case.x)
    before = fisher.to_dense()
    with torch.no_grad():
        for p in case.model.parameters():
            p.add_(1.0)
    torch.testing.assert_close(fisher.to_dense(), before)
    assert not torch.allclose(Fisher(case.model, lik.Gaussian(), case.x).to_dense(), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_any_gradient_mode(mode: Any) -> None:
    case = networks.case("layer_norm")
    y = networks.targets("categorical", case.z)
    expected = Hessian(case.model, lik.Categorical(), case.x, y).to_dense()
    fisher = Fisher(case.model, lik.Categorical(), case.x).to_dense()
    with mode():
        torch.testing.assert_close(Hessian(case.model, lik.Categorical(), case.x, y).to_dense(), expected)
        torch.testing.assert_close(Fisher(case.model, lik.Categorical(), case.x).to_dense(), fisher)
        assert not torch.is_grad_enabled()


def test_results_carry_no_graph() -> None:
    case = networks.case("mlp")
    y, v = networks.targets("gaussian", case.z), torch.ones(26, dtype=torch.float64, requires_grad=True)
    x = case.x.requires_grad_()
    for operator in (
        Jacobian(case.model, x),
        Fisher(case.model, lik.Gaussian(), x),
        Hessian(case.model, lik.Gaussian(), x, y),
    ):
        assert not (operator @ v).requires_grad
        assert not (operator @ torch.stack([v, v], 1)).requires_grad
    assert x.grad is None and v.grad is None


def test_batch_coupling_is_refused_by_name() -> None:
    model = _seeded(TRAPS["batch_norm_train"][0])
    y = torch.zeros(4, 2, dtype=torch.float64)
    for operator in (EmpiricalFisher, GradientCovariance):
        with pytest.raises(ValueError, match=f"BatchNorm1d '1'.*{operator.__name__}"):
            operator(model, lik.Gaussian(), X, y)
        operator(model.eval(), lik.Gaussian(), X, y)
        model.train()


def test_an_operation_without_second_derivatives_is_refused_by_name() -> None:
    model = nn.Sequential(nn.EmbeddingBag(5, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="EmbeddingBag '0'"):
        Fisher(model, lik.Categorical(), TOKENS).to_dense()
    with pytest.raises(ValueError, match="EmbeddingBag '0'"):
        Hessian(model, lik.Categorical(), TOKENS, torch.tensor([0, 1, 0])).to_dense()
    model[0].requires_grad_(False)
    assert Fisher(model, lik.Categorical(), TOKENS).to_dense().shape == (8, 8)


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_weight_norm(wrap: Any) -> None:
    """Without forward mode, and with a double backward in PyTorch that is wrong: Fisher is exact, Hessian refuses."""
    model = _seeded(lambda: nn.Sequential(wrap(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 2)))
    j = oracle.jacobian(model, X)
    torch.testing.assert_close(Fisher(model, lik.Gaussian(), X).to_dense(), j.T @ j / 4)
    with pytest.raises(ValueError, match="weight_norm"):
        Hessian(model, lik.Gaussian(), X, torch.zeros(4, 2, dtype=torch.float64))


def test_randomness_that_cannot_be_replayed_is_noticed() -> None:
    """Numbers from a generator of the model's own: forward mode sees others than the first pass did."""
    generator = torch.Generator().manual_seed(0)

    def noisy(model: nn.Module, x: Tensor) -> Tensor:
        return model(x) * torch.rand(x.shape[0], 1, generator=generator, dtype=x.dtype)

    case = networks.case("mlp")
    j = Jacobian(case.model, case.x, forward=noisy)
    noise = (j._products.z / case.z)[:, :1]
    expected = (oracle.jacobian(case.model, case.x).reshape(4, 2, -1) * noise[:, :, None]).flatten(0, 1)
    torch.testing.assert_close(j @ torch.eye(26, dtype=torch.float64), expected)
    torch.testing.assert_close(j.to_dense(), expected)


def test_compiled_and_wrapped_models() -> None:
    case = networks.case("mlp")
    expected = Fisher(case.model, lik.Categorical(), case.x).to_dense()
    compiled = torch.compile(copy.deepcopy(case.model))
    torch.testing.assert_close(Fisher(compiled, lik.Categorical(), case.x).to_dense(), expected)
    averaged = torch.optim.swa_utils.AveragedModel(case.model)
    torch.testing.assert_close(Fisher(averaged, lik.Categorical(), case.x).to_dense(), expected)
    view = ModelView(case.model)
    torch.testing.assert_close(Fisher(view, lik.Categorical(), case.x).to_dense(), expected)
    with pytest.raises(ValueError, match="forward: "):
        Fisher(view, lik.Categorical(), case.x, forward=lambda m, x: m(x))


def test_float32_stays_float32() -> None:
    case = networks.case("mlp")
    model, x = case.model.float(), case.x.float()
    fisher = Fisher(model, lik.Bernoulli(), x)
    assert fisher.dtype == torch.float32 and fisher.to_dense().dtype == torch.float32
    double = Fisher(copy.deepcopy(model).double(), lik.Bernoulli(), x.double()).to_dense()
    torch.testing.assert_close(fisher.to_dense(), double.float())


def test_models_of_two_dtypes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)).double())

    model, x = Mixed(), X.float()
    fisher = Fisher(model, lik.Gaussian(), x)
    assert fisher.dtype == torch.float64
    j = oracle.jacobian(model, x)
    torch.testing.assert_close(fisher.to_dense(), j.T @ j / 4, rtol=1e-5, atol=1e-7)


def test_columns_are_split_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    case = networks.case("mlp")
    assert Jacobian(case.model, case.x)._products.chunk_size > 1000
    monkeypatch.setattr(jacobian_products, "_COLUMN_BYTES", 4000)
    assert 1 <= Jacobian(case.model, case.x)._products.chunk_size < 10


def test_bad_input() -> None:
    case = networks.case("mlp")
    model, x = case.model, case.x
    with pytest.raises(ValueError, match="inputs: the batch is empty"):
        Fisher(model, lik.Gaussian(), x[:0])
    with pytest.raises(ValueError, match="output is not finite"):
        Fisher(model, lik.Gaussian(), x * float("nan"))
    with pytest.raises(ValueError, match="inputs: .*float32"):
        Fisher(model, lik.Gaussian(), x.float())
    with pytest.raises(ValueError, match="parametrization: .*\"mean\"|parametrization: .*'mean'"):
        Fisher(model, lik.Gaussian(), x, parametrization="mean")
    with pytest.raises(ValueError, match="linearize"):
        GaussNewton(model, lik.Gaussian(), x, case.z, linearize="outputs")
    with pytest.raises(TypeError, match="likelihood: .*CrossEntropyLoss"):
        Fisher(model, nn.CrossEntropyLoss(), x)
    with pytest.raises(TypeError, match="likelihood: .*the class Gaussian"):
        Fisher(model, lik.Gaussian, x)
    with pytest.raises(ValueError, match="does not depend on any trainable parameter"):
        Jacobian(model, x, forward=lambda m, inputs: m(inputs).detach())
    with pytest.raises(ValueError, match=r"real output z \[batch"):
        Jacobian(model, x, forward=lambda m, inputs: m(inputs).sum())
    with pytest.raises(ValueError, match="chunk_size"):
        Jacobian(model, x, chunk_size=0)
    with pytest.raises(ValueError, match="no trainable parameters"):
        Jacobian(nn.Tanh(), x)
    assert autodiff.Jacobian(model, x).shape == (8, 26)
