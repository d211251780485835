"""How variants with parameters of their own take the place of layers in living models."""
