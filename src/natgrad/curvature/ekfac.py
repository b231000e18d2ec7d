r"""EKFAC: the best diagonal in the Kronecker eigenbasis (George et al. 2018, arXiv:1806.03884).

With ``A = Q_A diag(a) Q_Aᵀ`` and ``G = Q_G diag(g) Q_Gᵀ`` the block of a layer is ``Q diag(S) Qᵀ``, ``Q = Q_A ⊗ Q_G``,
and S holds the second moments of the per-example gradient ``∇_n = Σ_t g_t ā_tᵀ`` (t runs over the uses of the layer)
in that basis, entry by entry:

.. math:: S = \frac{1}{\text{count}} \sum_n \mathrm E_y \left[ (Q_G^T \nabla_n Q_A)^{2} \right].

That is the diagonal of ``Qᵀ F Q``. K-FAC has ``g aᵀ`` in the place of S, another diagonal in the same basis; of all of
them S is the nearest to F in the Frobenius norm.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.curvature.inverse import Eigenbasis, kronecker_basis
from natgrad.damping import check_damping
from natgrad.layers.capture import Record
from natgrad.layers.factors import with_ones
from natgrad.operators.base import LinearOperator

# Per-example gradients of a layer that are written out at once hold at most so many numbers.
_ELEMENTS_AT_ONCE = 2**22


class GradientSquares:
    """Sums of squared per-example gradients of every layer in its eigenbasis, over the cotangents of one pass.

    Args:
        record: of the forward pass.
        bases: by layer name; layers without one are left out.
        parts: per layer whether weight and bias are trained.
        rows: how many leading examples count.
        batch: the number of all examples.

    Raises:
        ValueError: a layer whose inputs do not have the examples in dimension 0: its uses cannot be told apart by
            example.
    """

    def __init__(
        self,
        record: Record,
        bases: Mapping[str, Eigenbasis],
        parts: Mapping[str, tuple[bool, bool]],
        rows: int,
        batch: int,
    ) -> None:
        self.bases, self._rows, self._batch = bases, rows, batch
        self.sums: dict[str, Float[Tensor, "out columns"]] = {}
        self._inputs: dict[str, list[Float[Tensor, "rows uses columns"]]] = {}
        inputs = record.inputs
        for name, basis in bases.items():
            self.sums[name] = torch.zeros(len(basis.g), len(basis.a), dtype=basis.a.dtype, device=basis.a.device)
            weight, bias = parts[name]
            found = []
            for a in inputs.get(name, []):
                a = self._per_example(name, a).to(basis.a.dtype)
                a = with_ones(a, bias).view(*a.shape[:-1], -1) if weight else a.new_ones(*a.shape[:-1], 1)
                found.append(a if basis.QA is None else a @ basis.QA)
            self._inputs[name] = found

    def add(self, gradients: Mapping[str, list[Tensor]]) -> None:
        """Add one cotangent's ``(Σ_t g_t ā_tᵀ)²`` in the eigenbasis.

        Args:
            gradients: g of every call, by layer name; other layers than those with a basis are passed over.
        """
        for name, basis in self.bases.items():
            if name not in gradients or not self._inputs[name]:
                continue
            found = [self._per_example(name, g).to(basis.a.dtype) for g in gradients[name]]
            g = found[0] if len(found) == 1 else torch.cat(found, dim=1)
            a = self._inputs[name]
            a = a[0] if len(a) == 1 else torch.cat(a, dim=1)
            add_gradient_squares(self.sums[name], a, g if basis.QG is None else g @ basis.QG)

    def add_diagonal(self, name: str, diagonal: Float[Tensor, "rows ... out"]) -> None:
        """Add what all of F_R gives for the layer whose output is z, where F_R is diagonal.

        The g's of different outputs and positions are uncorrelated then: ``Σ_rows (Q_Gᵀ)² d ((Q_Aᵀ ā)²)ᵀ``.
        """
        basis = self.bases.get(name)
        if basis is not None:
            d = diagonal.reshape(-1, diagonal.shape[-1]).to(basis.a.dtype)
            d = d if basis.QG is None else d @ basis.QG.square()
            self.sums[name].addmm_(d.T, self._inputs[name][0].flatten(0, 1).square())

    def _per_example(self, name: str, x: Tensor) -> Float[Tensor, "rows uses d"]:
        if x.ndim < 2 or x.shape[0] != self._batch:
            raise ValueError(
                f"layer {name!r} sees a tensor of shape {tuple(x.shape)} without the {self._batch} examples in "
                "dimension 0, so that the gradient of an example cannot be formed: use structure='block_diagonal'"
            )
        return x[: self._rows].reshape(self._rows, -1, x.shape[-1])


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
