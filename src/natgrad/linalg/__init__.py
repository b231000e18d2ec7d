"""Plain mathematics on tensors; no model in sight."""

from natgrad.linalg.bilinear import (
    bilinear_gradient,
    bilinear_hessian,
    bilinear_newton_step,
    convolution_tiling,
    distributed_inverse,
    kronecker_approximation,
    summed_hessian,
    tied_hessian,
)
from natgrad.linalg.cg import cg
from natgrad.linalg.iterative import NewtonSchulz
from natgrad.linalg.krylov import (
    Progress,
    RelativeProgress,
    RelativeResidual,
    Solution,
    StoppingRule,
    geometric_indices,
)
from natgrad.linalg.low_rank import DiagonalMinusLowRank, LowRank
from natgrad.linalg.minres_qlp import minres_qlp
from natgrad.linalg.spd import safe_cholesky, safe_eigh, spd_inverse
from natgrad.linalg.stein import KroneckerSum

__all__ = [
    "DiagonalMinusLowRank",
    "KroneckerSum",
    "LowRank",
    "NewtonSchulz",
    "Progress",
    "RelativeProgress",
    "RelativeResidual",
    "Solution",
    "StoppingRule",
    "bilinear_gradient",
    "bilinear_hessian",
    "bilinear_newton_step",
    "cg",
    "convolution_tiling",
    "distributed_inverse",
    "geometric_indices",
    "kronecker_approximation",
    "minres_qlp",
    "safe_cholesky",
    "safe_eigh",
    "spd_inverse",
    "summed_hessian",
    "tied_hessian",
]
