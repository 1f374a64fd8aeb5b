"""Verify finds every difference that is made by hand, and calls equal what is equal."""

import json
import shutil
import struct

import pytest

from downcycle import DowncycleError, keep_layers, open_checkpoint, verify, write
from downcycle.surgery import hub
from downcycle.surgery.compensation.fold import keep_compensated, open_fitted


@pytest.fixture
def child(make, tmp_path):
    """A child of two of four layers in three shards, its parent in two."""
    make(tmp_path / "m", shards=2, config={"x": float("nan"), "use_cache": True, "nothing": None})
    write(keep_layers(open_checkpoint(tmp_path / "m"), [0, 3]), tmp_path / "c", max_shard_size=300)
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 3
    return tmp_path / "c"


@pytest.mark.parametrize("given", [False, True])
def test_an_untouched_child_is_proved(child, make, tmp_path, given):
    counts = []
    proof = verify(child, tmp_path / "m" if given else None, progress=counts.append)
    assert (proof.parent, proof.layers, proof.tensors, proof.files) == (str(tmp_path / "m"), [0, 3], 21, 5)
    assert proof.bytes == sum(counts) == open_checkpoint(child).nbytes


def test_a_parent_that_moved_must_be_given(child, tmp_path):
    (tmp_path / "m").rename(tmp_path / "elsewhere")
    with pytest.raises(DowncycleError, match="no such folder.*give it with --src"):
        verify(child)
    assert verify(child, tmp_path / "elsewhere").tensors == 21
    with pytest.raises(DowncycleError, match="no such folder"):
        verify(child, "")


def test_more_files_than_were_written_do_no_harm_unless_a_model_reads_them(child):
    (child / "README.md").write_text("my model")
    (child / "axolotl.yaml").write_text("base_model: .")
    assert verify(child).files == 5
    (child / "special_tokens_map.json").write_text("{}")
    with pytest.raises(DowncycleError, match="special_tokens_map.json does not belong"):
        verify(child)


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md"])
def test_licence_texts_may_be_added_and_those_of_the_parent_must_stay(make, tmp_path, name):
    make(tmp_path / "m")
    write(keep_layers(open_checkpoint(tmp_path / "m"), [0, 3]), tmp_path / "c")
    (tmp_path / "c" / name).write_text("mine")
    assert verify(tmp_path / "c").files == 5
    (tmp_path / "m" / name).write_text("the parent's")
    with pytest.raises(DowncycleError, match=f"{name} differs"):
        verify(tmp_path / "c")
    (tmp_path / "c" / name).unlink()
    with pytest.raises(DowncycleError, match=f"{name} is missing"):
        verify(tmp_path / "c")
    (tmp_path / "c" / name).write_text("the parent's")
    assert verify(tmp_path / "c").files == 6


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rewrite_shard(child, pack_file, read_back, change):
    """Put changed tensors into one file instead of three."""
    tensors = read_back(child)
    change(tensors)
    for path in child.glob("model*"):
        path.unlink()
    (child / "model.safetensors").write_bytes(pack_file(tensors))


def said_of(folder, says):
    """Return the one line in which a folder is refused."""
    with pytest.raises(DowncycleError, match=says) as refusal:
        verify(folder)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


CHANGES = {
    "one bit of a tensor": (lambda c: flip_a_bit(c / "model-00002-of-00003.safetensors"), r"tensor model\.\S+ differs between bytes 0 and"),
    "the tokenizer": (lambda c: flip_a_bit(c / "tokenizer.json"), "tokenizer.json differs"),
    "a missing template": (lambda c: (c / "chat_template.jinja").unlink(), "chat_template.jinja is missing"),
    "a config key": (lambda c: edit_json(c / "config.json", lambda v: v.update(vocab_size=9)), "vocab_size is 9 instead of 8"),
    "a config key's type": (lambda c: edit_json(c / "config.json", lambda v: v.update(use_cache=1)), "use_cache is 1 instead of true"),
    "a new config key": (lambda c: edit_json(c / "config.json", lambda v: v.update(y=None)), "y is null instead of absent"),
    "a config key gone": (lambda c: edit_json(c / "config.json", lambda v: v.pop("nothing")), "nothing is absent instead of null"),
    "another depth in lineage": (
        lambda c: edit_json(c / "downcycle.json", lambda v: v.update(layers=[0])),
        "num_hidden_layers is 2 instead of 1",
    ),
    "another layer in lineage": (
        lambda c: edit_json(c / "downcycle.json", lambda v: v.update(layers=[0, 2])),
        r"tensor model.layers.1\S+ differs",
    ),
}


@pytest.mark.parametrize(("change", "says"), CHANGES.values(), ids=CHANGES)
def test_every_change_is_found(child, change, says):
    change(child)
    assert said_of(child, says).startswith(f"{child} is not what downcycle.json says: ")


def swap(tensors):
    tensors["model.norm.weight"], tensors["model.layers.0.input_layernorm.weight"] = (
        tensors["model.layers.0.input_layernorm.weight"],
        tensors["model.norm.weight"],
    )


TENSORS = {
    "a missing tensor": (lambda t: t.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
    "an extra tensor": (lambda t: t.update(extra=t["model.norm.weight"]), "tensor extra does not belong"),
    "another dtype": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"]._replace(dtype="F16")}),
        r"is F16 \[8, 4\] instead of BF16",
    ),
    "another shape": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"]._replace(shape=(4, 8))}),
        r"is BF16 \[4, 8\] instead of BF16 \[8, 4\]",
    ),
    "two tensors swapped": (swap, "tensor model.norm.weight differs"),
}


@pytest.mark.parametrize(("change", "says"), TENSORS.values(), ids=TENSORS)
def test_every_change_of_tensors_is_found(child, pack_file, read_back, change, says):
    rewrite_shard(child, pack_file, read_back, lambda tensors: None)
    assert verify(child).tensors == 21  # the number of files is no part of the value
    rewrite_shard(child, pack_file, read_back, change)
    with pytest.raises(DowncycleError, match=says):
        verify(child)


def test_the_wrong_parent(child, make, tmp_path):
    make(tmp_path / "trained-otherwise", seed=1, config={"x": float("nan"), "use_cache": True, "nothing": None})
    make(tmp_path / "another-shape", vocab=9)
    with pytest.raises(DowncycleError, match="differs between bytes .*, and 1[0-9] more"):
        verify(child, tmp_path / "trained-otherwise")
    with pytest.raises(DowncycleError, match="another-shape is not the parent of .*config or tensors differ"):
        verify(child, tmp_path / "another-shape")
    with pytest.raises(DowncycleError, match="is not the parent"):
        verify(child, child)


LINEAGES = {
    "gone": (None, "holds no downcycle.json"),
    "empty": ({}, "holds no downcycle.json"),
    "without layers": ({"parent": "x", "revision": None, "fingerprint": "", "rule": "first"}, "lacks 'layers'"),
    "layers that are text": ({"layers": "0-3"}, "no list of layers"),
    "layers that are true": ({"layers": [True]}, "no list of layers"),
    "layers that are nested": ({"layers": [[0]]}, "no list of layers"),
    "a parent that is a number": ({"parent": 5}, "names no parent"),
    "a parent that is a list": ({"parent": []}, "names no parent"),
    "a layer that is not there": ({"layers": [10**30]}, "does not exist"),
    "no layers": ({"layers": []}, "no layers"),
    "an operation of the future": ({"operation": "fold"}, "speaks of 'fold', which is not known here"),
    "an operation that is a list": ({"operation": ["merge"]}, "which is not known here"),
    "a merge without an adapter": ({"operation": "merge"}, "lacks 'adapter'"),
    "a parent's lineage that is text": ({"parent_lineage": "x", "fingerprint": ""}, "is not the parent"),
    "another fingerprint": ({"fingerprint": 5}, "is not the parent"),
    "a revision of a folder": ({"revision": "main"}, "only a Hub repo has revisions"),
}


@pytest.mark.parametrize(("lineage", "says"), LINEAGES.values(), ids=LINEAGES)
def test_a_lineage_that_cannot_be(child, lineage, says):
    path = child / "downcycle.json"
    whole = json.loads(path.read_text())
    path.unlink()
    if lineage is not None:
        path.write_text(json.dumps(lineage if "rule" in lineage or not lineage else whole | lineage))
    said_of(child, says)


def test_a_cut_has_no_adapter(child, tmp_path):
    for given in (tmp_path, "nowhere"):
        with pytest.raises(DowncycleError, match=f"--adapter {given}: no adapter was merged into {child}; leave it out"):
            verify(child, adapter=given)


def test_a_folder_that_is_no_child(make, tmp_path):
    make(tmp_path / "m")
    with pytest.raises(DowncycleError, match="only a folder that downcycle wrote can be verified"):
        verify(tmp_path / "m")
    shutil.rmtree(tmp_path / "m")
    with pytest.raises(DowncycleError, match="no such folder"):
        verify(tmp_path / "m")


def test_a_folder_is_never_looked_for_on_the_hub(make, tmp_path, monkeypatch):
    make(tmp_path / "p1")
    monkeypatch.chdir(tmp_path)
    write(keep_layers(open_checkpoint("p1"), [0]), "c")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(hub, "open_hub", None)
    with pytest.raises(DowncycleError, match="p1: no such folder.*give it with --src"):
        verify(tmp_path / "c")
    assert verify(tmp_path / "c", "../p1").layers == [0]


# Fitted weights: what the parent has not, and downcycle.json states the digests of.


DOWN = "model.layers.{}.mlp.down_proj.weight"


@pytest.fixture
def compensated(make, stored, pack_file, tmp_path):
    """Layers 0, 1 and 3 of four, with new weights in what becomes layers 1 and 2."""
    make(tmp_path / "m")
    parent = open_checkpoint(tmp_path / "m")
    (tmp_path / "cache").mkdir()
    new = {DOWN.format(layer): stored("BF16", (4, 8), seed=90 + layer) for layer in (1, 3)}
    (tmp_path / "cache" / "fitted.safetensors").write_bytes(pack_file(new))
    fitted = open_fitted(tmp_path / "cache" / "fitted.safetensors")
    write(keep_compensated(parent, [0, 1, 3], "bi", fitted, {"method": "refit", "loss": {"plain": 3.0, "refit": 2.0}}), tmp_path / "c")
    shutil.rmtree(tmp_path / "cache")
    return tmp_path / "c"


def flip(folder, read_back, pack_file, name):
    tensors = read_back(folder)
    data = bytearray(tensors[name].data)
    data[0] ^= 1
    tensors[name] = tensors[name]._replace(data=bytes(data))
    (folder / "model.safetensors").write_bytes(pack_file(tensors))


def digests(change):
    return lambda folder: edit_json(folder / "downcycle.json", lambda lineage: change(lineage["compensation"]["tensors"]))


def test_fitted_weights_are_proved_by_their_digests(compensated, tmp_path):
    proof = verify(compensated)
    assert proof.what == f"layers 0-1,3 of {tmp_path / 'm'}, 2 tensors of them fitted, with the digests that downcycle.json states"
    assert (proof.layers, proof.tensors) == ([0, 1, 3], 30)
    assert verify(compensated, tmp_path / "m") == proof


@pytest.mark.parametrize("name", [DOWN.format(1), DOWN.format(2), DOWN.format(0), "model.norm.weight"])
def test_a_flipped_bit_is_found_in_fitted_weights_and_in_others(name, compensated, read_back, pack_file):
    flip(compensated, read_back, pack_file, name)
    with pytest.raises(DowncycleError, match=f"tensor {name} differs between bytes 0 and"):
        verify(compensated)


DIGESTS = {
    "another digest": (digests(lambda them: them.update({DOWN.format(1): "0" * 64})), f"tensor {DOWN.format(1)} differs"),
    "no digest": (digests(lambda them: them.pop(DOWN.format(1))), f"tensor {DOWN.format(1)} differs"),
    "no text": (digests(lambda them: them.update({DOWN.format(1): 5})), f"tensor {DOWN.format(1)} differs"),
    "swapped": (
        digests(lambda them: them.update({DOWN.format(1): them[DOWN.format(2)], DOWN.format(2): them[DOWN.format(1)]})),
        f"tensor {DOWN.format(1)} differs.*tensor {DOWN.format(2)} differs",
    ),
    "of a tensor that is not there": (digests(lambda them: them.update(x="0" * 64)), "says that x was fitted, which the model has not"),
    "no compensation": (lambda c: edit_json(c / "downcycle.json", lambda v: v.pop("compensation")), f"tensor {DOWN.format(1)} differs"),
    "compensation that is text": (
        lambda c: edit_json(c / "downcycle.json", lambda v: v.update(compensation="refit")),
        f"tensor {DOWN.format(1)} differs",
    ),
}


@pytest.mark.parametrize(("change", "says"), DIGESTS.values(), ids=DIGESTS)
def test_changed_digests_are_found(change, says, compensated):
    change(compensated)
    said_of(compensated, says)


def test_a_cut_of_a_compensated_child_is_proved_while_that_is_there(compensated, make, tmp_path):
    """What was fitted is in the child alone, and so the child cannot be made again without it."""
    write(keep_layers(open_checkpoint(compensated), [0, 2]), tmp_path / "g")
    assert verify(tmp_path / "g").layers == [0, 2]
    compensated.rename(tmp_path / "moved")
    with pytest.raises(DowncycleError, match="no such folder.*give it with --src") as refusal:
        verify(tmp_path / "g")
    assert "\n" not in str(refusal.value)
    assert verify(tmp_path / "g", tmp_path / "moved").layers == [0, 2]
    write(keep_layers(open_checkpoint(tmp_path / "m"), [0, 1, 3]), compensated)  # another child of the same shapes
    with pytest.raises(DowncycleError, match=f"tensor {DOWN.format(1)} differs"):
        verify(tmp_path / "g")


def test_a_merge_into_a_compensated_child(compensated, tmp_path, pack_file, stored):
    """A merge is computed again from the child as it is; where that is gone, one line says so."""
    pytest.importorskip("torch")
    from downcycle import merge_adapter

    adapter = tmp_path / "lora"
    adapter.mkdir()
    modules = [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]
    zeros = stored("F32", (1, 1))
    tensors = {}
    for module in modules:
        for half, shape in (("A", (2, 8)), ("B", (4, 2))):
            values = struct.pack(f"<{shape[0] * shape[1]}f", *(0.01 * place for place in range(shape[0] * shape[1])))
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = zeros._replace(shape=shape, data=values)
    (adapter / "adapter_model.safetensors").write_bytes(pack_file(tensors))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2, "target_modules": ["down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(compensated)}))
    write(merge_adapter(open_checkpoint(compensated), adapter), tmp_path / "merged")
    assert verify(tmp_path / "merged").tensors == 30
    compensated.rename(tmp_path / "moved")
    with pytest.raises(DowncycleError, match="no such folder.*give it with --src") as refusal:
        verify(tmp_path / "merged")
    assert "\n" not in str(refusal.value)
    assert verify(tmp_path / "merged", tmp_path / "moved").tensors == 30
