"""Rounds do the tasks that are needed; shards bear the names of the Hub."""

from fineweb import pa, pq

from downcycle.recipes.dataset import rounds, work


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
