"""The streaming layer: hidden states from the servers to the training ranks."""
