"""A source of 1,200 documents in three files, a request for a part of it, and the dataset made of them once."""

from pathlib import Path

import pytest

from downcycle.recipes.dataset import source as parquet_source
from downcycle.recipes.dataset.make import Request, make_dataset


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Many tasks out of little text."""
    monkeypatch.setattr(parquet_source, "PIECE_ROWS", 100)


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    from fineweb import documents

    return [row for seed in range(3) for row in documents(400, seed)]


@pytest.fixture(scope="session")
def source(tmp_path_factory, rows) -> Path:
    from fineweb import store

    folder = tmp_path_factory.mktemp("source")
    return store(folder, {f"{i:03}_00000.parquet": rows[400 * i : 400 * i + 400] for i in range(3)})


@pytest.fixture(scope="session")
def request_(source) -> Request:
    return Request(120_000, str(source), tokenizer="demo", held_out=0.02)


@pytest.fixture(scope="session")
def made(tmp_path_factory, request_) -> Path:
    """Made by one worker, with the real size of a task."""
    out = tmp_path_factory.mktemp("made") / "web"
    make_dataset(out, request_, workers=1)
    return out
