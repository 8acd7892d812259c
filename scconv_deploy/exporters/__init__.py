"""Everything that writes an artifact."""
