"""Curvature estimates: statistics that add up over batches, and their inverses under a damping."""
