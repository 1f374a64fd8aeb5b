"""Measuring a model: how it is loaded, perplexity, speed."""
