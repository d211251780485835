"""How variants take the place of a layer and of the feed-forward net in its block."""
