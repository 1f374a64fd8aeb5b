"""How fast a model reads a prompt and writes after it, one sequence at a time, and in how much memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from ...surgery.checkpoint import Checkpoint
from ...surgery.errors import DowncycleError
from ..results import Speed
from .loading import Loaded, load, positions, vocabulary
from .memory import peak_memory, start_peak

SEED = 0


def measure_speed(
    model: Checkpoint | Loaded,
    how: str = "stored",
    *,
    prompt: int = 512,
    generated: int = 64,
    runs: int = 3,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Speed:
    """Measure prefill, decoding and peak memory: medians of `runs` after one that warms up.

    Each run reads `prompt` random tokens and writes `generated` more with the KV cache, the likeliest each time and past any end-of-text
    token, by transformers' own `generate`. Prefill ends when the first new token is known; the others are the decoding. Both are cut where
    the model has fewer positions.

    The peak is the most memory held in loading or in running above what was held before loading (see `memory`). Measure a loaded model
    before all else: what the process took since then and still holds is counted as the model's.

    Args:
        model: a checkpoint, which is loaded as `how` says, or one that is loaded already.
        progress: called with what is being done, runs done and runs in all.
    """
    if min(prompt, generated, runs) < 1:
        raise DowncycleError(f"prompt {prompt}, generated {generated}, runs {runs}: give numbers from 1")
    loaded = model if isinstance(model, Loaded) else load(model, how)
    limit = positions(loaded.model.config) or prompt + generated
    generated = min(generated, max(1, limit // 2))
    prompt = max(1, min(prompt, limit - generated))
    start_peak(loaded.device.type)
    rates = []
    for run in range(runs + 1):
        progress("measuring speed", run, runs + 1)
        rates.append(_run(loaded, prompt, generated))
    progress("measuring speed", runs + 1, runs + 1)
    return Speed(
        prompt=prompt,
        generated=generated,
        prefill_rate=median(rate for rate, _ in rates[1:]),
        decode_rate=median(rate for _, rate in rates[1:]),
        peak_bytes=max(loaded.peak, peak_memory(loaded.device.type) - loaded.held),
        runs=runs,
    )


class _Clock:
    """What `generate` calls a streamer: it is given the prompt, then each token once it is known."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def _run(loaded: Loaded, prompt: int, generated: int) -> tuple[float, float]:
    """Return the rates of prefill and decoding of one run, in tokens per second."""
    import torch
    from transformers import GenerationConfig

    special, rows = set(loaded.tokenizer.all_special_ids), vocabulary(loaded.model)
    plain = torch.tensor([token for token in range(min(rows, len(loaded.tokenizer))) if token not in special])
    ids = plain[torch.randint(len(plain), (1, prompt), generator=torch.Generator().manual_seed(SEED))].to(loaded.device)
    settings = GenerationConfig(max_new_tokens=generated + 1, do_sample=False, pad_token_id=int(plain[0]))
    clock = _Clock()
    model: Any = loaded.model
    own, model.generation_config = model.generation_config, GenerationConfig()  # what `settings` leaves open would come from the model's
    try:
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=clock)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise DowncycleError(f"{loaded.checkpoint.name}: cannot write text, so its speed cannot be measured ({said})") from error
    finally:
        model.generation_config = own
    began, first, *_, last = clock.times
    return prompt / (first - began), generated / (last - first)
