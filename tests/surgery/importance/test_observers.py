"""What is seen of hidden states as layers are run is what `output_hidden_states` of the whole model says."""

import math

import pytest

torch = pytest.importorskip("torch")

from downcycle import open_checkpoint  # noqa: E402
from downcycle.surgery.importance.observers import Influences, LastTokens, Magnitudes  # noqa: E402
from downcycle.surgery.importance.parts import Parts  # noqa: E402
from downcycle.surgery.importance.paths import WHOLE, run_paths  # noqa: E402
from downcycle.surgery.importance.states import States  # noqa: E402

from tiny_models import DEPTH  # noqa: E402

FAMILIES = ["llama", "gemma3_text", "opt", "mixtral"]


def observed(folder, batches, states, **options):
    parts = Parts(open_checkpoint(folder), **options)
    watching = Influences(DEPTH), LastTokens(DEPTH), Magnitudes(DEPTH)
    run_paths(parts, batches, [WHOLE, frozenset({0}), frozenset({4})], States(states), observers=watching)
    return watching


@pytest.mark.parametrize("family", FAMILIES)
def test_block_influence(tiny, whole, batches, tmp_path, family):
    influences, _, _ = observed(tiny(family), batches, tmp_path / "states")
    states = [whole(tiny(family)).hidden(batch.ids) for batch in batches]
    for layer, score in enumerate(influences.scores()):
        angles = []
        for hidden in states:
            before, after = hidden[layer].double().flatten(0, 1), hidden[layer + 1].double().flatten(0, 1)
            angles += [1 - (x @ y / (x.norm() * y.norm())).item() for x, y in zip(before, after, strict=True)]
        assert len(angles) == sum(batch.ids.size for batch in batches)
        assert score == pytest.approx(sum(angles) / len(angles), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_angular_distance_of_every_block(tiny, whole, batches, tmp_path, family):
    _, last, _ = observed(tiny(family), batches, tmp_path / "states")
    states = [whole(tiny(family)).hidden(batch.ids) for batch in batches]
    rows = [torch.cat([hidden[depth][:, -1] for hidden in states]).double() for depth in range(DEPTH + 1)]
    triangle = last.triangle()
    assert [len(row) for row in triangle] == [*range(DEPTH, 0, -1)]
    for size, row in enumerate(triangle, 1):
        for start, distance in enumerate(row):
            cosines = torch.nn.functional.cosine_similarity(rows[start], rows[start + size]).clamp(-1, 1)
            assert distance == pytest.approx((cosines.arccos() / math.pi).mean().item(), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude(tiny, whole, batches, tmp_path, family):
    _, _, magnitudes = observed(tiny(family), batches, tmp_path / "states")
    model = whole(tiny(family)).model
    for layer, score in enumerate(magnitudes.scores):
        weights = [weight for name, weight in model.named_parameters() if f"layers.{layer}." in name and weight.ndim > 1]
        assert len(weights) >= 4
        assert score == pytest.approx(sum(weight.double().abs().sum().item() for weight in weights), rel=1e-9)


def test_a_layer_that_a_text_does_not_pass_has_no_score(tiny, batches, tmp_path):
    """Mllama's layers 1, 4 and 6 look at images alone."""
    influences, last, magnitudes = observed(tiny("mllama"), batches, tmp_path / "states")
    assert [layer for layer, score in enumerate(influences.scores()) if score is None] == [1, 4, 6]
    triangle = last.triangle()
    assert [layer for layer, distance in enumerate(triangle[0]) if distance == 0] == [1, 4, 6]
    assert triangle[1][0] == triangle[0][0] and triangle[1][3] == triangle[0][3]
    assert None not in magnitudes.scores


def test_packed_weights_have_no_magnitude(tiny, batches, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantizer = BitsAndBytesConfig(load_in_8bit=True)
    influences, last, magnitudes = observed(tiny(), batches, tmp_path / "states", quantization_config=quantizer)
    assert magnitudes.scores == [None] * DEPTH
    assert all(0 < score < 2 for score in influences.scores()) and all(distance > 0 for row in last.triangle() for distance in row)
