"""Engines: options, targets, profiles, network and build."""
