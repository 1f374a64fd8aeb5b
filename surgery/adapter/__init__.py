"""Merge a LoRA or DoRA adapter into the weights that it was trained on."""
