"""The words and the values that pass between the wings. Torch-free."""
