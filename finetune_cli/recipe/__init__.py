"""The recipe: its sections, its reader, and what it says when something in it is wrong."""
