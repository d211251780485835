"""Floor 1: what attention is."""
