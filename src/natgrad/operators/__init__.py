"""Linear operators: the contract, exact curvature without matrices, and compositions of Kronecker products."""
