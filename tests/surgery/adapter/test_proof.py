"""A merge can be proved from its downcycle.json, and an adapter is merged into no other model than it names."""

import json
import re
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from tiny_adapters import as_bytes, edit, edit_tensors  # noqa: E402

from downcycle import DowncycleError, keep_layers, open_checkpoint, verify, write  # noqa: E402
from downcycle.surgery.adapter.merge import merge_adapter  # noqa: E402

from hub_server import connected  # noqa: E402

KEY = "base_model.model.model.layers.3.self_attn.q_proj.lora_{}.weight"


def test_a_merge_is_proved_and_its_faults_are_found(llama, adapter, tmp_path):
    child = write(keep_layers(open_checkpoint(llama[0]), [*range(8)]), tmp_path / "child")
    write(merge_adapter(open_checkpoint(child), adapter), tmp_path / "out")
    lineage = json.loads((tmp_path / "out" / "downcycle.json").read_text())
    assert (lineage["operation"], lineage["parent"], lineage["adapter"]) == ("merge", str(child), str(adapter))
    assert lineage["parent_lineage"]["layers"] == [*range(8)]
    assert lineage["adapter_base"] == json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    proof = verify(tmp_path / "out")
    assert (proof.parent, proof.layers, proof.tensors) == (str(child), [], len(open_checkpoint(child).tensors))
    shutil.rmtree(child)
    assert verify(tmp_path / "out") == proof  # made again from its parent
    assert verify(tmp_path / "out", llama[0]) == proof
    adapter.rename(tmp_path / "moved")
    with pytest.raises(DowncycleError, match="adapter: no such folder.*give it with --adapter"):
        verify(tmp_path / "out")
    assert verify(tmp_path / "out", adapter=tmp_path / "moved").tensors == proof.tensors
    edit_tensors(tmp_path / "moved", lambda tensors: tensors[KEY.format("B")].add_(1))
    with pytest.raises(DowncycleError, match=r"tensor model.layers.3.self_attn.q_proj.weight differs .*Merge it again"):
        verify(tmp_path / "out", adapter=tmp_path / "moved")
    edit(tmp_path / "moved", lora_alpha=9)
    with pytest.raises(DowncycleError, match="moved is not the adapter merged into"):
        verify(tmp_path / "out", adapter=tmp_path / "moved")


def test_a_merge_into_a_cut_that_was_never_written_is_proved(llama, tmp_path):
    write(merge_adapter(keep_layers(open_checkpoint(llama[0]), [7, *range(1, 8)]), llama[1]), tmp_path / "out")
    assert verify(tmp_path / "out").what == f"{llama[0]} with {llama[1]} merged into it"


def test_a_base_and_an_adapter_of_the_hub(llama, tmp_path, monkeypatch):
    with connected(monkeypatch, tmp_path / "cache") as server:
        for name, folder in (("ann/base", llama[0]), ("ann/lora", llama[1])):
            commit = server.add(name, folder, {"v1"})
        pinned = merge_adapter(open_checkpoint("ann/base"), "ann/lora@v1")
        assert (pinned.lineage["adapter"], pinned.lineage["adapter_revision"]) == ("ann/lora", commit)
        with pytest.raises(DowncycleError, match="v2"):
            merge_adapter(open_checkpoint("ann/base"), "ann/lora@v2")
        write(merge_adapter(open_checkpoint("ann/base"), "ann/lora"), tmp_path / "out")
        proof = verify(tmp_path / "out")
        assert verify(tmp_path / "out", adapter="ann/lora@v1") == proof
    assert proof.what == "ann/base with ann/lora merged into it"
    assert as_bytes(open_checkpoint(tmp_path / "out")) == as_bytes(merge_adapter(open_checkpoint(llama[0]), llama[1]))


def other_model(llama, folder):
    """Another model of the same shapes."""
    shutil.copytree(llama[0], folder)
    edit_tensors(folder, lambda tensors: [tensor.neg_() for tensor in tensors.values()], "model.safetensors")
    return folder


def test_no_other_model_than_the_adapter_names(refusal, llama, adapter, tmp_path):
    parent = other_model(llama, tmp_path / "parent")
    first, last = (write(keep_layers(open_checkpoint(parent), kept), tmp_path / str(kept[0])) for kept in ([0, 1], [6, 7]))
    edit_tensors(adapter, lambda tensors: [tensors.pop(key) for key in list(tensors) if not re.search(r"\.[01]\.", key)])
    edit(adapter, base_model_name_or_path=str(first))
    said = refusal(open_checkpoint(last), adapter)
    assert f"was trained on {first}, which is another model than {last}: their model.layers.0.mlp.down_proj.weight differ" in said
    assert f"set base_model_name_or_path there to {last}" in said
    expected = as_bytes(merge_adapter(open_checkpoint(first), adapter))
    renamed = shutil.copytree(first, tmp_path / "renamed")
    assert as_bytes(merge_adapter(open_checkpoint(renamed), adapter)) == expected
    edit(adapter, base_model_name_or_path=str(last))  # as the hint says
    merge_adapter(open_checkpoint(last), adapter)
    shutil.rmtree(last)
    assert as_bytes(merge_adapter(open_checkpoint(first), adapter)) == expected  # what is gone cannot be compared


def test_an_adapter_is_not_merged_twice(refusal, llama, adapter, tmp_path):
    edit(adapter, base_model_name_or_path=str(llama[0]))
    once = write(merge_adapter(open_checkpoint(llama[0]), adapter), tmp_path / "once")
    assert f"was trained on {llama[0]}, which is another model than {once}" in refusal(open_checkpoint(once), adapter)


def test_the_adapters_place_is_asked_for_only_where_it_is_not_found(llama, adapter, tmp_path):
    write(merge_adapter(open_checkpoint(llama[0]), adapter), tmp_path / "out")
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(DowncycleError, match="is truncated") as raised:
        verify(tmp_path / "out")
    assert "--adapter" not in str(raised.value)
    shutil.rmtree(adapter)
    with pytest.raises(DowncycleError, match="no such folder.*lies elsewhere now, give it with --adapter"):
        verify(tmp_path / "out")
    with pytest.raises(DowncycleError, match="elsewhere: no such folder") as raised:
        verify(tmp_path / "out", adapter=tmp_path / "elsewhere")
    assert "--adapter" not in str(raised.value)
