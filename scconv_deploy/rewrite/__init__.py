"""Graph to graph. So far: the functions that give the ``scconv`` operators their meaning."""
