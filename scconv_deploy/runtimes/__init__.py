"""What runs an artifact, one context manager a backend."""
