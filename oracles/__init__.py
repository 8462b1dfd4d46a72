"""What the engine is held against: exact laws, plain references and random requests."""
