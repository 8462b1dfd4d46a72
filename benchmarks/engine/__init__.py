"""What the engine reaches on one GPU: ``python -m benchmarks.engine``."""
