"""Floor 3: operators and what computes them."""
