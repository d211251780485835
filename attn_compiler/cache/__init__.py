"""Caches of the variants that change what a cache holds."""
