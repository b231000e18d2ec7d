"""Plain mathematics on tensors; no model in sight."""

from natgrad.linalg.spd import safe_cholesky, safe_eigh, spd_inverse
from natgrad.linalg.stein import KroneckerSum

__all__ = ["KroneckerSum", "safe_cholesky", "safe_eigh", "spd_inverse"]
