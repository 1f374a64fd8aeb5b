"""The command line as a hostile user meets it: every refusal is one line and changes nothing; every answer is exact."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from downcycle.surgery.sources import LocalFolder
from downcycle.terminal import parse_count

SMALL = [
    "README.md",
    "axolotl.yaml",
    "chat_template.jinja",
    "config.json",
    "downcycle.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
INDEX = "model.safetensors.index.json"
COMMAND = [sys.executable, "-c", "from downcycle.cli import main; main()"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder beside the models, so that default names land there."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def model(make, tmp_path):
    """Eight layers in three shards."""
    make(tmp_path / "Meta-Llama-3-8B", layers=8, shards=3)
    return tmp_path / "Meta-Llama-3-8B"


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# What works


def test_a_cut(downcycle, cut_by_hand, read_back, make, tmp_path):
    tensors = make(tmp_path / "My-8B", layers=8)
    code, out, err = downcycle("--src", tmp_path / "My-8B", "--keep", "6")
    assert (code, out) == (0, "My-6B\n")
    assert err.splitlines() == [
        *("██████░░  keep 0-5 of 8", "1,412 parameters -> 1,076 (76.2%)"),
        "with axolotl.yaml, which heals it; for your GPUs: downcycle recipe My-6B --gpus N --gpu-memory GIB",
    ]
    assert names(Path.cwd()) == sorted(["My-6B", *(f"My-6B/{name}" for name in [*SMALL, "model.safetensors"])])
    assert read_back(Path("My-6B")) == cut_by_hand(tensors, list(range(6)))
    code, out, err = downcycle("verify", "My-6B")
    assert (code, err) == (0, "")
    assert out == f"My-6B is layers 0-5 of {tmp_path / 'My-8B'}: 57 tensors, 2.15 kB and 5 files compared, all equal\n"


def test_layers_may_repeat_and_reorder(downcycle, cut_by_hand, read_back, make, tmp_path):
    tensors = make(tmp_path / "m", layers=8)
    code, out, err = downcycle("--src", tmp_path / "m", "--layers", "7,0-3,2-4,2", "--out", "c")
    assert (code, out) == (0, "c\n")
    assert err.splitlines()[0] == "██32█░░█  keep 7,0-3,2-4,2 of 8"
    assert read_back(Path("c")) == cut_by_hand(tensors, [7, 0, 1, 2, 3, 2, 3, 4, 2])


@pytest.mark.parametrize(("rule", "kept"), [("first", [0, 1, 2]), ("tail", [0, 1, 7]), ("ends", [0, 1, 7]), ("even", [0, 4, 7])])
def test_rules(downcycle, model, rule, kept):
    code, out, _ = downcycle("--src", model, "--keep", "3", "--select", rule, "--out", "c", "--json")
    assert (code, json.loads(out)["layers"]) == (0, kept)
    assert json.loads(Path("c/downcycle.json").read_text())["rule"] == rule


def test_json_is_all_that_is_printed(downcycle, model):
    code, out, err = downcycle("--src", model, "--keep", "6", "--json", "--max-shard-size", "500")
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert answer["written"] is True
    assert (answer["parent"], answer["revision"], answer["out"]) == (str(model), None, "Llama-3-6B")
    assert (answer["layers"], answer["dropped"]) == ([0, 1, 2, 3, 4, 5], [6, 7])
    assert answer["files"] == sorted([*SMALL, INDEX])
    written = {path.name: path.stat().st_size for path in Path("Llama-3-6B").iterdir()}
    assert answer["shards"] == {name: size for name, size in written.items() if name.endswith(".safetensors")}
    assert answer["bytes"]["write"] == sum(written.values())
    assert answer["bytes"]["download"] == 0
    for command in (("inspect", "Llama-3-6B"), ("verify", "Llama-3-6B")):
        code, out, err = downcycle(*command, "--json")
        assert (code, err) == (0, "")
        assert isinstance(json.loads(out), dict)


def test_a_dry_run_reads_no_weight_and_writes_nothing(downcycle, model, tree, tmp_path, monkeypatch):
    """Of each shard only the header is left: the data are a hole in the file."""
    downcycle("--src", model, "--keep", "3", "--dry-run")
    for path in model.glob("*.safetensors"):
        size = path.stat().st_size
        header = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
        os.truncate(path, header)
        os.truncate(path, size)
    before = tree(tmp_path)
    reads = []
    read = LocalFolder.read
    monkeypatch.setattr(
        LocalFolder, "read", lambda self, path, start, length: reads.append((path, start + length)) or read(self, path, start, length)
    )
    monkeypatch.setattr(LocalFolder, "copy", None)
    for extra in ([], ["--json"], ["--out", "a/b"], ["--overwrite"], ["--max-shard-size", "1"]):
        code, out, err = downcycle("--src", model, "--keep", "3", "--dry-run", *extra)
        assert (code, err) == (0, "")
        assert json.loads(out)["written"] is False if extra == ["--json"] else "would read" in out
        assert tree(tmp_path) == before
    for path, end in reads:
        if path.endswith(".safetensors"):
            with open(model / path, "rb") as file:
                assert end <= 8 + struct.unpack("<Q", file.read(8))[0]
    assert {path for path, _ in reads} == {
        "config.json",
        "tokenizer_config.json",
        "tokenizer.json",  # which token the recipe pads with
        INDEX,
        *(path.name for path in model.glob("*.safetensors")),
    }


def test_inspect(downcycle, model):
    code, out, err = downcycle("inspect", model)
    assert (code, err) == (0, "")
    shown = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert shown["model"] == str(model)
    assert shown["family"] == "llama (LlamaForCausalLM)"
    assert shown["layers"] == "8 (0-7)"
    assert shown["dtypes"] == "BF16 1,412"


@pytest.mark.parametrize(
    "src", ["~/a model é", "../a model é", "../a model é/", "./../here/../a model é", "../link", "../\udcff\udcfe"], ids=ascii
)
def test_ways_to_spell_a_folder(downcycle, make, tmp_path, monkeypatch, src):
    monkeypatch.setenv("HOME", str(tmp_path))
    make(tmp_path / "a model é")
    (tmp_path / "link").symlink_to("a model é")
    os.symlink(tmp_path / "a model é", os.fsencode(tmp_path) + b"/\xff\xfe")
    code, _, err = downcycle("--src", src, "--keep", "1")
    assert code == 0
    (child,) = Path.cwd().iterdir()
    nameable = "\udcff" not in src  # YAML is Unicode
    assert names(child) == sorted(["model.safetensors", *(name for name in SMALL if nameable or name != "axolotl.yaml")])
    assert ("no recipe: " in err) is not nameable
    assert downcycle("verify", child.name).code == 0


def test_the_home_folder_in_out(downcycle, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert downcycle("--src", model, "--keep", "1", "--out", "~/new/child/")[:2] == (0, "~/new/child/\n")
    assert names(tmp_path / "home" / "new" / "child") == sorted([*SMALL, "model.safetensors"])


def test_overwrite(downcycle, model, refused):
    assert downcycle("--src", model, "--keep", "1", "--out", "c").code == 0
    assert "--overwrite" in refused("--src", model, "--keep", "2", "--out", "c")
    assert downcycle("--src", model, "--keep", "2", "--out", "c", "--overwrite", "--max-shard-size", "1kB").code == 0
    assert json.loads(Path("c/config.json").read_text())["num_hidden_layers"] == 2
    assert names(Path.cwd()) == sorted(["c", *(f"c/{name}" for name in [*SMALL, "model.safetensors"])])


def test_code_of_a_model_s_own(downcycle, make, refused, tmp_path):
    make(tmp_path / "m", config={"model_type": "x", "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}})
    (tmp_path / "m" / "modeling_x.py").write_text("raise SystemExit('this code was run')")
    assert "--trust-remote-code" in refused("--src", tmp_path / "m", "--keep", "1", "--out", "c")
    assert "--trust-remote-code" in refused("inspect", tmp_path / "m")
    assert downcycle("--src", tmp_path / "m", "--keep", "1", "--out", "c", "--trust-remote-code").code == 0
    assert names(Path("c")) == sorted([*SMALL, "model.safetensors", "modeling_x.py"])
    assert "--trust-remote-code" in refused("verify", "c")
    assert downcycle("verify", "c", "--trust-remote-code").code == 0


def test_code_that_nobody_needs_is_left_behind(downcycle, make, tmp_path):
    make(tmp_path / "m", config={"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}})
    (tmp_path / "m" / "modeling_x.py").write_text("raise SystemExit('this code was run')")
    assert downcycle("--src", tmp_path / "m", "--keep", "1", "--out", "c").code == 0
    assert names(Path("c")) == sorted([*SMALL, "model.safetensors"])


def test_a_family_that_nobody_knows_is_refused(refused, make, tmp_path):
    make(tmp_path / "m", config={"model_type": "unheard-of"})
    assert "upgrade transformers" in refused("--src", tmp_path / "m", "--keep", "1", "--out", "c")


# What is refused


BAD_OPTIONS = {
    "keep 0": (["--keep", "0"], "between 1 and 8"),
    "keep 9 of 8": (["--keep", "9"], "--keep 9: the model has 8 layers; keep between 1 and 8"),
    "keep -1": (["--keep", "-1"], "--keep -1: not a number"),
    "keep two": (["--keep", "two"], "--keep two: not a number; write it like 24"),
    "keep nothing": (["--keep", ""], "not a number"),
    "keep half": (["--keep", "0.5"], "not a whole number"),
    "keep very many": (["--keep", "99999999999999"], "between 1 and 8"),
    "keep a long number": (["--keep", "9" * 5000], "not a number"),
    "keep an Arabic number": (["--keep", "٣"], "not a number"),
    "keep NaN": (["--keep", "nan"], "not a number"),
    "an unknown rule": (["--keep", "2", "--select", "best"], "no such rule"),
    "layers: empty": (["--layers", ""], "neither a layer nor a range"),
    "layers: comma": (["--layers", ","], "neither a layer nor a range"),
    "layers: backwards": (["--layers", "3-1"], "runs backwards"),
    "layers: out of range": (["--layers", "0-8"], "--layers 0-8: layer 8 does not exist; the model has 8 layers (0-7). Try --layers 0-7"),
    "layers: far out of range": (["--layers", "0-99999999999"], "--layers"),
    "layers: a hole": (["--layers", "0,,1"], "'' is neither"),
    "layers: Arabic digits": (["--layers", "٠-٣"], "neither a layer nor a range"),
    "layers: escape codes": (["--layers", "\x1b[2J"], "\\x1b[2J"),
    "layers: two lines": (["--layers", "0\n1"], "neither a layer nor a range"),
    "shards of 0": (["--keep", "2", "--max-shard-size", "0"], "--max-shard-size 0: give a size such as 5GB"),
    "shards of -1": (["--keep", "2", "--max-shard-size", "-1"], "--max-shard-size -1: not a number"),
    "shards of abc": (["--keep", "2", "--max-shard-size", "abc"], "--max-shard-size abc: not a number; write it like 24, 5GB"),
    "shards of 1.5 bytes": (["--keep", "2", "--max-shard-size", "1.5"], "not a whole number"),
    "a revision of a folder": (["--keep", "2", "--revision", "main"], "only a Hub repo has revisions"),
    "a recipe there is not": (["--keep", "2", "--recipe", "sota"], "--recipe sota: no such preset"),
}


@pytest.mark.parametrize(("options", "says"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(refused, model, options, says):
    assert says in refused("--src", model, *options)


@pytest.mark.parametrize(
    "src",
    ["", "./nothing", "/nothing/here/at/all", "~nobody-of-that-name/m", "x" * 5000 + "/", "..", "/dev/null", "a/b/c", "é é"],
    ids=ascii,
)
@pytest.mark.parametrize("command", [("--keep", "1", "--src"), ("inspect",), ("verify",)], ids=["cut", "inspect", "verify"])
def test_bad_sources(refused, command, src):
    refused(*command, src)


def test_a_file_is_no_source(refused, model):
    assert "give the folder that holds config.json" in refused("--keep", "1", "--src", model / "model-00001-of-00003.safetensors")


OUTS = {
    "the source": ("../Meta-Llama-3-8B", "holds the source"),
    "the source by its own name": ("../here/../Meta-Llama-3-8B/", "holds the source"),
    "around the source": ("..", "exists and holds no checkpoint"),
    "in the source": ("../Meta-Llama-3-8B/child", "lies in the source"),
    "a file": ("../Meta-Llama-3-8B/config.json", "is no folder"),
    "in a file": ("/etc/passwd/c", "nothing can be written into /etc/passwd"),
    "the root": ("/", "holds no checkpoint"),
    "nothing": ("", "give a folder's name"),
    "a device": ("/dev/null", "is no folder"),
    "in /proc": ("/proc/1/c", "/proc/1"),
    "in /sys": ("/sys/c", "/sys"),
}


@pytest.mark.parametrize(("out", "says"), OUTS.values(), ids=OUTS)
def test_bad_targets(refused, model, out, says):
    assert says in refused("--src", model, "--keep", "2", "--overwrite", "--out", out)


@pytest.mark.parametrize("length", [250, 256, 5000])  # with 250 letters, the staging folder's name is too long
def test_a_name_too_long(refused, model, length):
    assert "File name too long; choose another folder" in refused("--src", model, "--keep", "2", "--out", "x" * length)


def test_a_source_to_be_written_over_by_its_default_name(downcycle, refused, model, tmp_path):
    model.rename(tmp_path / "here" / "x-1L")
    assert "lies in the source" in refused("--src", "x-1L", "--keep", "2", "--out", "x-1L/x-2L")
    os.chdir("x-1L")
    assert "lies in the source" in refused("--src", ".", "--keep", "2")


def test_the_current_folder_is_gone(refused, downcycle, model, tmp_path):
    Path("gone").mkdir()
    os.chdir("gone")
    (tmp_path / "here" / "gone").rmdir()
    for src in (model, "demo"):
        assert "the current folder was deleted" in refused("--src", src, "--keep", "2")
        assert "the current folder was deleted" in refused("--src", src, "--keep", "2", "--out", "c")
    refused("--src", ".", "--keep", "2")
    assert downcycle("--src", model, "--keep", "2", "--out", tmp_path / "c").code == 0


CONFIGS = [
    [],
    7,
    None,
    "x",
    {},
    {"num_hidden_layers": "8"},
    {"num_hidden_layers": True},
    {"num_hidden_layers": -8},
    {"num_hidden_layers": 0},
]
CONFIGS += [{"num_hidden_layers": 10**30}, {"num_hidden_layers": 9}, {"num_hidden_layers": [8]}, {"text_config": {"num_hidden_layers": -1}}]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_bad_configs(refused, model, config):
    (model / "config.json").write_text(json.dumps(config))
    refused("--src", model, "--keep", "1")
    refused("--src", model, "--layers", "0")
    refused("inspect", model)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe{}", b'{"a": "\xff"}', b"{" * 100_000, b'{"a":' * 300 + b"1" + b"}" * 300, b"\xef\xbb\xbf[]"]
)
def test_configs_that_are_no_json(refused, model, content):
    (model / "config.json").write_bytes(content)
    refused("--src", model, "--keep", "1")


def test_a_damaged_shard(refused, model):
    shard = model / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    assert "truncated" in refused("--src", model, "--keep", "1")
    assert "truncated" in refused("inspect", model)


def test_pickles_are_refused_with_the_way_to_convert(refused, model):
    for path in [*model.glob("*.safetensors"), model / INDEX]:
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert "save_pretrained" in refused("--src", model, "--keep", "1")


def test_ten_damaged_bytes_anywhere(downcycle, model, tmp_path):
    """Whatever the damage, the answer is a line or a whole child, and nothing else appears."""
    rng = random.Random(13)
    originals = {path: path.read_bytes() for path in model.iterdir()}
    codes = []
    for _ in range(300):
        path = rng.choice([model / "config.json", model / INDEX, *model.glob("*.safetensors")])
        damaged = bytearray(originals[path])
        for _ in range(rng.randint(1, 10)):
            damaged[rng.randrange(min(len(damaged), 2000))] = rng.choice(b'\x00\xff"{}[]:,0129-aZ')
        path.write_bytes(damaged)
        code, out, err = downcycle("--src", model, "--keep", "2", "--out", "c", "--overwrite")
        codes.append(code)
        assert code == 0 or (code, out, err.count("\n")) == (1, "", 1), err
        assert {entry.name for entry in Path.cwd().iterdir()} <= {"c"}
        assert {entry.name for entry in tmp_path.iterdir()} == {"here", model.name}
        path.write_bytes(originals[path])
    assert {0, 1} == set(codes)


# Usage


@pytest.mark.parametrize(
    "arguments",
    [
        ["--keep", "2"],
        ["--src", "demo"],
        ["--src", "demo", "--keep", "2", "--layers", "0"],
        ["--nonsense"],
        ["nonsense"],
        ["inspect"],
        ["verify"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(downcycle, arguments):
    code, out, err = downcycle(*arguments)
    assert code == 2
    assert "Usage" in out + err
    assert "Traceback" not in err
    assert names(Path.cwd()) == []


def test_help(downcycle):
    for arguments in ([], ["--help"], ["inspect", "--help"], ["verify", "--help"]):
        code, out, err = downcycle(*arguments)
        assert (code, err) == (0, "")
        assert "Usage" in out


def test_counts():
    known = {"24": 24, " 7 ": 7, "1B": 10**9, "5GB": 5 * 10**9, "5gb": 5 * 10**9, "3T": 3 * 10**12}
    known |= {"1.005k": 1005, "4.35MB": 4350000, "2GiB": 2 << 30, "0.5KiB": 512}
    assert {text: parse_count(text, "--x") for text in known} == known


# The process


def start(*arguments, **options):
    return subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture
def long_cut(make, tmp_path):
    """A cut of a thousand shards of one tensor each, which takes a second or more."""
    make(tmp_path / "long", layers=110)
    return "--src", tmp_path / "long", "--keep", "109", "--out", "c", "--max-shard-size", "1"


def wait_for_a_shard(process):
    """Wait until the first shards are done."""
    while process.poll() is None and len(list(Path(".c.downcycle").glob("*.safetensors"))) < 5:
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()


def test_ctrl_c_and_a_second_run(long_cut, refused, downcycle):
    process = start(*long_cut)
    wait_for_a_shard(process)
    process.send_signal(signal.SIGSTOP)  # else it may be done before the second begins
    second = subprocess.run([*COMMAND, *map(str, long_cut)], capture_output=True, text=True, check=False)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate()
    assert (second.returncode, second.stdout) == (1, "")
    assert (
        second.stderr.splitlines()[-1]
        == f"downcycle: --out {Path.cwd() / 'c'}: another run is writing it; wait for it or choose another folder"
    )
    assert (process.returncode, out) == (130, "")
    staging = Path.cwd() / ".c.downcycle"
    assert err.splitlines()[3:] == [f"downcycle: interrupted; what is done stays in {staging}, and the same command goes on from there"]
    assert [path.name for path in Path.cwd().iterdir()] == [staging.name]
    done = {path.name: path.stat().st_ino for path in staging.glob("*.safetensors")}
    assert len(done) >= 5
    assert downcycle(*long_cut).code == 0
    assert done.items() <= {path.name: path.stat().st_ino for path in Path("c").iterdir()}.items()
    assert [path.name for path in Path.cwd().iterdir()] == ["c"]
    assert len(list(Path("c").iterdir())) == len(SMALL) + 1 + 109 * 9 + 3


def test_a_pipe_that_closes(model):
    process = start("inspect", model)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait() in (0, 1)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_any_terminal_can_show_it(make, tmp_path, encoding):
    make(tmp_path / "é🦙")
    for arguments in (
        ["--src", tmp_path / "é🦙", "--keep", "1", "--dry-run"],
        ["--src", tmp_path / "é🦙", "--keep", "1"],
        ["inspect", "./é🦙"],
    ):
        done = subprocess.run(
            [*COMMAND, *map(str, arguments)], env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=False
        )
        assert done.returncode == (arguments[0] == "inspect"), done.stderr
        assert b"Traceback" not in done.stderr
    assert names(Path("é🦙-1L")) == sorted([*SMALL, "model.safetensors"])


def test_help_and_a_cut_import_nothing_heavy(model):
    heavy = {"torch", "numpy", "huggingface_hub", "safetensors"}
    code = f"import sys; from downcycle.cli import main\ntry: main()\nfinally: print(*{heavy} & set(sys.modules))"
    for arguments in (["--help"], ["--src", model, "--keep", "1"], ["inspect", model]):
        done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == ""


def test_a_dry_run_says_what_stands_in_the_way(downcycle, model):
    answer = downcycle("--src", model, "--keep", "1", "--out", model / "x", "--dry-run")
    assert answer.code == 0
    assert "but as things are it would be refused: --out" in answer.out
    assert (
        "lies in the source"
        in json.loads(downcycle("--src", model, "--keep", "1", "--out", model / "x", "--dry-run", "--json").out)["obstacle"]
    )


@pytest.mark.parametrize("options", [["--json"], ["--keep", "4"], ["--dry-run"], ["--src", "x"]])
def test_options_of_a_cut_before_another_command_are_refused(downcycle, model, options):
    answer = downcycle(*options, "inspect", model)
    assert answer.code == 2
    assert f"{options[0]} belongs to a cut" in answer.err


def test_a_rule_beside_a_list_is_refused(downcycle, model):
    answer = downcycle("--src", model, "--layers", "0-1", "--select", "even")
    assert answer.code == 2
    assert "--select chooses for --keep" in answer.err


def test_a_cut_without_a_parent_is_told_what_is_missing(downcycle):
    answer = downcycle("--keep", "3")
    assert (answer.code, answer.out) == (2, "")
    assert "give the parent with --src SRC" in answer.err


# What measures. All else of it is tested where torch is: in tests/eval/scoring/


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--keep", "4", "--calibrate", "demo"], "--calibrate is for rules that measure, and for --compensate"),
        (["--layers", "0-3", "--seed", "1"], "--seed is for rules that measure, and for --compensate"),
        (["--keep", "4", "--select", "even", "--protect", "0"], "--protect is for rules that measure, and --select even does not"),
        (["--keep", "4", "--compensate", "refit", "--calibrate", "demo", "--protect", "0"], "--select first does not"),
        (["--layers", "0-3", "--protect", "0"], "--protect chooses for --keep; with --layers you choose"),
        (["--keep", "4", "--select", "bi", "--samples", "many"], "Invalid value for '--samples'"),
    ],
)
def test_options_that_nothing_measures_by(downcycle, model, tree, tmp_path, options, says):
    before = tree(tmp_path)
    code, out, err = downcycle("--src", model, *options)
    assert (code, out) == (2, "") and says in " ".join(err.split())
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--keep", "4", "--select", "ppl"], "--select ppl: measures the model on a text; give one with --calibrate TEXT"),
        (["--keep", "4", "--compensate", "refit"], "--compensate refit: measures the model on a text"),
        (["--layers", "0-3", "--compensate", "hope"], "--compensate hope: no such method; choose scale, refit, or none"),
        (["--keep", "4", "--select", "bi", "--calibrate", "demo", "--protect", "8"], "--protect 8: layer 8 does not exist"),
        (["--keep", "9", "--select", "bi", "--calibrate", "demo"], "--keep 9: the model has 8 layers; keep between 1 and 8"),
        (["--keep", "9", "--select", "even", "--compensate", "refit", "--calibrate", "demo"], "--keep 9: the model has 8 layers"),
        (["--keep", "2", "--select", "ppl", "--calibrate", "demo", "--protect", "0-2"], "3 layers must stay, but --keep 2 keeps fewer"),
    ],
)
def test_what_cannot_be_measured_is_refused(refused, model, options, says):
    assert says in refused("--src", model, *options)


@pytest.mark.parametrize(
    "command", [("score",), ("--keep", "4", "--select", "bi", "--src"), ("--keep", "4", "--compensate", "scale", "--src")]
)
def test_measuring_without_torch_names_what_to_install(refused, model, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "needs torch and transformers: pip install 'downcycle[eval]'" in refused(*command, model, "--calibrate", "demo")
