"""Vectors over the parameters in the layers' Kronecker eigenbases."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.curvature.inverse import Eigenbasis
from natgrad.layers.factors import with_ones
from natgrad.linalg.reflectors import Reflectors
from natgrad.optim.layout import JointLayout


def rotate(
    layout: JointLayout,
    bases: Mapping[str, Eigenbasis],
    vector: Float[Tensor, " size"],
    out: Float[Tensor, " size"],
    *,
    back: bool = False,
) -> None:
    """Write ``Q_Gᵀ V Q_A`` of every layer's V to ``out``, or ``Q_G V Q_Aᵀ``; what has no basis as it is.

    Args:
        layout: of both vectors.
        bases: by layer.
        vector: over the parameters.
        out: another vector.
        back: from the eigenbases.
    """
    found = layout.blocks(out)
    for name, V in layout.blocks(vector).items():
        basis = bases.get(name)
        if basis is None:
            found[name].copy_(V)
        elif back:
            basis.rotate_back(V, found[name])
        else:
            basis.rotate(V, found[name])
    others = layout.others(out)
    for name, part in layout.others(vector).items():
        others[name].copy_(part)


def divergence(layout: JointLayout, bases: Mapping[str, Eigenbasis], step: Float[Tensor, " size"]) -> Float[Tensor, ""]:
    """``δᵀ F̆ δ`` of a step δ in the eigenbases: ``Σ_ij δ_ij² g_i a_j`` over the layers that have one."""
    blocks = layout.blocks(step)
    along = {name: (blocks[name].square() @ basis.a[..., None]).squeeze(-1) for name, basis in bases.items()}
    return torch.stack([(along[name] * basis.g).sum() for name, basis in bases.items()]).sum()


def with_rows(basis: Eigenbasis, rows: int) -> tuple[Eigenbasis, Eigenbasis]:
    """Which sides of a gradient ``gᵀ a`` are rotated with its rows, and which are left for afterwards.

    ``(g Q_G)ᵀ (a Q_A)`` takes less than ``Q_Gᵀ (gᵀ a) Q_A`` on a side where there are fewer rows of a and g than the
    gradient has rows (on the side of A) or columns (on that of G).
    """
    with_a, with_g = rows < len(basis.g), rows < len(basis.a)
    before = replace(basis, QA=basis.QA if with_a else None, QG=basis.QG if with_g else None)
    return before, replace(basis, QA=None if with_a else basis.QA, QG=None if with_g else basis.QG)


def rotate_rows(x: Float[Tensor, "m n"], Q: Tensor | Reflectors, *, ones: bool = False) -> Float[Tensor, "m columns"]:
    """``x Q`` in the dtype of Q.

    Args:
        x: rows.
        Q: a basis.
        ones: append a column of ones to x.
    """
    x = x.to(Q.dtype)
    if isinstance(Q, Reflectors):
        return Q.right(with_ones(x, bias=ones))
    return torch.addmm(Q[-1], x, Q[:-1]) if ones else x @ Q
