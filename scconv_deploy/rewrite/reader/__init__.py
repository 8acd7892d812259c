"""SRUs read from the nodes of a graph."""
