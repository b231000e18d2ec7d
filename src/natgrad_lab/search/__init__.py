"""Biased random search [THESIS, sec. 4.1, Algorithm 1] as a sampler for any Optuna study."""

from natgrad_lab.search.sampler import BiasedRandomSampler, acceptance

__all__ = ["BiasedRandomSampler", "acceptance"]
