"""What a cut cost: measuring a child against its parent, and publishing it."""
