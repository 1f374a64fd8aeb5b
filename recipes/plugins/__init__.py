"""Plugins for Axolotl, named in a recipe by `plugins: [downcycle.recipes.plugins.TernaryPlugin]`."""

from .ternary import TernaryPlugin

__all__ = ["TernaryPlugin"]
