"""What `downcycle data` prints, how it is interrupted, and what it refuses."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("datatrove")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from downcycle.surgery.checkpoint import DEMO_FOLDER  # noqa: E402

PARAGRAPHS = [text for text in (DEMO_FOLDER.parent / "healing.txt").read_text().split("\n\n") if len(text) > 100]
FIXED = {
    "dump": "CC-MAIN-2024-10",
    "url": "https://a.example",
    "date": "2024-02-21T00:00:00Z",
    "file_path": "s3://a",
    "language_score": 0.9,
}


def write_source(folder: Path, documents: int) -> Path:
    """Write one parquet file in FineWeb's schema: each third document is French, two have no text."""
    chance = random.Random(1)
    rows = [
        {"text": chance.choice(PARAGRAPHS) + f" {i}", "id": str(i), "language": "fr" if i % 3 == 2 else "en", "token_count": 99, **FIXED}
        for i in range(documents)
    ]
    rows[1]["text"], rows[3]["text"] = " ", None
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=100)
    return folder


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_source(tmp_path / "source", 300)


def options(source, *more):
    return ("data", "--out", "d", "--src", source, "--tokenizer", DEMO_FOLDER, "--language", "en", "--workers", "1", *more)


def test_counts_on_stderr_and_the_folder_on_stdout(downcycle, source):
    code, out, err = downcycle(*options(source, "--tokens", "2k", "--held-out", "0.1"))
    assert (code, out) == (0, "d\n"), err
    report = json.loads(Path("d/downcycle-data.json").read_text())
    *told, full = err.splitlines()[:-3]
    assert told[0] == "reading: 0 documents; tokens 0/2,000"
    assert re.fullmatch(r"reading: [1-9]\d* documents; tokens 2,000/2,000", full)
    assert "2,000/2,000" not in "".join(told)
    lines = err.splitlines()[-3:]
    for line, split in zip(lines, ("train", "test"), strict=False):
        rows = pq.read_table(Path("d") / "data" / f"{split}-00000-of-00001.parquet", columns=["n_tokens"]).to_pylist()
        assert line.split() == [split, f"{sum(row['n_tokens'] for row in rows):,}", "tokens", f"{len(rows):,}", "documents"]
    assert lines[-1].startswith("left out: ")
    for count, reason in ((1, "malformed"), (1, "blank text"), (report["dropped"]["other_language"], "other language")):
        assert f"{count:,} {reason}" in lines[-1]
    assert report["dropped"]["other_language"] > 0


def test_json_is_the_report_and_nothing_else(downcycle, source):
    code, out, err = downcycle(*options(source, "--tokens", "2000", "--json"))
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(Path("d/downcycle-data.json").read_text())
    assert json.loads(out)["splits"]["train"]["tokens"] >= 2000


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--tokens", "many"), "--tokens many"),
        (("--tokens", "0"), "--tokens"),
        (("--tokens", "2k", "--held-out", "1.5"), "1.5"),
        (("--tokens", "2k", "--min-tokens", "9", "--max-tokens", "8"), "--max-tokens 8: leaves no document"),
        (("--tokens", "2k", "--min-language-score", "nan"), "--min-language-score nan: give a number from 0 to 1"),
        (("--tokens", "2k", "--workers", "0"), "0"),
        (("--tokens", "2k", "--executor", "cloud"), "cloud"),
        (("--tokens", "2k", "--src", "nowhere/at/all"), "nowhere/at/all"),
        (("--tokens", "2k", "--tokenizer", "./none"), "./none"),
    ],
)
def test_bad_options(refused, source, more, says):
    assert says in refused(*options(source, *more))


def test_not_enough_text_says_how_much_there_is(downcycle, source):
    code, out, err = downcycle(*options(source, "--tokens", "1M"))
    assert (code, out, Path("d").exists()) == (1, "", False)
    assert re.search(r"--tokens 1000000: there are \d+ training tokens in all \(rows dropped: 1 blank text, 1 malformed, 100 other", err)


def test_ctrl_c_says_where_the_work_stays_and_the_same_command_ends_it(downcycle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_source(tmp_path / "source", 40_000)
    command = [sys.executable, "-c", "from downcycle.cli import main; main()", *map(str, options(source, "--tokens", "2M"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None and not list(Path(".d.downcycle").rglob("counts/*.json")):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    staging = Path.cwd() / ".d.downcycle"
    told = f"downcycle: interrupted; what is done stays in {staging}, and the same command goes on from there"
    assert err.splitlines()[-1] == told
    assert staging.is_dir()
    assert not Path("d").exists()
    assert downcycle(*options(source, "--tokens", "2M")).code == 0
    assert not staging.exists()
    assert json.loads(Path("d/downcycle-data.json").read_text())["splits"]["train"]["tokens"] >= 2_000_000
