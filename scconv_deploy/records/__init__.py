"""Pure data that every stage writes. Standard library only."""
