"""Pre-flight checks, by number."""
