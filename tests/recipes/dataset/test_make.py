"""A dataset holds exactly the documents that its law says, counted as Axolotl trains on them."""

import json
from types import SimpleNamespace

import pytest
from fineweb import DEMO, FILES, data_bytes, expect, pa, paths, read, store, store_tables
from huggingface_hub import DatasetCard

from downcycle.recipes.dataset.make import Request, make_dataset


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


def test_rows_without_a_value_are_not_taken(tmp_path, rows):
    """A null in a column that is filtered by, one column at a time."""
    content = [dict(row, language="en", language_score=0.9, token_count=300) for row in rows[:40]]
    lacking = {3: "language", 8: "language", 12: "language_score", 20: "token_count", 21: "token_count", 24: "token_count"}
    for number, column in lacking.items():
        content[number][column] = None
    folder = store(tmp_path / "source", {"a.parquet": content})
    wanted = Request(3000, str(folder), None, "demo", "en", 0.5, 100, 700)
    report = make_dataset(tmp_path / "out", wanted, workers=1)
    assert read(tmp_path / "out") == expect([row for number, row in enumerate(content) if number not in lacking], 3000, 0.001)
    made_of = next(number for number, row in enumerate(content) if row["id"] == read(tmp_path / "out")["train"][-1]["id"])
    assert made_of > max(lacking)
    assert report["dropped"] == {"low_language_score": 1, "no_token_count": 3, "other_language": 2}
    for bound in ({"min_tokens": 100}, {"max_tokens": 700}):
        report = make_dataset(tmp_path / "out", Request(3000, str(folder), tokenizer="demo", **bound), workers=1, overwrite=True)
        assert report["dropped"] == {"no_token_count": 3}


def test_malformed_rows_are_dropped_and_counted(tmp_path, rows):
    bad = [rows[0] | {"text": None}, rows[1] | {"id": None}, rows[2] | {"text": " \n\t"}, rows[3] | {"text": ""}]
    table, one = pa.Table.from_pylist([*bad, *rows[10:40]]), pa.Table.from_pylist([rows[4]])
    no_utf8 = pa.array([b"\xff\xfe not UTF-8"]).view(pa.string())
    raw = [one.set_column(one.schema.get_field_index(column), column, no_utf8) for column in ("text", "url")]
    whole = pa.concat_tables([table, *raw, pa.Table.from_pylist(rows[40:60])])
    store_tables(tmp_path / "source", {"a.parquet": whole}, rows=1000)
    report = make_dataset(tmp_path / "out", Request(6000, str(tmp_path / "source"), tokenizer="demo"), workers=1)
    assert read(tmp_path / "out") == expect(rows[10:60], 6000, 0.001)
    assert report["dropped"] == {"malformed": 4, "blank_text": 2}


def test_columns_of_any_name_are_kept(tmp_path, rows):
    """`rank`, `metadata` and `media` mean something to datatrove; old counts and hashes are made anew."""
    content = [row | {"rank": 7, "metadata": "m", "media": "x"} for row in rows[:30]]
    store(tmp_path / "source", {"a.parquet": [row | {"n_tokens": -1, "__text_hash": "x"} for row in content]})
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
