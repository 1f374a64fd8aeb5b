"""Rotary position embeddings as GGUF tells of them: the base, how long contexts are scaled, and Llama 3.1's factors. Works on configs."""

from __future__ import annotations

import math
import struct
from typing import Any

from ..errors import DowncycleError
from .numbers import number, whole

Config = dict[str, Any]
KNOWN = ("default", "linear", "yarn", "llama3")


def rope_of(config: Config) -> Config:
    """Return the parameters of a model's rope; of one that has several, those of the layers that see everything."""
    rope: Config = config.get("rope_parameters") or {}
    whole: Config = rope.get("full_attention", rope)
    return whole


def stated_rope(config: Config) -> Config:
    """Return the rope that a config.json states, in its newer form or in its older one; empty where it leaves a part to its class."""
    rope: Config = config.get("rope_parameters") or {}
    if not rope and "rope_theta" in config:
        scaling = config.get("rope_scaling") or {}
        rope = {"rope_theta": config["rope_theta"], "rope_type": scaling.get("type", "default"), **scaling}
    return rope if {"rope_theta", "rope_type"} <= rope.keys() else {}


def rotary_part(config: Config) -> float:
    """Return which part of a head's dimensions is turned."""
    named = {"partial_rotary_factor": rope_of(config).get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0}
    return number(named, "partial_rotary_factor")


def rope_fields(config: Config, head: int) -> dict[str, Any]:
    """Return the metadata of a rope by key, without the architecture's name in front.

    Raises:
        DowncycleError: a way of scaling that llama.cpp does not have.
    """
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind not in KNOWN:
        raise DowncycleError(f"rope_type {kind}: not known here, so its GGUF would be wrong; known are {', '.join(KNOWN)}")
    fields = {"rope.dimension_count": int(head * rotary_part(config)), "rope.freq_base": number(rope, "rope_theta")}
    if kind in ("linear", "yarn"):
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": number(rope, "factor")}
    return fields | (_yarn(config, rope) if kind == "yarn" else {})


def _yarn(config: Config, rope: Config) -> dict[str, Any]:
    """YaRN (arXiv 2309.00071): llama.cpp multiplies its own 0.1 ln(factor) + 1 by attn_factor, and takes the paper's betas."""
    if (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1) != (32, 1):
        raise DowncycleError("rope_type yarn with other betas than 32 and 1, which llama.cpp takes for granted: its GGUF would be wrong")
    if rope.get("mscale") or rope.get("mscale_all_dim") or rope.get("truncate") is False:
        raise DowncycleError("rope_type yarn with mscale, or without truncate: not known here, so its GGUF would be wrong")
    stated = (
        rope if rope.get("original_max_position_embeddings") else {"original_max_position_embeddings": config["max_position_embeddings"]}
    )
    fields: dict[str, Any] = {"rope.scaling.original_context_length": whole(stated, "original_max_position_embeddings")}
    if rope.get("attention_factor") is not None:
        fields["rope.scaling.attn_factor"] = number(rope, "attention_factor") / (0.1 * math.log(number(rope, "factor")) + 1)
    return fields


def rope_factors(config: Config, head: int) -> bytes:
    """Return what Llama 3.1's rope divides each frequency by, float32 [dimensions / 2]; empty for another rope.

    Long waves are stretched by `factor`, short ones not, those between in part (the `llama3` rope of transformers).
    """
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return b""
    factor, low, high = (number(rope, name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    longest, base = whole(rope, "original_max_position_embeddings"), number(rope, "rope_theta")
    if not (factor > 0 and high > low and base > 0):
        raise DowncycleError(
            f"rope_type llama3 with the factors {factor}, {low} and {high} and the base {base}: no such rope; mend config.json"
        )
    factors = []
    for index in range(0, head, 2):
        turns = longest / (2 * math.pi * base ** (index / head))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return struct.pack(f"<{len(factors)}f", *factors)
