"""What benchmarks share: engines, loops, shapes and results."""
