"""What tests and benchmarks compare the engine with: exact laws, references, random requests."""
