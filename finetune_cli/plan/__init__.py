"""The plan: a recipe with every `auto` made concrete, and where each value comes from."""
