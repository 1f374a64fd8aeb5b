"""`downcycle ternarize`: what it writes, prints and refuses, on the built-in model."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

from downcycle import keep_layers, open_checkpoint, verify, write  # noqa: E402
from downcycle.eval.measure.perplexity import perplexity  # noqa: E402
from downcycle.surgery.checkpoint import DEMO_FOLDER  # noqa: E402
from downcycle.surgery.choose import even  # noqa: E402
from downcycle.surgery.ternary.ternarize import ternarize  # noqa: E402

RECORD = {"schedule": "linear", "warmup_steps": 1000, "k": None, "include": [], "exclude": [], "norm": False, "strength": 1.0, "steps": 50}
NEVER = "was never trained with ternary weights, as far as its config.json says"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small(tmp_path):
    """Two layers of the built-in model, as a model that was not made here."""
    folder = write(keep_layers(open_checkpoint("demo"), [0, 1]), tmp_path / "small")
    (folder / "downcycle.json").unlink()
    return folder


@pytest.fixture
def learnt(small):
    """Make it one that learnt ternary weights, with this record."""

    def make(**changes):
        config = json.loads((small / "config.json").read_text()) | {"downcycle_ternary": RECORD | changes}
        (small / "config.json").write_text(json.dumps(config))
        return small

    return make


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("The small model reads what it was never trained on. " * 9)
    return "text.txt"


def notes(answer):
    return [line for line in answer.err.splitlines() if line.startswith("note: ")]


def test_a_model_is_packed_and_what_became_of_it_is_said(downcycle):
    answer = downcycle("ternarize", "demo", "--out", "packed")
    assert (answer.code, answer.out) == (0, "packed\n")
    first, shares, note = answer.err.splitlines()
    weights = [load_file(DEMO_FOLDER / "model.safetensors")[name].float() for name in open_checkpoint("demo").tensors if "_proj" in name]
    codes = torch.cat([(one / one.abs().mean()).round().clamp(-1, 1).flatten() for one in weights])
    lost = sum(float((one - one.abs().mean() * (one / one.abs().mean()).round().clamp(-1, 1)).double().square().sum()) for one in weights)
    error = (lost / sum(float(one.double().square().sum()) for one in weights)) ** 0.5
    assert first == (
        f"84 matrices of 12 layers, {len(codes):,} weights: 4.72 MB -> 590 kB, 2.00 bits a weight; the model: 6.82 MB -> 2.69 MB"
    )
    wanted = ", ".join(f"{value}: {float((codes == value).float().mean()):.1%}" for value in (-1, 0, 1))
    assert shares == f"{wanted}; |W - sT| / |W| = {error:.1%}"
    assert note.startswith(f"note: demo {NEVER}: rounding changed its weights by {error:.1%}, and the packed model is of no use")
    assert note.endswith("train it first: downcycle recipe demo --preset ternary")
    assert verify("packed").what == "demo with ternary weights"
    assert f"{open_checkpoint('demo').num_elements:,} (packed by bitnet)" in downcycle("inspect", "packed").out
    assert {path.name for path in Path("packed").iterdir()} == {
        *("README.md", "config.json", "downcycle.json", "model.safetensors"),
        *open_checkpoint("demo").files,
    }
    assert "2.69 MB" in Path("packed/README.md").read_text()


@pytest.mark.parametrize("linear", ["bitlinear", "autobitlinear"])
def test_cut_and_packed_in_one_pass_is_what_two_passes_make(linear, downcycle):
    answer = downcycle("ternarize", "demo", "--out", "once", "--keep", 5, "--select", "even", "--linear", linear)
    assert answer.code == 0 and "35 matrices of 5 layers" in answer.err
    write(keep_layers(open_checkpoint("demo"), even(12, 5), "even"), "child")
    write(ternarize(open_checkpoint("child"), linear=linear), "twice")
    assert Path("once/model.safetensors").read_bytes() == Path("twice/model.safetensors").read_bytes()
    assert Path("once/config.json").read_bytes() == Path("twice/config.json").read_bytes()
    code, out, _ = downcycle("verify", "once")
    assert (code, out[:36]) == (0, "once is demo with ternary weights: 8")
    lineage = json.loads(Path("once/downcycle.json").read_text())
    assert (lineage["operation"], lineage["parent_lineage"]["layers"], lineage["parent_lineage"]["rule"]) == (
        "ternary",
        even(12, 5),
        "even",
    )
    listed = downcycle("ternarize", "demo", "--out", "listed", "--layers", ",".join(map(str, even(12, 5))), "--linear", linear)
    assert listed.code == 0 and Path("listed/model.safetensors").read_bytes() == Path("once/model.safetensors").read_bytes()


def test_json_has_all_of_it(downcycle, small, text):
    answer = downcycle("ternarize", "small", "--out", "packed", "--text", text, "--json")
    found = json.loads(answer.out)
    assert answer.code == 0 and (found["out"], found["source"], found["linear"]) == ("packed", "small", "bitlinear")
    assert found["matrices"] == 14 and found["parameters"] == open_checkpoint(small).num_elements
    assert found["bytes"] == {"before": open_checkpoint(small).nbytes, "after": open_checkpoint("packed").nbytes}
    assert [one["layer"] for one in found["layers"]] == [0, 1]
    for key in ("minus", "zero", "plus", "before", "after"):
        assert found["weights"][key] == sum(one[key] for one in found["layers"])
    assert 0.3 < found["weights"]["error"] < 0.8 and found["weights"]["bits"] == pytest.approx(2, abs=0.01)
    losses = found["losses"]
    assert losses["before"]["loss"] == pytest.approx(perplexity(open_checkpoint(small), text).loss, abs=1e-9)
    assert losses["after"]["loss"] == pytest.approx(perplexity(open_checkpoint("packed"), text).loss, abs=1e-9)
    assert losses["cost"] == pytest.approx(losses["after"]["loss"] - losses["before"]["loss"])
    assert losses["guessing"] == pytest.approx(math.log(4096))
    assert NEVER in found["warnings"][0] and found["warnings"][1].startswith("loss: before ")


def test_a_model_that_learnt_ternary_weights_is_packed_without_a_word(downcycle, learnt):
    learnt()
    assert notes(downcycle("ternarize", "small", "--out", "packed")) == []
    assert json.loads(Path("packed/config.json").read_text())["downcycle_ternary"] == RECORD


def test_one_that_learnt_them_in_part(downcycle, learnt):
    learnt(strength=0.25)
    (note,) = notes(downcycle("ternarize", "small", "--out", "packed"))
    assert "was not trained with ternary weights to the end (lambda reached 0.25 of 1): rounding changed its weights by" in note
    assert note.endswith("train on until lambda is 1")


def test_which_maps_is_as_in_training(downcycle, learnt):
    learnt(exclude=["down_proj$"])
    answer = downcycle("ternarize", "small", "--out", "packed")
    assert notes(answer) == [] and "12 matrices of 2 layers" in answer.err
    assert open_checkpoint("packed").tensors["model.layers.1.mlp.down_proj.weight"].dtype == "BF16"
    assert verify("packed").tensors == len(open_checkpoint("packed").tensors)


def test_other_maps_than_in_training_are_named(downcycle, learnt):
    learnt(exclude=["down_proj$"])
    new, left = notes(downcycle("ternarize", "small", "--out", "packed", "--exclude", "q_proj$", "--exclude", "up_proj$"))
    assert new == (
        "note: model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj become ternary, and small was not trained so: these weights "
        "are only rounded"
    )
    assert "layers.0.self_attn.q_proj" in left and "and 1 more learnt ternary weights and stay floating-point" in left
    assert json.loads(Path("packed/downcycle.json").read_text())["exclude"] == ["q_proj$", "up_proj$"]


def test_patterns_that_number_layers_and_a_cut(downcycle, learnt):
    learnt(exclude=[r"layers\.1\."])
    numbered, cut = notes(downcycle("ternarize", "small", "--out", "packed", "--keep", 1))
    assert r"may number layers (layers\.1\.), and the cut renumbers them" in numbered
    assert "was cut after its training with ternary weights, and not trained since" in cut


def test_the_loss_of_one_that_learnt(downcycle, learnt, text):
    learnt()
    (note,) = notes(downcycle("ternarize", "small", "--out", "packed", "--text", text))
    before, after = (perplexity(open_checkpoint(one), text).loss for one in ("small", "packed"))
    assert f"before {before:.4f} (float weights, with which it was not trained in the end), after packing {after:.4f}" in note
    assert f"nats per token on {text} (guessing: 8.32): " in note


def test_the_loss_of_what_is_only_rounded(downcycle, text):
    (_, note) = notes(downcycle("ternarize", "demo", "--out", "packed", "--text", text))
    before, after = (perplexity(open_checkpoint(one), text).loss for one in ("demo", "packed"))
    knows = after < math.log(4096) - 0.05
    said = f"packing costs {after - before:+.4f}" if knows else "the packed model knows nothing of the text"
    assert f"before {before:.4f}, after packing {after:.4f}" in note and note.endswith(f": {said}")


def test_a_model_with_norms_is_measured_packed_only(downcycle, learnt, text):
    folder = learnt(norm=True)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        f"{name.removesuffix('.weight')}.rms_norm.weight": torch.ones(tensor.shape[1], dtype=tensor.dtype)
        for name, tensor in tensors.items()
        if "_proj" in name
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = json.loads(downcycle("ternarize", "small", "--out", "packed", "--text", text, "--json").out)
    assert found["losses"]["before"] is None and found["losses"]["cost"] is None
    assert found["losses"]["after"]["loss"] == pytest.approx(perplexity(open_checkpoint("packed"), text).loss)
    assert "before it cannot be measured: its maps have norms of their own" in found["warnings"][-1]


def test_a_dry_run_writes_and_reads_nothing(downcycle, small, tree, tmp_path):
    before = tree(tmp_path)
    answer = downcycle("ternarize", "small", "--out", "packed", "--dry-run", "--exclude", "down_proj$")
    assert tree(tmp_path) == before and answer.err == ""
    assert "12 matrices of 2 layers would become ternary" in answer.out and f"note: small {NEVER}, and the packed" in answer.out
    found = json.loads(downcycle("ternarize", "small", "--out", "packed", "--dry-run", "--json").out)
    downcycle("ternarize", "small", "--out", "packed")
    assert found["shards"] == {"model.safetensors": Path("packed/model.safetensors").stat().st_size}
    assert found["bytes"]["write"] == sum(path.stat().st_size for path in Path("packed").iterdir())


def test_what_a_stopped_run_had_packed_is_counted_from_the_files(downcycle, small):
    """All shards but the last are whole: the second run packs that one only."""
    options = ["--max-shard-size", "30kB"]
    whole = json.loads(downcycle("ternarize", "small", "--out", "whole", *options, "--json").out)
    count = len(list(Path("whole").glob("*.safetensors")))
    script = (
        "import sys, downcycle.surgery.write as w; from downcycle.cli import main; before = w._write_shard; done = []\n"
        f"def stop(*given):\n    before(*given); done.append(1)\n    if len(done) == {count - 1}: raise KeyboardInterrupt\n"
        f"w._write_shard = stop; sys.argv[1:] = ['ternarize', 'small', '--out', 'packed', *{options}]; main()"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 130 and "the same command goes on from there" in ended.stderr
    held = [load_file(path) for path in Path(".packed.downcycle").glob("*.safetensors")]
    assert len(held) == count - 1 and any(tensor.dtype == torch.uint8 for tensors in held for tensor in tensors.values())
    found = json.loads(downcycle("ternarize", "small", "--out", "packed", *options, "--json").out)
    for one, other in zip([found["weights"], *found["layers"]], [whole["weights"], *whole["layers"]], strict=True):
        assert {**one, "error": 0, "norm": 0} == {**other, "error": 0, "norm": 0}
        assert one["error"] == pytest.approx(other["error"], rel=1e-6)


# What is refused: one line, and nothing left behind.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--linear", "bitnet"], "--linear bitnet: no such class; choose bitlinear or autobitlinear"),
        (["--exclude", "proj"], "no linear map that becomes ternary; change the patterns of --include and --exclude"),
        (["--include", "("], "is no regular expression"),
        (["--include", "embed_tokens|input_layernorm", "--exclude", "nothing("], "is no regular expression"),
        (["--keep", "3"], "--keep 3: the model has 2 layers"),
        (["--keep", "two"], "--keep two: not a number"),
        (["--keep", "1", "--select", "bi"], "--select bi: no such rule; there are first, tail, ends, even"),
        (["--layers", "0-5"], "--layers 0-5: layer 5 does not exist"),
        (["--max-shard-size", "0"], "--max-shard-size 0: give a size"),
        (["--text", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--text", "empty.txt"], "empty.txt"),
        (["--revision", "main"], "--revision main: small is a folder"),
    ],
)
def test_wrong_options(arguments, said, refused, small):
    Path("empty.txt").write_text("")
    assert said in refused("ternarize", "small", "--out", "packed", *arguments)


@pytest.mark.parametrize(
    "arguments",
    [["--keep", "1", "--layers", "0"], ["--select", "even"], ["--dry-run", "--text", "demo"], ["--layers", "0", "--select", "tail"]],
)
def test_options_that_exclude_each_other(arguments, downcycle, small, tree, tmp_path):
    before = tree(tmp_path)
    answer = downcycle("ternarize", "small", "--out", "packed", *arguments)
    assert (answer.code, answer.out) == (2, "") and tree(tmp_path) == before


def test_sources_that_cannot_be_packed(refused, downcycle, small):
    assert downcycle("ternarize", "small", "--out", "packed").code == 0
    assert "packed: its weights are packed by bitnet already; give the model as it was before" in refused(
        "ternarize", "packed", "--out", "again"
    )
    Path("lora").mkdir()
    Path("lora/adapter_config.json").write_text("{}")
    assert "lora: an adapter, not a model; merge it into its base model first" in refused("ternarize", "lora", "--out", "again")
    assert "no such folder" in refused("ternarize", "./nowhere", "--out", "again")
    assert "packed: exists already" in refused("ternarize", "small", "--out", "packed")
    assert "holds the source" in refused("ternarize", "small", "--out", "small", "--overwrite")
    assert "lies in the source" in refused("ternarize", "small", "--out", "small/packed")


@pytest.mark.parametrize("text", [[], ["--text", "text.txt"]])
def test_weights_that_are_not_finite_leave_nothing_behind(text, downcycle, small):
    Path("text.txt").write_text("Some words to read. " * 9)
    tensors = load_file(small / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(tensors, small / "model.safetensors", {"format": "pt"})
    answer = downcycle("ternarize", "small", "--out", "packed", *text)
    assert answer.code == 1 and len([line for line in answer.err.splitlines() if line.startswith("downcycle: ")]) == 1
    assert not Path("packed").exists() and not Path(".packed.downcycle").exists()
    if not text:
        assert "model.layers.1.mlp.up_proj.weight: holds NaN or infinity" in answer.err


def test_a_config_that_no_training_wrote(learnt, refused):
    learnt(strength="whole")
    assert "downcycle_ternary is not what a training writes (strength is whole" in refused("ternarize", "small", "--out", "packed")


def test_a_full_disk(small, disk, refused):
    full = disk("size=300k")
    assert "are needed and" in refused("ternarize", "small", "--out", full / "packed")


def test_a_model_is_replaced_where_that_is_asked_for(downcycle, small):
    shutil.copytree(small, "packed")
    assert downcycle("ternarize", "small", "--out", "packed", "--overwrite").code == 0
    assert open_checkpoint("packed").config["quantization_config"]["quant_method"] == "bitnet"


def test_ctrl_c_is_answered(small):
    """Stopped while a matrix is packed."""
    script = (
        "import os, signal, sys, threading, downcycle.surgery.ternary.packing as p; from downcycle.cli import main; before = p._codes\n"
        "first = threading.Lock()\n"
        "def stop(*block):\n    first.acquire(blocking=False) and os.kill(os.getpid(), signal.SIGINT); return before(*block)\n"
        "p._codes = stop; sys.argv[1:] = ['ternarize', 'small', '--out', 'packed']; main()"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, preexec_fn=_listen)
    assert ended.returncode == 130 and "interrupted" in ended.stderr and not Path("packed").exists()


def _listen():
    signal.signal(signal.SIGINT, signal.default_int_handler)
