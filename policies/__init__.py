"""Pure decision rules: how far to draft, when to publish, when to roll back. No torch, no I/O."""
