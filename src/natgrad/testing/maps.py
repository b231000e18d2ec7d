r"""The conformance suite of layers with several linear maps inside: attention, recurrent cells and modules.

The maps are seen as a `Preconditioner` sees them, in a recorded pass. Over all of its calls ``Σ g āᵀ`` has to be the
gradient of the map's parameters; the factors are compared with their definition on the rows of those calls.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from natgrad.curvature.base import to_dense
from natgrad.curvature.fisher import kronecker_fisher
from natgrad.curvature.inverse import kronecker_basis
from natgrad.layers.capture import Capture, Record
from natgrad.layers.coverage import cover
from natgrad.layers.rules import Block, KroneckerRule
from natgrad.model_view import ModelView
from natgrad.operators.autodiff import Fisher


def check_maps(model: nn.Module, likelihood: Any, x: Tensor, close: dict[str, Any]) -> None:
    """Every map's rows, factors, splits of the batch, and the diagonal in its eigenbasis.

    Args:
        model: z = model(x), a tensor; its examples do not depend on each other.
        likelihood: p(y | z).
        x: a batch, examples first.
        close: tolerances.

    Raises:
        AssertionError: a rule is wrong.
    """
    blocks = cover(ModelView(model)).blocks
    capture = Capture(model, blocks)
    with capture.record() as record:
        z = model(x)
    capture.remove()
    plain = model(x)
    assert_close(z, plain, msg=lambda m: f"the recorded pass computes something else: {m}", **close)
    _check_gradients(record, plain, z, close)
    _check_factors(record, model, likelihood, x, z, close)
    _check_splits(model, likelihood, x, close)


def _check_gradients(record: Record, plain: Tensor, z: Tensor, close: dict[str, Any]) -> None:
    """``Σ g āᵀ`` over the calls is the gradient, and the gradient that of the pass without a record."""
    cotangent = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(z.device)
    found = record.output_gradients(z, cotangent)
    for name, block in record.blocks.items():
        parameters = block.parameters
        gradients = torch.autograd.grad(plain, list(parameters.values()), cotangent, retain_graph=True)
        V = block.to_matrix(dict(zip(parameters, gradients, strict=True)))
        a, g, _ = _rows(block, record, name, found[name])
        message = f"{name}: Σ g āᵀ over the calls is not the gradient"
        assert_close(_unstacked(g.mT @ a, block), V, msg=lambda m, w=message: f"{w}: {m}", **close)


def _check_factors(
    record: Record, model: nn.Module, likelihood: Any, x: Tensor, z: Tensor, close: dict[str, Any]
) -> None:
    """A and G as defined, on the rows of the calls."""
    S, N = likelihood.fisher_factor(z.detach()), len(z)
    columns = [record.output_gradients(z, S.reshape(*z.shape, -1)[..., k]) for k in range(S.shape[-1])]
    k = kronecker_fisher(model, likelihood, x)
    count = float(likelihood.count(z.detach()))
    for name, block in record.blocks.items():
        rows = [_rows(block, record, name, found[name]) for found in columns]
        a, _, used = rows[0]
        A = a.mT @ a / N
        G = torch.stack([g.mT @ g for _, g, _ in rows]).sum(0) / used * N / count
        factors = k.factors[name]
        for key, expected, factor in (("A", A, factors.A), ("G", G, factors.G)):
            message = f"{name}, {type(likelihood).__name__}: {key}"
            assert_close(to_dense(factor), _unstacked(expected, block), msg=lambda m, w=message: f"{w}: {m}", **close)


def _check_splits(model: nn.Module, likelihood: Any, x: Tensor, close: dict[str, Any]) -> None:
    """Any split of the batch gives the same matrix; EKFAC has the diagonal of the exact one in its basis."""
    whole = kronecker_fisher(model, likelihood, x).to_dense()
    parts = kronecker_fisher(model, likelihood, [x[:1], x[1:]]).to_dense()
    assert_close(parts, whole, msg=lambda m: f"another matrix of one example and the others: {m}", **close)
    k = kronecker_fisher(model, likelihood, x, structure="ekfac")
    F = Fisher(model, likelihood, x).to_dense()
    for name, (index, found) in zip(k.factors, k.blocks, strict=True):
        Q, exact = kronecker_basis(k.bases[name]), F[index[:, None], index]
        message = f"{name}, structure='ekfac': not the diagonal in the eigenbasis"
        diagonal = (Q.T @ exact @ Q).diagonal()
        assert_close((Q.T @ found.to_dense() @ Q).diagonal(), diagonal, msg=lambda m, w=message: f"{w}: {m}", **close)


def _rows(block: Block, record: Record, name: str, gradients: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """ā and g of all calls, ``[stack, rows, d]``, zero where a call does not belong to a block; how many do belong."""
    rule = block.rule
    assert isinstance(rule, KroneckerRule)
    inputs, outputs, used = [], [], []
    for use, g in zip(record.uses[name], gradients, strict=True):
        a, rows = rule.stacked_rows(use).double(), rule.stacked_gradient_rows(use, g)
        assert a.shape[:3] == rows.shape[:3], f"{name}: rows {tuple(a.shape)} and gradient_rows {tuple(rows.shape)}"
        ones = torch.zeros_like(a[..., :1])
        ones[slice(None) if use.slot is None else use.slot] = 1
        parts = [a] if rule.attributes[0] in block.members else []
        parts += [ones] if rule.attributes[1] in block.members else []
        inputs.append(torch.cat(parts, dim=-1).flatten(1, 2))
        outputs.append(rows.flatten(1, 2))
        used.append(ones.sum((1, 2, 3)))
    return torch.cat(inputs, dim=1), torch.cat(outputs, dim=1), torch.stack(used).sum(0)[:, None, None]


def _unstacked(M: Tensor, block: Block) -> Tensor:
    return M if len(block.shape) == 3 else M[0]
