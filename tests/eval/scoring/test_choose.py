"""Every rule of the command line keeps what the same rule keeps that is computed with the whole model in memory."""

import json
import math

import pytest

torch = pytest.importorskip("torch")

from downcycle import open_checkpoint  # noqa: E402

DEPTH, KEEP = 10, 7
PROTECTED = {"bi": [], "angular": [9], "ppl": [0, 9], "taylor": [0, 1, 2, 3, 8, 9], "magnitude": [0, 1, 2, 3, 8, 9]}  # as in the papers


def influence(model, samples):
    """1 - the mean cosine over all tokens of all samples."""
    sums, count = [0.0] * DEPTH, 0
    for one in samples:
        _, states = model.run(one.ids)
        count += len(one.ids)
        for layer in range(DEPTH):
            sums[layer] += float((1 - torch.cosine_similarity(states[layer], states[layer + 1], dim=-1)).sum())
    return [total / count for total in sums]


def angles(model, samples, size):
    """The mean angle at the last token over each block of this size, in parts of pi."""
    found = []
    for start in range(DEPTH - size + 1):
        ends = [[states[depth][-1] for depth in (start, start + size)] for states in (model.run(one.ids)[1] for one in samples)]
        found.append(sum(math.acos(float(torch.cosine_similarity(*pair, dim=0))) / math.pi for pair in ends) / len(samples))
    return found


def gradients(model, samples):
    """The sum of |w dL/dw| over each layer's matrices."""
    matrices = [[weight.requires_grad_(True) for weight in layer.parameters() if weight.ndim > 1] for layer in model.layers]
    loss = sum(model.nats(one) for one in samples) / sum(one.scored for one in samples)
    loss.backward()
    found = [sum(float((weight.detach() * weight.grad).abs().sum()) for weight in layer) for layer in matrices]
    for weight in (weight for layer in matrices for weight in layer):
        weight.requires_grad_(False).grad = None
    return found


def lowest(scores, protected, count):
    free = [layer for layer in range(DEPTH) if layer not in protected]
    return set(sorted(free, key=lambda layer: scores[layer])[:count])


def search(model, samples, protected, count):
    """Drop the layer without which the loss is least, and begin anew."""
    gone: set[int] = set()
    while len(gone) < count:
        losses = {layer: model.loss(samples, gone | {layer}) for layer in range(DEPTH) if layer not in gone and layer not in protected}
        gone.add(min(losses, key=losses.get))
    return gone


def block(model, samples, protected, size):
    scores = angles(model, samples, size)
    starts = [start for start in range(len(scores)) if not set(range(start, start + size)) & set(protected)]
    best = min(starts, key=lambda start: scores[start])
    return set(range(best, best + size))


def dropped(model, samples, rule, protected):
    count = DEPTH - KEEP
    if rule == "bi":
        return lowest(influence(model, samples), protected, count)
    if rule == "taylor":
        return lowest(gradients(model, samples), protected, count)
    if rule == "magnitude":
        sizes = [sum(float(w.abs().sum()) for w in layer.parameters() if w.ndim > 1) for layer in model.layers]
        return lowest(sizes, protected, count)
    return (search if rule == "ppl" else block)(model, samples, protected, count)


@pytest.mark.parametrize("protect", [None, "none", "2,4-5"])
def test_rules(protect, tiny, text, study, whole, downcycle, tmp_path):
    folder = tiny(DEPTH)
    samples, model = study(folder).calibration.fit, whole(folder)
    given = () if protect is None else ("--protect", protect)
    chosen = {}
    for rule, own in PROTECTED.items():
        code, out, err = downcycle(
            *("--src", folder, "--keep", KEEP, "--select", rule, "--calibrate", text, "--samples", 10, "--length", 24, *given),
            *("--out", tmp_path / rule, "--json"),
        )
        assert (code, err) == (0, "")
        protected = {None: own, "none": [], "2,4-5": [2, 4, 5]}[protect]
        chosen[rule] = json.loads(out)["layers"]
        assert set(range(DEPTH)) - set(chosen[rule]) == dropped(model, samples, rule, protected)
        lineage = open_checkpoint(tmp_path / rule).lineage
        assert (lineage["layers"], lineage["rule"]) == (chosen[rule], rule)
        facts = lineage["calibration"]
        assert (facts["samples"], facts["length"], facts["seed"], facts["text"]) == (10, 24, 0, str(text))
        assert facts["tokens"] == sum(len(one.ids) for one in samples)
    assert len({tuple(layers) for layers in chosen.values()}) > 2  # or it proves nothing


def test_all_layers_may_be_kept(tiny, text, downcycle, tmp_path):
    for rule in PROTECTED:
        given = ("--calibrate", text, "--samples", 10, "--length", 24)
        code, out, _ = downcycle("--src", tiny(), "--keep", 6, "--select", rule, *given, "--out", tmp_path / rule, "--json")
        assert (code, json.loads(out)["layers"]) == (0, [0, 1, 2, 3, 4, 5])


def test_a_folder_that_exists_is_refused_before_anything_is_measured(tiny, text, refused, loads, tmp_path):
    (tmp_path / "child").mkdir()
    (tmp_path / "child" / "config.json").write_text("{}")
    given = ("--src", tiny(), "--keep", 4, "--select", "ppl", "--calibrate", text, "--samples", 10, "--length", 24)
    assert "exists already; choose another folder, or give --overwrite" in refused(*given, "--out", tmp_path / "child")
    assert loads == []
