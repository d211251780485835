"""What conversions of trained attention share: the trained layer, and how its heads compare."""
