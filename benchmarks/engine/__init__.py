"""Engine performance on one GPU: ``python -m benchmarks.engine``."""
