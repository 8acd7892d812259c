"""Checks of an artifact against a reference: each one gives findings with a tolerance and a reason."""
