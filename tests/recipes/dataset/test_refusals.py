"""What cannot be is refused in one line, before anything is written; a bad file is named."""

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from fineweb import DEMO, expect, pa, pq, read, refusal, store

from downcycle import DowncycleError
from downcycle.recipes.dataset.make import make_dataset


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 0}, "--tokens 0: give the number"),
        ({"tokens": -5}, "--tokens -5"),
        ({"held_out": 0.5}, "--held-out 0.5.*less than 0.5"),
        ({"held_out": -0.1}, "--held-out -0.1"),
        ({"held_out": float("nan")}, "--held-out nan"),
        ({"language": ""}, "--language ''"),
        ({"min_language_score": float("nan")}, "--min-language-score nan: give a number from 0 to 1"),
        ({"min_language_score": 2}, "--min-language-score 2"),
        ({"min_language_score": -0.1}, "--min-language-score -0.1"),
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.drop_columns(["text"]), "has no column text, only id, dump"),
        (lambda table: table.drop_columns(["id"]), "has no column id"),
        (lambda table: table.drop_columns(["language"]), "has no column language"),
        (lambda table: table.set_column(0, "text", pa.array([["a"]] * len(table))), "column text holds list<.*strings are needed"),
        (lambda table: table.append_column("text", table["url"]), "has more than one column named text;"),
        (lambda table: table.append_column("url", table["text"]).append_column("dump", table["text"]), "one column named dump, url;"),
        (lambda table: _twice(table, "n_tokens"), "has more than one column named n_tokens;"),
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
        (lambda path: pq.write_table(_twice(pq.read_table(path), "new"), path), "b.parquet: has more than one column named new"),
        (lambda path: pq.write_table(pq.read_table(path).drop_columns(["url"]), path), "b.parquet: has no column url"),
        (lambda path: pq.write_table(pq.read_table(path).cast(_counts_as_text(path)), path), "b.parquet: column token_count is string"),
    ],
    ids=["truncated", "empty", "garbage", "repeated", "column", "type"],
)
def test_names_a_bad_file(tmp_path, rows, request_, damage, words):
    folder = store(tmp_path / "source", {"a.parquet": rows[:100], "b.parquet": rows[100:200]})
    damage(folder / "b.parquet")
    said = refusal(tmp_path / "out", replace(request_, src=str(folder)), workers=1)
    assert words in said
    assert "log" not in said


def _twice(table: "pa.Table", name: str) -> "pa.Table":
    numbers = pa.array(range(len(table)))
    return table.append_column(name, numbers).append_column(name, numbers)


def _counts_as_text(path: Path) -> "pa.Schema":
    schema = pq.read_schema(path)
    return schema.set(schema.get_field_index("token_count"), pa.field("token_count", pa.string()))


def test_bad_file_behind_the_needed_ones_does_no_harm(tmp_path, rows, request_):
    folder = store(tmp_path / "source", {"a.parquet": rows[:100]})
    (folder / "b.parquet").write_bytes(b"no parquet")
    make_dataset(tmp_path / "out", replace(request_, src=str(folder), tokens=1000), workers=1)
    assert read(tmp_path / "out") == expect(rows[:100], 1000, request_.held_out)


def test_text_that_is_all_held_out(tmp_path, rows, request_):
    """The first text of all is held out, and there is no other."""
    folder = store(tmp_path / "source", {"a.parquet": [row | {"text": rows[0]["text"]} for row in rows[:60]]})
    one = expect(rows[:9], 1, 0)["train"][0]["n_tokens"]
    said = refusal(tmp_path / "out", replace(request_, src=str(folder), tokens=500), workers=1)
    assert f"there are 0 training tokens in all (rows dropped: none; tokens held out: {60 * one:,}); give --held-out 0, or" in said
    report = make_dataset(tmp_path / "out", replace(request_, src=str(folder), tokens=500, held_out=0), workers=1)
    assert report["splits"]["train"]["documents"] == -(-500 // one)


def test_filters_that_leave_nothing(tmp_path, rows, request_):
    folder = store(tmp_path / "source", {"a.parquet": rows[:60]})
    said = refusal(tmp_path / "out", replace(request_, src=str(folder), language="xx"), workers=1)
    assert "0 training tokens in all (rows dropped: 60 other language; tokens held out: 0); choose other filters" in said


def test_broken_tokenizer(tmp_path, request_):
    shutil.copytree(DEMO / "model", tmp_path / "model")
    settings = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
    assert "names no end-of-text token" in refusal(tmp_path / "out", replace(request_, tokenizer=str(tmp_path / "model")))
    (tmp_path / "model/tokenizer.json").write_text("{}")
    assert "cannot be loaded" in refusal(tmp_path / "out", replace(request_, tokenizer=str(tmp_path / "model")))
