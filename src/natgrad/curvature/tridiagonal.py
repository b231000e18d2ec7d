r"""F̂, whose inverse is block-tridiagonal and which agrees with F̃ on the tridiagonal blocks [KFAC, sec. 4.3].

The gradient of a chain of layers is seen as a directed Gaussian model, from the highest layer down:

.. math::
    \operatorname{vec} \mathcal D W_i \sim \mathcal N(\Psi_{i,i+1} \operatorname{vec} \mathcal D W_{i+1}, \;
    \Sigma_{i|i+1}), \qquad \Psi_{i,i+1} = \tilde F_{i,i+1} \tilde F_{i+1,i+1}^{-1} = \Psi^A \otimes \Psi^G, \qquad
    \Sigma_{i|i+1} = \tilde F_{i,i} - \Psi_{i,i+1} \tilde F_{i+1,i+1} \Psi_{i,i+1}^T,

and ``F̂^{-1} = Ξᵀ Λ Ξ`` with I on the diagonal of Ξ, ``-Ψ_{i,i+1}`` beside it, and ``Λ = diag(Σ_{1|2}^{-1}, …,
Σ_ℓ^{-1})``. Every vector here has the layers in forward order, of each the columns of ``[W b]`` stacked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.curvature.base import Factors, to_dense
from natgrad.curvature.inverse import invert_block
from natgrad.damping import FactoredTikhonov
from natgrad.linalg.spd import safe_eigh
from natgrad.linalg.stein import KroneckerSum
from natgrad.operators.base import LinearOperator

Pair = tuple[Tensor, Tensor]


class Block(Protocol):
    """A layer's part of a block-diagonal operator."""

    def apply(self, V: Tensor) -> Tensor:
        """Its product with matrices ``[k, out, columns]``."""
        ...


@dataclass(frozen=True)
class LayerChain:
    """The factors of a chain of layers.

    Args:
        names: of the layers, in forward order.
        layers: (A, G) of each layer, dense.
        pairs: (``A_{i-1,i}``, ``G_{i,i+1}``) of each layer but the last and the one after it.
        precision: relative; what is smaller in an undamped factor counts as zero.
    """

    names: tuple[str, ...]
    layers: tuple[Pair, ...]
    pairs: tuple[Pair, ...]
    precision: float

    @classmethod
    def of(cls, names: Sequence[str], layers: Sequence[Factors], pairs: Sequence[Factors]) -> "LayerChain":
        """From factors, in double precision where the device has it."""
        precision = torch.finfo(to_dense(layers[0].A).dtype).eps
        dense = [tuple((_double(to_dense(f.A)), _double(to_dense(f.G))) for f in group) for group in (layers, pairs)]
        return cls(tuple(names), dense[0], dense[1], precision)

    def damped(self, damping: float | Tensor, rule: FactoredTikhonov) -> "LayerChain":
        """``A + π γ I`` and ``G + γ/π I`` for every layer, π its own; the cross factors stay [KFAC, sec. 6.3]."""
        layers = []
        for A, G in self.layers:
            of_a, of_g = rule.split(A, G, damping)
            eye_a, eye_g = (torch.eye(len(M), dtype=M.dtype, device=M.device) for M in (A, G))
            layers.append((A + of_a * eye_a, G + of_g * eye_g))
        return LayerChain(self.names, tuple(layers), self.pairs, self.precision)

    def reversed(self) -> "LayerChain":
        """The same layers from the last to the first: the edges of the Gaussian model point the other way."""
        turned = tuple((A.mT, G.mT) for A, G in reversed(self.pairs))
        return LayerChain(self.names[::-1], self.layers[::-1], turned, self.precision)

    def fisher(self) -> "ChainFisher":
        """F̂ of these factors; where one is singular, its pseudo-inverse takes the place of its inverse in Ψ."""
        return ChainFisher(self, self.regressions(pseudo=True))

    def inverse(self, damping: float | Tensor, rule: FactoredTikhonov) -> "ChainInverse":
        """``F̂^{-1}`` of the damped factors.

        Raises:
            ValueError: a factor, or what a regression leaves, is singular; names the layer, proposes a damping. Or the
                rule has a solver.
        """
        refuse_solver(rule)
        products = [
            invert_block(Factors(A, G), damping, rule, check=True, what=f"the block of layer {name!r}")
            for name, (A, G) in zip(self.names, self.layers, strict=True)
        ]
        chain = self.damped(damping, rule)
        psi = chain.regressions()
        blocks = []
        for name, sigma in zip(self.names, chain.conditional(psi), strict=False):
            try:
                blocks.append(sigma.inverse())
            except ValueError as error:
                A, G = self.layers[self.names.index(name)]
                proposal = 1e-3 * float(A.diagonal().mean() * G.diagonal().mean()) or 1e-3
                raise ValueError(
                    f"the gradient of layer {name!r} is determined by that of the next layer, so that the "
                    f"block-tridiagonal inverse does not exist with damping={float(damping):g}; give a larger damping, "
                    f"for example {proposal:.1e}"
                ) from error
        like = chain.layers[0][0]
        return ChainInverse(Regressions(psi, chain.sizes(), like), Blocks([*blocks, products[-1]], chain.sizes(), like))

    def regressions(self, *, pseudo: bool = False) -> tuple[Pair, ...]:
        """``Ψ^A = A_{i-1,i} A_{i,i}^{-1}`` and ``Ψ^G = G_{i,i+1} G_{i+1,i+1}^{-1}`` of every pair."""
        found = []
        for cross, upper in zip(self.pairs, self.layers[1:], strict=True):
            found.append((self._divided(cross[0], upper[0], pseudo), self._divided(cross[1], upper[1], pseudo)))
        return tuple(found)

    def conditional(self, psi: Sequence[Pair]) -> list[KroneckerSum]:
        """``Σ_{i|i+1} = A ⊗ G − Ψ^A A_{i,i} Ψ^Aᵀ ⊗ Ψ^G G_{i+1,i+1} Ψ^Gᵀ`` of every layer but the last."""
        found = []
        for (A, G), (upper_A, upper_G), (psi_A, psi_G) in zip(self.layers[:-1], self.layers[1:], psi, strict=True):
            explained = (_symmetric(psi_A @ upper_A @ psi_A.mT), _symmetric(psi_G @ upper_G @ psi_G.mT))
            found.append(KroneckerSum(A, G, *explained, sign=-1))
        return found

    def sizes(self) -> list[tuple[int, int]]:
        """(out, columns) of every layer."""
        return [(len(G), len(A)) for A, G in self.layers]

    def _divided(self, C: Tensor, M: Tensor, pseudo: bool) -> Tensor:
        """``C M^{-1}``."""
        if not pseudo:
            return torch.linalg.solve(M, C.mT).mT
        values, Q, _ = safe_eigh(M)
        kept = values > values[-1] * self.precision * len(values)
        return ((C @ Q) * torch.where(kept, values, torch.inf).reciprocal()) @ Q.mT


class _OnLayers(LinearOperator):
    """An operator on the stacked columns of every layer.

    Args:
        sizes: (out, columns) of every layer.
        like: a tensor with its dtype, on its device.
        symmetric: whether it is its own transpose.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], like: Tensor, *, symmetric: bool = True) -> None:
        self.sizes = tuple(sizes)
        n = sum(out * columns for out, columns in sizes)
        super().__init__((n, n), dtype=like.dtype, device=like.device, symmetric=symmetric)


class Regressions(_OnLayers):
    """Ξ: ``U_i = V_i − Ψ^G V_{i+1} Ψ^Aᵀ``, ``U_ℓ = V_ℓ``.

    Args:
        psi: (Ψ^A, Ψ^G) of every pair of neighbours.
        sizes: (out, columns) of every layer.
        like: a tensor with its dtype, on its device.
    """

    def __init__(self, psi: Sequence[Pair], sizes: Sequence[tuple[int, int]], like: Tensor) -> None:
        super().__init__(sizes, like, symmetric=False)
        self.psi = tuple(psi)

    def _matmat(self, v: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        V = _split(v, self.sizes)
        pairs = zip(V[:-1], V[1:], self.psi, strict=True)
        return _joined([*(V_i - G @ above @ A.mT for V_i, above, (A, G) in pairs), V[-1]])

    def _rmatmat(self, u: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """``V_i − Ψ^Gᵀ V_{i-1} Ψ^A``."""
        V = _split(u, self.sizes)
        pairs = zip(V[1:], V[:-1], self.psi, strict=True)
        return _joined([V[0], *(V_i - G.mT @ below @ A for V_i, below, (A, G) in pairs)])

    def solve(self, u: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """``Ξ^{-1} u``, from the last layer down."""
        V = _split(u, self.sizes)
        for i in reversed(range(len(self.psi))):
            A, G = self.psi[i]
            V[i] = V[i] + G @ V[i + 1] @ A.mT
        return _joined(V)

    def solve_transposed(self, u: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """``Ξ^{-T} u``, from the first layer up."""
        V = _split(u, self.sizes)
        for i, (A, G) in enumerate(self.psi):
            V[i + 1] = V[i + 1] + G.mT @ V[i] @ A
        return _joined(V)


class Blocks(_OnLayers):
    """A block-diagonal operator with one block per layer, given by maps of matrices.

    Args:
        blocks: objects with ``apply(V)``.
        sizes: (out, columns) of every layer.
        like: a tensor with its dtype, on its device.
    """

    def __init__(self, blocks: Sequence[Block], sizes: Sequence[tuple[int, int]], like: Tensor) -> None:
        super().__init__(sizes, like)
        self.blocks = tuple(blocks)

    def _matmat(self, v: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        return _joined([block.apply(V) for block, V in zip(self.blocks, _split(v, self.sizes), strict=True)])


class ChainInverse(_OnLayers):
    """``F̂^{-1} = Ξᵀ Λ Ξ``, block-tridiagonal.

    Args:
        Xi: Ξ.
        Lambda: Λ.
    """

    def __init__(self, Xi: Regressions, Lambda: Blocks) -> None:
        super().__init__(Xi.sizes, torch.empty((), dtype=Xi.dtype, device=Xi.device))
        self.Xi, self.Lambda = Xi, Lambda

    def _matmat(self, v: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        return self.Xi._rmatmat(self.Lambda._matmat(self.Xi._matmat(v)))


class ChainFisher(_OnLayers):
    """``F̂ = Ξ^{-1} Λ^{-1} Ξ^{-T}``: F̃ on the tridiagonal blocks, products of regressions further out.

    Args:
        chain: the factors.
        psi: their regressions.
    """

    def __init__(self, chain: LayerChain, psi: Sequence[Pair]) -> None:
        A, G = chain.layers[-1]
        super().__init__(chain.sizes(), A)
        last = KroneckerSum(A, G, torch.zeros_like(A), torch.zeros_like(G))
        self.Xi = Regressions(psi, self.sizes, A)
        self.Sigma = Blocks([*chain.conditional(psi), last], self.sizes, A)

    def _matmat(self, v: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        return self.Xi.solve(self.Sigma._matmat(self.Xi.solve_transposed(v)))


def refuse_solver(rule: FactoredTikhonov) -> None:
    """Refuse approximate inverses of the factors: regressions and what they leave must belong together.

    Raises:
        ValueError: the rule has a solver.
    """
    if rule.solver is not None:
        raise ValueError(f"{rule}: structure='block_tridiagonal' inverts its factors by Cholesky; leave solver out")


def _split(v: Float[Tensor, "n k"], sizes: Sequence[tuple[int, int]]) -> list[Float[Tensor, "k out columns"]]:
    parts = v.split([out * columns for out, columns in sizes])
    return [part.mT.reshape(-1, columns, out).mT for part, (out, columns) in zip(parts, sizes, strict=True)]


def _joined(V: Sequence[Float[Tensor, "k out columns"]]) -> Float[Tensor, "n k"]:
    return torch.cat([part.mT.reshape(part.shape[0], -1) for part in V], dim=1).mT


def _symmetric(M: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Without what rounding made of the other half."""
    return (M + M.mT) / 2


def _double(M: Tensor) -> Tensor:
    return M if M.device.type == "mps" else M.double()
