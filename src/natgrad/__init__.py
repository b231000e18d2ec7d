"""Natural-gradient and Gauss-Newton training for PyTorch models.

`import natgrad as ng`. The library depends on PyTorch, plus a typing library for tensor shapes. Data sets, races between
optimisers and the command line live beside it in `natgrad_lab`.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
