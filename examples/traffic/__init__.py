"""Prompts as people send them: chat requests made from this installation, completions of its text,
or any JSONL file."""
