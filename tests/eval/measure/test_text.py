"""Documents come as they are, in order, from every kind of place; what is no text is refused in one line."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from downcycle import DowncycleError
from downcycle.eval.measure.text import BUILT_IN, read_documents

from hub_server import HubServer

TEXTS = ["One.\n", "Zwei, drei – ü", "  猫\n\n\ntwo blank lines", "four"]
ROWS = [{"text": text, "id": number} for number, text in enumerate(TEXTS)]


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_parquet(path: Path, rows, **options: object) -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def refusal(text: object, limit: int | None = None) -> str:
    with pytest.raises(DowncycleError) as refused:
        read_documents(str(text), limit)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_built_in():
    shipped = (Path(__file__).parents[3] / "recipes/demo/held_out.txt").read_text()
    found = read_documents()
    assert found.name == BUILT_IN
    assert "\n\n\n".join(found.texts) + "\n" == shipped
    assert read_documents(limit=3).texts == found.texts[:3]


def test_a_plain_file_is_one_document(tmp_path):
    for name, prefix in (("a.txt", b""), ("b.md", b""), ("c.TXT", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(prefix + "\n\n\n".join(TEXTS).encode())
        assert read_documents(str(tmp_path / name)).texts == ("\n\n\n".join(TEXTS),)


def test_json(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines([ROWS[0], {"text": None}, {"text": " \n"}]) + "\n" + lines(ROWS[1:]))
    (tmp_path / "lines.json").write_text(lines(ROWS))
    (tmp_path / "array.json").write_text("\n " + json.dumps(ROWS, indent=2))
    for name in ("a.jsonl", "lines.json", "array.json"):
        assert read_documents(str(tmp_path / name)).texts == tuple(TEXTS)
        assert read_documents(str(tmp_path / name), limit=2).texts == tuple(TEXTS[:2])


def test_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [ROWS[0], {"text": None, "id": 7}, *ROWS[1:]], row_group_size=2)
    assert read_documents(str(path)).texts == tuple(TEXTS)
    assert read_documents(str(path), limit=3).texts == tuple(TEXTS[:3])


def test_a_limit_leaves_the_rest_unread(tmp_path):
    """Broken text behind the limit does no harm."""
    (tmp_path / "a.jsonl").write_text(lines(ROWS[:2]) + "{broken")
    (tmp_path / "b.jsonl").write_bytes(b"\xff")
    assert read_documents(str(tmp_path), limit=2).texts == tuple(TEXTS[:2])
    assert refusal(tmp_path).startswith(f"{tmp_path}/a.jsonl, line 3: not valid JSON")


def test_folders(tmp_path):
    """Tables where there are any, so that their card is no document; else texts; hidden files never."""
    write_parquet(tmp_path / "tables/b.parquet", ROWS[2:])
    write_parquet(tmp_path / "tables/a/a.parquet", ROWS[:2])
    (tmp_path / "tables/README.md").write_text("A card.")
    (tmp_path / "tables/.hidden.parquet").write_text("no parquet")
    assert read_documents(str(tmp_path / "tables")).texts == tuple(TEXTS)
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / f"texts/{number}.{'md' if number % 2 else 'txt'}").write_text(text)
    assert read_documents(str(tmp_path / "texts")).texts == tuple(TEXTS)


def test_made_by_downcycle_data(tmp_path):
    """What was held out; where nothing was, all."""
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", ROWS[:3])
    (tmp_path / "downcycle-data.json").write_text("{}")
    assert read_documents(str(tmp_path)).texts == tuple(TEXTS[:3])
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", ROWS[3:])
    assert read_documents(str(tmp_path)).texts == tuple(TEXTS[3:])


def test_digest_follows_texts_and_their_order(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    (tmp_path / "same.json").write_text(json.dumps(ROWS))
    (tmp_path / "turned.jsonl").write_text(lines(ROWS[::-1]))
    (tmp_path / "joined.jsonl").write_text(lines([{"text": TEXTS[0] + TEXTS[1]}, *ROWS[2:]]))
    digests = {name: read_documents(str(tmp_path / name)).digest for name in ("a.jsonl", "same.json", "turned.jsonl", "joined.jsonl")}
    expected = sha256(b"".join(b"%d\n%s" % (len(text.encode()), text.encode()) for text in TEXTS)).hexdigest()
    assert digests["a.jsonl"] == digests["same.json"] == expected
    assert len(set(digests.values())) == 3


def test_refusals(tmp_path):
    files = {
        "empty.txt": (b"", "an empty text"),
        "blank.txt": (b" \n\n", "an empty text"),
        "empty.jsonl": (b"", "an empty text"),
        "zeros.txt": (b"ab\0c", "a binary file"),
        "latin.txt": (b"caf\xe9", r"no UTF-8 text \(byte 3 is not\)"),
        "latin.jsonl": (b'{"text": "caf\xe9"}', "no UTF-8 text"),
        "model.bin": (b"abc", "not a text that can be read"),
        "columns.jsonl": (b'{"content": "a", "id": 1}', "line 1: has no column text, only content, id; rename"),
        "array.json": (b'[{"text": 5}]', "row 0: its text is int, and must be a string"),
        "list.jsonl": (b"[1]", "line 1: has no column text"),
        "bad.json": (b"[{", "not valid JSON"),
        "half.jsonl": (b'{"text": "a\\ud83d"}', "half a surrogate pair"),
        "torn.parquet": (b"PAR1", "damaged or truncated"),
    }
    for name, (content, words) in files.items():
        if name.endswith(".parquet"):
            pytest.importorskip("pyarrow")
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DowncycleError, match=words) as refused:
            read_documents(str(tmp_path / name))
        assert str(refused.value).startswith(str(tmp_path / name))
        assert "\n" not in str(refused.value)
    assert "has no column text, only content" in refusal(write_parquet(tmp_path / "c.parquet", [{"content": "a"}]))
    assert "its text is int" in refusal(write_parquet(tmp_path / "d.parquet", [{"text": 3}]))
    (tmp_path / "folder").mkdir()
    assert "a folder without text" in refusal(tmp_path / "folder")
    assert "no such file or folder, and not a data set" in refusal(tmp_path / "missing.txt")
    assert refusal("").startswith("'': no such file")
    assert "limit 0: give a number from 1" in refusal(tmp_path / "a.txt", 0)


HUB_SCRIPT = """
import sys
from downcycle import DowncycleError
from downcycle.eval.measure.text import read_documents
for text in sys.argv[1:]:
    try:
        print(read_documents(text, 3).texts)
    except DowncycleError as error:
        print(error)
"""


def test_data_sets_of_the_hub(tmp_path):
    """The test split of a part of a data set; of another, what there is. In a process of its own, as `datasets` reads addresses once."""
    pytest.importorskip("datasets")
    repo = tmp_path / "repo"
    write_parquet(repo / "small-train-00000-of-00001.parquet", ROWS)
    write_parquet(repo / "small-test-00000-of-00001.parquet", ROWS[::-1])
    write_parquet(repo / "large-train-00000-of-00001.parquet", ROWS[1:])
    part = "- config_name: {0}\n  data_files:\n{1}"
    split = "  - split: {1}\n    path: {0}-{1}-*\n"
    parts = [("small", ("train", "test")), ("large", ("train",))]
    card = "".join(part.format(name, "".join(split.format(name, one) for one in splits)) for name, splits in parts)
    (repo / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    with HubServer() as hub:
        commit = hub.add("datasets/ann/words", repo)
        address = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        asked = ["ann/words:small", f"ann/words:large@{commit}", "ann/words", "no/such", "ann/words:huge"]
        command = [sys.executable, "-c", HUB_SCRIPT, *asked]
        run = subprocess.run(command, env=os.environ | address, capture_output=True, text=True)
    found = run.stdout.splitlines()
    assert len(found) == len(asked), run.stderr
    assert found[0] == repr(tuple(TEXTS[:0:-1]))
    assert found[1] == repr(tuple(TEXTS[1:]))
    for name, line in zip(asked[2:], found[2:], strict=True):
        assert line.startswith(f"{name}: no such file or folder, and as a data set of the Hub it cannot be read (")
    assert "small" in found[2]
