"""What server and trainer show of themselves elsewhere: Weights & Biases, TensorBoard."""
