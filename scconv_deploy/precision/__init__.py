"""Half precision for the data, float32 for the gate."""
