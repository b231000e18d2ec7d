"""Parameters that no factor covers, with ``uncovered="diagonal"``: tied embeddings and whatever has no rule."""

import copy
from typing import Any

import pytest
import torch
from oracles.preconditioning import EVERY_STEP, train
from torch import Tensor, nn

import natgrad as ng

TOKENS = ng.Categorical("element")


class Language(nn.Module):
    """An embedding whose weight is that of the last layer too, and an activation with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear, self.slope = nn.Embedding(7, 4), nn.Linear(4, 4), nn.PReLU()
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        return self.head(self.slope(self.linear(h + h.cumsum(1))))


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.arange(20).view(4, 5) ** 2 % 7
    return ids, (ids + 1) % 7


@pytest.mark.parametrize("expectation", ["exact", "empirical"])
@pytest.mark.parametrize("structure", ["block_diagonal", "ekfac"])
def test_the_gradient_is_divided_by_the_damped_diagonal(structure: str, expectation: Any) -> None:
    model, (ids, y) = Language(), batch()
    how = {"structure": structure, "expectation": expectation, "damping": 0.1, "scaling": None}
    pre = ng.Preconditioner(model, TOKENS, uncovered="diagonal", periods=EVERY_STEP, **how)
    z = model(ids)
    pre.observe(z, y)
    TOKENS.nll(z, y).backward()
    plain = torch.cat([model.embedding.weight.grad.flatten(), model.slope.weight.grad])
    pre.step()
    twin = ng.Fisher(model, TOKENS, ids) if expectation == "exact" else ng.EmpiricalFisher(model, TOKENS, ids, y)
    diagonal = twin.to_dense().diagonal()[[*range(28), -1]]
    found = torch.cat([model.embedding.weight.grad.flatten(), model.slope.weight.grad])
    torch.testing.assert_close(found, plain / (diagonal + 0.1))


def test_it_is_estimated_from_sampled_targets_and_listed() -> None:
    model, (ids, _) = Language(), batch()
    pre = ng.Preconditioner(model, TOKENS, uncovered="diagonal", periods=EVERY_STEP, decay=0.999)
    for _ in range(800):
        pre.update(ids)
        model.linear.weight.grad = torch.zeros_like(model.linear.weight)
        pre.step()
    exact = ng.Fisher(model, TOKENS, ids).to_dense().diagonal()[:28]
    found = pre._running.factors["embedding.weight"].to_dense().diagonal()
    torch.testing.assert_close(found, exact, rtol=0.25, atol=0)
    assert (found.sum() / exact.sum() - 1).abs() < 0.05
    table = str(pre.coverage())
    assert (
        "embedding.weight  diagonal (Embedding, shared with another module)" in table and "49 covered, 0 not" in table
    )


def test_a_tied_model_trains_and_resumes() -> None:
    ids, y = batch()

    def made() -> tuple[nn.Module, ng.Preconditioned]:
        model = Language()
        pre = ng.Preconditioner(model, TOKENS, uncovered="diagonal", exclude=["slope"])
        return model, ng.Preconditioned(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), pre)

    one, optimizer = made()
    assert "slope.weight" in optimizer.pre.coverage().uncovered  # left out on purpose
    first = train(one, optimizer, TOKENS, ids, y, 15)
    state, weights = copy.deepcopy((optimizer.state_dict(), one.state_dict()))
    rest = train(one, optimizer, TOKENS, ids, y, 15)
    assert rest[-1] < 0.5 * first[0]
    two, resumed = made()
    two.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert train(two, resumed, TOKENS, ids, y, 15) == rest


def test_what_has_no_diagonal_is_refused() -> None:
    with pytest.raises(ValueError, match=r"structure='input_covariance' takes no derivatives.*slope.*'identity'"):
        ng.Preconditioner(Language(), TOKENS, structure="input_covariance", uncovered="diagonal")
    sparse = nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"0\.weight has sparse gradients; pass uncovered='identity'"):
        ng.Preconditioner(sparse, TOKENS, uncovered="diagonal")
    with pytest.raises(ValueError, match=r"PReLU.*pass uncovered='identity' or uncovered='diagonal' to say"):
        ng.Preconditioner(Language(), TOKENS)
    with pytest.raises(ValueError, match=r"uncovered='none': expected one of 'error', 'identity', 'diagonal'"):
        ng.Preconditioner(Language(), TOKENS, uncovered="none")
    with pytest.raises(ValueError, match=r"pass uncovered='identity' to say"):  # all that this optimiser knows
        ng.ACP(nn.Sequential(nn.Linear(3, 3), nn.PReLU()), ng.Gaussian(), lr=0.1)
