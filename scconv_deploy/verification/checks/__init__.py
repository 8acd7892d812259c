"""Checks of an artifact against a reference, each with a status, a reason and the numbers behind it."""
