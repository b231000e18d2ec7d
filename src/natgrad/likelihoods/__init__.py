"""Likelihoods p(y | z): the distributions that turn a model's output into a loss and its curvature."""

from natgrad.likelihoods.base import Likelihood, is_plain_sum, nll_and_score, score
from natgrad.likelihoods.bernoulli import Bernoulli
from natgrad.likelihoods.categorical import Categorical
from natgrad.likelihoods.gaussian import Gaussian
from natgrad.likelihoods.poisson import Poisson

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood", "Poisson", "is_plain_sum", "nll_and_score", "score"]
