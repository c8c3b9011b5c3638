"""How a step's global batch is ordered, shared out and cut into micro-batches."""
