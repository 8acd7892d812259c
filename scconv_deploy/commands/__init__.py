"""Commands, one file per kind of argument: each parses, calls a workflow, prints and exits. No logic."""
