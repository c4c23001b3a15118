"""From words to checked jobs. Torch-free."""
