"""Layers: what is captured of them, and how that becomes Kronecker factors."""
