"""Proof that an artifact computes what PyTorch computes, across a step function."""
