"""Dense twins: the definitions written out, slow and obvious, independent of the package."""
