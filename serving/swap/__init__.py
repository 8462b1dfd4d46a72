"""New weights in a running drafter."""
