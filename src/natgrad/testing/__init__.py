"""Checks that a rule for layers of your own can be put through; they need nothing but PyTorch."""

from natgrad.testing.layers import check_layer

__all__ = ["check_layer"]
