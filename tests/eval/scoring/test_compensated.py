"""A compensated child says how it was made and is verified; weights that do not help are not used; only lasting refusals are remembered."""

import json
import re
import shutil
from dataclasses import replace
from hashlib import sha256

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

from downcycle import DowncycleError, open_checkpoint, verify  # noqa: E402
from downcycle.eval.scoring import study as study_module  # noqa: E402
from downcycle.eval.scoring.compensated import compensate, compensated  # noqa: E402
from downcycle.surgery.importance import states as states_module  # noqa: E402
from downcycle.surgery.importance.states import States  # noqa: E402

from hub_server import connected  # noqa: E402

PATH = frozenset({2, 3})
SMALL = ("--samples", 10, "--length", 24)


@pytest.fixture
def cut(tiny, text, downcycle, tmp_path):
    """Cut on the command line; return the folder and what was said on stderr."""

    def run(*arguments, src=None, out="child"):
        given = ("--src", src or tiny(), "--calibrate", text, *SMALL, "--out", tmp_path / out)
        code, printed, err = downcycle(*given, *arguments)
        assert (code, printed) == (0, f"{tmp_path / out}\n"), err
        return tmp_path / out, err

    return run


@pytest.mark.parametrize("method", ["scale", "refit"])
@pytest.mark.parametrize("choice", [("--keep", 4, "--select", "taylor"), ("--keep", 4, "--select", "even"), ("--layers", "0-1,4-5")])
def test_a_written_child(method, choice, cut, tiny, downcycle):
    """Through rules that measure, rules that do not, and a list of layers; the child is verified and loads."""
    folder, err = cut(*choice, "--compensate", method)
    lineage = json.loads((folder / "downcycle.json").read_text())
    compensation, calibration = lineage["compensation"], lineage["calibration"]
    assert compensation.keys() == {"method", "loss", "tensors"} and compensation["method"] == method
    assert compensation["loss"].keys() == {"plain", method} and compensation["loss"][method] < compensation["loss"]["plain"]
    assert f"{method}: {compensation['loss']['plain']:.3f} -> {compensation['loss'][method]:.3f} nats per token" in err
    assert {key: calibration[key] for key in ("samples", "length", "seed", "held_out_samples")} == {
        "samples": 10, "length": 24, "seed": 0, "held_out_samples": 4,
    }  # fmt: skip
    tensors, before = load_file(folder / "model.safetensors"), load_file(tiny() / "model.safetensors")
    kept = lineage["layers"]
    assert compensation["tensors"]
    for name, tensor in tensors.items():
        words = name.split(".")
        old = ".".join([*words[:2], str(kept[int(words[2])]), *words[3:]]) if words[1] == "layers" else name
        digest = compensation["tensors"].get(name)
        assert digest == (None if torch.equal(tensor, before[old]) else sha256(tensor.numpy().tobytes()).hexdigest())
    code, out, err = downcycle("verify", folder)
    assert (code, err) == (0, "")
    assert f"{len(compensation['tensors'])} tensors of them fitted, with the digests that downcycle.json states" in out


@pytest.mark.parametrize("method", ["scale", "refit"])
def test_weights_that_do_not_help_are_not_used(method, cut):
    """This cut loses less than the uncut model, and what comes closer to that loses more."""
    plain, _ = cut("--keep", 4, "--select", "ppl", out="plain")
    folder, err = cut("--keep", 4, "--select", "ppl", "--compensate", method)
    (said,) = [line for line in err.splitlines() if method in line and "nats" in line]
    fitted, cut_only = map(float, re.findall(r"[0-9]+\.[0-9]{4}", said))
    assert fitted >= cut_only and said.endswith(": the plain weights are kept")
    assert "compensation" not in json.loads((folder / "downcycle.json").read_text())
    assert (folder / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert verify(folder).tensors == verify(plain).tensors


@pytest.mark.parametrize("layers", ["0-1,1,5", "5,0", "0-5,0"])
def test_repeated_and_reordered_layers_are_refused(layers, tiny, text, refused, loads):
    """Parent and child advance together, and what is measured is the parent with layers left out."""
    err = refused("--src", tiny(), "--layers", layers, "--compensate", "refit", "--calibrate", text, *SMALL)
    assert f"--compensate refit: needs layers in their order, each once, and {layers} are not; leave --compensate out" in err
    assert loads == []


def test_nothing_is_dropped(tiny, cut):
    folder, err = cut("--layers", "0-5", "--compensate", "refit")
    assert "no layer is dropped, and so nothing is compensated for" in err
    assert (folder / "model.safetensors").read_bytes() == (tiny() / "model.safetensors").read_bytes()


def test_a_family_that_cannot_be_cut_so_is_refused_before_anything_is_fitted(tiny, study, loads, copy):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = copy(tiny())
    (folder / "model.safetensors").unlink()
    sizes = {"n_layer": 4, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": 4096, "bos_token_id": 4080, "eos_token_id": 4081}
    GPT2LMHeadModel(GPT2Config(**sizes, scale_attn_by_inverse_layer_idx=True)).save_pretrained(folder)
    with pytest.raises(DowncycleError, match="scale_attn_by_inverse_layer_idx"):
        compensate(study(folder), [0, 2, 3], "layers", "refit")
    assert loads == []


# What is remembered.


def test_an_outcome_is_recalled_while_its_weights_are_there(tiny, study, loads, cache):
    first = compensated(study(tiny()), PATH, "refit")
    loads.clear()
    assert compensated(study(tiny()), PATH, "refit") == first
    assert loads == []
    for harm in (damage, lambda fitted: shutil.rmtree(fitted)):
        loads.clear()
        harm(cache / "fitted")
        assert compensated(study(tiny()), PATH, "refit") == first
        assert loads


def damage(fitted):
    """Change the last byte of the one file below."""
    (file,) = fitted.glob("*/*.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_full_disk_is_no_refusal_for_ever(tiny, study, monkeypatch):
    """The error of one run is not that of the next."""

    def full(self, *given):
        raise states_module._no_room(self.folder, OSError(28, "No space left on device"))

    with monkeypatch.context() as patch:
        patch.setattr(States, "put", full)
        outcome = compensated(study(tiny()), PATH, "refit")
        assert "cannot hold the hidden states (No space left on device" in outcome.refused and outcome.loss is None
    assert compensated(study(tiny()), PATH, "refit").loss is not None


def test_damaged_states_are_no_refusal_for_ever(tiny, study, monkeypatch):
    """As the line says: run the same once more."""
    of = study(tiny())

    def stop(what, done, total):
        if what == "refitting the layers" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compensated(replace(of, progress=stop), PATH, "refit")
    for path in of.folder.glob("**/*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    assert "run the same once more" in compensated(of, PATH, "refit").refused
    assert compensated(of, PATH, "refit").loss is not None


def test_a_lasting_refusal_is_remembered_and_leaves_nothing(tiny, study, copy, loads, cache):
    """BERT's norms stand behind the sum: no factor can be folded into such a layer."""
    from transformers import BartConfig, BartForCausalLM

    folder = copy(tiny())
    (folder / "model.safetensors").unlink()
    sizes = {"d_model": 32, "decoder_layers": 4, "decoder_ffn_dim": 48, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    torch.manual_seed(0)
    BartForCausalLM(BartConfig(**sizes, vocab_size=4096, bos_token_id=4080, eos_token_id=4081, pad_token_id=1)).save_pretrained(folder)
    outcome = compensated(study(folder), frozenset({2}), "scale")
    assert "scale cannot be folded into a bart model" in outcome.refused
    loads.clear()
    assert compensated(study(folder), frozenset({2}), "scale") == outcome
    assert loads == [] and not list(cache.glob("**/*.pt"))


def test_the_memory_is_asked_for_what_is_fitted_too(tiny, study, monkeypatch):
    of = study(tiny())
    monkeypatch.setattr(study_module, "free_memory", lambda device: 1000)
    outcome = compensated(of, PATH, "scale")
    assert outcome.refused.endswith("MiB free; use a machine with more memory")


def test_the_memory_is_asked_for_the_equations(tiny, study, monkeypatch):
    """A map of 2^17 inputs: sums, factor and work space of 128 GiB each; 32 outputs add next to nothing. It may fit another time."""
    of = study(tiny())
    size = study_module.model_size(of.checkpoint)
    wide = replace(size, matrices=(*size.matrices, replace(size.matrices[0], rows=32, columns=2**17)))
    with monkeypatch.context() as patched:
        patched.setattr(study_module, "model_size", lambda checkpoint: wide)
        refused = compensated(of, PATH, "refit").refused
    assert re.search(r"fitting a map of 131072 inputs takes 385 GiB, its equations being float64, and cpu has .* try --comp", refused)
    assert compensated(of, PATH, "refit").loss


# The parent on a Hub.


def test_a_parent_on_the_hub(tiny, text, downcycle, tmp_path, monkeypatch):
    with connected(monkeypatch, tmp_path / "hub") as hub:
        commit = hub.add("ann/tiny-6m", tiny())
        given = ("--calibrate", text, *SMALL, "--layers", "0-1,4-5", "--compensate", "refit")
        code, _, err = downcycle("--src", "ann/tiny-6m", *given, "--out", tmp_path / "child")
        assert code == 0, err
        code, _, err = downcycle("--src", tiny(), *given, "--out", tmp_path / "same")
        assert code == 0, err
        assert (tmp_path / "child" / "model.safetensors").read_bytes() == (tmp_path / "same" / "model.safetensors").read_bytes()
        lineage = json.loads((tmp_path / "child" / "downcycle.json").read_text())
        assert (lineage["parent"], lineage["revision"]) == ("ann/tiny-6m", commit)
        code, out, err = downcycle("verify", tmp_path / "child")
        assert (code, err) == (0, "") and "tensors of them fitted" in out
        data = bytearray((tmp_path / "child" / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (tmp_path / "child" / "model.safetensors").write_bytes(data)
        code, _, err = downcycle("verify", tmp_path / "child")
        assert code == 1 and "differs between bytes" in err


def test_a_child_can_be_cut_and_compensated_again(cut, tiny, downcycle):
    first, _ = cut("--keep", 5, "--select", "bi", "--compensate", "refit")
    second, _ = cut("--keep", 4, "--select", "bi", "--compensate", "refit", src=first, out="grandchild")
    lineage = open_checkpoint(second).lineage
    assert lineage["parent_lineage"]["compensation"]["tensors"] and lineage["compensation"]["tensors"]
    assert downcycle("verify", second).code == 0
    shutil.rmtree(first)
    code, _, err = downcycle("verify", second)
    assert code == 1 and err.count("\n") == 1 and "no such folder" in err
