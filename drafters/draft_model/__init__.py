"""A separate causal LM as drafter: any smaller one with the target's tokenizer."""
