"""What is wrong with a command that measures is said in one line, and before anything is measured; what is right is printed and written."""

import json
import re
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

from downcycle.eval.scoring.commands import Measuring, choose_child  # noqa: E402
from downcycle.surgery.checkpoint import open_checkpoint  # noqa: E402
from downcycle.surgery.importance.scores import parse_scores  # noqa: E402

SMALL = ("--samples", 10, "--length", 24)


@pytest.fixture
def usage(downcycle, tree, tmp_path):
    """Run a command that is no command: status 2, nothing on stdout, nothing written. Return what was said."""

    def run(*arguments):
        before = tree(tmp_path)
        code, out, err = downcycle(*arguments)
        assert (code, out) == (2, "") and "Traceback" not in err
        assert tree(tmp_path) == before
        return " ".join(err.split())

    return run


def with_text(arguments, text):
    return [text if one == "TEXT" else one for one in arguments]


USAGE = {
    "a text for a rule without data": (("--keep", 4, "--calibrate", "demo"), "--calibrate is for rules that measure, and for --compensate"),
    "a text for a list": (("--layers", "0-3", "--calibrate", "demo"), "--calibrate is for rules that measure, and for --compensate"),
    "samples for a rule without data": (("--keep", 4, "--samples", 5), "--samples is for rules that measure"),
    "length without data": (("--keep", 4, "--length", 5), "--length is for rules that measure"),
    "seed without data": (("--keep", 4, "--seed", 5), "--seed is for rules that measure"),
    "protect without data": (("--keep", 4, "--protect", "0"), "--protect is for rules that measure, and --select first does not"),
    "protect without data, compensated": (
        ("--keep", 4, "--select", "even", "--protect", "1", "--compensate", "refit", "--calibrate", "TEXT"),
        "--protect is for rules that measure, and --select even does not",
    ),
    "protect for a list": (
        ("--layers", "0-3", "--protect", "0", "--compensate", "refit", "--calibrate", "TEXT"),
        "--protect chooses for --keep; with --layers you choose",
    ),
    "a rule for a list": (("--layers", "0-3", "--select", "bi", "--calibrate", "TEXT"), "--select chooses for --keep"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), USAGE.values(), ids=USAGE)
def test_options_that_do_not_go_together(arguments, says, tiny, text, usage, loads):
    assert says in usage("--src", tiny(), *with_text(arguments, text))
    assert loads == []


REFUSED = {
    "a rule without its text": (("--keep", 4, "--select", "ppl"), "--select ppl: measures the model on a text; give one with --calibrate"),
    "a compensation without its text": (("--keep", 4, "--compensate", "scale"), "--compensate scale: measures the model on a text"),
    "no such rule": (("--keep", 4, "--select", "luck", "--calibrate", "TEXT"), "--select luck: no such rule; there are first, tail, ends"),
    "no such method": (("--keep", 4, "--compensate", "hope", "--calibrate", "TEXT"), "--compensate hope: no such method; choose scale"),
    "a protected layer that is not there": (
        ("--keep", 4, "--select", "bi", "--protect", "0,6", "--calibrate", "TEXT"),
        "--protect 0,6: layer 6 does not exist; the model has 6 layers (0-5)",
    ),
    "a protected layer that is no number": (
        ("--keep", 4, "--select", "bi", "--protect", "last", "--calibrate", "TEXT"),
        "--protect last: 'last' is neither a layer nor a range",
    ),
    "more protected than kept": (
        ("--keep", 2, "--select", "ppl", "--protect", "0-2", "--calibrate", "TEXT"),
        "--protect 0-2: 3 layers must stay, but --keep 2 keeps fewer",
    ),
    "no block is free": (
        ("--keep", 3, "--select", "angular", "--protect", "2-3", "--calibrate", "TEXT", *SMALL),
        "--select angular: no 3 layers in a row are free of the protected 2-3",
    ),
    "no layer": (("--keep", 0, "--select", "bi", "--calibrate", "TEXT"), "--keep 0: the model has 6 layers; keep between 1 and 6"),
    "too many": (("--keep", 7, "--select", "ppl", "--calibrate", "TEXT"), "--keep 7: the model has 6 layers; keep between 1 and 6"),
    "no samples": (("--keep", 4, "--select", "bi", "--calibrate", "TEXT", "--samples", 0), "--samples 0: give a number from 1"),
    "fewer than no samples": (("--keep", 4, "--select", "bi", "--calibrate", "TEXT", "--samples", -3), "--samples -3: give a number"),
    "one token": (("--keep", 4, "--select", "bi", "--calibrate", "TEXT", "--length", 1), "--length 1: give a number from 2"),
    "more than positions": (("--keep", 4, "--select", "bi", "--calibrate", "TEXT", "--length", 65), "has 64 positions"),
    "too short a text": (("--keep", 4, "--select", "bi", "--calibrate", "TEXT", "--samples", 500), "too short: "),
    "no such text": (("--keep", 4, "--select", "bi", "--calibrate", "no/where.txt"), "no/where.txt: no such file or folder"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(arguments, says, tiny, text, refused, tmp_path):
    assert says in refused("--src", tiny(), *with_text(arguments, text), "--out", tmp_path / "child", "--json")


def test_nothing_is_measured_before_the_numbers_are_right(tiny, text, refused, loads, tmp_path):
    for given in (("--keep", 0), ("--keep", 7), ("--keep", 2, "--protect", "0-2")):
        for rule in ("bi", "angular", "ppl", "taylor", "magnitude"):
            refused("--src", tiny(), *given, "--select", rule, "--calibrate", text, *SMALL, "--out", tmp_path / "child")
        assert "layers" in refused("score", tiny(), *given, "--calibrate", text, *SMALL)
    assert loads == []


@pytest.mark.parametrize("command", [("score",), ("--keep", 4, "--select", "bi", "--src")], ids=["score", "cut"])
def test_texts_and_models_that_cannot_be_used(command, tiny, text, copy, refused, tmp_path):
    binary = tmp_path / "text.txt"
    binary.write_bytes(bytes(range(256)) * 100)
    assert re.search(r"text\.txt: no UTF-8 text .*: binary", refused(*command, tiny(), "--calibrate", binary))
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt: an empty text" in refused(*command, tiny(), "--calibrate", tmp_path / "empty.txt")
    folder = copy(tiny())
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "its tokenizer" in refused(*command, folder, "--calibrate", text, *SMALL)


@pytest.mark.parametrize("command", [("score",), ("--keep", 4, "--select", "ppl", "--src")], ids=["score", "cut"])
def test_a_layer_that_holds_no_number_is_named(command, tiny, text, copy, refused, tmp_path):
    folder = copy(tiny())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    given = ("--calibrate", text, *SMALL, "--json", *(("--out", tmp_path / "child") if command != ("score",) else ()))
    err = refused(*command, folder, *given)
    assert "the output of layer 2 is not finite, as its weight mlp.up_proj.weight holds NaN or infinity" in err


# score


def test_score_needs_a_text(tiny, usage):
    assert "give a text to measure on, with --calibrate TEXT ('demo' is the built-in one)" in usage("score", tiny())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--compensate", "hope"), "--compensate hope: no such method; choose from scale, refit, or none"),
        (("--compensate", "scale,hope"), "--compensate hope: no such method"),
        (("--load", "int3"), "--load int3: choose one of stored, bf16, fp32, int8, nf4"),
        (("--keep", "many"), "--keep many: not a number"),
        (("--protect", "6"), "--protect 6: layer 6 does not exist"),
    ],
)
def test_score_refuses(arguments, says, tiny, text, refused, loads):
    assert says in refused("score", tiny(), "--calibrate", text, *SMALL, *arguments)
    assert loads == []


def test_score_writes_and_prints_the_same(tiny, text, downcycle, tmp_path, loads):
    pytest.importorskip("matplotlib")
    given = ("score", tiny(), "--calibrate", text, *SMALL, "--keep", 5, "--compensate", "refit")
    code, out, err = downcycle(*given, "--report", tmp_path / "report")
    assert code == 0, err
    assert out.endswith(f"{tmp_path / 'report' / 'report.html'}\n")
    written = json.loads((tmp_path / "report" / "scores.json").read_text())
    loads.clear()
    code, out, err = downcycle(*given, "--json")
    assert (code, err) == (0, "") and loads == []
    assert json.loads(out) == written
    scores = parse_scores(written)
    assert (scores.layers, scores.keep, scores.protect) == (6, 5, None)
    assert all(len(choice.kept) == 5 and "scale" not in {*choice.compensated, *choice.kept_plain} for choice in scores.choices)


def test_three_of_four_layers_are_kept_unless_told_otherwise(tiny, text, downcycle):
    code, out, _ = downcycle("score", tiny(5), "--calibrate", text, *SMALL, "--compensate", "none", "--json")
    scores = parse_scores(json.loads(out))
    assert (code, scores.keep) == (0, 4)
    assert not any(choice.compensated or choice.kept_plain or choice.refused for choice in scores.choices)


# cut


def test_a_dry_run_measures_and_writes_nothing(tiny, text, downcycle, tmp_path, tree):
    before = tree(tmp_path)
    given = ("--src", tiny(), "--keep", 4, "--select", "ppl", "--compensate", "refit", "--calibrate", text, *SMALL, "--dry-run", "--json")
    code, out, err = downcycle(*given)
    answer = json.loads(out)
    assert (code, err, answer["written"]) == (0, "", False)
    assert len(answer["layers"]) == 4 and "refit" in answer["notes"][0]
    assert tree(tmp_path) == before


def test_in_python(tiny, text):
    """The same as on the command line, for those who write programs."""
    parent = open_checkpoint(tiny())
    child, notes = choose_child(parent, 4, "bi", "none", Measuring(str(text), 10, 24), quiet=True)
    assert child.num_layers == 4 and notes == [] and child.lineage["rule"] == "bi"
    child, notes = choose_child(parent, [0, 5], "layers", "none", Measuring(None), quiet=True)
    assert child.lineage["layers"] == [0, 5] and "calibration" not in child.lineage


def test_several_runs_at_once_measure_what_one_does(tiny, text, downcycle, tmp_path):
    """Each in a process of its own, with one cache."""
    given = ["--src", tiny(), "--calibrate", text, *SMALL, "--select", "ppl", "--compensate", "refit"]
    command, pipe = [sys.executable, "-c", "from downcycle.cli import main; main()", *map(str, given)], subprocess.PIPE
    runs = [
        subprocess.Popen([*command, "--keep", str(keep), "--out", tmp_path / f"c{place}"], stdout=pipe, stderr=pipe, text=True)
        for place, keep in enumerate((4, 4, 3))
    ]
    said = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], said
    assert downcycle(*given, "--keep", 4, "--out", tmp_path / "alone").code == 0
    for name in ("model.safetensors", "downcycle.json", "config.json"):
        wanted = (tmp_path / "alone" / name).read_bytes()
        assert (tmp_path / "c0" / name).read_bytes() == (tmp_path / "c1" / name).read_bytes() == wanted


@pytest.mark.parametrize("protect", ["2-4", "none"])
def test_what_must_stay_is_noted_in_the_child(protect, tiny, text, downcycle, tmp_path):
    given = ("--src", tiny(), "--calibrate", text, *SMALL, "--keep", 4, "--select", "bi", "--protect", protect, "--load", "fp32")
    assert downcycle(*given, "--out", tmp_path / "c").code == 0
    noted = json.loads((tmp_path / "c" / "downcycle.json").read_text())["calibration"]
    assert (noted["protect"], noted["load"]) == ([2, 3, 4] if protect != "none" else [], "fp32")
    card = (tmp_path / "c" / "README.md").read_text()
    assert ("Layers 2-4 had to stay." if protect != "none" else "No layer had to stay.") in card and "weights held as fp32" in card
    assert downcycle("verify", tmp_path / "c", "--src", tiny()).code == 0


def test_rules_without_data_that_drop_what_must_stay_are_left_out(tiny, text, downcycle):
    given = ("--calibrate", text, *SMALL, "--keep", 4, "--protect", "4-5", "--compensate", "none", "--json")
    code, out, _ = downcycle("score", tiny(), *given)
    found = json.loads(out)
    assert code == 0
    assert all({4, 5} <= set(choice["kept"]) for choice in found["choices"])
    assert found["refused"]["first"] == "drops 4-5, which must stay"


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(tiny, text, refused, loads):
    err = refused("score", tiny(), "--calibrate", text, *SMALL, "--report", "/proc/x/y")
    assert re.search(r"--report /proc/x/y: nothing can be written into /proc \(.*\); choose another folder", err)
    assert loads == []
