"""The buffer between server and trainer: traces flow one way, weights the other. Torch-free."""
