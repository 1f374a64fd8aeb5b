"""What a packed model's weights are is counted once, beside its source where that is at hand, and kept."""

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

from downcycle import DowncycleError, keep_layers, open_checkpoint, write  # noqa: E402
from downcycle.eval.content import content_digest  # noqa: E402
from downcycle.eval.results import LayerWeights, all_layers  # noqa: E402
from downcycle.eval.ternary.layers import layer_weights  # noqa: E402
from downcycle.surgery.ternary.ternarize import ternarize  # noqa: E402


@pytest.fixture
def packed(tmp_path):
    """A model of two layers that was not made here, and what it was packed as."""
    source = write(keep_layers(open_checkpoint("demo"), [0, 1]), tmp_path / "source")
    (source / "downcycle.json").unlink()
    return write(ternarize(open_checkpoint(source)), tmp_path / "packed")


def measured(folder, told=None):
    checkpoint = open_checkpoint(folder)
    return layer_weights(checkpoint, content_digest(checkpoint), lambda what, done, total: told is None or told.append(what))


def errors_by_hand(source, layers):
    found = []
    for layer in layers:
        lost = norm = 0.0
        for name, weight in load_file(Path(source) / "model.safetensors").items():
            if f"layers.{layer}." in name and weight.ndim == 2:
                scale = weight.float().abs().mean()
                rest = weight.float() - scale * (weight.float() / scale).round().clamp(-1, 1)
                lost, norm = lost + float(rest.double().square().sum()), norm + float(weight.double().square().sum())
        found.append((lost / norm) ** 0.5)
    return found


def test_beside_its_source(packed, tmp_path):
    found = measured(packed)
    assert [one.layer for one in found] == [0, 1]
    assert [one.error for one in found] == pytest.approx(errors_by_hand(tmp_path / "source", [0, 1]), rel=1e-5)
    assert [(one.before, one.after) for one in found] == [(2 * 196608, 196608 // 4 + 7 * 4)] * 2
    assert all(one.weights == 196608 for one in found)


def test_a_source_that_was_never_written(tmp_path):
    """Layers that were cut and packed in one pass are made again from the first parent."""
    folder = write(ternarize(keep_layers(open_checkpoint("demo"), [3, 7, 8])), tmp_path / "packed")
    source = write(keep_layers(open_checkpoint("demo"), [3, 7, 8]), tmp_path / "child")
    assert [one.error for one in measured(folder)] == pytest.approx(errors_by_hand(source, [0, 1, 2]), rel=1e-5)


def test_it_is_counted_once(packed):
    told = []
    first = measured(packed, told)
    assert measured(packed, told) == first and told == ["counting ternary weights"]


def test_a_source_that_is_gone_or_another_one_now(packed, tmp_path):
    beside = measured(packed)
    shutil.move(tmp_path / "source", tmp_path / "elsewhere")
    alone = measured(packed)
    assert [(one.minus, one.zero, one.plus, one.after) for one in alone] == [(one.minus, one.zero, one.plus, one.after) for one in beside]
    assert all(one.error is one.before is one.norm is None for one in alone)
    write(keep_layers(open_checkpoint("demo"), [0, 1, 2]), tmp_path / "source")
    assert measured(packed) == alone
    shutil.rmtree(tmp_path / "source")
    shutil.move(tmp_path / "elsewhere", tmp_path / "source")
    assert measured(packed) == beside


def test_a_parent_on_the_hub_is_not_asked_for(packed, monkeypatch):
    lineage = json.loads((packed / "downcycle.json").read_text())
    (packed / "downcycle.json").write_text(json.dumps(lineage | {"parent": "someone/model", "revision": "0" * 40}))
    monkeypatch.setattr("downcycle.eval.ternary.layers.parent_of", lambda *given, **named: pytest.fail("asked"))
    assert all(one.error is None for one in measured(packed))


def test_a_source_that_was_trained_on_is_counted_again(packed, tmp_path):
    before = measured(packed)
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 3
    save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    after = measured(packed)
    assert after[0] == before[0] and after[1].error > before[1].error


def test_other_models_have_none(tmp_path):
    assert measured(write(keep_layers(open_checkpoint("demo"), [0]), tmp_path / "m")) == ()


def test_a_damaged_model_is_refused(packed):
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 255
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(DowncycleError, match="4 codes that are no ternary weights"):
        measured(packed)


def test_all_layers_together():
    one, two = LayerWeights(0, 1, 2, 3, 5, 12, 0.5, 2.0), LayerWeights(1, 3, 2, 1, 5, 12, 0.25, 4.0)
    whole = all_layers([one, two])
    assert (whole.minus, whole.zero, whole.plus, whole.after, whole.before) == (4, 4, 4, 10, 24)
    assert whole.error == pytest.approx((1 + 1) ** 0.5 / 20**0.5) and whole.norm == pytest.approx(20**0.5)
    assert all_layers([one, LayerWeights(1, 3, 2, 1, 5)]) == LayerWeights(None, 4, 4, 4, 10)
    assert all_layers([LayerWeights(0, 0, 4, 0, 5, 8, 0.0, 0.0)]).error == 0
