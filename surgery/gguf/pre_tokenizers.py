"""How a byte-level tokenizer splits text before it merges, and what llama.cpp calls that: told by the rules in tokenizer.json.

Each name was compared with real llama.cpp, token by token, on varied text.
"""

from __future__ import annotations

from typing import Any

CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"

LLAMA3 = rf"{WORDS}|\p{{N}}{{1,3}}|{SIGNS}|{REST}"
QWEN2 = rf"{WORDS}|\p{{N}}|{SIGNS}|{REST}"
TEKKEN = rf"{CASED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{REST}"
DIGITS, GPT2 = "each digit", "as GPT-2"

# By the steps of the splitting, and whether a whole piece that is in the vocabulary is taken as it is (ignore_merges).
NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",
    ((QWEN2,), False): "qwen2",
    ((TEKKEN,), True): "tekken",
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
}


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str:
    """Return what llama.cpp calls the splitting of a tokenizer.json; empty where nothing there is known to do the same."""
    steps = _steps(tokenizer.get("pre_tokenizer") or {})
    return NAMES.get((tuple(steps), bool(tokenizer["model"].get("ignore_merges"))), "") if steps else ""


def _steps(pre: dict[str, Any]) -> list[str]:
    """Return the steps of a splitting in words or patterns; none where one is not understood, or bytes are not its alphabet."""
    parts = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return []
    steps = [_step(part) for part in parts[:-1]] + ([GPT2] if parts[-1].get("use_regex", True) else [])
    return steps if all(steps) else []


def _step(part: dict[str, Any]) -> str:
    if part.get("type") == "Digits" and part.get("individual_digits"):
        return DIGITS
    whole = (part.get("behavior"), bool(part.get("invert"))) in (("Isolated", False), ("Removed", True))
    return part.get("pattern", {}).get("Regex", "") if part.get("type") == "Split" and whole else ""
