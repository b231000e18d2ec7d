r"""EKFAC: the best diagonal in the Kronecker eigenbasis (George et al. 2018, arXiv:1806.03884).

With ``A = Q_A diag(a) Q_Aᵀ`` and ``G = Q_G diag(g) Q_Gᵀ`` the block of a layer is ``Q diag(S) Qᵀ``, ``Q = Q_A ⊗ Q_G``,
and S holds the second moments of the per-example gradient ``∇_n = Σ_t g_t ā_tᵀ`` (t runs over the uses of the layer)
in that basis, entry by entry:

.. math:: S = \frac{1}{\text{count}} \sum_n \mathrm E_y \left[ (Q_G^T \nabla_n Q_A)^{2} \right].

That is the diagonal of ``Qᵀ F Q``. K-FAC has ``g aᵀ`` in the place of S, another diagonal in the same basis; of all of
them S is the nearest to F in the Frobenius norm. A stack of blocks has a basis and an S for each of them. Layers whose
block is diagonal by definition have their exact diagonal already, ``S = g aᵀ``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.curvature.base import Factors
from natgrad.curvature.inverse import Eigenbasis, kronecker_basis
from natgrad.damping import check_damping
from natgrad.layers.embedding import EmbeddingRule
from natgrad.layers.linear import LinearRule
from natgrad.layers.rules import Block, KroneckerRule, Use
from natgrad.operators.base import LinearOperator

# Per-example gradients of a layer that are written out at once hold at most so many numbers.
_ELEMENTS_AT_ONCE = 2**22


class GradientSquares:
    """Sums of squared per-example gradients of every layer in its eigenbasis, over the cotangents of one pass.

    Rotated inputs of linear layers are kept for all cotangents; the patches of convolutions are unfolded again for
    each, a bounded number of examples at a time.

    Args:
        blocks: of the layers, by name.
        uses: their calls, of the leading examples alone.
        bases: by layer name; layers without one are left out.
        rows: how many leading examples count.

    Raises:
        ValueError: a layer whose inputs do not have the examples in dimension 0: its uses cannot be told apart by
            example.
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        uses: Mapping[str, Sequence[Use]],
        bases: Mapping[str, Eigenbasis],
        rows: int,
    ) -> None:
        self.blocks, self.uses, self._rows = blocks, uses, rows
        self.bases = {name: basis for name, basis in bases.items() if isinstance(blocks[name].rule, KroneckerRule)}
        self.sums: dict[str, Float[Tensor, "*stack out columns"]] = {}
        self._kept: dict[str, Float[Tensor, "*stack rows uses columns"]] = {}
        for name, basis in self.bases.items():
            self.sums[name] = basis.a.new_zeros(*basis.g.shape, basis.a.shape[-1])
            for use in uses.get(name, []):
                self._check(name, use)
            if isinstance(blocks[name].rule, LinearRule) and uses.get(name):
                self._kept[name] = self._inputs(name, slice(0, rows))

    def add(self, gradients: Mapping[str, list[Tensor]], alone: bool = False) -> None:
        """Add one cotangent's ``(Σ_t g_t ā_tᵀ)²`` in the eigenbasis.

        Args:
            gradients: g of every call, by layer name; other layers than those with a basis are passed over.
            alone: the cotangent is that of one example, whose gradient then is the sum over all rows.
        """
        for name, basis in self.bases.items():
            if name not in gradients or not self.uses.get(name):
                continue
            calls = [
                (replace(use, arrange=None), use.gradient(g))
                for use, g in zip(self.uses[name], gradients[name], strict=True)
            ]
            rule, kept = self._rule(name), self._kept.get(name)
            if isinstance(rule, EmbeddingRule):
                self._add_embedding(name, rule, calls, alone)
                continue
            at_once = self._rows if kept is not None else self._examples_at_once(name)
            gradient = torch.zeros_like(self.sums[name]) if alone else None
            for start in range(0, self._rows, at_once):
                some = slice(start, min(start + at_once, self._rows))
                found = [rule.stacked_gradient_rows(_of_examples(use, some), g[some]) for use, g in calls]
                g = _without_stack(torch.cat(found, dim=2).to(basis.a.dtype), basis)
                g = g if basis.QG is None else g @ _for_examples(basis.QG)
                a = self._inputs(name, some) if kept is None else kept
                if gradient is None:
                    add_gradient_squares(self.sums[name], a, g)
                else:
                    gradient += g.flatten(-3, -2).mT @ a.flatten(-3, -2)
            if gradient is not None:
                self.sums[name] += gradient.square_()

    def add_diagonal(self, name: str, diagonal: Float[Tensor, "rows ... out"]) -> None:
        """Add what all of F_R gives for the linear layer whose output is z, where F_R is diagonal.

        The g's of different outputs and positions are uncorrelated then: ``Σ_rows (Q_Gᵀ)² d ((Q_Aᵀ ā)²)ᵀ``.
        """
        basis = self.bases.get(name)
        if basis is not None:
            d = diagonal.reshape(-1, diagonal.shape[-1]).to(basis.a.dtype)
            d = d if basis.QG is None else d @ basis.QG.square()
            self.sums[name].addmm_(d.T, self._kept[name].flatten(0, 1).square())

    def _rule(self, name: str) -> KroneckerRule:
        rule = self.blocks[name].rule
        assert isinstance(rule, KroneckerRule)  # no other has eigenvectors to look for
        return rule

    def _inputs(self, name: str, some: slice) -> Float[Tensor, "*stack examples uses columns"]:
        """The rotated ā of some examples."""
        basis, block, rule = self.bases[name], self.blocks[name], self._rule(name)
        found = [rule.stacked_rows(_of_examples(use, some)).to(basis.a.dtype) for use in self.uses[name]]
        a = found[0] if len(found) == 1 else torch.cat(found, dim=2)
        ones = a.new_ones(*a.shape[:-1], 1)
        weight, bias = (key in block.members for key in (*rule.attributes, "")[:2])
        if bias:
            a = torch.cat([a, ones], dim=3) if weight else ones
        a = _without_stack(a, basis)
        return a if basis.QA is None else a @ _for_examples(basis.QA)

    def _add_embedding(self, name: str, rule: EmbeddingRule, calls: Sequence[tuple[Use, Tensor]], alone: bool) -> None:
        """``∇_n`` has a column for every index of an example: those alone are written out."""
        basis, total = self.bases[name], self.sums[name]
        vocabulary, some = total.shape[1], slice(0, self._rows)
        ids = torch.cat([rule.indices(_of_examples(use, some)) for use, _ in calls], dim=1)
        g = torch.cat([rule.gradient_rows(_of_examples(use, some), g[some]) for use, g in calls], dim=1)
        keys = ids if alone else ids + vocabulary * torch.arange(self._rows, device=ids.device)[:, None]
        found, place = torch.unique(keys.flatten(), return_inverse=True)
        columns = g.new_zeros(len(found), g.shape[-1], dtype=total.dtype)
        columns.index_add_(0, place, g.flatten(0, 1).to(total.dtype))
        columns = columns if basis.QG is None else columns @ basis.QG
        total.index_add_(1, found % vocabulary, columns.square_().T)

    def _examples_at_once(self, name: str) -> int:
        one = [self._rule(name).stacked_rows(_of_examples(use, slice(0, 1))) for use in self.uses[name]]
        return max(1, _ELEMENTS_AT_ONCE // max(1, sum(a.numel() for a in one)))

    def _check(self, name: str, use: Use) -> None:
        rule = self._rule(name)
        apart = use.input.ndim > (0 if isinstance(rule, EmbeddingRule) else 1) and use.share == 1
        if not apart or use.input.shape[0] != self._rows or not _examples_first(rule, use):
            raise ValueError(
                f"layer {name!r} sees a tensor of shape {tuple(use.input.shape)} without the {self._rows} examples in "
                "dimension 0, so that the gradient of an example cannot be formed: use structure='block_diagonal'"
            )


def _examples_first(rule: KroneckerRule, use: Use) -> bool:
    """Whether the rule, too, takes dimension 0 for that of the examples (not so in a call without a batch)."""
    return isinstance(rule, EmbeddingRule) or rule.rows(_of_examples(use, slice(0, 1))).shape[0] == 1


def _without_stack(rows: Float[Tensor, "stack examples uses d"], basis: Eigenbasis) -> Tensor:
    return rows if basis.a.ndim > 1 else rows[0]


def _for_examples(Q: Float[Tensor, "*stack d d"]) -> Tensor:
    """A basis, or one for every block of a stack, to multiply ``[*stack, examples, uses, d]`` by."""
    return Q.unsqueeze(1) if Q.ndim > 2 else Q


def _of_examples(use: Use, some: slice) -> Use:
    """A call of a layer for some of the examples, which are in dimension 0."""
    a = use.input[some]
    return replace(use, input=a, output_shape=torch.Size((a.shape[0], *use.output_shape[1:])))


def add_gradient_squares(
    total: Float[Tensor, "*stack out columns"],
    a: Float[Tensor, "*stack batch uses columns"],
    g: Float[Tensor, "*stack batch uses out"],
) -> None:
    """Add ``Σ_n (Σ_t g_t a_tᵀ)²`` in place; with one use per example that is one matrix product.

    Otherwise the gradients of some examples at a time are written out, a few million numbers at most.
    """
    if a.shape[-2] == 1:
        total += g.squeeze(-2).square().mT @ a.squeeze(-2).square()
        return
    at_once = max(1, _ELEMENTS_AT_ONCE // total.numel())
    for some_a, some_g in zip(a.split(at_once, dim=-3), g.split(at_once, dim=-3), strict=True):
        total += (some_g.mT @ some_a).square_().sum(-3)


class EigenBlock(LinearOperator):
    """``Q diag(S) Qᵀ`` with ``Q = Q_A ⊗ Q_G``, on stacked columns of ``[W b]``.

    Args:
        basis: Q_A and Q_G, or stacks of them.
        scaling: S, as a matrix like ``[W b]``, or a stack of them.
    """

    def __init__(self, basis: Eigenbasis, scaling: Float[Tensor, "*stack out columns"]) -> None:
        n = scaling.numel()
        super().__init__((n, n), dtype=scaling.dtype, device=scaling.device, symmetric=True)
        self.basis, self.scaling = basis, scaling

    def _matmat(self, v: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        V = v.T.reshape(-1, *self.scaling.mT.shape).mT
        return self.basis.rotate_back(self.basis.rotate(V) * self.scaling).mT.reshape(v.shape[1], -1).T

    def _dense(self) -> Float[Tensor, "n n"]:
        Q = kronecker_basis(self.basis)
        return (Q * self.scaling.mT.reshape(-1)) @ Q.T

    def inverse(self, damping: float | Tensor, what: str = "the block") -> "EigenBlock":
        """``(Q diag(S) Qᵀ + damping I)^{-1}``.

        Raises:
            ValueError: the block is singular and the damping 0; a damping is proposed.
        """
        check_damping(damping)
        smallest, largest = float(self.scaling.min()), float(self.scaling.max())
        if float(damping) == 0 and smallest <= largest * torch.finfo(self.dtype).eps * max(self.scaling.shape):
            proposal = 1e-3 * (float(self.scaling.mean()) or 1.0)
            raise ValueError(
                f"{what} is singular (values from {smallest:.1e} to {largest:.1e} in the eigenbasis) and has no "
                f"undamped inverse; pass a damping, for example damping={proposal:.1e}"
            )
        return EigenBlock(self.basis, (self.scaling + damping).reciprocal())


def with_second_moments(factors: Factors, basis: Eigenbasis) -> Factors:
    """Factors with an S: ``g aᵀ``, the diagonal itself, where the block is diagonal by definition."""
    return factors if factors.S is not None else replace(factors, S=eigenvalues(basis))


def eigenvalues(basis: Eigenbasis) -> Float[Tensor, "*stack out columns"]:
    """``g aᵀ``: the eigenvalues of ``A ⊗ G`` arranged like ``[W b]``."""
    return basis.g[..., :, None] * basis.a[..., None, :]


def carried_over(
    scaling: Float[Tensor, "*stack out columns"], old: Eigenbasis, new: Eigenbasis
) -> Float[Tensor, "*stack out columns"]:
    r"""The diagonal, in a new basis, of the approximation that was made in the old one.

    ``diag(Q'ᵀ Q diag(S) Qᵀ Q')``, with the squared overlaps ``P = (Q'ᵀ Q)²`` of each side: ``P_G S P_Aᵀ``. The trace
    stays what it was.
    """
    left, right = _overlaps(old.QG, new.QG), _overlaps(old.QA, new.QA)
    scaling = scaling if left is None else left @ scaling
    return scaling if right is None else scaling @ right.mT


def _overlaps(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """``(Q'ᵀ Q)²`` entry by entry; None for that of the standard basis with itself."""
    if old is None:
        return None if new is None else new.mT.square()
    return old.square() if new is None else (new.mT @ old).square_()
