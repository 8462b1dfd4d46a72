"""The models that guess: one protocol, used for serving and for training."""
