"""Parity of artifacts with a reference: gates compared one by one, outputs against the noise floor."""
