"""Attention as people write it, and as the library models spell it."""
