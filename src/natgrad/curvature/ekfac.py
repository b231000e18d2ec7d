r"""EKFAC: the best diagonal in the Kronecker eigenbasis (George et al. 2018, arXiv:1806.03884).

With ``A = Q_A diag(a) Q_Aᵀ`` and ``G = Q_G diag(g) Q_Gᵀ`` the block of a layer is ``Q diag(S) Qᵀ``, ``Q = Q_A ⊗ Q_G``,
and S holds the second moments of the per-example gradient ``∇_n = Σ_t g_t ā_tᵀ`` (t runs over the uses of the layer)
in that basis, entry by entry:

.. math:: S = \frac{1}{\text{count}} \sum_n \mathrm E_y \left[ (Q_G^T \nabla_n Q_A)^{2} \right].

That is the diagonal of ``Qᵀ F Q``. K-FAC has ``g aᵀ`` in the place of S, another diagonal in the same basis; of all of
them S is the nearest to F in the Frobenius norm.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.curvature.inverse import Eigenbasis, kronecker_basis
from natgrad.damping import check_damping
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
        self.blocks, self.bases, self.uses, self._rows = blocks, bases, uses, rows
        self.sums: dict[str, Float[Tensor, "out columns"]] = {}
        self._kept: dict[str, Float[Tensor, "rows uses columns"]] = {}
        for name, basis in bases.items():
            self.sums[name] = torch.zeros(len(basis.g), len(basis.a), dtype=basis.a.dtype, device=basis.a.device)
            for use in uses.get(name, []):
                self._check(name, use)
            if isinstance(blocks[name].rule, LinearRule) and uses.get(name):
                self._kept[name] = self._inputs(name, slice(0, rows))

    def add(self, gradients: Mapping[str, list[Tensor]]) -> None:
        """Add one cotangent's ``(Σ_t g_t ā_tᵀ)²`` in the eigenbasis.

        Args:
            gradients: g of every call, by layer name; other layers than those with a basis are passed over.
        """
        for name, basis in self.bases.items():
            if name not in gradients or not self.uses.get(name):
                continue
            kept = self._kept.get(name)
            at_once = self._rows if kept is not None else self._examples_at_once(name)
            for start in range(0, self._rows, at_once):
                some = slice(start, min(start + at_once, self._rows))
                found = [
                    self._rule(name).gradient_rows(_of_examples(use, some), g[some])
                    for use, g in zip(self.uses[name], gradients[name], strict=True)
                ]
                g = (found[0] if len(found) == 1 else torch.cat(found, dim=1)).to(basis.a.dtype)
                g = g if basis.QG is None else g @ basis.QG
                add_gradient_squares(self.sums[name], self._inputs(name, some) if kept is None else kept, g)

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

    def _inputs(self, name: str, some: slice) -> Float[Tensor, "examples uses columns"]:
        """The rotated ā of some examples."""
        basis, members = self.bases[name], self.blocks[name].members
        found = [self._rule(name).rows(_of_examples(use, some)).to(basis.a.dtype) for use in self.uses[name]]
        a = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        ones = a.new_ones(*a.shape[:-1], 1)
        if "bias" in members:
            a = torch.cat([a, ones], dim=2) if "weight" in members else ones
        return a if basis.QA is None else a @ basis.QA

    def _examples_at_once(self, name: str) -> int:
        one = [self._rule(name).rows(_of_examples(use, slice(0, 1))) for use in self.uses[name]]
        return max(1, _ELEMENTS_AT_ONCE // max(1, sum(a.shape[1] for a in one) * one[0].shape[2]))

    def _check(self, name: str, use: Use) -> None:
        rows = use.input.shape[0] if use.input.ndim > 1 and use.share == 1 else None
        if rows != self._rows or self._rule(name).rows(_of_examples(use, slice(0, 1))).shape[0] != 1:
            raise ValueError(
                f"layer {name!r} sees a tensor of shape {tuple(use.input.shape)} without the {self._rows} examples in "
                "dimension 0, so that the gradient of an example cannot be formed: use structure='block_diagonal'"
            )


def _of_examples(use: Use, some: slice) -> Use:
    """A call of a layer for some of the examples, which are in dimension 0."""
    a = use.input[some]
    return replace(use, input=a, output_shape=torch.Size((a.shape[0], *use.output_shape[1:])))


def add_gradient_squares(
    total: Float[Tensor, "out columns"], a: Float[Tensor, "batch uses columns"], g: Float[Tensor, "batch uses out"]
) -> None:
    """Add ``Σ_n (Σ_t g_t a_tᵀ)²`` in place; with one use per example that is one matrix product.

    Otherwise the gradients of some examples at a time are written out, a few million numbers at most.
    """
    if a.shape[1] == 1:
        total.addmm_(g[:, 0].square().T, a[:, 0].square())
        return
    at_once = max(1, _ELEMENTS_AT_ONCE // total.numel())
    for some_a, some_g in zip(a.split(at_once), g.split(at_once), strict=True):
        total += torch.bmm(some_g.mT, some_a).square_().sum(0)


class EigenBlock(LinearOperator):
    """``Q diag(S) Qᵀ`` with ``Q = Q_A ⊗ Q_G``, on stacked columns of ``[W b]``.

    Args:
        basis: Q_A and Q_G.
        scaling: S, as a matrix like ``[W b]``.
    """

    def __init__(self, basis: Eigenbasis, scaling: Float[Tensor, "out columns"]) -> None:
        n = scaling.numel()
        super().__init__((n, n), dtype=scaling.dtype, device=scaling.device, symmetric=True)
        self.basis, self.scaling = basis, scaling

    def _matmat(self, v: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        out, columns = self.scaling.shape
        V = v.T.reshape(-1, columns, out).mT
        return self.basis.rotate_back(self.basis.rotate(V) * self.scaling).mT.reshape(v.shape[1], -1).T

    def _dense(self) -> Float[Tensor, "n n"]:
        Q = kronecker_basis(self.basis)
        return (Q * self.scaling.T.reshape(-1)) @ Q.T

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


def carried_over(
    scaling: Float[Tensor, "out columns"], old: Eigenbasis, new: Eigenbasis
) -> Float[Tensor, "out columns"]:
    r"""The diagonal, in a new basis, of the approximation that was made in the old one.

    ``diag(Q'ᵀ Q diag(S) Qᵀ Q')``, with the squared overlaps ``P = (Q'ᵀ Q)²`` of each side: ``P_G S P_Aᵀ``. The trace
    stays what it was.
    """
    left, right = _overlaps(old.QG, new.QG), _overlaps(old.QA, new.QA)
    scaling = scaling if left is None else left @ scaling
    return scaling if right is None else scaling @ right.T


def _overlaps(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """``(Q'ᵀ Q)²`` entry by entry; None for that of the standard basis with itself."""
    if old is None:
        return None if new is None else new.T.square()
    return old.square() if new is None else (new.T @ old).square_()
