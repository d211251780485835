"""Numbers: what attention costs, and how long that takes on a device."""
