"""Training pieces beside the optimisers: batch-size schedule, iterate averaging, sparse initialisation."""

from natgrad.training.averaging import IterateAverage
from natgrad.training.initialization import sparse_init_
from natgrad.training.schedule import ExponentialBatchSize

__all__ = ["ExponentialBatchSize", "IterateAverage", "sparse_init_"]
