"""Models with ternary weights: made by a command, and what became of their weights, layer by layer."""
