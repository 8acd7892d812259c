"""Records that every stage writes, and their JSON codec. Standard library only."""
