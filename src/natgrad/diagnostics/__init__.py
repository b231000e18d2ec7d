"""How good an approximation is, and why: residuals, cumulants, regressions, distances, operation counts."""

from natgrad.diagnostics.cumulants import CumulantReport, PairCumulants, cumulant_report, pair_cumulants
from natgrad.diagnostics.health import LayerHealth, layer_health
from natgrad.diagnostics.heskes import HeskesDistance, layerwise_kl
from natgrad.diagnostics.operations import Operations, kfac_operations, paper_coefficients
from natgrad.diagnostics.passes import Pass, exact_pass
from natgrad.diagnostics.piecewise_linear import PiecewiseLinearHessian, piecewise_linear_hessian
from natgrad.diagnostics.regression import block_means, regression_view
from natgrad.diagnostics.residuals import Residual, fisher_residuals, layer_sizes, residual

__all__ = [
    "CumulantReport",
    "HeskesDistance",
    "LayerHealth",
    "Operations",
    "PairCumulants",
    "Pass",
    "PiecewiseLinearHessian",
    "Residual",
    "block_means",
    "cumulant_report",
    "exact_pass",
    "fisher_residuals",
    "kfac_operations",
    "layer_health",
    "layer_sizes",
    "layerwise_kl",
    "pair_cumulants",
    "paper_coefficients",
    "piecewise_linear_hessian",
    "regression_view",
    "residual",
]
