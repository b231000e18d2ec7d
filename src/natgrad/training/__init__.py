"""Training pieces beside the optimisers: batch-size schedule, iterate averaging, initialisation, a normalisation."""

from natgrad.layers.mean_only import MeanOnlyBatchNorm
from natgrad.training.averaging import IterateAverage
from natgrad.training.initialization import sparse_init_
from natgrad.training.schedule import ExponentialBatchSize, HyperbolicDecay

__all__ = ["ExponentialBatchSize", "HyperbolicDecay", "IterateAverage", "MeanOnlyBatchNorm", "sparse_init_"]
