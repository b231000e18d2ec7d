"""Curvature estimates: statistics that add up over batches, and their inverses under a damping."""

from natgrad.curvature.fisher import KroneckerCurvature, kronecker_fisher

__all__ = ["KroneckerCurvature", "kronecker_fisher"]
