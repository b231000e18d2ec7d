"""Natural-gradient and Gauss-Newton training for PyTorch models.

`import natgrad as ng`. The library depends on PyTorch, plus a typing library for tensor shapes. Data sets, races
between optimisers and the command line live beside it in `natgrad_lab`.
"""

from natgrad import diagnostics, layers, linalg, testing, training
from natgrad.curvature.discounted_covariance import PastGradients
from natgrad.curvature.fisher import kronecker_fisher
from natgrad.damping import ExactTikhonov, FactoredTikhonov
from natgrad.damping_rules import GreedyGamma, LevenbergMarquardt
from natgrad.layers import register_layer
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from natgrad.losses import likelihood_of
from natgrad.operators.autodiff import (
    EmpiricalFisher,
    Fisher,
    GaussNewton,
    GradientCovariance,
    Hessian,
    Jacobian,
)
from natgrad.optim.acp import ACP
from natgrad.optim.centered import CenteredSGD
from natgrad.optim.dense_newton import Newton
from natgrad.optim.eigen_adam import EigenAdam
from natgrad.optim.health import health
from natgrad.optim.hessian_free import HessianFree
from natgrad.optim.inner_solve import InnerSolve, LineSearch
from natgrad.optim.kfac import KFAC
from natgrad.optim.krylov_descent import KrylovDescent, SubspaceSearch
from natgrad.optim.krylov_preconditioner import KroneckerPreconditioner
from natgrad.optim.natural_gradient import NaturalGradient
from natgrad.optim.nesterov import NesterovSGD
from natgrad.optim.newton import KrylovSolver
from natgrad.optim.preconditioned import Preconditioned
from natgrad.optim.preconditioner import Preconditioner
from natgrad.optim.prong import PRONG
from natgrad.optim.scaling import Grafting, KLClip
from natgrad.optim.settings import Damping, Periods, Renewal, Rescaling, StepGuard, Subsets
from natgrad.optim.tonga import TONGA

__version__ = "0.1.0"

__all__ = [
    "ACP",
    "KFAC",
    "PRONG",
    "TONGA",
    "Bernoulli",
    "Categorical",
    "CenteredSGD",
    "Damping",
    "EigenAdam",
    "EmpiricalFisher",
    "ExactTikhonov",
    "FactoredTikhonov",
    "Fisher",
    "GaussNewton",
    "Gaussian",
    "GradientCovariance",
    "Grafting",
    "GreedyGamma",
    "Hessian",
    "HessianFree",
    "InnerSolve",
    "Jacobian",
    "KLClip",
    "KrylovDescent",
    "KroneckerPreconditioner",
    "KrylovSolver",
    "LevenbergMarquardt",
    "Likelihood",
    "LineSearch",
    "NaturalGradient",
    "NesterovSGD",
    "Newton",
    "PastGradients",
    "Periods",
    "Poisson",
    "Preconditioned",
    "Preconditioner",
    "Renewal",
    "Rescaling",
    "StepGuard",
    "SubspaceSearch",
    "Subsets",
    "__version__",
    "diagnostics",
    "health",
    "kronecker_fisher",
    "layers",
    "likelihood_of",
    "register_layer",
    "testing",
    "linalg",
    "training",
]
