"""A dataset holds exactly the documents that its law says, counted as Axolotl trains on them, however the work went."""

import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("datatrove")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
from huggingface_hub import DatasetCard, HfFileSystem, constants  # noqa: E402
from huggingface_hub.utils import close_session  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from downcycle import DowncycleError  # noqa: E402
from downcycle.recipes.dataset import rounds, work  # noqa: E402
from downcycle.recipes.dataset import source as parquet_source  # noqa: E402
from downcycle.recipes.dataset.make import Request, make_dataset  # noqa: E402
from downcycle.surgery.checkpoint import DEMO_FOLDER  # noqa: E402
from downcycle.surgery.staging import staging_path  # noqa: E402

from hub_server import HubServer  # noqa: E402

DEMO = DEMO_FOLDER.parent
PARAGRAPHS = [text for text in (DEMO / "healing.txt").read_text().split("\n\n") if len(text) > 100]
COLUMNS = ["text", "id", "dump", "url", "date", "file_path", "language", "language_score", "token_count"]
FILES = {"downcycle-data.json", "README.md", "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"}
END = 4081


def documents(count: int, seed: int) -> list[dict]:
    """Rows in FineWeb's schema; one in ten repeats an earlier text, one in eight is not English."""
    rng = random.Random(seed)
    rows: list[dict] = []
    for i in range(count):
        text = "\n\n".join(rng.sample(PARAGRAPHS, rng.randint(1, 3)))
        if rows and rng.random() < 0.1:
            text = rng.choice(rows)["text"]
        facts = {
            "dump": "CC-MAIN-2024-10",
            "url": f"https://a.example/{i}",
            "date": "2024-02-21T00:00:00Z",
            "file_path": "s3://commoncrawl",
        }
        language = {
            "language": rng.choice(["en"] * 7 + ["fr"]),
            "language_score": rng.uniform(0.65, 1),
            "token_count": rng.randint(20, 900),
        }
        rows.append({"text": text, "id": f"<urn:uuid:{seed}-{i}>", **facts, **language})
    return rows


def store(folder: Path, files: dict[str, list[dict]], rows: int = 50) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(content), folder / name, row_group_size=rows)
    return folder


def expect(rows: list[dict], tokens: int, held_out: float) -> dict[str, list[dict]]:
    """The law, spelt a second time, on rows that passed the filters."""
    tokenizer = Tokenizer.from_file(str(DEMO / "model/tokenizer.json"))
    splits: dict[str, list[dict]] = {"train": [], "test": []}
    total = 0
    for row in rows:
        ids = tokenizer.encode(row["text"]).ids
        count = len(ids) + (ids[-1] != END)
        share = int.from_bytes(blake2b(row["text"].encode(), digest_size=8).digest(), "little") / 2**64
        held = held_out and (share < held_out or row["text"] == rows[0]["text"])
        splits["test" if held else "train"].append(row | {"n_tokens": count})
        total += 0 if held else count
        if total >= tokens:
            return splits
    raise AssertionError("the test's source is too small")


def read(folder: Path) -> dict[str, list[dict]]:
    return {
        split: [row for file in sorted((folder / "data").glob(f"{split}-*")) for row in pq.read_table(file).to_pylist()]
        for split in ("train", "test")
    }


def data_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [*(folder / "data").iterdir(), folder / "downcycle-data.json"]}


def paths(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def workers_of(pid: int) -> list[int]:
    """Worker processes that a process started."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == str(pid) and b"dataset.worker" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
    return found


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Many tasks out of little text."""
    monkeypatch.setattr(parquet_source, "PIECE_ROWS", 100)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [row for seed in range(3) for row in documents(400, seed)]


@pytest.fixture(scope="module")
def source(tmp_path_factory, rows) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return store(folder, {f"{i:03}_00000.parquet": rows[400 * i : 400 * i + 400] for i in range(3)})


@pytest.fixture(scope="module")
def request_(source) -> Request:
    return Request(120_000, str(source), tokenizer="demo", held_out=0.02)


@pytest.fixture(scope="module")
def made(tmp_path_factory, request_) -> Path:
    """Made by one worker, with the real size of a task."""
    out = tmp_path_factory.mktemp("made") / "web"
    make_dataset(out, request_, workers=1)
    return out


def refusal(out: Path, request: Request, **options: object) -> str:
    """What a call that must be refused says; it must leave no target and fit on a line."""
    with pytest.raises(DowncycleError) as caught:
        make_dataset(out, request, **options)
    assert "\n" not in str(caught.value)
    assert not out.is_dir() or not any(out.iterdir())
    return str(caught.value)


def test_holds_what_the_law_says(made, request_, rows):
    expected = expect(rows, request_.tokens, request_.held_out)
    assert read(made) == expected
    assert paths(made) == FILES
    assert [path.name for path in made.parent.iterdir()] == ["web"]
    total = sum(row["n_tokens"] for row in expected["train"])
    assert request_.tokens <= total < request_.tokens + expected["train"][-1]["n_tokens"]
    report = json.loads((made / "downcycle-data.json").read_text())
    for split, content in expected.items():
        assert report["splits"][split] == {"documents": len(content), "tokens": sum(row["n_tokens"] for row in content)}
    assert report["dropped"] == {}
    assert report["arguments"]["tokens"] == 120_000


def test_no_text_is_in_both_splits(made):
    splits = {split: [row["text"] for row in content] for split, content in read(made).items()}
    assert not set(splits["train"]) & set(splits["test"])
    assert any(len(texts) > len(set(texts)) for texts in splits.values())  # the source does repeat texts


def test_workers_change_nothing(tmp_path, made, request_):
    seen = []
    report = make_dataset(tmp_path / "out", request_, workers=3, progress=lambda *done: seen.append(done))
    assert data_bytes(tmp_path / "out") == data_bytes(made)
    assert seen == sorted(seen)
    assert seen[-1][1] >= report["splits"]["train"]["tokens"]


def test_filters(tmp_path, rows, source):
    wanted = Request(20_000, str(source), None, "demo", "en", 0.8, 100, 700)
    report = make_dataset(tmp_path / "out", wanted, workers=2)
    passes = {
        "other_language": lambda row: row["language"] == "en",
        "low_language_score": lambda row: row["language_score"] >= 0.8,
        "too_short": lambda row: row["token_count"] >= 100,
        "too_long": lambda row: row["token_count"] <= 700,
    }
    kept = [row for row in rows if all(test(row) for test in passes.values())]
    assert read(tmp_path / "out") == expect(kept, 20_000, 0.001)
    last = [row["id"] for row in rows].index(read(tmp_path / "out")["train"][-1]["id"])
    rows_read = rows[: (last // 100 + 1) * 100]  # of whole tasks
    reasons = [next((reason for reason, test in passes.items() if not test(row)), None) for row in rows_read]
    assert report["dropped"] == {reason: reasons.count(reason) for reason in sorted(passes)}


def test_a_part_of_a_source_by_name(tmp_path, rows):
    store(tmp_path / "web", {"data/CC-MAIN-2024-10/a.parquet": rows[:50], "sample/10BT/b.parquet": rows[50:90], ".c/d.parquet": rows[:3]})
    for name, start in (("CC-MAIN-2024-10", 0), ("sample-10BT", 50)):
        found = parquet_source.find_parquet(str(tmp_path / "web"), name)
        assert len(found.files) == 1
        assert pq.read_table(Path(found.url) / found.files[0]).to_pylist()[0] == rows[start]
    assert parquet_source.find_parquet(str(tmp_path / "web"), None).files == ("data/CC-MAIN-2024-10/a.parquet", "sample/10BT/b.parquet")


def test_malformed_rows_are_dropped_and_counted(tmp_path, rows):
    bad = [rows[0] | {"text": None}, rows[1] | {"id": None}, rows[2] | {"text": " \n\t"}, rows[3] | {"text": ""}]
    broken = rows[4] | {"text": b"\xff\xfe not UTF-8"}
    table = pa.Table.from_pylist([*bad, *rows[10:40]])
    raw = pa.Table.from_pylist([broken]).set_column(0, "text", pa.array([broken["text"]]).view(pa.string()))
    (tmp_path / "source").mkdir()
    pq.write_table(pa.concat_tables([table, raw, pa.Table.from_pylist(rows[40:60])]), tmp_path / "source/a.parquet")
    report = make_dataset(tmp_path / "out", Request(6000, str(tmp_path / "source"), tokenizer="demo"), workers=1)
    assert read(tmp_path / "out") == expect(rows[10:60], 6000, 0.001)
    assert report["dropped"] == {"malformed": 3, "blank_text": 2}


def test_columns_of_any_name_are_kept(tmp_path, rows):
    """`rank`, `metadata` and `media` mean something to datatrove; an old `n_tokens` is counted anew."""
    content = [row | {"rank": 7, "metadata": "m", "media": "x", "n_tokens": -1} for row in rows[:30]]
    store(tmp_path / "source", {"a.parquet": content})
    make_dataset(tmp_path / "out", Request(3000, str(tmp_path / "source"), tokenizer="demo", held_out=0), workers=1)
    assert read(tmp_path / "out") == expect(content, 3000, 0)
    assert paths(tmp_path / "out") == FILES - {"data/test-00000-of-00001.parquet"}


def test_axolotl_trains_on_as_many_tokens(tmp_path, made, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("axolotl")
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    from axolotl.datasets import TokenizedPromptDataset
    from axolotl.prompt_strategies.completion import load
    from datasets import load_dataset
    from transformers import AutoTokenizer

    loaded = load_dataset(str(made), cache_dir=str(tmp_path))
    strategy = load(AutoTokenizer.from_pretrained(DEMO / "model"), SimpleNamespace(train_on_inputs=False, sequence_len=512))
    for split, content in read(made).items():
        assert loaded[split].to_list() == content
        tokenized = TokenizedPromptDataset(strategy, loaded[split], process_count=1, keep_in_memory=True)
        assert sum(map(len, tokenized["input_ids"])) == sum(row["n_tokens"] for row in content)


def test_a_text_that_ends_with_the_end_token_is_not_given_another(tmp_path, rows):
    content = [row | {"text": row["text"] + "<|end_of_text|>"} for row in rows[:5]]
    store(tmp_path / "source", {"a.parquet": content})
    make_dataset(tmp_path / "out", Request(200, str(tmp_path / "source"), tokenizer="demo", held_out=0), workers=1)
    assert read(tmp_path / "out") == expect(content, 200, 0)


def test_card(made):
    facts = DatasetCard.load(made / "README.md")
    assert facts.data.size_categories == "n<1K"
    assert facts.data.configs[0]["data_files"] == [{"split": s, "path": f"data/{s}-*"} for s in ("train", "test")]
    assert str(made) not in facts.content
    assert str(json.loads((made / "downcycle-data.json").read_text())["arguments"]["src"]) not in facts.content


def test_killed_run_goes_on(tmp_path, made, request_):
    """Kill -9 in the middle: no target, no worker left; then finished tasks are not done again and the files are the same."""
    out, staging = tmp_path / "out", staging_path(tmp_path / "out")
    if not (run := os.fork()):
        make_dataset(out, request_, workers=1)
        os._exit(0)
    while len(work.finished(staging)) < 2:
        assert os.waitpid(run, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    children = workers_of(run)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    assert children
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not out.exists()
    before = {path.name: path.stat().st_mtime_ns for path in (staging / "completions").iterdir()}
    after = dict(before)
    again = lambda *done: after.update({path.name: path.stat().st_mtime_ns for path in (staging / "completions").glob("*")})  # noqa: E731
    make_dataset(out, request_, workers=2, progress=again)
    assert {name: after[name] for name in before} == before
    assert data_bytes(out) == data_bytes(made)
    assert not staging.exists()


def test_killed_worker_is_reported_and_the_run_goes_on(tmp_path, made, request_):
    out = tmp_path / "out"

    def kill(done: int, tokens: int) -> None:
        if work.finished(staging_path(out)):
            for worker in workers_of(os.getpid()):
                os.kill(worker, signal.SIGKILL)

    said = refusal(out, request_, workers=1, progress=kill)
    assert re.search(r"a worker was killed \(SIGKILL\).*fewer --workers. What is done stays in .*goes on from there", said)
    make_dataset(out, request_, workers=1)
    assert data_bytes(out) == data_bytes(made)


def test_interrupt_leaves_no_process(tmp_path, request_):
    def interrupt(done: int, tokens: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_dataset(tmp_path / "out", request_, workers=2, progress=interrupt)
    assert not workers_of(os.getpid())
    assert staging_path(tmp_path / "out").is_dir()
    assert not (tmp_path / "out").exists()


def test_too_little_text_loses_nothing(tmp_path, source, rows, request_, made):
    """The error says how much there is; a call for less goes on from the work done and gives what it would give from nothing."""
    out = tmp_path / "out"
    said = refusal(out, replace(request_, tokens=10_000_000), workers=2)
    have = int(re.search(r"there are (\d+) training tokens in all .*ask for at most \1", said)[1])
    with pytest.raises(AssertionError):
        expect(rows, have + 1, 0.02)
    assert sum(row["n_tokens"] for row in expect(rows, have, 0.02)["train"]) == have
    started = time.time_ns()
    seen = set()
    look = lambda *done: seen.update(path.name for path in (staging_path(out) / "parts").glob("*") if path.stat().st_mtime_ns > started)  # noqa: E731
    make_dataset(out, request_, workers=2, progress=look)
    assert not seen
    assert data_bytes(out) == data_bytes(made)


def test_first_task_stops_early_and_is_done_again_for_more(tmp_path, rows, monkeypatch):
    """One row group of any size is not read to its end for a few tokens; what was cut short is not taken for the whole later."""
    monkeypatch.setattr(parquet_source, "PIECE_ROWS", 20_000)
    folder = store(tmp_path / "source", {"a.parquet": rows}, rows=10_000)
    small, large = (Request(tokens, str(folder), tokenizer="demo") for tokens in (2000, 100_000))
    seen = []

    def stop(done: int, tokens: int) -> None:
        seen.append(done)
        if work.finished(staging_path(tmp_path / "out")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_dataset(tmp_path / "out", small, workers=1, progress=stop)
    assert 0 < max(seen) < 100
    make_dataset(tmp_path / "out", large, workers=1)
    assert read(tmp_path / "out") == expect(rows, 100_000, 0.001)


def test_other_arguments_do_not_reuse_the_work(tmp_path, request_, rows):
    out = tmp_path / "out"

    def stop(done: int, tokens: int) -> None:
        if work.finished(staging_path(out)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_dataset(out, request_, workers=1, progress=stop)
    make_dataset(out, replace(request_, tokens=5000, language="fr"), workers=1)
    assert read(out) == expect([row for row in rows if row["language"] == "fr"], 5000, request_.held_out)


def test_overwrite(tmp_path, request_, made):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    with pytest.raises(DowncycleError, match="exists already.*--overwrite"):
        make_dataset(out, request_)
    make_dataset(out, replace(request_, tokens=500), workers=1, overwrite=True)
    assert sum(row["n_tokens"] for row in read(out)["train"]) < 5000
    (out / "downcycle-data.json").unlink()
    with pytest.raises(DowncycleError, match="holds no dataset"):
        make_dataset(out, request_, overwrite=True)


def test_two_runs_into_one_target(tmp_path, request_):
    said = []

    def second(done: int, tokens: int) -> None:
        if not said:
            said.append(refusal(tmp_path / "out", request_))

    make_dataset(tmp_path / "out", replace(request_, tokens=500), workers=1, progress=second)
    assert "another run is writing it" in said[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 0}, "--tokens 0: give the number"),
        ({"tokens": -5}, "--tokens -5"),
        ({"held_out": 0.5}, "--held-out 0.5.*less than 0.5"),
        ({"held_out": -0.1}, "--held-out -0.1"),
        ({"held_out": float("nan")}, "--held-out nan"),
        ({"language": ""}, "--language ''"),
        ({"min_tokens": -1}, "--min-tokens -1"),
        ({"min_tokens": 9, "max_tokens": 5}, "--max-tokens 5"),
        ({"tokens": 0, "held_out": 1}, "--tokens 0.*; --held-out 1"),
        ({"src": ""}, "--src '': no such folder"),
        ({"src": "no/such/folder"}, "--src no/such/folder: no such folder"),
        ({"src": __file__}, "a file; give the folder"),
        ({"name": "../x"}, "--name '../x'"),
        ({"name": "CC-MAIN-1999-01"}, "holds no parquet files in data/CC-MAIN-1999-01, CC-MAIN-1999-01"),
        ({"tokenizer": "/nowhere"}, "--tokenizer /nowhere: no such folder"),
        ({"tokenizer": str(DEMO)}, "--tokenizer .*demo: holds no tokenizer.json"),
    ],
)
def test_refuses(tmp_path, request_, change, words):
    assert re.search(words, refusal(tmp_path / "out", replace(request_, **change)))
    assert not any(tmp_path.iterdir())


def test_refuses_options(tmp_path, request_, monkeypatch, source):
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    assert "--workers 0" in refusal(tmp_path / "out", request_, workers=0)
    assert "no such executor; choose local, slurm, ray" in refusal(tmp_path / "out", request_, executor="k8s")
    assert "set SBATCH_PARTITION" in refusal(tmp_path / "out", request_, executor="slurm")
    assert "lies in the source" in refusal(source / "out", request_)
    (tmp_path / "file").write_text("")
    assert "is no folder" in refusal(tmp_path / "file", request_)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(DowncycleError, match="is a symbolic link"):
        make_dataset(tmp_path / "link", request_)
    assert re.search("No such file|Not a directory|cannot be|choose", refusal(Path("/proc/no/out"), request_))


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_ray_is_asked_for(tmp_path, request_):
    assert "pip install 'datatrove[ray]'" in refusal(tmp_path / "out", request_, executor="ray")
    made = work.make_executors("ray", [], 7, [3], tmp_path, 4)
    assert [(one.tasks, one.workers) for one in made] == [(7, 4)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.drop_columns(["text"]), "has no column text, only id, dump"),
        (lambda table: table.drop_columns(["id"]), "has no column id"),
        (lambda table: table.drop_columns(["language"]), "has no column language"),
        (lambda table: table.set_column(0, "text", pa.array([["a"]] * len(table))), "column text holds list<.*strings are needed"),
        (lambda table: table.set_column(1, "id", pa.array(range(len(table)))), "column id holds int64"),
    ],
)
def test_refuses_columns(tmp_path, rows, request_, change, words):
    (tmp_path / "source").mkdir()
    pq.write_table(change(pa.Table.from_pylist(rows[:20])), tmp_path / "source/a.parquet")
    assert re.search(f"a.parquet: .*{words}", refusal(tmp_path / "out", replace(request_, src=str(tmp_path / "source"), language="en")))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-5000]), "b.parquet: damaged or truncated"),
        (lambda path: path.write_bytes(b""), "b.parquet: damaged or truncated"),
        (lambda path: path.write_bytes(b"PAR1" + random.Random(1).randbytes(20_000) + path.read_bytes()[20_004:]), "b.parquet: damaged"),
        (lambda path: pq.write_table(pq.read_table(path).drop_columns(["url"]), path), "b.parquet: has no column url"),
        (lambda path: pq.write_table(pq.read_table(path).cast(_counts_as_text(path)), path), "b.parquet: column token_count is string"),
    ],
    ids=["truncated", "empty", "garbage", "column", "type"],
)
def test_names_a_bad_file(tmp_path, rows, request_, damage, words):
    folder = store(tmp_path / "source", {"a.parquet": rows[:100], "b.parquet": rows[100:200]})
    damage(folder / "b.parquet")
    said = refusal(tmp_path / "out", replace(request_, src=str(folder)), workers=1)
    assert words in said
    assert "log" not in said


def _counts_as_text(path: Path) -> "pa.Schema":
    schema = pq.read_schema(path)
    return schema.set(schema.get_field_index("token_count"), pa.field("token_count", pa.string()))


def test_bad_file_behind_the_needed_ones_does_no_harm(tmp_path, rows, request_):
    folder = store(tmp_path / "source", {"a.parquet": rows[:100]})
    (folder / "b.parquet").write_bytes(b"no parquet")
    make_dataset(tmp_path / "out", replace(request_, src=str(folder), tokens=1000), workers=1)
    assert read(tmp_path / "out") == expect(rows[:100], 1000, request_.held_out)


def test_broken_tokenizer(tmp_path, request_):
    shutil.copytree(DEMO / "model", tmp_path / "model")
    settings = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
    assert "names no end-of-text token" in refusal(tmp_path / "out", replace(request_, tokenizer=str(tmp_path / "model")))
    (tmp_path / "model/tokenizer.json").write_text("{}")
    assert "cannot be loaded" in refusal(tmp_path / "out", replace(request_, tokenizer=str(tmp_path / "model")))


def test_full_disk(tmp_path, request_, made):
    """On a disk of 200 kB, which only root can make."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", disk], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        assert "the disk is full; free some space" in refusal(disk / "out", request_, workers=1)
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        make_dataset(disk / "out", request_, workers=1)
        assert data_bytes(disk / "out") == data_bytes(made)
    finally:
        subprocess.run(["umount", disk], check=True)


SLURM = {
    "sbatch": """#!/bin/bash
script="${@: -1}"; echo "$@" >> SHARED/calls; cp "$script" SHARED/script.$(ls SHARED | wc -l)
if grep -q launch_pickled "$script"; then
  last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
  for i in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here bash "$script" > SHARED/log.$i 2>&1; done
fi
echo "Submitted batch job 7"
""",
    "srun": '#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done\nexec "$@"\n',
    "scontrol": "#!/bin/bash\necho here\n",
    "squeue": "#!/bin/bash\n",
}


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """Slurm's commands as they look from outside; sbatch does the job before it answers."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "shared").mkdir()
    for name, text in SLURM.items():
        (folder / name).write_text(text.replace("SHARED", str(folder / "shared")))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SBATCH_PARTITION", "cpu")
    monkeypatch.setitem(work.POLL, "slurm", 0.01)
    return folder


def test_slurm(tmp_path, cluster, request_, rows):
    make_dataset(tmp_path / "out", replace(request_, tokens=9000), workers=2, executor="slurm")
    assert read(tmp_path / "out") == expect(rows, 9000, request_.held_out)
    script = next(path.read_text() for path in (cluster / "shared").glob("script.*") if "launch_pickled" in path.read_text())
    assert re.search(r"#SBATCH --array=0-1%2\n", script)
    assert re.search(r"#SBATCH --partition=cpu\n", script)
    assert "qos" not in script


def test_slurm_job_that_fails(tmp_path, cluster, request_):
    (cluster / "srun").write_text("#!/bin/bash\nexit 1\n")
    assert "Slurm job 7 ended with 2 of 2 tasks undone" in refusal(tmp_path / "out", request_, workers=2, executor="slurm")


def test_from_the_hub(tmp_path, source, monkeypatch):
    """The Hub on loopback: the commit is pinned, files that are not needed are not fetched."""
    shutil.copytree(source, tmp_path / "web/data/CC-MAIN-2024-10")
    with HubServer() as hub:
        commit = hub.add("datasets/HuggingFaceFW/fineweb", tmp_path / "web")
        hub.fail("*/000_00000.parquet", times=3)
        hub.fail("*/000_00000.parquet", times=1, drop_after=1000)  # while a task reads it
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name, value in {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, value)
        wanted = Request(20_000, name="CC-MAIN-2024-10", tokenizer="demo", held_out=0.02)
        make_dataset(tmp_path / "out", wanted, workers=1)
        assert "no public dataset at http://127.0.0.1" in refusal(tmp_path / "no", replace(wanted, src="no/where"))
        assert "has no revision v9" in refusal(tmp_path / "no", replace(wanted, src="HuggingFaceFW/fineweb@v9"))
        assert "holds no parquet files" in refusal(tmp_path / "no", replace(wanted, name="CC-MAIN-1999-01"))
        assert not hub.asked("*/002_00000.parquet")
        assert not any(fault.times for fault in hub.faults)
    HfFileSystem.clear_instance_cache()
    close_session()
    assert read(tmp_path / "out") == expect(pq.read_table(source).to_pylist(), 20_000, 0.02)
    facts = DatasetCard.load(tmp_path / "out/README.md").data
    assert (facts.license, facts.source_datasets) == ("odc-by", ["HuggingFaceFW/fineweb"])
    assert json.loads((tmp_path / "out/downcycle-data.json").read_text())["revision"] == commit


def test_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the Hub cannot be asked" in refusal(tmp_path / "out", Request(5, tokenizer="demo"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "no connection to 127.0.0.1" in refusal(tmp_path / "out", Request(5, tokenizer="demo"))
    close_session()


def test_shards_have_the_names_of_the_hub(tmp_path, monkeypatch, made):
    """Files of any number, in order."""
    from downcycle.recipes.dataset import shards as shard_files

    monkeypatch.setattr(shard_files, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(shard_files, "GROUP_ROWS", 20)
    table = pq.read_table(made / "data/train-00000-of-00001.parquet")
    shards = shard_files.Shards(tmp_path, "train", table.schema)
    for start in range(0, len(table), 7):
        shards.add(table.slice(start, 7))
    files = shards.finish()
    assert len(files) > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"train-{i:05}-of-{len(files):05}.parquet" for i in range(len(files))]
    assert pa.concat_tables(map(pq.read_table, files)).equals(table)
    assert (shards.documents, shards.tokens) == (len(table), sum(table["n_tokens"].to_pylist()))


def test_rounds_ask_for_what_is_missing(tmp_path):
    """Tasks of 100 tokens each: a first round of as many as there are workers, then the rest at once, and no more."""
    asked = []

    def write_tasks(pieces: list, watch: object) -> None:
        asked.append(len(pieces))
        for rank in range(len(pieces)):
            if rank not in work.finished(tmp_path):
                hashes = pa.array([rank], pa.uint64())
                pq.write_table(pa.table({"n_tokens": [100], "__text_hash": hashes}), tmp_path / f"parts/{rank:05}.parquet")
                (tmp_path / f"completions/{rank:05}").touch()

    (tmp_path / "completions").mkdir()
    wanted = rounds.Rounds(tmp_path, 950, 0, lambda *done: None)
    assert wanted.collect(iter([None] * 50), 2, write_tasks) == [None] * 10
    assert asked[0] == 2
    assert asked[-1] in (10, 11)
    assert len(asked) == 2
