"""Layers: what is captured of them, and how that becomes Kronecker factors."""

from natgrad.layers import kinds as kinds
from natgrad.layers.registry import register_layer
from natgrad.layers.rules import Block, DiagonalRule, KroneckerRule, LayerRule, Use

__all__ = ["Block", "DiagonalRule", "KroneckerRule", "LayerRule", "Use", "register_layer"]
