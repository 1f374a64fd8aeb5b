"""Fold what dropped layers did into weights that are kept."""
