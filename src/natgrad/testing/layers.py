r"""The conformance suite of layer rules.

Everything follows from one identity that automatic differentiation confirms: over the rows that a rule gives,
``Σ g āᵀ`` is the gradient of the layer's parameters. With that, the factors are compared with their definition, with
the exact Fisher matrix where K-FAC is exact, and with themselves over splits of a batch.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from natgrad.curvature.base import to_dense
from natgrad.curvature.fisher import kronecker_fisher
from natgrad.curvature.inverse import kronecker_basis
from natgrad.layers.registry import block_of, rules_for
from natgrad.layers.rules import Block, DiagonalRule, KroneckerRule, Use
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian
from natgrad.operators.autodiff import EmpiricalFisher, Fisher
from natgrad.testing.maps import check_maps

_OUTPUTS = 3


class Probe(nn.Module):
    """The layer, tanh, and a fixed random map of each example's outputs to a few; of several outputs the first counts.

    Args:
        layer: under test.
        x: a batch for it.
    """

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            size = self._output(x).flatten(1).shape[1]
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(size, _OUTPUTS, generator=generator, dtype=torch.float64) / size**0.5
        self.register_buffer("weight", weight.to(x.device))

    def forward(self, x: Tensor) -> Tensor:
        """z, ``[batch, 3]``."""
        return torch.tanh(self._output(x)).flatten(1) @ self.weight

    def _output(self, x: Tensor) -> Tensor:
        found = self.layer(x)
        return found[0] if isinstance(found, tuple) else found


def check_layer(layer: nn.Module, x: Tensor, *, rtol: float = 1e-7, atol: float = 1e-9) -> None:
    """Put a layer's rule through the conformance suite, in float64 and on a copy of the layer.

    Args:
        layer: any layer whose kind has a rule (:func:`natgrad.register_layer`), with trained parameters. It takes one
            tensor; where it returns several the first counts, with the examples in dimension 0.
        x: a batch for it, with the examples in dimension 0: at least three, of which no two are alike.
        rtol: of all comparisons.
        atol: of all comparisons.

    Raises:
        AssertionError: the rule is wrong; the message says in what.
        TypeError: no rule covers the layer.
        ValueError: the batch is too small.
    """
    if x.shape[0] < 3:
        raise ValueError(f"x: expected at least three examples, got {x.shape[0]}")
    layer = copy.deepcopy(layer).double()
    x = x.double() if x.is_floating_point() else x
    close: dict[str, Any] = {"rtol": rtol, "atol": atol}
    if list(rules_for(layer) or [""]) != [""]:
        for likelihood in (Gaussian(0.7), Bernoulli("element"), Categorical("none")):
            check_maps(Probe(layer, x), likelihood, x, close)
        return
    block = block_of("layer", layer)
    if not block.members:
        raise ValueError(f"layer: no parameter of {type(layer).__name__} is trained")
    refusal = block.rule.refuse(layer)
    if refusal is not None:
        raise ValueError(f"layer: {type(layer).__name__} {refusal}")
    check_matrix(block, close)
    check_rows(block, x, close)
    model = Probe(layer, x)
    for likelihood in (Gaussian(0.7), Bernoulli("element"), Categorical("none")):
        check_factors(model, likelihood, x, close)
        check_exact_cases(model, likelihood, x, close)
        check_splits(model, likelihood, x, close)
        check_eigenbasis(model, likelihood, x, close)


def check_matrix(block: Block, close: dict[str, Any]) -> None:
    """Parameters → V → parameters is the identity, and V an arrangement of them in the shape that the rule says."""
    generator = torch.Generator().manual_seed(2)
    parts = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)
        for name, p in block.parameters.items()
    }
    V = block.to_matrix(parts)
    assert tuple(V.shape) == tuple(block.shape), f"to_matrix gives {tuple(V.shape)}, shape says {tuple(block.shape)}"
    back = block.from_matrix(V)
    assert back.keys() == parts.keys(), f"from_matrix gives {list(back)}, the block holds {list(parts)}"
    for name, part in parts.items():
        assert back[name].shape == part.shape, f"from_matrix: {name} has shape {tuple(back[name].shape)}"
        assert_close(back[name], part, msg=lambda m, n=name: f"from_matrix(to_matrix(...)) changes {n}: {m}", **close)
    everything = torch.cat([part.flatten() for part in parts.values()]).sort().values
    assert_close(V.flatten().sort().values, everything, msg=lambda m: f"V is no arrangement of the parameters: {m}")


def check_rows(block: Block, x: Tensor, close: dict[str, Any]) -> None:
    """``Σ g āᵀ`` over the rows is the gradient; the sums are those of the rows, for both kinds of sharing."""
    layer, rule = block.layer, block.rule
    s = layer(x)
    g = torch.randn(s.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(s.device)
    parameters = block.parameters
    found = dict(zip(parameters, torch.autograd.grad(s, list(parameters.values()), g), strict=True))
    V, use = block.to_matrix(found), Use(layer, x, s.shape, layer.training)
    with torch.no_grad():
        if isinstance(rule, DiagonalRule):
            sums = rule.per_example(block, use, g)
            assert sums.shape[0] == x.shape[0], f"per_example gives {sums.shape[0]} rows for {x.shape[0]} examples"
            what = "the examples' gradients do not add up to the gradient"
            assert_close(sums.sum(0), V[0], msg=lambda m: f"per_example: {what}: {m}", **close)
            return
        assert isinstance(rule, KroneckerRule)
        if V.ndim == 3:
            return  # the rows of a stack are known to its rule alone
        a, rows_g = _with_ones(block, rule.rows(use).double()), rule.gradient_rows(use, g)
        assert a.ndim == rows_g.ndim == 3 and a.shape[:2] == rows_g.shape[:2], (
            f"rows {tuple(a.shape)} and gradient_rows {tuple(rows_g.shape)}: expected [examples, positions, features]"
        )
        gradient = torch.einsum("npo,npi->oi", rows_g, a)
        assert_close(gradient, V, msg=lambda m: f"rows: Σ g āᵀ over the rows is not the gradient: {m}", **close)
        for sharing in ("expand", "reduce") if rule.shares else ("expand",):
            _check_sums(Block(block.name, rule, block.modules, block.members, sharing), use, a, rows_g, g, close)


def check_factors(model: Probe, likelihood: Any, x: Tensor, close: dict[str, Any]) -> None:
    """A and G as defined, for every expectation; the diagonal of the exact matrix for a diagonal rule."""
    block = block_of("layer", model.layer)
    y = _targets(likelihood, model, x)
    for expectation in ("exact", "empirical"):
        k = kronecker_fisher(model, likelihood, x, expectation=expectation, y=y)
        factors = k.factors["layer"]
        what = f"{type(likelihood).__name__}, expectation={expectation!r}"
        if isinstance(block.rule, DiagonalRule):
            if _coupled(model.layer):
                continue
            exact = _exact(model, likelihood, x, y, expectation).diagonal()
            assert_close(k.to_dense().diagonal(), exact, msg=lambda m, w=what: f"{w}: diagonal: {m}", **close)
            continue
        if len(block.shape) == 3 or not isinstance(block.rule, KroneckerRule):
            continue
        N, z = x.shape[0], model(x).detach()
        A, G, rows = 0.0, 0.0, 0
        for n in range(N):
            use, derivatives = _derivatives(model, x[n : n + 1])
            a = _with_ones(block, block.rule.rows(use).double())[0]
            S = _columns(likelihood, z[n : n + 1], None if expectation == "exact" else y[n : n + 1])
            A = A + a.T @ a / N
            kept = a.abs().sum(1) > 0 if block.rule.diagonal_input else slice(None)  # padding is no row
            g = torch.stack([block.rule.gradient_rows(use, d)[0] for d in derivatives])[:, kept]
            G, rows = G + torch.einsum("dpo,dk,ek,epq->oq", g, S, S, g), rows + g.shape[1]
        count = float(likelihood.count(z)) if expectation == "exact" else N
        assert_close(to_dense(factors.A), A, msg=lambda m, w=what: f"{w}: A: {m}", **close)
        assert_close(to_dense(factors.G), G / rows * N / count, msg=lambda m, w=what: f"{w}: G: {m}", **close)


def check_exact_cases(model: Probe, likelihood: Any, x: Tensor, close: dict[str, Any]) -> None:
    """One example at one position: ``A ⊗ G`` is the Fisher matrix of the layer."""
    block = block_of("layer", model.layer)
    if not isinstance(block.rule, KroneckerRule) or len(block.shape) == 3:
        return
    with torch.no_grad():
        positions = block.rule.rows(Use(model.layer, x[:1], model.layer(x[:1]).shape)).shape[1]
    if positions == 1:
        k = kronecker_fisher(model, likelihood, x[:1])
        exact = _exact(model, likelihood, x[:1], None, "exact")
        message = "one example at one position: not the Fisher matrix"
        assert_close(k.to_dense(), exact, msg=lambda m: f"{message}: {m}", **close)


def check_splits(model: Probe, likelihood: Any, x: Tensor, close: dict[str, Any]) -> None:
    """Any split of the batch gives the same matrix, and so do a mean and a sum up to their scale."""
    if _coupled(model.layer):
        return
    for sharing in ("expand", "reduce"):
        whole = kronecker_fisher(model, likelihood, x, sharing=sharing)
        for split in ([1, x.shape[0] - 1], [1] * x.shape[0]):
            parts = kronecker_fisher(model, likelihood, list(x.split(split)), sharing=sharing)
            message = f"batches of {split} examples, sharing={sharing!r}: another matrix than of the whole"
            assert_close(parts.to_dense(), whole.to_dense(), msg=lambda m, w=message: f"{w}: {m}", **close)
    direction = torch.randn(whole.shape[0], generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    direction = direction.to(x.device)
    kind = type(likelihood)
    N = x.shape[0]  # the curvature of a sum is N times that of the mean, and so are gradient and damping
    mean = kronecker_fisher(model, kind(normalizer="example"), x).inverse(0.1, kind="exact")
    total = kronecker_fisher(model, kind(normalizer="none"), x).inverse(0.1 * N, kind="exact")
    scaled = total @ (direction * N)
    assert_close(scaled, mean @ direction, msg=lambda m: f"mean and sum precondition differently: {m}", **close)


def check_eigenbasis(model: Probe, likelihood: Any, x: Tensor, close: dict[str, Any]) -> None:
    """With ``structure="ekfac"`` the block is the diagonal of the exact Fisher matrix in the Kronecker eigenbasis."""
    block = block_of("layer", model.layer)
    if _coupled(model.layer) or "ekfac" not in block.rule.structures_of(model.layer):
        return
    k = kronecker_fisher(model, likelihood, x, structure="ekfac")
    index, found = k.blocks[0]
    Q = kronecker_basis(k.bases["layer"])
    exact = _exact(model, likelihood, x, None, "exact")[index[:, None], index]
    message = f"{type(likelihood).__name__}, structure='ekfac': not the diagonal in the eigenbasis"
    diagonal = (Q.T @ exact @ Q).diagonal()
    assert_close((Q.T @ found.to_dense() @ Q).diagonal(), diagonal, msg=lambda m: f"{message}: {m}", **close)


def _check_sums(block: Block, use: Use, a: Tensor, rows_g: Tensor, g: Tensor, close: dict[str, Any]) -> None:
    rule = block.rule
    assert isinstance(rule, KroneckerRule)
    what = f"sharing={block.sharing!r}"
    if block.sharing == "reduce":
        a, rows_g = a.mean(1, keepdim=True), rows_g.sum(1, keepdim=True)
    a, rows_g = a.flatten(0, 1), rows_g.flatten(0, 1)
    if rule.diagonal_input:
        kept = a.abs().sum(1) > 0
        a, rows_g = a[kept], rows_g[kept]
    A, rows = rule.input_sum(block, use)
    assert float(rows) == a.shape[0], f"{what}: input_sum counts {float(rows):g} rows, there are {a.shape[0]}"
    expected = a.T @ a
    assert_close(torch.diag(A) if A.ndim == 1 else A, expected, msg=lambda m: f"{what}: input_sum: {m}", **close)
    G = A.new_ones(block.factor_shapes[1])
    rule.output_sum(block, use, g, G)
    assert_close(G - 1, rows_g.T @ rows_g, msg=lambda m: f"{what}: output_sum: {m}", **close)


def _with_ones(block: Block, a: Tensor) -> Tensor:
    """``[a 1]``, or what of it is trained."""
    parts = [] if block.rule.attributes[0] not in block.members else [a]
    biased = len(block.rule.attributes) > 1 and block.rule.attributes[1] in block.members
    return torch.cat([*parts, a.new_ones(*a.shape[:-1], 1)], dim=-1) if biased else parts[0]


def _derivatives(model: Probe, x: Tensor) -> tuple[Use, list[Tensor]]:
    """The layer's call on one example, and the derivatives of every output of the model at the layer's."""
    s = model.layer(x)
    z = (torch.tanh(s).flatten(1) @ model.weight)[0]
    derivatives = [torch.autograd.grad(value, s, retain_graph=True)[0] for value in z]
    return Use(model.layer, x, s.shape, model.layer.training), derivatives


def _targets(likelihood: Any, model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        z = model(x)
    if isinstance(likelihood, Categorical):
        return torch.arange(x.shape[0], device=x.device) % z.shape[-1]
    return torch.linspace(0, 1, z.numel(), dtype=z.dtype, device=z.device).view_as(z)


def _exact(model: nn.Module, likelihood: Any, x: Tensor, y: Any, expectation: str) -> Tensor:
    exact = Fisher(model, likelihood, x) if expectation == "exact" else EmpiricalFisher(model, likelihood, x, y)
    return exact.to_dense()


def _columns(likelihood: Any, z: Tensor, y: Tensor | None) -> Tensor:
    """S with ``S Sᵀ = F_R`` of one example; of an empirical estimate the derivative of its nll."""
    if y is None:
        return likelihood.fisher_factor(z)[0]
    leaf = z.detach().requires_grad_()
    return torch.autograd.grad(likelihood.nll(leaf, y, count=1), leaf)[0].T


def _coupled(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training
