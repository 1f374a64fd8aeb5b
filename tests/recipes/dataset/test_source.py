"""Parquet files are found in folders and on the Hub, and read alike however they were written."""

import json
import shutil
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from fineweb import COLUMNS, expect, pa, pq, read, refusal, store, store_tables
from huggingface_hub import DatasetCard, HfFileSystem, constants
from huggingface_hub.utils import close_session

from downcycle.recipes.dataset import source as parquet_source
from downcycle.recipes.dataset.make import Request, make_dataset

from hub_server import connected


def test_a_part_of_a_source_by_name(tmp_path, rows):
    store(tmp_path / "web", {"data/CC-MAIN-2024-10/a.parquet": rows[:50], "sample/10BT/b.parquet": rows[50:90], ".c/d.parquet": rows[:3]})
    for name, start in (("CC-MAIN-2024-10", 0), ("sample-10BT", 50)):
        found = parquet_source.find_parquet(str(tmp_path / "web"), name)
        assert len(found.files) == 1
        assert pq.read_table(Path(found.url) / found.files[0]).to_pylist()[0] == rows[start]
    assert parquet_source.find_parquet(str(tmp_path / "web"), None).files == ("data/CC-MAIN-2024-10/a.parquet", "sample/10BT/b.parquet")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub on loopback, for this process and its workers."""
    with connected(monkeypatch, tmp_path / "cache") as hub:
        for name, value in {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, value)
        yield hub
    HfFileSystem.clear_instance_cache()


def test_from_the_hub(tmp_path, source, hub):
    """The commit is pinned, files that are not needed are not fetched."""
    shutil.copytree(source, tmp_path / "web/data/CC-MAIN-2024-10")
    commit = hub.add("datasets/HuggingFaceFW/fineweb", tmp_path / "web")
    hub.fail("*/000_00000.parquet", times=3)
    hub.fail("*/000_00000.parquet", times=1, drop_after=1000)  # while a task reads it
    wanted = Request(20_000, name="CC-MAIN-2024-10", tokenizer="demo", held_out=0.02)
    make_dataset(tmp_path / "out", wanted, workers=1)
    assert "no public dataset at http://127.0.0.1" in refusal(tmp_path / "no", replace(wanted, src="no/where"))
    assert "has no revision v9" in refusal(tmp_path / "no", replace(wanted, src="HuggingFaceFW/fineweb@v9"))
    assert "holds no parquet files" in refusal(tmp_path / "no", replace(wanted, name="CC-MAIN-1999-01"))
    assert not hub.asked("*/002_00000.parquet")
    assert not any(fault.times for fault in hub.faults)
    assert read(tmp_path / "out") == expect(pq.read_table(source).to_pylist(), 20_000, 0.02)
    facts = DatasetCard.load(tmp_path / "out/README.md").data
    assert (facts.license, facts.source_datasets) == ("odc-by", ["HuggingFaceFW/fineweb"])
    assert json.loads((tmp_path / "out/downcycle-data.json").read_text())["revision"] == commit


def test_what_was_held_out_of_the_source_is_left_out(tmp_path, made):
    """A dataset made here is a source like another, but for its test files."""
    report = make_dataset(tmp_path / "out", Request(10_000, str(made), tokenizer="demo", held_out=0.02), workers=1)
    content = read(made)["train"]
    assert read(tmp_path / "out") == expect(content, 10_000, 0.02)
    assert report["files"] == ["data/train-00000-of-00001.parquet"]
    shutil.copytree(made / "data", tmp_path / "foreign/data")  # made elsewhere, for all that can be known
    assert len(parquet_source.find_parquet(str(tmp_path / "foreign"), None).files) == 2


def test_what_was_held_out_is_left_out_on_the_hub(tmp_path, made, hub):
    hub.add("datasets/me/web", made)
    make_dataset(tmp_path / "out", Request(10_000, "me/web", tokenizer="demo", held_out=0.02), workers=1)
    assert read(tmp_path / "out") == expect(read(made)["train"], 10_000, 0.02)
    assert not hub.asked("*test-00000-of-00001.parquet")
    shutil.copytree(made / "data", tmp_path / "foreign/data")
    hub.add("datasets/me/foreign", tmp_path / "foreign")
    assert len(parquet_source.find_parquet("me/foreign", None).files) == 2


TEXTS = {"string": pa.string(), "large": pa.large_string(), "views": pa.string_view(), "dictionary": pa.dictionary(pa.int32(), pa.string())}


@pytest.mark.parametrize("first", TEXTS)
def test_text_is_text_however_it_is_spelt(tmp_path, rows, first):
    """Files whose text columns have other types than those of the first file, and more columns, in another order."""
    spelt = {name: _spell(rows[20 * i : 20 * i + 20], type_) for i, (name, type_) in enumerate(TEXTS.items())}
    order = [first, *(name for name in TEXTS if name != first)]
    spelt[order[1]] = spelt[order[1]].select(sorted(COLUMNS)).append_column("more", pa.array([1] * 20))
    folder = store_tables(tmp_path / "source", {f"{i}.parquet": spelt[name] for i, name in enumerate(order)})
    content = [row for name in order for row in rows[20 * list(TEXTS).index(name) :][:20]]
    make_dataset(tmp_path / "out", Request(9000, str(folder), tokenizer="demo", language="en"), workers=2)
    made = read(tmp_path / "out")
    assert made == expect([row for row in content if row["language"] == "en"], 9000, 0.001)
    assert made["train"][-1]["id"] in [row["id"] for row in content[60:]]
    schema = pq.read_schema(tmp_path / "out/data/train-00000-of-00001.parquet")
    assert {schema.field(name).type for name in ("text", "id", "language", "url")} == {pa.string()}


def _spell(rows: list[dict], type_: "pa.DataType") -> "pa.Table":
    table = pa.Table.from_pylist(rows)
    return table.cast(pa.schema([(one.name, type_ if one.type == pa.string() else one.type) for one in table.schema]))


def test_columns_of_other_types_are_kept(tmp_path, rows):
    """Nested, timestamps in nanoseconds, decimals, bytes, and a field that no row may lack."""
    more = [
        {"tags": [i, None], "facts": {"a": f"{i}", "b": [i]}, "when": i * 1001, "price": Decimal(f"{i}.25"), "raw": bytes([i])}
        for i in range(30)
    ]
    types = {
        "tags": pa.list_(pa.int32()),
        "facts": pa.struct([("a", pa.large_string()), ("b", pa.list_(pa.int64()))]),
        "when": pa.timestamp("ns"),
        "price": pa.decimal128(12, 2),
        "raw": pa.binary(),
    }
    table = pa.Table.from_pylist(rows[:30])
    for name, type_ in types.items():
        table = table.append_column(pa.field(name, type_, nullable=name != "price"), pa.array([row[name] for row in more], type_))
    store_tables(tmp_path / "source", {"a.parquet": table})
    make_dataset(tmp_path / "out", Request(3000, str(tmp_path / "source"), tokenizer="demo", held_out=0), workers=1)
    made = pq.read_table(tmp_path / "out/data/train-00000-of-00001.parquet")
    assert len(made) > 5
    assert made.drop_columns(["n_tokens"]).to_pylist() == table.slice(0, len(made)).to_pylist()
    assert {name: made.schema.field(name).type for name in types} == types


def test_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the Hub cannot be asked" in refusal(tmp_path / "out", Request(5, tokenizer="demo"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "no connection to 127.0.0.1" in refusal(tmp_path / "out", Request(5, tokenizer="demo"))
    close_session()
