"""How processes find one another, watch one another and stop together."""
