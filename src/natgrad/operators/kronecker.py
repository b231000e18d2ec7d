r"""Kronecker products as operators, and operators on parameters that consist of blocks.

``(A ⊗ G) vec(V) = vec(G V A)`` for symmetric A and V ``[out, columns]``, vec stacking columns [KFAC, sec. 2].
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from natgrad.layers.rules import Block
from natgrad.model_view import ModelView
from natgrad.operators.base import LinearOperator


class Kronecker(LinearOperator):
    """``A ⊗ G`` of two symmetric factors; a vector stands for a diagonal one, three dimensions for a stack of blocks.

    Args:
        A: ``[columns, columns]`` or its diagonal, or ``[blocks, columns, columns]``.
        G: ``[out, out]`` or its diagonal, or ``[blocks, out, out]``.
    """

    def __init__(self, A: Float[Tensor, "*columns"], G: Float[Tensor, "*out"]) -> None:
        n = (A if A.ndim == 1 else A[..., 0]).numel() * G.shape[-1]
        super().__init__((n, n), dtype=A.dtype, device=A.device, symmetric=True)
        self.A, self.G = A, G

    def _matmat(self, v: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        columns, out = self.A.shape[-1], self.G.shape[-1]
        if self.A.ndim == 3:
            V = self.A @ v.reshape(len(self.A), columns, -1)
            return (self.G[:, None] @ V.unflatten(2, (out, -1))).reshape(v.shape)
        V = v.reshape(columns, -1)
        V = self.A[:, None] * V if self.A.ndim == 1 else self.A @ V
        V = V.reshape(columns, out, -1)
        V = self.G[:, None] * V if self.G.ndim == 1 else self.G @ V
        return V.reshape(v.shape)

    def _dense(self) -> Float[Tensor, "n n"]:
        A, G = (torch.diag(x) if x.ndim == 1 else x.contiguous() for x in (self.A, self.G))
        if A.ndim == 2:
            return torch.kron(A, G)
        return torch.block_diag(*(torch.kron(a, g) for a, g in zip(A, G, strict=True)))


class Dense(LinearOperator):
    """A symmetric matrix as an operator.

    Args:
        matrix: ``[n, n]``.
    """

    def __init__(self, matrix: Float[Tensor, "n n"]) -> None:
        super().__init__((matrix.shape[0], matrix.shape[1]), dtype=matrix.dtype, device=matrix.device, symmetric=True)
        self.matrix = matrix

    def _matmat(self, v: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        return self.matrix @ v

    def _dense(self) -> Float[Tensor, "n n"]:
        return self.matrix


class BlockDiagonal(LinearOperator):
    """A symmetric operator on parameters with one block per group of parameters, and zero between groups.

    Args:
        view: the model.
        blocks: (index, block): the block acts on the entries ``v[index]``, in that order. The indices partition the
            parameters.
    """

    def __init__(self, view: ModelView, blocks: Sequence[tuple[Int[Tensor, " n"], LinearOperator]]) -> None:
        n = view.num_parameters
        super().__init__((n, n), dtype=view.dtype, device=view.device, domain=view, codomain=view, symmetric=True)
        self.blocks = tuple(blocks)

    def _matmat(self, v: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        out = torch.zeros_like(v)
        for index, block in self.blocks:
            out[index] = block._matmat(v[index].to(block.dtype)).to(v.dtype)
        return out

    def _dense(self) -> Float[Tensor, "P P"]:
        out = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for index, block in self.blocks:
            out[index[:, None], index] = block._dense().to(self.dtype)
        return out


def layer_index(view: ModelView, block: Block) -> Int[Tensor, " size"]:
    """Where the stacked columns of a block's matrix V stand in a vector over the parameters; stacks one by one.

    Args:
        view: the model.
        block: a layer with its rule.
    """
    index = view.to_dict(torch.arange(view.num_parameters, device=view.device))
    V = block.to_matrix({key: index[name] for key, name in block.members.items()})
    return V.mT.reshape(-1)


def parameter_index(view: ModelView, name: str) -> Int[Tensor, " size"]:
    """Where one parameter stands in a vector over the parameters, row-major."""
    return view.to_dict(torch.arange(view.num_parameters, device=view.device))[name].reshape(-1)
