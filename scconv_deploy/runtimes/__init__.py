"""Runners of artifacts, one context manager for each backend."""
