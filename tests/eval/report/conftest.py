"""Results to report on, made up but for the published losses of Llama-3-6B's healing; no number here is a measurement of this package."""

import hashlib
import math
from types import SimpleNamespace

import pytest

from downcycle.eval.results import LayerWeights, Logged, ModelResult, Perplexity, Results, Score, Speed

SUITE = {  # task: title, metric, shots, examples, chance
    "arc_challenge": ("ARC-challenge", "acc_norm", 25, 1172, 0.25),
    "hellaswag": ("HellaSwag", "acc_norm", 10, 10042, 0.25),
    "mmlu": ("MMLU", "acc", 5, 14042, 0.25),
    "truthfulqa_mc2": ("TruthfulQA", "acc", 0, 817, None),
    "winogrande": ("Winogrande", "acc", 5, 1267, 0.5),
    "gsm8k": ("GSM8K", "exact_match", 5, 1319, 0.0),
}
HEALING = {1: 7.1806, 5867: 2.6266, 11734: 2.5872, 17601: 2.5549, 23468: 2.5235, 29335: 2.5067, 35202: 2.4968, 41069: 2.4942}
STEPS = 23468  # of an epoch


def score(task, value, *, stderr=0.0, limit=None, group="openllm"):
    title, metric, shots, examples, chance = SUITE[task]
    stderr = stderr if stderr is None or stderr else math.sqrt(value * (1 - value) / examples)
    return Score(task, title, metric, value, stderr, shots, examples, limit, "1.0", True, chance, group)


def suite(*values, **options):
    return tuple(score(task, value, **options) for task, value in zip(SUITE, values, strict=True))


def perplexity(loss, *, text="fineweb-1b, held out", tokens=262144, size=1150000, stderr=0.0041, length=2048, stride=1024):
    bits = loss * tokens / math.log(2) / size
    return Perplexity(text, f"{hash_of(text)}", loss, stderr, math.exp(loss), bits, tokens, size, 412, length, stride)


def hash_of(text):
    return hashlib.sha256(text.encode()).hexdigest()


def speed(factor):
    return Speed(512, 128, 5120.5 / factor, 41.2 / factor, int(16.9e9 * factor), 5)


def healing(every=50):
    """A log as a trainer keeps it: a loss each `every` steps, evaluations as they were published."""
    training = [
        Logged(step, step / STEPS, 2.45 + 4.7 * math.exp(-step / 900) + 0.05 * math.sin(step)) for step in range(every, 46936, every)
    ]
    return tuple(sorted([*training, *(Logged(step, step / STEPS, None, loss) for step, loss in HEALING.items())], key=lambda one: one.step))


def model(name, role="parent", kept=None, depth=None, layers=32, parameters=8_030_261_248, **measured):
    layers = len(kept) if kept else layers
    return ModelResult(name, hash_of(name), role, layers, parameters, 2 * parameters, "bf16", "cuda", None, depth, kept, **measured)


def ternary(layers):
    """Ternary weights of a model whose first layer is in float and whose second came from nobody knows what."""
    counts = ((67_000_000 + 10_000 * layer, 84_000_000 - 20_000 * layer, 67_000_000 + 10_000 * layer) for layer in range(1, layers))
    found = [LayerWeights(layer, *three, 54_500_028, 436_000_000, 0.51 + 0.001 * layer, 90.0) for layer, three in enumerate(counts, 1)]
    return (LayerWeights(1, *((found[0].minus, found[0].zero, found[0].plus)), 54_500_028), *found[1:])


def llama(**changes):
    """Parent, cut and healed, like Llama-3-6B; the last of them packed."""
    first = tuple(range(24))
    parent = model(
        "meta-llama/Meta-Llama-3-8B",
        scores=suite(0.592, 0.821, 0.667, 0.439, 0.781, 0.505),
        perplexity=(perplexity(1.815), perplexity(2.291, text="wikitext-2", tokens=71000, size=330000)),
        speed=speed(1),
    )
    cut = model(
        *("Llama-3-6B-v0", "cut", first, 32),
        parameters=6_285_365_248,
        scores=suite(0.331, 0.421, 0.512, 0.451, 0.623, 0.011),
        perplexity=(perplexity(5.112), perplexity(7.735, text="wikitext-2", tokens=71000, size=330000)),
        speed=speed(0.78),
    )
    healed = model(
        *("Llama-3-6B-v0.1", "healed", first, 32),
        parameters=6_285_365_248,
        scores=suite(0.452, 0.702, 0.588, 0.442, 0.711, 0.121),
        perplexity=(perplexity(2.494), perplexity(2.866, text="wikitext-2", tokens=71000, size=330000)),
        speed=speed(0.78),
        training=healing(),
        ternary=ternary(24),
    )
    versions = {"downcycle": "0.1.0", "torch": "2.13.0", "transformers": "5.16.1", "lm_eval": "0.4.11"}
    return Results((parent, cut, healed), "one NVIDIA H100, 26 CPU cores, 200 GiB", versions, "2026-11-22", **changes)


def many():
    """Seven models with long names, of 126 layers."""
    models = []
    for n in range(7):
        kept = None if n == 0 else tuple(range(126 - 10 * n)) if n % 2 else tuple(range(0, 126, n))
        measured = {"scores": suite(*(0.9 - 0.09 * n for _ in SUITE), limit=100), "perplexity": (perplexity(1.2 + n),)}
        measured |= {"speed": speed(1 - n / 9), "training": healing(200 + n) if n else ()}
        measured |= {"ternary": ternary(126)} if n in (3, 6) else {}
        name = f"someone-{n}/A-Very-Large-Language-Model-405B-pruned-by-rule-{n}-and-healed-2026-11"
        role = ("healed", kept, 126) if n else ("parent", None, None, 126)
        models.append(model(name, *role, parameters=(405 - 30 * n) * 10**9, **measured))
    return Results(tuple(models), "a machine", {"torch": "2.13.0"}, "2026-11-22")


@pytest.fixture(scope="session")
def made():
    """The makers of this file."""
    return SimpleNamespace(**{name: value for name, value in globals().items() if callable(value) or name.isupper()})
