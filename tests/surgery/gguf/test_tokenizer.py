"""Tokens of real llama.cpp against the tokenizers library's, for each way of splitting text that has a name; and what has none."""

import json
import shutil
import struct
from pathlib import Path

import pytest

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
tokenizers = pytest.importorskip("tokenizers")

from downcycle.surgery.checkpoint import open_checkpoint  # noqa: E402
from downcycle.surgery.errors import DowncycleError  # noqa: E402
from downcycle.surgery.gguf.export import write_gguf  # noqa: E402
from downcycle.surgery.gguf.pre_tokenizers import DIGITS, GPT2, NAMES  # noqa: E402
from downcycle.surgery.gguf.tokenizer import tokenizer_fields  # noqa: E402

import llama_cpp  # noqa: E402

DEMO = Path(__file__).parents[3] / "recipes" / "demo"
SPACE = "\u2581"
TEXTS = [
    "Hello world, it's 12345 o'clock!\n\n  déjà vu",
    "I'LL We'Ve   they'd\tfoo_bar(x) == 3.14159; // comment\r\n\r\nnext",
    "日本語のテキスト 12,345.67 ½ Ⅷ ٣٤٥",
    "HTMLParser camelCase XMLHttpRequest iPhone A1B2C3",
    "   leading and trailing   ",
    "\n\n\n\t\t x",
    "emoji 👩‍👩‍👧‍👦 🎉!!",
    "a\u00a0b\u3000c\u2003d don't DON'T l'été cafe\u0301",
    "path/to//file\\n <|eot_id|> <|begin_of_text|>hi (([[{{...!!!???---",
    "1 22 333 4444 55555 666666",
    "Ελληνικά Русский العربية हिन्दी ไทย 한국어",
    " ",
    "",
    "foo  \n  bar\n\n \n baz",
]


@pytest.fixture
def demo(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DEMO / "model", folder)
    return folder


def change(folder, file="tokenizer.json", **fields):
    value = json.loads((folder / file).read_text()) | fields
    (folder / file).write_text(json.dumps(value))
    return value


def splitting(steps):
    parts = [
        {"type": "Digits", "individual_digits": True}
        if step == DIGITS
        else {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
        for step in steps
        if step != GPT2
    ]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": GPT2 in steps}
    return {"type": "Sequence", "pretokenizers": [*parts, last]}


def compare(folder, texts=TEXTS):
    write_gguf(open_checkpoint(folder), folder / "model.gguf", "f16")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert llama_cpp.run(folder / "model.gguf", texts=texts)["tokens"] == [tokenizer.encode(text).ids for text in texts]


@pytest.mark.parametrize("key", NAMES, ids=NAMES.values())
def test_llama_cpp_splits_as_the_tokenizer_does(key, demo):
    steps, ignore_merges = key
    model = json.loads((demo / "tokenizer.json").read_text())["model"]
    change(demo, pre_tokenizer=splitting(steps), model={**model, "ignore_merges": ignore_merges})
    compare(demo)


@pytest.mark.parametrize("key", NAMES, ids=NAMES.values())
def test_the_names_differ_in_what_they_split(key, demo):
    """That the texts tell one splitting from another, or the test above would prove nothing."""
    found = {}
    for (steps, _), name in NAMES.items():
        change(demo, pre_tokenizer=splitting(steps))
        pieces = tokenizers.Tokenizer.from_file(str(demo / "tokenizer.json")).pre_tokenizer
        found[name] = [[piece for piece, _ in pieces.pre_tokenize_str(text)] for text in TEXTS]
    same = {"llama-bpe", "dbrx"}
    assert all(found[name] != found[other] for name in found for other in found if name != other and {name, other} != same)


# Vocabularies that fall back to bytes: as transformers makes tokenizer.json of SentencePiece's files.


@pytest.fixture(scope="module")
def pieces():
    """Tokens in their order and the pieces among them that are joined, the first joined first."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=900, show_progress=False)
    trained.train_from_iterator((DEMO / "held_out.txt").read_text()[:60000].splitlines(), trainer)
    model = json.loads(trained.to_str())["model"]
    joined = list(dict.fromkeys(left + right for left, right in model["merges"]))
    single = sorted({token for token in model["vocab"] if len(token) == 1} | {SPACE})
    return ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *joined, *single], joined


def with_pieces(folder, pieces, normalizer, pre_tokenizer):
    tokens, joined = pieces
    vocab = {token: place for place, token in enumerate(tokens)}
    pairs = [[word[:cut], word[cut:]] for word in joined for cut in range(1, len(word)) if {word[:cut], word[cut:]} <= vocab.keys()]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": place, "content": token, **flags, "special": True} for place, token in enumerate(tokens[:3])]
    added.append({"id": len(tokens), "content": "<tool>", **flags, "special": False})
    template = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    change(
        folder,
        added_tokens=added,
        normalizer=normalizer,
        pre_tokenizer=pre_tokenizer,
        post_processor={"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": special},
        decoder=None,
        model={"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab, "merges": pairs},
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}))


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
LLAMA2 = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, REPLACE]}
GEMMA = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
METASPACE = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "texts"),
    [
        (LLAMA2, None, [*TEXTS, "<tool>abc <tool> d"]),
        (REPLACE, GEMMA, [*TEXTS, "<tool>abc <tool> d"]),
        (None, {**METASPACE, "prepend_scheme": "never"}, TEXTS),
        (None, METASPACE, [text for text in TEXTS if not text.startswith(" ")]),
    ],
)
def test_pieces_are_joined_as_the_tokenizer_joins_them(normalizer, pre_tokenizer, texts, pieces, demo):
    with_pieces(demo, pieces, normalizer, pre_tokenizer)
    compare(demo, texts)
    _, notes = tokenizer_fields(open_checkpoint(demo), 4096)
    assert [note[:29] for note in notes] == (["llama.cpp puts a space before"] if pre_tokenizer == METASPACE else [])


def message(number, value):
    """Spell a field of a protocol buffer."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    size = len(value)
    return bytes([number << 3 | 2, *([size] if size < 128 else [size & 127 | 128, size >> 7])]) + value


def spelled(pieces, kind=2, prefix=1):
    tokens, joined = pieces
    types = {"<unk>": 2, "<s>": 3, "</s>": 3}
    data = b""
    for token in tokens:
        score = -float(joined.index(token)) if token in joined else 0.0 if token in types else -9999.0
        data += message(
            1, message(1, token.encode()) + message(2, score) + message(3, types.get(token, 6 if token.startswith("<0x") else 1))
        )
    return data + message(2, message(3, kind)) + message(3, message(3, prefix))


def test_sentencepieces_own_file_is_read(pieces, demo):
    with_pieces(demo, pieces, LLAMA2, None)
    expected, _ = tokenizer_fields(open_checkpoint(demo), 4096)
    (demo / "tokenizer.model").write_bytes(spelled(pieces))
    found, _ = tokenizer_fields(open_checkpoint(demo), 4096)
    ranked = [place for place, score in enumerate(expected["ggml.scores"]) if score > -1e6]
    assert [found["ggml.scores"][place] for place in ranked] == [-float(pieces[1].index(found["ggml.tokens"][place])) for place in ranked]
    assert {key: value for key, value in found.items() if key != "ggml.scores"} == {
        key: value for key, value in expected.items() if key != "ggml.scores"
    }
    compare(demo)


@pytest.mark.parametrize("data", [b"", b"\x0a", b"{}", bytes(range(200)), b"\x0a\xff\xff\xff\xff\x0f"])
def test_a_damaged_file_of_pieces_is_refused(data, pieces, demo):
    with_pieces(demo, pieces, LLAMA2, None)
    (demo / "tokenizer.model").write_bytes(data)
    with pytest.raises(DowncycleError, match="tokenizer.model"):
        tokenizer_fields(open_checkpoint(demo), 4096)


def test_pieces_of_another_algorithm_are_refused(pieces, demo):
    with_pieces(demo, pieces, LLAMA2, None)
    (demo / "tokenizer.model").write_bytes(spelled(pieces, kind=1))
    with pytest.raises(DowncycleError, match="no BPE"):
        tokenizer_fields(open_checkpoint(demo), 4096)


def test_pairs_that_no_scores_can_say_are_refused(pieces, demo):
    with_pieces(demo, pieces, LLAMA2, None)
    model = json.loads((demo / "tokenizer.json").read_text())["model"]
    word = next(word for word in pieces[1] if sum(left + right == word for left, right in model["merges"]) > 1)
    several = [pair for pair in model["merges"] if "".join(pair) == word]
    apart = [pair for pair in model["merges"] if pair != several[-1]] + [several[-1]]
    missing = [pair for pair in model["merges"] if pair != several[-1]]
    for merges, says in ((apart, "at two places"), (missing, "never joins")):
        change(demo, model={**model, "merges": merges})
        with pytest.raises(DowncycleError, match=says):
            tokenizer_fields(open_checkpoint(demo), 4096)


# What is in the file beside the tokens.


def test_tokens_types_and_special_tokens(demo):
    fields, notes = tokenizer_fields(open_checkpoint(demo), 4100)
    stored = json.loads((demo / "tokenizer.json").read_text())
    assert notes == ()
    assert all(fields["ggml.tokens"][place] == token for token, place in stored["model"]["vocab"].items())
    assert [fields["ggml.tokens"][token["id"]] for token in stored["added_tokens"]] == [
        token["content"] for token in stored["added_tokens"]
    ]
    assert fields["ggml.token_type"] == [1] * 4080 + [3] * 16 + [5] * 4
    assert fields["ggml.tokens"][4096:] == ["[PAD4096]", "[PAD4097]", "[PAD4098]", "[PAD4099]"]
    assert (fields["ggml.bos_token_id"], fields["ggml.eos_token_id"]) == (4080, 4081)
    assert (fields["ggml.add_bos_token"], fields["ggml.add_eos_token"]) == (True, False)
    assert fields["chat_template"] == (demo / "chat_template.jinja").read_text()
    assert fields["ggml.merges"] == [" ".join(pair) for pair in stored["model"]["merges"]]


def test_named_templates_and_settings(demo):
    (demo / "chat_template.jinja").unlink()
    templates = [{"name": "default", "template": "a"}, {"name": "tools", "template": "b"}]
    change(demo, "tokenizer_config.json", chat_template=templates, add_bos_token=False, add_eos_token=True, pad_token="<|eot_id|>")
    fields, _ = tokenizer_fields(open_checkpoint(demo), 4096)
    assert (fields["chat_template"], fields["chat_template.tools"], fields["chat_templates"]) == ("a", "b", ["tools"])
    assert (fields["ggml.add_bos_token"], fields["ggml.add_eos_token"], fields["ggml.padding_token_id"]) == (False, True, 4089)


def test_templates_in_files_of_their_own_are_those_of_transformers(demo):
    transformers = pytest.importorskip("transformers")
    (demo / "additional_chat_templates").mkdir()
    (demo / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS")
    (demo / "additional_chat_templates" / "rag-2.jinja").write_text("RAG é")
    change(demo, "tokenizer_config.json", chat_template="passed over")
    known = transformers.AutoTokenizer.from_pretrained(demo).chat_template
    fields, _ = tokenizer_fields(open_checkpoint(demo), 4096)
    found = {key: value for key, value in fields.items() if key.startswith("chat_template.")}
    assert found == {"chat_template.tool_use": known.pop("tool_use"), "chat_template.rag_2": known.pop("rag-2")}
    assert known == {"default": fields["chat_template"]}
    assert sorted(fields["chat_templates"]) == ["rag_2", "tool_use"]


def test_a_file_holds_named_templates_as_the_packages_writer_spells_them(demo, tmp_path):
    (demo / "additional_chat_templates").mkdir()
    (demo / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS")
    write_gguf(open_checkpoint(demo), tmp_path / "model.gguf", "f16")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    default = (demo / "chat_template.jinja").read_text()
    writer.add_chat_template([{"name": "default", "template": default}, {"name": "tool_use", "template": "TOOLS"}])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found, other = (
        {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / name).fields.items() if "chat_template" in name}
        for name in ("model.gguf", "other.gguf")
    )
    assert found == other
    assert len(found) == 3


def test_a_template_that_is_no_text_and_a_vocabulary_of_another_make_are_refused(demo, tmp_path):
    (demo / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(DowncycleError, match="chat_template.jinja: no text in UTF-8"):
        tokenizer_fields(open_checkpoint(demo), 4096)
    change(demo, model={"type": "BPE", "merges": []})
    with pytest.raises(DowncycleError, match="tokenizer.json: lacks, or has an unusable, part .KeyError: 'vocab'"):
        write_gguf(open_checkpoint(demo), tmp_path / "model.gguf", "f16")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits text"),
        ({"pre_tokenizer": None}, "splits text"),
        ({"pre_tokenizer": splitting([r"\w+|\s+"])}, "splits text"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}}, "splits text"),
        ({"normalizer": {"type": "Lowercase"}}, "changes text"),
        ({"model": {"type": "Unigram", "vocab": []}}, "of the kind Unigram"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "of the kind WordPiece"),
    ],
)
def test_what_llama_cpp_is_not_known_to_do_is_refused(fields, says, demo):
    change(demo, **fields)
    with pytest.raises(DowncycleError, match=says):
        tokenizer_fields(open_checkpoint(demo), 4096)


def test_too_few_rows_a_missing_and_a_broken_tokenizer_are_refused(demo):
    with pytest.raises(DowncycleError, match="has the token 4095, and the embeddings have 4000 rows"):
        tokenizer_fields(open_checkpoint(demo), 4000)
    (demo / "tokenizer.json").write_text("{")
    with pytest.raises(DowncycleError, match="not valid JSON"):
        tokenizer_fields(open_checkpoint(demo), 4096)
    (demo / "tokenizer.json").unlink()
    with pytest.raises(DowncycleError, match="not there"):
        tokenizer_fields(open_checkpoint(demo), 4096)
