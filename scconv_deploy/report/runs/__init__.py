"""Overview of a run's cells: read, rendered, compared."""
