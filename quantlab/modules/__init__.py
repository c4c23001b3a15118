"""What is true of any torch module: its layers, bytes, digests, calls."""
