"""Plain mathematics on tensors; no model in sight."""

from natgrad.linalg.spd import safe_cholesky, safe_eigh, spd_inverse

__all__ = ["safe_cholesky", "safe_eigh", "spd_inverse"]
