"""Rates are those of runs that really happened, of the lengths that are stated, and the peak covers the weights."""

import os
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")

from transformers import GenerationConfig  # noqa: E402

from downcycle import DowncycleError, open_checkpoint  # noqa: E402
from downcycle.eval.measure.loading import load  # noqa: E402
from downcycle.eval.measure.memory import held_memory, peak_memory, start_peak  # noqa: E402
from downcycle.eval.measure.speed import measure_speed  # noqa: E402

BIG = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "max_position_embeddings": 64}


def test_reads_and_writes_as_many_tokens_as_it_says(tiny):
    """Seen by a hook on the model: the prompt at once, then one token at a time on top of the cache, past any end of text."""
    loaded = load(open_checkpoint(tiny(eos_token_id=[*range(4000)])), device="cpu")
    seen = []
    loaded.model.register_forward_pre_hook(
        lambda module, given, named: seen.append((named["input_ids"].shape[1], named["past_key_values"].get_seq_length())),
        with_kwargs=True,
    )
    told, began = [], time.perf_counter()
    speed = measure_speed(loaded, prompt=20, generated=5, runs=2, progress=lambda *step: told.append(step))
    seconds = time.perf_counter() - began
    assert seen == [(20, 0), *((1, 20 + done) for done in range(5))] * 3
    assert (speed.prompt, speed.generated, speed.runs) == (20, 5, 2)
    assert speed.prefill_rate > 20 / seconds and speed.decode_rate > 5 / seconds
    assert told == [("measuring speed", done, 3) for done in range(4)]


@pytest.mark.parametrize(("prompt", "generated", "expected"), [(500, 10, (54, 10)), (10, 500, (10, 32)), (500, 500, (32, 32))])
def test_lengths_are_cut_to_the_positions(tiny, prompt, generated, expected):
    speed = measure_speed(open_checkpoint(tiny()), prompt=prompt, generated=generated, runs=1)
    assert (speed.prompt, speed.generated) == expected


@pytest.mark.parametrize("own", [{"stop_strings": ["a"]}, {"num_return_sequences": 2, "do_sample": True}, {"guidance_scale": 1.5}])
def test_a_model_s_own_settings_of_writing_do_not_count(tiny, own):
    loaded = load(open_checkpoint(tiny()), device="cpu")
    seen = []
    loaded.model.register_forward_pre_hook(lambda module, given, named: seen.append(named["input_ids"].shape), with_kwargs=True)
    loaded.model.generation_config = before = GenerationConfig(**own)
    measure_speed(loaded, prompt=8, generated=3, runs=1)
    assert seen == [(1, 8), *[(1, 1)] * 3] * 2
    assert loaded.model.generation_config is before


PEAKS = """
import sys
import torch
from downcycle import open_checkpoint
from downcycle.eval.measure.speed import measure_speed
measure_speed(open_checkpoint("demo"), prompt=9, generated=1, runs=1)  # brings the libraries in
torch.ones(1 << 28)
ballast = torch.ones(1 << 27)
for how in ("stored", "fp32"):
    print(measure_speed(open_checkpoint(sys.argv[1]), how, prompt=16, generated=2, runs=1).peak_bytes)
"""


def test_peak(tiny):
    """At least the weights that are used, and not many times as much; what was held before, or is over, does not count."""
    folder = tiny(dtype="bfloat16", **BIG)
    run = subprocess.run([sys.executable, "-c", PEAKS, folder], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    stored, fp32 = map(int, run.stdout.split())
    used = open_checkpoint(folder).nbytes - 2 * 4096 * 512  # of the mapped embeddings a few rows are looked at
    assert used < stored < 1.5 * used
    assert 2 * used < fp32 < 4 * used


def test_peak_of_this_process():
    before = start_peak("cpu")
    assert held_memory("cpu") == pytest.approx(before, abs=10_000_000)
    torch.ones(1 << 27)
    assert peak_memory("cpu") - before == pytest.approx(1 << 29, rel=0.05)
    assert start_peak("cpu") == pytest.approx(before, abs=30_000_000)


@pytest.mark.parametrize("wrong", [{"prompt": 0}, {"generated": 0}, {"runs": 0}])
def test_refuses(tiny, wrong):
    with pytest.raises(DowncycleError, match="give numbers from 1"):
        measure_speed(open_checkpoint(tiny()), **wrong)
