"""Samples are pieces of documents as training cuts them, the held-out ones of other documents, and the same for the same seed."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
from transformers import AutoTokenizer  # noqa: E402

from downcycle import DowncycleError, open_checkpoint  # noqa: E402
from downcycle.eval.measure import calibration  # noqa: E402
from downcycle.eval.measure.calibration import held_out_samples, make_calibration  # noqa: E402
from downcycle.eval.measure.text import read_documents, stream_documents  # noqa: E402
from downcycle.surgery.checkpoint import DEMO_FOLDER  # noqa: E402
from downcycle.surgery.importance.calibration import LENGTH, SAMPLES  # noqa: E402

from hub_server import HubServer  # noqa: E402

BOS, EOS = 4080, 4081
KINDS = ("bos", "both", "eos", "none")


def prose(number: int, words: int) -> str:
    """A document that is like no other."""
    return " ".join(f"Line {number}x{place} of the story goes on." for place in range(-(-words // 7)))


SHORT = [prose(number, 7 + number % 5 * 9) for number in range(60)]
LONG = [prose(number, 250 + 30 * number) for number in range(12)]


@pytest.fixture(scope="session")
def models(put_tokenizer, tmp_path_factory):
    """The built-in model with each kind of tokenizer, and that tokenizer."""
    demo, made = open_checkpoint("demo"), {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        put_tokenizer(folder, kind)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        (folder / "config.json").write_text((DEMO_FOLDER / "config.json").read_text())
        made[kind] = replace(demo, files=files), AutoTokenizer.from_pretrained(folder)
    return made


def save(path: Path, texts) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def tokens(tokenizer, text: str) -> list[int]:
    """The oracle: what training reads of a document, with the end of text that stands before it where there is no BOS."""
    ids = tokenizer(text)["input_ids"]
    ids = ids[:-1] if ids[-1] == EOS else ids
    return ids if ids[0] == BOS or tokenizer.eos_token is None else [EOS, *ids]


def cut(tokenizer, texts, length: int) -> dict[tuple[int, int], list[int]]:
    """The oracle: each piece of each document by document and place, cut as Axolotl cuts."""
    every = {}
    for document, text in enumerate(texts):
        ids = tokens(tokenizer, text)
        every |= {(document, start): ids[start : start + length] for start in range(0, len(ids), length)}
    return {where: piece for where, piece in every.items() if len(piece) > 1}


def places(samples, pieces) -> list[tuple[int, int]]:
    """Where each sample is from."""
    found = [[where for where, piece in pieces.items() if where[0] == one.document and piece == one.ids.tolist()] for one in samples]
    assert all(len(one) == 1 for one in found)
    return [one[0] for one in found]


def refusal(*arguments: object, **options: object) -> str:
    with pytest.raises(DowncycleError) as refused:
        make_calibration(*arguments, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [SHORT, LONG, [*LONG, *SHORT]], ids=["short", "long", "mixed"])
def test_samples_are_pieces_of_documents(models, tmp_path, kind, texts):
    model, tokenizer = models[kind]
    found = make_calibration(model, save(tmp_path / "a.jsonl", texts), samples=17, length=32)
    pieces = cut(tokenizer, texts, 32)
    where = places([*found.fit, *found.held_out], pieces)
    assert (len(found.fit), len(found.held_out), len(set(where))) == (17, 5, 22)
    for one in (*found.fit, *found.held_out):
        assert (one.ids.dtype, one.given, one.scored) == (np.int64, 1, len(one.ids) - 1)
        assert (one.ids[0] in (BOS, EOS)) == (pieces[one.document, 0] == one.ids.tolist() and kind != "none")
        assert EOS not in one.ids[1:] and BOS not in one.ids[1:]
    assert any(start == 0 for _, start in where)
    if texts is not SHORT:
        assert any(start > 0 for _, start in where)
        assert {len(one.ids) for one in (*found.fit, *found.held_out)} == {32}


@pytest.mark.parametrize("samples", [1, 5, 16, 40])
@pytest.mark.parametrize("texts", [SHORT, LONG], ids=["short", "long"])
def test_held_out_samples_are_of_other_documents(models, tmp_path, texts, samples):
    text = save(tmp_path / "a.jsonl", texts)
    for seed in range(8):
        found = make_calibration(models["bos"][0], text, samples=samples, length=24, seed=seed)
        apart, others = {one.document for one in found.held_out}, {one.document for one in found.fit}
        assert not apart & others
        assert len(found.fit) == samples
        assert len(found.held_out) == held_out_samples(samples) == max(4, -(-samples // 4))
        assert len(apart) >= (2 if texts is LONG else 4)


@pytest.mark.parametrize("samples", [4, 10])
def test_of_a_single_document_the_end_is_held_out(models, tmp_path, samples):
    (tmp_path / "a.txt").write_text(LONG[-1])
    pieces = cut(models["bos"][1], [LONG[-1]], 32)
    for seed in range(8):
        found = make_calibration(models["bos"][0], str(tmp_path / "a.txt"), samples=samples, length=32, seed=seed)
        assert max(places(found.fit, pieces)) < min(places(found.held_out, pieces))
        assert len(found.held_out) == max(4, -(-samples // 4))


def test_a_document_that_is_nearly_all_of_the_text(models, tmp_path):
    """What the others have is too little to hold out, and without it there is too little to fit on."""
    texts = ["Only a few words.", LONG[-1], "A few more of them."]
    pieces = cut(models["bos"][1], texts, 32)
    for seed in range(8):
        found = make_calibration(models["bos"][0], save(tmp_path / "a.jsonl", texts), samples=10, length=32, seed=seed)
        assert max(places(found.fit, pieces)) < min(places(found.held_out, pieces))


@pytest.mark.parametrize("kind", KINDS)
def test_long_documents_are_cut_without_gaps(models, tmp_path, kind):
    """With as many samples as there are pieces, all tokens of the document come back, in order."""
    model, tokenizer = models[kind]
    ids = tokens(tokenizer, LONG[0])
    length = next(length for length in range(30, 60) if len(ids) % length > length // 2)
    samples = next(samples for samples in range(1, 99) if samples + held_out_samples(samples) == -(-len(ids) // length))
    (tmp_path / "a.md").write_text(LONG[0])
    found = make_calibration(model, str(tmp_path / "a.md"), samples=samples, length=length)
    assert [len(one.ids) for one in (*found.fit, *found.held_out)] == [length] * (len(ids) // length) + [len(ids) % length]
    assert np.concatenate([one.ids for one in (*found.fit, *found.held_out)]).tolist() == ids


def test_full_pieces_first(models, tmp_path):
    """As many tokens as are asked for, where the text has them; else the longer ones of what there is."""
    model, tokenizer = models["bos"]
    text = save(tmp_path / "mixed.jsonl", [*SHORT, *LONG])
    for length in (16, 64, 128):
        found = make_calibration(model, text, samples=20, length=length)
        assert sum(len(one.ids) for one in found.fit) == 20 * length
    text, pieces = save(tmp_path / "short.jsonl", SHORT), cut(tokenizer, SHORT, 512)
    sizes = sorted(map(len, pieces.values()))
    assert sizes[0] < 16 < 64 < sizes[-1] < 128
    found = make_calibration(model, text, samples=20)
    assert min(len(one.ids) for one in found.fit) > max(16, sizes[0])
    assert len({one.document for one in found.fit}) == 20
    every = make_calibration(model, text, samples=48)
    assert len({one.document for one in (*every.fit, *every.held_out)}) == 60


def test_all_full_pieces_before_shorter_ones(models, tmp_path):
    text, full = save(tmp_path / "a.jsonl", [*SHORT, LONG[0]]), len(tokens(models["bos"][1], LONG[0])) // 128
    assert 3 < full < 24
    fits = [make_calibration(models["bos"][0], text, samples=24, length=128, seed=seed).fit for seed in range(8)]
    counts = Counter(sum(len(one.ids) == 128 for one in fit) for fit in fits)
    assert set(counts) <= {0, full} and counts[full] > 3, counts  # none, where that document is held out


def test_of_each_document_one_piece_before_a_second(models, tmp_path):
    found = make_calibration(models["bos"][0], save(tmp_path / "a.jsonl", LONG), samples=13, length=32)
    counts = Counter(one.document for one in found.fit)
    assert max(counts.values()) == -(-13 // len(counts))
    assert len(counts) == 12 - len({one.document for one in found.held_out}) >= 8
    assert max(Counter(one.document for one in found.held_out).values()) <= 2


def test_seeds(models, tmp_path):
    text = save(tmp_path / "a.jsonl", LONG)
    found = {seed: make_calibration(models["bos"][0], text, samples=12, length=32, seed=seed) for seed in (0, 1, -1, 2)}
    assert len({one.digest for one in found.values()}) == 4
    assert len({str(one.fit) for one in found.values()}) == len({str(one.held_out) for one in found.values()}) == 4
    for seed, first in found.items():
        again = make_calibration(models["bos"][0], text, samples=12, length=32, seed=seed)
        assert (again.digest, again.seed) == (first.digest, seed)
        for one, other in zip((*first.fit, *first.held_out), (*again.fit, *again.held_out), strict=True):
            assert (one.ids.tolist(), one.given, one.document) == (other.ids.tolist(), other.given, other.document)


SCRIPT = """
import sys
from downcycle import open_checkpoint
from downcycle.eval.measure.calibration import make_calibration
print(make_calibration(open_checkpoint("demo"), sys.argv[1], samples=12, length=32, seed=5).digest)
"""


def test_another_process_draws_the_same(models, tmp_path):
    text = save(tmp_path / "a.jsonl", LONG)
    here = make_calibration(open_checkpoint("demo"), text, samples=12, length=32, seed=5)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, text], env=os.environ | {"PYTHONHASHSEED": "77"}, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == here.digest


def test_digest(models, tmp_path):
    """It follows tokens, what is predicted, and the split; not where the text lies."""
    text, again = save(tmp_path / "a.jsonl", LONG), save(tmp_path / "b.jsonl", LONG)
    asked = {"samples": 12, "length": 32}
    found = make_calibration(models["bos"][0], text, **asked)
    elsewhere = make_calibration(models["bos"][0], again, **asked)
    assert (found.text, elsewhere.text) == (text, again)
    assert (found.digest, found.text_digest) == (elsewhere.digest, elsewhere.text_digest)
    assert found.text_digest == read_documents(text).digest
    others = [make_calibration(models[kind][0], text, **asked).digest for kind in ("eos", "none")]
    assert len({found.digest, *others}) == 3
    assert make_calibration(models["both"][0], text, **asked).digest == found.digest
    digest, first = calibration._digest, found.fit[0]
    assert digest(found.fit, found.held_out) == found.digest
    changed = [
        digest((replace(first, given=2), *found.fit[1:]), found.held_out),
        digest((replace(first, ids=first.ids + 1), *found.fit[1:]), found.held_out),
        digest(found.fit[:-1], (found.fit[-1], *found.held_out)),
        digest(found.held_out, found.fit),
    ]
    assert len({found.digest, *changed}) == 5


def test_the_rest_of_a_large_text_is_left_unread(models, tmp_path):
    """Behind what is needed: broken lines, and files that are no text."""
    save(tmp_path / "a.jsonl", LONG * 20)
    (tmp_path / "a.jsonl").open("a").write("{broken")
    (tmp_path / "b.jsonl").write_bytes(b"\xff")
    found = make_calibration(models["bos"][0], str(tmp_path), samples=12, length=32)
    assert len(found.fit) == 12
    assert "not valid JSON" in refusal(models["bos"][0], str(tmp_path), samples=2000, length=32)


def test_a_large_plain_file_is_read_from_its_start(models, tmp_path):
    """Of 1 GiB, nearly all of it a hole, as much as is needed; its last token there is whole."""
    with open(tmp_path / "a.txt", "wb") as file:
        file.write(b"\xef\xbb\xbf" + "Möre wörds föllöw, ".encode() * 5000)
        file.truncate(1 << 30)
    found = make_calibration(models["bos"][0], str(tmp_path / "a.txt"), samples=20, length=64)
    assert {len(one.ids) for one in (*found.fit, *found.held_out)} == {64}
    pieces = cut(models["bos"][1], ["Möre wörds föllöw, " * 4000], 64).values()
    assert all(one.ids.tolist() in pieces for one in (*found.fit, *found.held_out))
    assert "a binary file" in refusal(models["bos"][0], str(tmp_path / "a.txt"), samples=400, length=64)


def test_stream(tmp_path):
    """Documents one at a time, and of each no more than is asked for."""
    text = save(tmp_path / "a.jsonl", ["first", " ", "a second one"])
    with open(text, "a") as file:
        file.write("{broken")
    stream = stream_documents(text, most=8)
    assert (next(stream), next(stream)) == ("first", "a second")
    with pytest.raises(DowncycleError, match="line 4: not valid JSON"):
        next(stream)
    (tmp_path / "a.txt").write_text("猫🐈é" * 10)
    for most in range(1, 31):
        assert list(stream_documents(str(tmp_path / "a.txt"), most=most)) == [("猫🐈é" * 10)[:most]]


def test_long_documents_do_not_push_others_out(models, tmp_path):
    """Books: the samples are of at least sixteen, each read as far as the others, and none holds half a word of where that ended."""
    texts = [prose(number, 20_000) for number in range(20)]
    found = make_calibration(models["bos"][0], save(tmp_path / "a.jsonl", texts), samples=20, length=16)
    assert {one.document for one in (*found.fit, *found.held_out)} == set(range(16))
    places([*found.fit, *found.held_out], cut(models["bos"][1], [text[:4000] for text in texts], 16))


@pytest.mark.parametrize("single", [True, False])
def test_no_piece_ends_in_half_a_word(models, tmp_path, single):
    """Wherever the reading of a long document stops."""
    model, tokenizer = models["bos"]
    texts = [prose(number, 3000) for number in range(1 if single else 16)]
    save(tmp_path / "a.jsonl", texts)
    (tmp_path / "a.txt").write_text(texts[0])
    every = [tokens(tokenizer, text) for text in texts]
    for length in range(2, 12):
        name = str(tmp_path / ("a.txt" if single else "a.jsonl"))
        documents, passages = calibration._read(tokenizer, name, 4, length, lambda what, done, total: None)
        assert len(passages) == len(texts)
        for ids, passage in zip(every, passages, strict=True):
            assert passage.ids.tolist() == ids[: len(passage.ids)]
            assert len(ids) > len(passage.ids) > length and len(passage.ids) % length == 0


def test_reads_further_where_documents_give_less_than_expected(models, tmp_path):
    """A token alone is no piece where nothing stands before it."""
    texts = ["x"] * 5000 + LONG
    found = make_calibration(models["none"][0], save(tmp_path / "a.jsonl", texts), samples=2, length=16)
    assert {len(one.ids) for one in (*found.fit, *found.held_out)} == {16}
    assert min(one.document for one in (*found.fit, *found.held_out)) >= 5000


def test_defaults(models):
    """About 32k tokens of the text to heal on, which is none that models are evaluated on."""
    model, tokenizer = models["bos"]
    found = make_calibration(model, None)
    assert (found.samples, found.length, len(found.fit), len(found.held_out)) == (SAMPLES, LENGTH, 64, 16)
    assert sum(len(one.ids) for one in found.fit) == 32768
    shipped = (DEMO_FOLDER.parent / "healing.txt").read_text().split("\n\n\n")
    places(found.fit[:3], cut(tokenizer, shipped[: found.fit[2].document + 1], LENGTH))
    assert not set(stream_documents(training=True)) & set(read_documents().texts)


def test_length_follows_positions(models, tmp_path):
    model, text = models["bos"][0], save(tmp_path / "a.jsonl", LONG)
    small = replace(model, config={**model.config, "max_position_embeddings": 48})
    found = make_calibration(small, text, samples=4)
    assert (found.length, {len(one.ids) for one in found.fit}) == (48, {48})
    assert make_calibration(small, text, samples=4, length=48).digest == found.digest
    assert refusal(small, text, samples=4, length=49) == "length 49: demo has 48 positions; give at most that many tokens"
    wrapped = replace(model, config={"model_type": "gemma3", "text_config": {"max_position_embeddings": 24, "vocab_size": 4096}})
    assert make_calibration(wrapped, text, samples=4).length == 24


def test_progress(models, tmp_path):
    said = []
    make_calibration(models["bos"][0], save(tmp_path / "a.jsonl", SHORT), samples=4, progress=lambda *given: said.append(given))
    assert said[0] == ("reading the text", 1, 0)
    assert said[-1] == ("tokenizing the text", 60, 60)
    assert all(before[1] < after[1] for before, after in pairwise(said) if before[0] == after[0])


def test_what_was_held_out_of_training_data_is_left_alone(models, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "downcycle-data.json").write_text("{}")
    for name, texts in (("test-00000-of-00001", SHORT), ("train-00000-of-00001", LONG)):
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{name}.parquet")
    found = make_calibration(models["bos"][0], str(tmp_path), samples=8, length=32)
    assert found.text_digest == read_documents(save(tmp_path.parent / "long.jsonl", LONG)).digest
    places([*found.fit, *found.held_out], cut(models["bos"][1], LONG, 32))
    (tmp_path / "train-00000-of-00001.parquet").unlink()
    assert list(stream_documents(str(tmp_path), training=True)) == SHORT


HUB_SCRIPT = """
import sys
from downcycle import open_checkpoint
from downcycle.eval.measure.calibration import make_calibration
for text in sys.argv[1:]:
    found = make_calibration(open_checkpoint("demo"), text, samples=12, length=32)
    print(found.text, found.text_digest, max(one.document for one in (*found.fit, *found.held_out)))
"""


def test_a_data_set_of_the_hub_is_streamed_no_further_than_needed(tmp_path):
    """The train split, of which the second file is never asked for. In a process of its own, as `datasets` reads addresses once."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    (repo := tmp_path / "repo").mkdir()
    for name, texts in (("train-00000-of-00002", LONG * 20), ("train-00001-of-00002", LONG), ("test-00000-of-00001", SHORT)):
        pq.write_table(pa.table({"text": texts}), repo / f"{name}.parquet")
    with HubServer() as hub:
        hub.add("datasets/ann/words", repo)
        address = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        run = subprocess.run([sys.executable, "-c", HUB_SCRIPT, "ann/words"], env=os.environ | address, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert hub.asked("*train-00000*") and not hub.asked("*train-00001*") and not hub.asked("*test-00000*")
    name, digest, last = run.stdout.split()
    read = int(last) + 1
    assert name == "ann/words"
    first = [read_documents(save(tmp_path / "a.jsonl", (LONG * 20)[:count])).digest for count in range(read, 61)]
    assert digest in first


# What is refused.


@pytest.mark.parametrize(("samples", "length"), [(64, 512), (10, 256), (3, 400)])
def test_too_short(models, tmp_path, samples, length):
    """What the text has is counted, and what is advised works."""
    model, tokenizer = models["bos"]
    texts = LONG[:4]
    text, pieces = save(tmp_path / "a.jsonl", texts), cut(tokenizer, texts, length)
    if len(pieces) >= samples + held_out_samples(samples):
        texts = LONG[:1]
        text, pieces = save(tmp_path / "a.jsonl", texts), cut(tokenizer, texts, length)
    size, count = sum(len(tokens(tokenizer, one)) for one in texts), len(pieces)
    said = refusal(model, text, samples=samples, length=length)
    documents = "1 document" if len(texts) == 1 else f"{len(texts)} documents"
    assert said.startswith(
        f"{text}: too short: {size} tokens in {documents} give {count} pieces of at most {length} tokens, and "
        f"{samples} + {held_out_samples(samples)} held-out ones are needed; give a longer text, or "
    )
    fewer, shorter = re.search(r"or --samples (\d+)", said), re.search(r"or --length (\d+)", said)
    assert fewer or count < 5
    if fewer:
        assert len(make_calibration(model, text, samples=int(fewer[1]), length=length).fit) == int(fewer[1]) < samples
        refusal(model, text, samples=int(fewer[1]) + 1, length=length)
    assert len(make_calibration(model, text, samples=samples, length=int(shorter[1])).fit) == samples
    refusal(model, text, samples=samples, length=2 * int(shorter[1]))


def test_far_too_short(models, tmp_path):
    (tmp_path / "a.txt").write_text("Hello")
    said = refusal(models["bos"][0], str(tmp_path / "a.txt"), samples=1)
    assert said.endswith("in 1 document give 1 piece of at most 512 tokens, and 1 + 4 held-out ones are needed; give a longer text")


def test_numbers(models):
    assert refusal(models["bos"][0], None, samples=0) == "--samples 0: give a number from 1"
    assert refusal(models["bos"][0], None, length=1).startswith("--length 1: give a number from 2")
    assert refusal(models["bos"][0], None, length=-5).startswith("--length -5: give a number from 2")


def test_files_that_are_no_text(models, tmp_path):
    binary = b"\x7fELF\2\1\1" + bytes(range(256)) * 40
    files = {
        **dict.fromkeys(("a.txt", "a.md", "a.jsonl", "a.json"), (binary, r"no UTF-8 text \(byte \d+ is not\): binary, or in another")),
        **dict.fromkeys(("zeros.txt", "zeros.jsonl", "zeros.json"), (bytes(5000), "a binary file")),
        **dict.fromkeys(("calibration", "a.bin"), (binary, "not a text that can be read; give a .parquet, .jsonl, ")),
        **dict.fromkeys(("empty.txt", "empty.jsonl"), (b"", "an empty text")),
        "empty.json": (b"[]", "an empty text"),
        "a.parquet": (binary, "damaged or truncated, or no parquet file"),
        "missing.txt": (None, "no such file or folder"),
    }
    for name, (content, words) in files.items():
        if name.endswith(".parquet"):
            pytest.importorskip("pyarrow")
        if content is not None:
            (tmp_path / name).write_bytes(content)
        said = refusal(models["bos"][0], str(tmp_path / name))
        assert said.startswith(str(tmp_path / name)) and re.search(words, said), said


def test_tokenizers_that_will_not_do(models, tmp_path):
    model = models["bos"][0]
    text = save(tmp_path / "a.jsonl", LONG)
    assert refusal(replace(model, files={}), text).startswith("demo: its tokenizer: holds no tokenizer (tokenizer.json, ")
    small = replace(model, config={**model.config, "vocab_size": 4080})
    assert refusal(small, text, samples=4, length=32) == (
        "demo: its tokenizer gives token 4080 ('<|begin_of_text|>'), and the model has embeddings for 0-4079; "
        "put the tokenizer that it was trained with into its folder"
    )
    assert make_calibration(replace(small, config={**model.config, "vocab_size": 4081}), text, samples=4, length=32).samples == 4
