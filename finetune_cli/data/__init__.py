"""Rows: where they come from, and which tokens they become."""
