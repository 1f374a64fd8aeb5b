"""Checkpoint -> Checkpoint: opening, cutting, writing and proving. Imports nothing from the other folders."""
