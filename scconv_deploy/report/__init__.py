"""Records of a run, and what people read of them."""
