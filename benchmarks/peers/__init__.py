"""Other decoders on the same target, hardware and prompts."""
