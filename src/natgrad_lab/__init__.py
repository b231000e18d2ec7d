"""The bench beside `natgrad`: data sets, benchmark models, races between optimisers and the command line `natgrad`."""
