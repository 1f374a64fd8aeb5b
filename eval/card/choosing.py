"""Say why a rule keeps what it keeps, on what it measured, and what was folded into the layers that are left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...surgery.choose import format_layers
from ..origin import Step
from .redact import name_of
from .wording import plain

# What surgery/choose.py and surgery/importance/rules.py say of the rules, for those who read a card.
WHY = {
    "first": "keeps the layers nearest the input and drops the deepest ones: the choice of Llama-3-6B and of Inheritune "
    "(arXiv 2404.08634), made to be trained further.",
    "tail": "drops the block just before the last layer and keeps the last one, whose output the head was trained on.",
    "ends": "keeps the first and the last half, so that the layers next to the embeddings and those next to the head both stay.",
    "even": "spreads the kept layers evenly over the depth, the first and the last among them, so that no long run is missing.",
    "layers": "means that the layers were listed one by one.",
    "bi": "drops the layers that turn hidden states least (block influence, ShortGPT, arXiv 2403.03853).",
    "angular": "drops the block of layers over which hidden states turn least at the last token (arXiv 2403.17887).",
    "ppl": "drops the layer without which the loss is least, measures all others again, and so on (SLEB, arXiv 2402.09025).",
    "taylor": "drops the layers whose weights matter least to the loss by a first-order estimate (Taylor+, arXiv 2402.02834).",
    "magnitude": "drops the layers with the smallest weights (arXiv 2402.02834), a baseline.",
}
HOW = {
    "scale": "the weights before each gap were multiplied by the factor by which the dropped layers enlarged hidden states "
    "(Prune&Comp, arXiv 2507.18212)",
    "refit": "output projections of kept layers were fitted by least squares, layer by layer, to the parent's hidden states, those of the "
    "layer before each gap to what they are behind it",
}


def why_kept(step: Step) -> str:
    """Explain the rule of a cut, and what it was measured on; nothing where no rule is known."""
    if not step.rule:
        return ""
    known = f"The rule `{plain(step.rule)}` {WHY[step.rule]}" if step.rule in WHY else f"Rule: `{plain(step.rule)}`."
    facts = step.calibration
    numbers = [facts.get(name) for name in ("samples", "length")]
    if not isinstance(text := facts.get("text"), str) or not all(isinstance(number, int) for number in numbers):
        return known
    samples, length = numbers
    held = f", weights held as {plain(load)}" if isinstance(load := facts.get("load"), str) and load != "stored" else ""
    return f"{known}{_protected(facts)} Measured on {samples} samples of at most {length} tokens of {plain(name_of(text))}{held}."


def _protected(facts: Mapping[str, Any]) -> str:
    """Name the layers that a person said must stay; nothing where the rule's own did."""
    layers = facts.get("protect")
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        return ""
    return f" Layers {format_layers(layers)} had to stay." if layers else " No layer had to stay."


def what_was_folded(step: Step) -> str:
    """Say how the cut was compensated for, and what that won on held-out samples; nothing where it was not."""
    method, losses, tensors = (step.compensation.get(name) for name in ("method", "loss", "tensors"))
    if method not in HOW or not isinstance(tensors, dict):
        return ""
    won = ""
    if isinstance(losses, dict) and all(isinstance(losses.get(name), float) for name in ("plain", method)):
        won = f": on held-out samples {losses['plain']:.3f} nats per token became {losses[method]:.3f}"
    return f"To make up for the dropped layers, {HOW[method]} (`{method}`, {len(tensors)} tensors), without any training{won}."
