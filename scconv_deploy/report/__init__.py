"""Parity reports: load, render, compare, merge, judge again."""
