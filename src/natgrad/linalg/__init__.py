"""Plain mathematics on tensors; no model in sight."""

from natgrad.linalg.cg import cg
from natgrad.linalg.krylov import (
    Progress,
    RelativeProgress,
    RelativeResidual,
    Solution,
    StoppingRule,
    geometric_indices,
)
from natgrad.linalg.minres_qlp import minres_qlp
from natgrad.linalg.spd import safe_cholesky, safe_eigh, spd_inverse
from natgrad.linalg.stein import KroneckerSum

__all__ = [
    "KroneckerSum",
    "Progress",
    "RelativeProgress",
    "RelativeResidual",
    "Solution",
    "StoppingRule",
    "cg",
    "geometric_indices",
    "minres_qlp",
    "safe_cholesky",
    "safe_eigh",
    "spd_inverse",
]
