"""Caches for generation, one file each, and what belongs to them; nothing is imported here."""
