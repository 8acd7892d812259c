"""The machine: files, signals, streams, GPUs, tools. Standard library only."""
