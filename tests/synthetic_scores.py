"""Scores of layers that were made up, in the shapes of real ones: deterministic, of any depth, and without numpy. Nothing was measured."""

import hashlib
import math
import random

from downcycle.surgery.importance.scores import Choice, Importance, Loss, Scores, Work

DEPTHS = {4: 3, 12: 9, 32: 24, 80: 60, 126: 100}  # layers: how many are kept
UNCUT = 2.1034


def make_scores(layers=32, keep=None, **changes):
    """What `downcycle score` could have found: layers without a score, a refused metric and method, a method that is kept plain."""
    keep = DEPTHS[layers] if keep is None else keep
    chance, drop = random.Random(layers), layers - keep
    states = _states(layers, chance)
    influence = [1 - _cosine(states[i], states[i + 1]) for i in range(layers)]
    alone = [12 * value**1.8 + chance.uniform(-0.004, 0.01) for value in influence]
    taylor = [None if i < min(4, layers // 4) or i >= layers - 2 else 30 * v * chance.uniform(0.5, 1.5) for i, v in enumerate(influence)]
    magnitude = [1.9e6 + 8e3 * i + chance.uniform(-5e4, 5e4) for i in range(layers)]
    triangle = tuple(
        tuple(math.acos(_cosine(states[i], states[i + n])) / math.pi for i in range(layers - n + 1)) for n in range(1, layers + 1)
    )
    begin = min(range(layers - drop + 1), key=lambda i: triangle[drop - 1][i]) if drop else 0
    dropped = {
        "bi": _lowest(influence, drop),
        "angular": list(range(begin, begin + drop)),
        "ppl": _lowest(alone, drop),
        "taylor": _lowest(taylor, drop),
        "magnitude": _lowest(magnitude, drop),
        "first": list(range(keep, layers)),
    }
    given = {
        "model": "meta-llama/Meta-Llama-3-8B",
        "revision": "8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920",
        "content": hashlib.sha256(b"model").hexdigest(),
        "layers": layers,
        "keep": keep,
        "protect": (0, layers - 1),
        "load": "bf16",
        "device": "cuda",
        "calibration": {
            "text": "fineweb-calibration.parquet",
            "text_digest": hashlib.sha256(b"text").hexdigest(),
            "digest": hashlib.sha256(b"tokens").hexdigest(),
            "samples": 64,
            "length": 2048,
            "seed": 42,
            "fit_tokens": 98304,
            "held_out_tokens": 32768,
        },
        "uncut": Loss(UNCUT, 0.0123),
        "importance": (
            Importance("block influence", "1 - cosine", tuple(influence)),
            Importance("angular distance", "angle / pi", triangle[0]),
            Importance("leave-one-out loss", "nats per token", tuple(alone)),
            Importance("Taylor", "nats per token", tuple(taylor)),
            Importance("magnitude", "sum of |w|", tuple(magnitude)),
        ),
        "angular": triangle,
        "choices": tuple(_choice(rule, layers, gone, influence, place) for place, (rule, gone) in enumerate(dropped.items())),
        "work": (
            Work("single-pass metrics", 1, layers, layers, layers * 4, layers * 4),
            Work("leave one out", 1, layers, layers * (layers + 1) // 2, layers * layers, layers * (layers - 1)),
            Work("greedy", drop, layers * drop, layers * layers * drop // 6, layers * layers * drop, layers * layers * drop),
        ),
        "refused": {"curvature": "needs gradients of every weight, and this model is loaded in nf4; load it in bf16"},
        "machine": "AMD EPYC, 16 cores, 128 GiB; NVIDIA H100",
        "versions": {"downcycle": "0.1.0", "torch": "2.13.0", "transformers": "5.16.1"},
    }
    return Scores(**given | changes)


def _states(layers, chance):
    """Hidden states, [layers + 1][24]: the first layers and the last one turn them most."""
    state = [chance.gauss(0, 1) for _ in range(24)]
    states = [state]
    for i in range(layers):
        place, size = i / max(1, layers - 1), math.hypot(*state) / math.sqrt(24)
        share = 1.1 * math.exp(-i * 1.2) + (1.6 - 1.1 * place) * 3 / (layers + 6) + 0.5 * math.exp(i - layers + 1) + chance.uniform(0, 0.03)
        state = [s + share * size * chance.gauss(0, 1) for s in state]
        states.append(state)
    return states


def _cosine(one, other):
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


def _lowest(values, count):
    known = [i for i in range(1, len(values) - 1) if values[i] is not None] or list(range(1, len(values) - 1))
    more = [i for i in range(len(values)) if i not in known]
    return sorted([*sorted(known, key=lambda i: values[i]), *more][:count])


def _choice(rule, layers, dropped, influence, place):
    cost = 0.9 * sum(influence[i] for i in dropped) * (1 + 0.35 * place) + (16 if rule == "magnitude" else 0.02)
    kept = tuple(i for i in range(layers) if i not in dropped)
    cut = Loss(UNCUT + cost, 0.031 + 0.006 * cost, 0.011 + 0.006 * cost)
    scaled = Loss(UNCUT + 0.8 * cost, cut.stderr, cut.added_stderr)
    refitted = Loss(UNCUT + (0.5 + 0.03 * place) * cost, 0.8 * cut.stderr, 0.8 * cut.added_stderr)
    worse = "its weights lose 2.9107 where the plain cut loses less"
    if rule == "taylor":
        return Choice(rule, kept, cut, {"refit": refitted}, kept_plain={"scale": worse})
    if rule == "first":
        return Choice(rule, kept, cut, {"scale": scaled}, refused={"refit": "a norm follows the MLP of layer 3; try --compensate scale"})
    return Choice(rule, kept, cut, {"scale": scaled, "refit": refitted})
