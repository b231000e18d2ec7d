"""Training pieces beside the optimisers: batch sizes, iterate averaging, initialisation, a normalisation, logs."""

from natgrad.layers.mean_only import MeanOnlyBatchNorm
from natgrad.training.averaging import IterateAverage
from natgrad.training.initialization import glorot_init_, he_init_, sparse_init_
from natgrad.training.learning_rate import inverse_largest_eigenvalue
from natgrad.training.logging import StatsLogger
from natgrad.training.schedule import ExponentialBatchSize, HyperbolicDecay

__all__ = [
    "ExponentialBatchSize",
    "HyperbolicDecay",
    "IterateAverage",
    "MeanOnlyBatchNorm",
    "StatsLogger",
    "glorot_init_",
    "he_init_",
    "inverse_largest_eigenvalue",
    "sparse_init_",
]
