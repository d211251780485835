"""Caches of generation whose layout a variant changes; they plug into transformers' own classes."""
