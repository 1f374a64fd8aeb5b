"""Benchmarks, run by lm-eval."""
