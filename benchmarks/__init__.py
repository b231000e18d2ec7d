"""What natgrad must reach, measured: `python -m benchmarks --help`."""
