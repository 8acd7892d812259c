"""Read SRUs from the nodes of a graph."""
