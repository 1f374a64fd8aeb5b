"""Verify finds every difference that is made by hand, and calls equal what is equal."""

import json
import shutil

import pytest

from downcycle import DowncycleError, keep_layers, open_checkpoint, verify, write
from downcycle.surgery import hub


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
    with pytest.raises(DowncycleError, match=says) as refusal:
        verify(child)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(f"{child} is not what downcycle.json says: ")


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
    with pytest.raises(DowncycleError, match=says) as refusal:
        verify(child)
    assert "\n" not in str(refusal.value)


def test_a_cut_has_no_adapter(child, tmp_path):
    for given in (tmp_path, "nowhere"):
        with pytest.raises(DowncycleError, match=f"--adapter {given}: {child} is a cut, and no adapter was merged into it; leave it out"):
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
