"""The buffer between server and trainer: traces flow one way, weights the other. Free of torch."""
