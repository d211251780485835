"""Floor 5: graph surgery."""
