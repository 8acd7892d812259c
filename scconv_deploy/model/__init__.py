"""PyTorch's side, from what the user names to a prepared model."""
