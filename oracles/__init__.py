"""References for tests and benchmarks: exact distributions, plain decoding, random requests."""
