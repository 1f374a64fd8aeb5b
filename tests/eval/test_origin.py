"""The layers of the first parent that are left after any chain of cuts, and what role that gives a model."""

import json
from dataclasses import replace

import pytest

from downcycle import keep_layers, open_checkpoint, write
from downcycle.eval.origin import origin_of, training_folder
from downcycle.surgery.adapter.merge import adapter_fingerprint
from downcycle.surgery.checkpoint import find_source


def merged(checkpoint, adapter="out", **more):
    """A checkpoint whose lineage says that an adapter was merged last."""
    lineage = {"operation": "merge", "parent": checkpoint.name, "revision": None, "adapter": adapter, "adapter_revision": None, **more}
    return replace(checkpoint, lineage={**lineage, "parent_lineage": checkpoint.lineage} if checkpoint.lineage else lineage)


def state(folder, history, step=3):
    (folder / f"checkpoint-{step}").mkdir(parents=True)
    (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": history}))


def test_a_model_not_made_here_has_no_origin(make, tmp_path):
    make(tmp_path / "m")
    origin = origin_of(open_checkpoint(tmp_path / "m"))
    assert (origin.role, origin.steps, origin.kept, origin.depth, origin.root) == ("parent", (), None, None, None)


@pytest.mark.parametrize("first", [[0, 1, 2, 5], [5, 4, 4, 0, 1]])
@pytest.mark.parametrize("second", [[0, 3], [3, 2, 2]])
def test_cuts_of_cuts_are_traced_to_the_first_parent(make, tmp_path, first, second):
    make(tmp_path / "m", layers=6)
    parent = open_checkpoint(tmp_path / "m")
    child = open_checkpoint(write(keep_layers(keep_layers(parent, first), second), tmp_path / "c"))
    origin = origin_of(child)
    assert origin.kept == tuple(first[layer] for layer in second)
    for new, old in enumerate(origin.kept):  # the oracle: the bytes themselves
        ours, theirs = (one.tensors[f"model.layers.{layer}.mlp.up_proj.weight"].data.read() for one, layer in ((child, new), (parent, old)))
        assert ours == theirs
    assert (origin.depth, origin.role, origin.root) == (6, "cut", str(tmp_path / "m"))
    assert [step.layers for step in origin.steps] == [tuple(first), tuple(second)]


def test_what_was_merged_is_healed_whatever_came_after(make, tmp_path):
    make(tmp_path / "m", layers=6)
    parent = open_checkpoint(tmp_path / "m")
    assert origin_of(merged(parent)).role == "healed"
    healed = merged(keep_layers(parent, [0, 2, 4]))
    again = keep_layers(healed, [0, 2])
    assert origin_of(healed).kept == (0, 2, 4)
    assert (origin_of(again).kept, origin_of(again).depth, origin_of(again).role) == ((0, 4), 6, "healed")
    assert [step.operation for step in origin_of(again).steps] == ["cut", "merge", "cut"]


def adapter(folder, rank=2, name="layers.0.self_attn.q_proj"):
    """Write an adapter of one matrix, and return what a merge records of it."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "target_modules": ["q_proj"]}))
    tensor = {"dtype": "F32", "shape": [rank, 4], "data_offsets": [0, rank * 16]}
    header = json.dumps({f"base_model.model.model.{name}.lora_A.weight": tensor}).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(rank * 16))
    return {"adapter": str(folder), "adapter_fingerprint": adapter_fingerprint(find_source(folder))}


def test_the_training_is_that_of_the_last_adapter_still_here_or_of_the_folder_itself(make, tmp_path):
    make(tmp_path / "m")
    model = open_checkpoint(tmp_path / "m")
    assert training_folder(model, tmp_path / "m") is None
    state(tmp_path / "m", [])
    assert training_folder(model, tmp_path / "m") == tmp_path / "m"
    state(tmp_path / "old", [])
    healed = merged(merged(model, **adapter(tmp_path / "old")), **adapter(tmp_path / "new"))
    assert training_folder(healed, tmp_path / "m") == tmp_path / "old"
    state(tmp_path / "new", [])
    assert training_folder(healed, tmp_path / "m") == tmp_path / "new"
    assert training_folder(merged(model, **adapter(tmp_path / "new"), adapter_revision="abc")) is None  # a Hub id, not a folder


@pytest.mark.parametrize("change", [{"rank": 3}, {"name": "layers.1.self_attn.q_proj"}, "gone", "damaged"])
def test_a_folder_that_holds_another_adapter_now_is_not_the_training(make, tmp_path, change):
    make(tmp_path / "m")
    state(tmp_path / "out", [])
    healed = merged(open_checkpoint(tmp_path / "m"), **adapter(tmp_path / "out"))
    assert training_folder(healed) == tmp_path / "out"
    if change == "gone":
        (tmp_path / "out" / "adapter_model.safetensors").unlink()
    elif change == "damaged":
        (tmp_path / "out" / "adapter_config.json").write_text("{")
    else:
        adapter(tmp_path / "out", **change)
    assert training_folder(healed) is None


def converted(model):
    from downcycle.surgery.ternary.ternarize import ternarize

    return ternarize(model)


def test_what_was_made_ternary_is_called_so(make, tmp_path):
    make(tmp_path / "m", layers=6)
    parent = open_checkpoint(tmp_path / "m")
    assert origin_of(converted(parent)).role == "ternary"
    packed = converted(merged(keep_layers(parent, [0, 2, 4])))
    assert (origin_of(packed).role, origin_of(packed).kept, origin_of(packed).is_healed) == ("ternary", (0, 2, 4), True)
    again = origin_of(keep_layers(packed, [0, 2]))
    assert (again.role, again.kept, [step.operation for step in again.steps]) == ("ternary", (0, 4), ["cut", "merge", "ternary", "cut"])
    assert not origin_of(converted(keep_layers(parent, [0]))).is_healed


def test_origins_one_after_the_other(make, tmp_path):
    make(tmp_path / "m", layers=6)
    parent = open_checkpoint(tmp_path / "m")
    first, second = origin_of(keep_layers(parent, [1, 3, 5])), origin_of(keep_layers(replace(parent, lineage={}), [2, 0]))
    both = second.after(first)
    assert (both.kept, both.depth, both.steps) == ((5, 1), 6, (*first.steps, *second.steps))
    assert origin_of(converted(parent)).after(first).kept == (1, 3, 5)
    assert first.after(origin_of(parent)) == first


def test_the_folder_of_weights_that_were_converted(make, tmp_path):
    make(tmp_path / "trained")
    state = tmp_path / "trained" / "checkpoint-5"
    state.mkdir()
    (state / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 5, "epoch": 1, "loss": 2.5}]}))
    packed = converted(open_checkpoint(tmp_path / "trained"))
    assert training_folder(packed) == tmp_path / "trained"
    config = json.loads((tmp_path / "trained" / "config.json").read_text())
    (tmp_path / "trained" / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert training_folder(packed) is None  # another training's, now
