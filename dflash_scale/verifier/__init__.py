"""What is known of the verifier: its files, shape, layers, LM head and identity."""
