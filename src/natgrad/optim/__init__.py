"""Optimisers: where a curvature, a damping and the quadratic model meet."""
