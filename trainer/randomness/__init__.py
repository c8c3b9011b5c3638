"""Random numbers that are a pure function of a key, the same on every device."""
