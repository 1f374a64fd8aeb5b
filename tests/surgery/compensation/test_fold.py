"""Fitted weights come back byte by byte, take the parent's place where they fit, and are noted so that they can be verified."""

import json
from dataclasses import replace
from hashlib import sha256

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

from downcycle import DowncycleError, keep_layers, open_checkpoint, write  # noqa: E402
from downcycle.surgery.compensation.fold import (  # noqa: E402
    fitted_digests,
    keep_compensated,
    open_fitted,
    save_fitted,
    take_fitted,
    with_fitted,
)

NAME = "model.layers.{}.mlp.down_proj.weight"
HOW = {"method": "refit", "loss": {"plain": 3.0, "refit": 2.5}}


def some(shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def data(tensor):
    return b"".join(tensor.chunks())


def as_bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def parent(make, tmp_path):
    make(tmp_path / "m", layers=4)
    return open_checkpoint(tmp_path / "m")


@pytest.fixture
def fitted(tmp_path):
    """New weights of layers 1 and 2."""
    tensors = {NAME.format(layer): some((4, 8), seed=layer) for layer in (1, 2)}
    save_fitted(tmp_path / "cache" / "fitted.safetensors", tensors)
    return tensors, open_fitted(tmp_path / "cache" / "fitted.safetensors")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_come_back_byte_by_byte(dtype, tmp_path):
    tensors = {"b": some((3, 5), dtype), "a": some((7,), dtype, 1), "t": some((5, 3), dtype, 2).T, "none": some((0, 4), dtype)}
    file = tmp_path / "a" / "b" / "one.safetensors"
    save_fitted(file, tensors)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    found = load_file(file)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert {name: data(tensor) for name, tensor in open_fitted(file).items()} == {name: as_bytes(one) for name, one in tensors.items()}


def test_no_tensors_at_all(tmp_path):
    save_fitted(tmp_path / "one.safetensors", {})
    assert open_fitted(tmp_path / "one.safetensors") == {}


def test_what_could_not_be_written_leaves_what_was_there(tmp_path):
    """A tensor that cannot be computed, after another was written already."""
    file = tmp_path / "one.safetensors"
    save_fitted(file, {"a": some((2, 2))})
    before = file.read_bytes()

    class Late:
        dtype, shape = torch.bfloat16, (2, 2)

        def detach(self):
            raise DowncycleError("times 3 it is more than BF16 holds")

    with pytest.raises(DowncycleError):
        save_fitted(file, {"a": some((2, 2), seed=1), "b": Late()})
    assert file.read_bytes() == before


def test_fitted_tensors_take_the_parents_place(parent, fitted):
    tensors, opened = fitted
    changed = with_fitted(parent, opened)
    assert list(changed.tensors) == list(parent.tensors)
    for name, tensor in changed.tensors.items():
        assert data(tensor) == (as_bytes(tensors[name]) if name in tensors else data(parent.tensors[name]))


@pytest.mark.parametrize(
    "tensors",
    [{NAME.format(9): some((4, 8))}, {NAME.format(1): some((8, 4))}, {NAME.format(1): some((4, 8), torch.float16)}],
    ids=["no such layer", "another shape", "another dtype"],
)
def test_what_was_fitted_for_another_model_is_refused(parent, tensors, tmp_path):
    save_fitted(tmp_path / "one.safetensors", tensors)
    name = next(iter(tensors))
    with pytest.raises(DowncycleError, match=f"{name} was fitted for another model; delete the cache and fit it again"):
        with_fitted(parent, open_fitted(tmp_path / "one.safetensors"))


def test_a_child_says_what_was_fitted(parent, fitted, tmp_path):
    """Layer 2 is dropped, and so its fitted weight is in no child; layer 1 becomes layer 0."""
    tensors, opened = fitted
    child = keep_compensated(parent, [1, 3], "bi", opened, HOW)
    write(child, tmp_path / "c")
    lineage = json.loads((tmp_path / "c" / "downcycle.json").read_text())
    digest = sha256(as_bytes(tensors[NAME.format(1)])).hexdigest()
    assert lineage["compensation"] == {**HOW, "tensors": {NAME.format(0): digest}}
    assert (lineage["layers"], lineage["rule"]) == ([1, 3], "bi")
    written, plain = open_checkpoint(tmp_path / "c"), keep_layers(parent, [1, 3], "bi")
    for name, tensor in plain.tensors.items():
        assert data(written.tensors[name]) == (as_bytes(tensors[NAME.format(1)]) if name == NAME.format(0) else data(tensor))


def test_what_was_fitted_is_taken_only_with_its_digest(parent, fitted):
    tensors, opened = fitted
    found, expected = keep_compensated(parent, [1, 2], "bi", opened, HOW), keep_layers(parent, [1, 2], "bi")
    taken = take_fitted(expected, found)
    assert {name: data(tensor) for name, tensor in taken.tensors.items()} == {name: data(one) for name, one in found.tensors.items()}
    assert taken.lineage["compensation"] == found.lineage["compensation"]
    digests = found.lineage["compensation"]["tensors"]
    wrong = replace(found, lineage={**found.lineage, "compensation": {**HOW, "tensors": digests | {NAME.format(0): "0" * 64}}})
    taken = take_fitted(expected, wrong)
    assert data(taken.tensors[NAME.format(0)]) == data(parent.tensors[NAME.format(1)])
    assert data(taken.tensors[NAME.format(1)]) == as_bytes(tensors[NAME.format(2)])
    strange = replace(found, lineage={**found.lineage, "compensation": {**HOW, "tensors": digests | {"x": "0" * 64}}})
    with pytest.raises(DowncycleError, match="downcycle.json: says that x was fitted, which the model has not; it was changed"):
        take_fitted(expected, strange)


@pytest.mark.parametrize("how", [None, 5, "refit", [], {}, {"tensors": None}, {"tensors": ["a"]}, {"tensors": {}}])
def test_lineages_that_name_no_fitted_tensor(how):
    assert fitted_digests({"compensation": how}) == fitted_digests({}) == fitted_digests(how) == {}
