"""Processes that tasks run in: this machine's, or a Ray cluster's."""
