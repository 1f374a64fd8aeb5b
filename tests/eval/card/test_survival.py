"""A second run renews what is generated, keeps every word of a person's, and writes whole or not at all."""

import json
import os
import re
import shutil

import pytest

from downcycle import DowncycleError
from downcycle.eval.card import card as card_module
from downcycle.eval.card.card import write_card
from downcycle.eval.card.marks import Record, is_marked, put_record, splice, take_record, wrap
from downcycle.eval.card.parents import bibtex

ORDER = ["a", "b", "c", "d"]


def section_in(text, name):
    """What stands between the marks of a section."""
    found = re.search(rf"<!-- downcycle:{name} [0-9a-f]{{16}} -->\n(.*?)\n?<!-- /downcycle:{name} -->", text, re.S)
    return found[1] if found else ""


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than all else, and are no words."""
    monkeypatch.setattr(card_module, "draw_pictures", lambda facts, folder: [])


@pytest.fixture
def written(healed, home):
    """A healed model's card, written once; its training is renamed afterwards, so that a second run knows other things."""
    write_card(healed)
    return healed / "README.md"


def renew(path, home):
    """Let the training's log go on, and write the card again."""
    log = home / "training" / "checkpoint-40" / "trainer_state.json"
    state = json.loads(log.read_text())
    state["log_history"].append({"step": 50, "epoch": 2.5, "eval_loss": 2.4001})
    log.write_text(json.dumps(state))
    return write_card(path.parent)


def edit(path, old, new):
    text = path.read_bytes().decode()
    assert text.count(old) >= 1
    path.write_bytes(text.replace(old, new, 1).encode())


def test_what_is_generated_is_renewed_and_nothing_else_is_touched(written, home):
    before = written.read_text()
    result = renew(written, home)
    after = written.read_text()
    assert result.kept_by_hand == []
    assert "2.4001" in section_in(after, "training") and "to 2.4001" in section_in(after, "summary")
    for name in ("making", "use", "recipe", "versions", "licence", "citation"):
        assert section_in(after, name) == section_in(before, name) != ""


@pytest.mark.parametrize("place", ["<!-- downcycle:summary", "<!-- downcycle:training", "<!-- downcycle:citation", "<!-- downcycle-record"])
def test_a_section_of_a_persons_stays_where_it_is(written, home, place):
    mine = "## Intended use\n\nFor *tests* only: `a|b` <b>&amp;</b> — naïve café\n\n"
    edit(written, place, mine + place)
    renew(written, home)
    after = written.read_text()
    assert after.count(mine) == 1 and "2.4001" in after
    assert after[after.index(mine) + len(mine) :].lstrip("\n").startswith(place)
    renew(written, home)
    assert written.read_text().count(mine) == 1


def test_words_before_the_first_and_behind_the_last_section_stay(written, home):
    edit(written, "<!-- downcycle:summary", "Read this first.\n\n<!-- downcycle:summary")
    written.write_text(written.read_text() + "\nAnd this last.\n")
    renew(written, home)
    body = written.read_text().partition("\n---\n")[2]
    assert body.lstrip().startswith("Read this first.") and "And this last." in body and "2.4001" in body


@pytest.mark.parametrize("name", ["summary", "training", "licence"])
def test_a_generated_section_that_was_changed_by_hand_is_kept_and_told(written, home, name):
    text = section_in(written.read_text(), name)
    edit(written, text, text + "\n\nMy own remark.")
    result = renew(written, home)
    assert result.kept_by_hand == [name]
    assert section_in(written.read_text(), name) == text + "\n\nMy own remark."
    other = "summary" if name == "training" else "training"
    assert "2.4001" in section_in(written.read_text(), other)
    assert renew(written, home).kept_by_hand == [name]  # and it stays so


def test_a_generated_section_that_was_taken_out_stays_out(written, home):
    text = written.read_text()
    found = re.search(r"<!-- downcycle:citation .*?<!-- /downcycle:citation -->\n\n", text, re.S)
    written.write_text(text.replace(found[0], ""))
    for _ in range(2):
        result = renew(written, home)
        assert (result.kept_by_hand, result.deleted_by_hand) == ([], ["citation"])
        assert result.remarks()[0] == "left out, as it was deleted by hand: citation"
        assert "## Citation" not in written.read_text() and "2.4001" in written.read_text()


@pytest.mark.parametrize("name", ["summary", "training", "citation"])  # the first, one between, and the last of the record
def test_a_section_is_written_anew_as_the_remarks_say(written, home, name):
    remark = "to have a section written anew, delete from README.md all of it, its marks, and its name in `<!-- downcycle-record`"
    text = section_in(written.read_text(), name)
    edit(written, text, text + "\n\nMy own remark.")
    assert renew(written, home).remarks()[:2] == [f"kept as it was written by hand: {name}", remark]
    found = re.search(rf"<!-- downcycle:{name} .*?<!-- /downcycle:{name} -->\n\n", written.read_text(), re.S)[0]
    edit(written, found, "")
    assert renew(written, home).remarks()[:2] == [f"left out, as it was deleted by hand: {name}", remark]
    edit(written, f'"{name}"', "")
    result = renew(written, home)
    assert result.kept_by_hand == result.deleted_by_hand == [] and remark not in result.remarks()
    after = written.read_text()
    assert section_in(after, name).startswith(text.partition("\n")[0]) and "My own remark." not in after
    assert after.count("<!-- downcycle-record") == 1


def test_a_card_that_lost_its_marks_is_a_persons_and_is_not_written_twice(written, home):
    everything = ["summary", "making", "use", "training", "recipe", "versions", "limitations", "licence", "citation"]
    bare = re.sub(r"<!-- /?downcycle.*? -->\n?", "", written.read_text())
    written.write_text(bare)
    for _ in range(2):
        result = renew(written, home)
        assert result.kept_by_hand == everything and result.deleted_by_hand == []
        assert written.read_text().partition("<!-- downcycle-record")[0].rstrip() == bare.rstrip()
    citation = "## Citation\n" + bare.partition("## Citation\n")[2]
    edit(written, citation.rstrip(), "")
    assert renew(written, home).kept_by_hand == everything[:-1]
    assert section_in(written.read_text(), "citation") == citation.rstrip()


def test_a_section_that_lost_its_marks_alone_is_kept_and_not_told_as_deleted(written, home):
    written.write_text(re.sub(r"<!-- /?downcycle:licence.*? -->\n", "", written.read_text()))
    result = renew(written, home)
    assert (result.kept_by_hand, result.deleted_by_hand) == (["licence"], [])
    assert written.read_text().count("## Licence\n") == 1


def test_a_heading_in_a_block_of_code_is_no_heading(child):
    mine = "```bash\n# child\n## Licence\n```\n\n~~~~\n~~~\n## How it was made\n~~~~\n\n## Citation  \n\nMe.\n"
    (child / "README.md").write_text(mine)
    assert write_card(child).kept_by_hand == ["citation"]
    text = (child / "README.md").read_text()
    assert mine in text and text.count("# child\n") == text.count("## Licence\n") == text.count("## How it was made\n") == 2


def test_sections_in_another_order_keep_it(written, home):
    text = written.read_text()
    found = re.search(r"<!-- downcycle:licence .*?<!-- /downcycle:licence -->\n\n", text, re.S)[0]
    written.write_text(text.replace(found, "").replace("<!-- downcycle:summary", found + "<!-- downcycle:summary", 1))
    renew(written, home)
    after = written.read_text()
    assert after.index("## Licence") < after.index("# Llama-3-6B-v0.1") and after.count("## Licence") == 1


def test_a_copied_section_is_a_persons_text(written, home):
    found = re.search(r"<!-- downcycle:summary .*?<!-- /downcycle:summary -->", written.read_text(), re.S)[0]
    written.write_text(written.read_text() + f"\n{found}\n")
    renew(written, home)
    after = written.read_text()
    assert after.count(found) == 1 and "to 2.4001" in after and "to 2.4942" in after


@pytest.mark.parametrize("mark", ["<!-- /downcycle:training -->", "<!-- downcycle:training "])
def test_a_damaged_mark_loses_nothing(written, home, mark):
    edit(written, mark, "")
    rows = re.findall(r"^\|.*\|$", section_in(written.read_text(), "training") or written.read_text(), re.M)
    renew(written, home)
    after = written.read_text()
    assert all(row in after for row in rows) and after.count("## Training\n") == 1 and "to 2.4001" in after


def test_without_the_record_nothing_of_a_persons_is_lost(written, home):
    text = re.sub(r"<!-- downcycle-record .*? -->\n", "", written.read_text(), flags=re.S)
    written.write_text(text.replace("license: llama3", "license: llama3\nthumbnail: mine.png") + "\nMine.\n")
    renew(written, home)
    after = written.read_text()
    assert "thumbnail: mine.png" in after and "Mine." in after and "2.4001" in after and after.count("## Training\n") == 1


@pytest.mark.parametrize("record", ["{", "3", '{"sections": 5, "metadata": 6}', '{"sections": [1]}'])
def test_a_damaged_record_does_no_harm(written, home, record):
    written.write_text(re.sub(r"(<!-- downcycle-record ).*?( -->)", lambda found: found[1] + record + found[2], written.read_text()))
    renew(written, home)
    assert f"<!-- downcycle-record {record} -->" in written.read_text() and "2.4001" in written.read_text()
    before = written.read_text()
    renew(written, home)
    assert before.count("<!-- downcycle-record ") == written.read_text().count("<!-- downcycle-record ") == 2  # theirs is text now


def test_metadata_of_a_persons_survive_and_ours_are_renewed(written, home, read):
    edit(written, "license: llama3", "license: llama3  # asked Meta\nthumbnail: mine.png\nmetrics:\n- perplexity")
    edit(written, "- llama-3\n", "- llama-3\n- tiny\n")
    edit(written, "- downcycle\n", "")
    edit(written, "library_name: transformers", "library_name: mlx")
    text = (home / "training" / "README.md").read_text()
    (home / "training" / "README.md").write_text(
        text.replace("  - path: prince-canuma/fineweb-CC-MAIN-2024-10-1B-en", "  - path: HuggingFaceFW/fineweb")
    )
    renew(written, home)
    data = read(written.parent).data
    assert data["thumbnail"] == "mine.png" and data["metrics"] == ["perplexity"] and data["library_name"] == "mlx"
    assert "tiny" in data["tags"] and "downcycle" not in data["tags"] and "axolotl" in data["tags"]
    assert data["datasets"] == ["HuggingFaceFW/fineweb"]  # nobody had touched them
    assert "license: llama3  # asked Meta\n" in written.read_text()


def test_what_was_not_known_for_a_while_is_renewed_all_the_same(written, home, read):
    trainers = (home / "training" / "README.md").read_text()
    (home / "training" / "README.md").unlink()
    renew(written, home)
    assert read(written.parent).data["datasets"] == ["prince-canuma/fineweb-CC-MAIN-2024-10-1B-en", "HuggingFaceFW/fineweb"]
    (home / "training" / "README.md").write_text(trainers.replace("prince-canuma/fineweb-CC-MAIN-2024-10-1B-en", "HuggingFaceFW/fineweb"))
    renew(written, home)
    assert read(written.parent).data["datasets"] == ["HuggingFaceFW/fineweb"]


def test_a_recipe_that_holds_our_marks_does_not_end_its_section(healed, home):
    path = home / "training" / "README.md"
    path.write_text(
        path.read_text().replace("sequence_len: 8", "sequence_len: 8  # <!-- /downcycle:recipe --> <!-- downcycle-record {} -->")
    )
    write_card(healed)
    assert renew(healed / "README.md", home).kept_by_hand == []
    assert (healed / "README.md").read_text().count("<!-- /downcycle:recipe -->") == 1


def test_a_card_of_a_persons_alone_is_kept_whole_below(child, read):
    mine = "# My model\n\nIt is good.\n\n```yaml\n---\na: b\n---\n```\n\n## Citation\n\nMe.\n"
    (child / "README.md").write_text(f"---\nlicense: mit  # mine\ntags: [mine]\n---\n\n{mine}")
    assert write_card(child).kept_by_hand == ["citation"]
    card = read(child)
    assert card.text.index("# child") < card.text.index(mine) and card.text.count(mine) == 1
    assert card.data["license"] == "mit" and card.data["tags"] == ["mine", "downcycle", "depth-pruning", "llama", "llama-3"]
    before = card.text
    write_card(child)
    assert (child / "README.md").read_text() == before


def test_a_persons_words_in_a_trainers_card_are_kept_and_its_paths_and_secrets_are_not(adapter, read):
    text = (adapter / "README.md").read_text()
    changed = text.replace("## Model description\n\nMore information needed", "## Model description\n\nMine.\n- note: a list of mine")
    (adapter / "README.md").write_text(changed.replace("library_name: peft", "library_name: peft\nlicense: mit\nthumbnail: x.png"))
    write_card(adapter)
    card = read(adapter)
    assert "## Model description\n\nMine.\n- note: a list of mine" in card.text and "See axolotl config" not in card.text
    assert card.text.count("More information needed") == 0 and "- distributed_type: multi-GPU" in card.text
    assert (card.data["license"], card.data["thumbnail"]) == ("mit", "x.png") and "base_model" not in card.data
    before = card.text
    write_card(adapter)
    assert read(adapter).text == before


ADDED = [
    "- Intended use: reading bedtime stories to my cat",
    "- Trained by: Ann, at the cat shelter",
    "| cat | 9 |",
    "# About the cats",
    "This model was trained from scratch on the cats dataset. Ask them.",
    "<!-- a note of mine -->",
]


@pytest.mark.parametrize("line", ADDED)
@pytest.mark.parametrize("place", ["## Training and evaluation data\n", "### Training results\n", "## Model description\n"])
def test_every_line_that_no_trainer_writes_is_kept_and_told(adapter, read, line, place):
    edit(adapter / "README.md", place, f"{line}\n\n{place}")
    assert write_card(adapter).kept_by_hand == ["what was added to the trainer's card"]
    assert f"\n{line}\n" in read(adapter).text
    assert write_card(adapter).kept_by_hand == [] and f"\n{line}\n" in read(adapter).text


def test_metadata_that_no_trainer_writes_are_kept(adapter, read):
    path = adapter / "README.md"
    edit(path, "tags:\n", "pipeline_tag: text2text-generation\ntags:\n- cats\n")
    edit(path, "  results: []", "  results:\n  - task: {type: x}\n    dataset: {type: t, name: n}\n    metrics: [{type: acc, value: 1}]")
    text = path.read_text()
    path.write_text(re.sub(r"^base_model: .*home.*$", "base_model: org/real", text, count=1, flags=re.M))
    write_card(adapter)
    data = read(adapter).data
    assert "cats" in data["tags"] and data["pipeline_tag"] == "text2text-generation" and data["base_model"] == "org/real"
    assert data["model-index"][0]["results"][0]["metrics"] == [{"type": "acc", "value": 1}]


@pytest.mark.parametrize("rest", ['{"metadata": \n\nMINE\n\n<!-- a note -->\nend\n', "{} --> is a mark. MINE\n", "{} -->\nMINE\n"])
def test_half_a_record_and_a_quoted_one_take_no_words_with_them(written, home, rest):
    text = written.read_text()
    record = re.search(r"<!-- downcycle-record .*\n", text)[0]
    for changed in (
        text.replace(record, f"<!-- downcycle-record {rest}"),
        text.replace(record, f"`<!-- downcycle-record {rest}\n{record}"),
    ):
        written.write_text(changed)
        renew(written, home)
        after = written.read_text()
        assert f"<!-- downcycle-record {rest.rstrip()}" in after and "2.4001" in after
        renew(written, home)
        assert written.read_text() == after


def test_a_record_inside_a_line_is_a_persons(written, home):
    quoted = "Mine: " + re.search(r"<!-- downcycle-record .*\n", written.read_text())[0]
    written.write_text(written.read_text() + quoted)
    renew(written, home)
    assert quoted in written.read_text() and "2.4001" in written.read_text()


def test_a_single_line_of_windows_changes_no_other(written, home):
    edit(written, "<!-- downcycle:use", "One\r\nTwo\n\n<!-- downcycle:use")
    renew(written, home)
    assert b"\r\n" not in written.read_bytes() and b"One\nTwo\n" in written.read_bytes()


def test_marks_without_an_end_and_entries_without_a_brace_are_read_once():
    body = "<!-- downcycle:use 0123456789abcdef -->\n" * 100_000
    assert splice(body, {}, ORDER, ()).text == body and not is_marked(body)
    assert list(bibtex("@misc{a,\n" * 100_000 + "@misc{b}\n")) == ["@misc{b}"]
    assert list(bibtex("@x{ {a} }\n\n@y{\n@z{1}} tail")) == ["@x{ {a} }", "@z{1}"]


def test_pefts_empty_template_is_replaced_and_a_filled_one_is_kept(adapter, read):
    template = (
        "---\nbase_model: child\nlibrary_name: peft\n---\n\n# Model Card for Model ID\n\n<!-- Provide a quick summary. -->\n\n"
        "## Model Details\n\n- **Developed by:** [More Information Needed]\n\n[More Information Needed]\n\n**BibTeX:**\n\n"
        "### Framework versions\n\n- PEFT 0.20.0"
    )
    (adapter / "README.md").write_text(template)
    write_card(adapter)
    assert "More Information Needed" not in read(adapter).text
    (adapter / "README.md").write_text(template.replace("by:** [More Information Needed]", "by:** me"))
    write_card(adapter)
    assert "- **Developed by:** me" in read(adapter).text


def test_the_line_ends_and_the_mark_of_windows_editors_do_no_harm(written, home):
    written.write_bytes(b"\xef\xbb\xbf" + written.read_text().replace("\n", "\r\n").encode())
    assert renew(written, home).kept_by_hand == []
    data = written.read_bytes()
    assert b"2.4001" in data and data.count(b"\r\n") == data.count(b"\n") and data.startswith(b"---\r\n")


def test_white_space_that_editors_take_away_is_no_change(written, home):
    text = written.read_text()
    written.write_text("\n".join(line.rstrip() for line in text.replace("| `seed`", "| `seed`").split("\n")).rstrip("\n"))
    assert renew(written, home).kept_by_hand == []


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"---\nlicense: mit\n", "do not end"),
        (b"---\nlicense: [\n---\n", "no YAML"),
        (b"---\n- x\n---\n", "no mapping"),
        (b"---\nmodel-index: 3\n---\n", "model-index"),
        (b"---\nmodel-index:\n- name: x\n---\n", "model-index"),
        (b"---\nmodel-index: []\n---\nx", ""),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_a_damaged_card_is_refused_in_one_line_and_stays(child, tree, home, content, fault):
    (child / "README.md").write_bytes(content)
    before = tree(home)
    if not fault:
        write_card(child)
        return
    with pytest.raises(DowncycleError, match=fault) as raised:
        write_card(child)
    assert "\n" not in str(raised.value) and str(child / "README.md") in str(raised.value)
    assert tree(home) == before


def test_a_card_that_is_a_folder_is_refused(child):
    (child / "README.md").mkdir()
    with pytest.raises(DowncycleError, match="README.md"):
        write_card(child)


def test_a_card_is_written_whole_or_not_at_all(written, home, tree, monkeypatch):
    before = written.read_bytes()

    def fail(path, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(type(written), "replace", fail)
    with pytest.raises(DowncycleError, match="No space left"):
        renew(written, home)
    assert written.read_bytes() == before
    assert not [path for path in written.parent.iterdir() if path.name.startswith(".README")]


def test_a_card_that_is_a_link_becomes_a_file_and_leaves_what_it_led_to(child, home):
    (home / "shared.md").write_text("# Shared\n")
    (child / "README.md").symlink_to(home / "shared.md")
    write_card(child)
    assert not (child / "README.md").is_symlink() and (home / "shared.md").read_text() == "# Shared\n"
    assert "# Shared" in (child / "README.md").read_text()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told(child):
    child.chmod(0o500)
    with pytest.raises(DowncycleError, match="Permission denied"):
        write_card(child)
    child.chmod(0o700)


def test_what_is_no_model_is_refused(home):
    (home / "empty").mkdir()
    with pytest.raises(DowncycleError, match="config.json"):
        write_card(home / "empty")
    with pytest.raises(DowncycleError):
        write_card(home / "nothing")
    assert list((home / "empty").iterdir()) == []


def test_what_a_person_took_from_the_recipe_is_not_read_back(trained, home):
    """The recipe of an output folder is read from the card, once the trainer's own is replaced: a changed one is a person's."""
    write_card(trained)
    shutil.rmtree(home / "child")
    edit(trained / "README.md", "datasets:\n  - path: HuggingFaceFW/fineweb", "datasets:\n  - path: org/mine")
    assert write_card(trained).kept_by_hand == ["recipe"]
    assert "- `mine`\n" in section_in((trained / "README.md").read_text(), "training")


def texts(**sections):
    return {name: f"## {name}\n\n{text}" for name, text in sections.items()}


def test_sections_are_put_into_their_places():
    first = splice("", texts(b="1", d="1"), ORDER, ()).text
    assert first == f"{wrap('b', texts(b='1')['b'])}\n\n{wrap('d', texts(d='1')['d'])}\n"
    mine = first.replace("\n\n<!-- downcycle:d", "\n\nMine.\n\n<!-- downcycle:d")
    second = splice(mine, texts(a="2", b="2", c="2", d="2"), ORDER, ("b", "d")).text
    assert [line for line in second.splitlines() if line.startswith(("##", "Mine"))] == ["## a", "## b", "## c", "Mine.", "## d"]
    assert splice(second, texts(b="3"), ORDER, tuple(ORDER)).text == second.replace(
        wrap("b", texts(b="2")["b"]), wrap("b", texts(b="3")["b"])
    )


def test_the_record_is_read_back_and_stands_once():
    record = Record(("a", "b"), {"tags": ["-->", "<x>", "é"]})
    body = put_record(put_record("text\n", record).replace("x", "x"), record)
    assert take_record(put_record("text", record))[1] == record
    assert '-->"' not in body and is_marked(body) and not is_marked("<!-- a comment -->")
