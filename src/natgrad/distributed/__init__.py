"""Several processes: the only place that talks to ``torch.distributed``."""
