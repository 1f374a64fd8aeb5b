"""Metadata survive what people do to them, and what a later run knows better is renewed."""

import pytest
import yaml

from downcycle.eval.card.front_matter import read_front_matter, remembered, unite, write_front_matter
from downcycle.surgery.errors import DowncycleError

FIRST = {"license": "llama3", "library_name": "transformers", "tags": ["downcycle", "llama"], "language": ["en"]}


def result(task, value, config=None):
    data = {"type": task, "name": task, **({"config": config} if config else {})}
    return {"task": {"type": "text-generation"}, "dataset": data, "metrics": [{"type": "acc", "value": value}]}


def index(*results, name="m"):
    return {"model-index": [{"name": name, "results": list(results)}]}


@pytest.mark.parametrize("card", ["", "# Title\n", "text\n---\na: 1\n---\n", "---x\n", "-- -\n"])
def test_a_card_without_metadata_is_all_text(card):
    assert read_front_matter(card).body == card and read_front_matter(card).data == {}


@pytest.mark.parametrize("end", ["---\n", "---"])
def test_metadata_and_text_are_divided(end):
    front = read_front_matter(f"---\nlicense: mit\n# why\n{end}")
    assert (front.data, front.yaml, front.body) == ({"license": "mit"}, "license: mit\n# why", "")
    front = read_front_matter("---\n---\n# T\n---\nx")
    assert (front.data, front.body) == ({}, "# T\n---\nx")
    assert read_front_matter("\n---\na: b\n---\nx").data == {"a": "b"}


@pytest.mark.parametrize(
    ("card", "fault"),
    [
        ("---\nlicense: mit\n", "do not end"),
        ("---", "do not end"),
        ("---\na: [1\n---\n", "no YAML"),
        ("---\na: b: c\n---\n", "no YAML"),
        ("---\n- a\n---\n", "no mapping"),
        ("---\n1: a\n---\n", "no mapping"),
        ("---\njust words\n---\n", "no mapping"),
        ("---\na: !!python/object:x {}\n---\n", "no YAML"),
    ],
)
def test_damaged_metadata_are_refused_in_one_line(card, fault):
    with pytest.raises(DowncycleError, match=fault) as raised:
        read_front_matter(card)
    assert "\n" not in str(raised.value)


def test_what_nobody_touched_is_renewed():
    new = {"license": "llama3.1", "library_name": "transformers", "tags": ["llama", "axolotl"], "language": ["en", "de"]}
    assert unite(remembered(FIRST), FIRST, new) == new


def test_what_is_not_known_any_more_stays():
    assert unite(remembered(FIRST), FIRST, {"library_name": "transformers"}) == FIRST


def test_what_a_person_changed_added_or_took_out_stays():
    now = {"license": "mit", "tags": ["llama", "mine"], "language": ["en"], "thumbnail": "x.png"}
    united = unite(remembered(FIRST), now, {**FIRST, "tags": ["downcycle", "llama", "axolotl"]})
    assert united == {**now, "tags": ["llama", "mine", "axolotl"]}  # neither the tag nor the library that were taken out come back


def test_a_card_written_by_a_person_alone_keeps_all_and_gains_the_rest():
    now = {"license": "mit", "tags": ["mine"], "language": "fr"}
    assert unite({}, now, FIRST) == {
        **{"license": "mit", "tags": ["mine", "downcycle", "llama"], "language": ["fr", "en"]},
        "library_name": "transformers",
    }
    assert unite({}, {"language": "en"}, {"language": ["en"]}) == {"language": "en"}


def test_results_are_renewed_and_those_of_a_person_stay():
    first = index(result("arc", 50), result("mmlu", 40))
    memory = remembered(first)
    renewed = index(result("arc", 55), result("mmlu", 40))
    assert unite(memory, first, renewed) == renewed
    theirs = index(result("arc", 50), result("mmlu", 99), result("own", 1))  # one changed, one added
    united = unite(memory, theirs, renewed)["model-index"][0]["results"]
    assert sorted(map(str, united)) == sorted(map(str, [result("arc", 55), result("mmlu", 99), result("own", 1)]))
    fewer = index(result("arc", 50))  # one taken out
    assert unite(memory, fewer, first) == fewer
    assert unite(memory, first, index(result("new", 3))) == index(result("arc", 50), result("mmlu", 40), result("new", 3))
    other = {"model-index": [{"name": "a", "results": []}, {"name": "b", "results": []}]}
    assert unite(memory, other, renewed) == other


def test_lines_of_keys_that_stay_are_not_touched():
    text = "# mine\nlicense:   mit  # why\n\n# tags below\ntags:\n  - 'a'\n  # in between\n  - b\nlanguage: en\nextra: {x: 1}"
    front = read_front_matter(f"---\n{text}\n---\n")
    assert write_front_matter(front, front.data) == text
    changed = write_front_matter(front, {**front.data, "language": "de", "new": [1]})
    assert changed == text.replace("language: en", "language: de") + "\nnew:\n- 1"
    changed = write_front_matter(front, {key: value for key, value in front.data.items() if key != "license"} | {"tags": ["c"]})
    assert yaml.safe_load(changed) == {"tags": ["c"], "language": "en", "extra": {"x": 1}}
    assert "# mine" in changed and "# tags below" in changed


@pytest.mark.parametrize(
    "text", ["my key: 1", "a:b: 1", '"my key": 1', "? license\n: mit", "b: &b {x: 1}\n<<: *b", "license: a\nlicense: mit"]
)
def test_no_key_is_written_twice(text):
    front = read_front_matter(f"---\n# mine\n{text}\n---\n")
    written = write_front_matter(front, {**front.data, "language": "de"})
    keys = [key.value for key, _ in yaml.compose(written).value]
    assert len(set(keys)) == len(keys) and yaml.safe_load(written) == {**front.data, "language": "de"}
    assert ("# mine" in written) == (text in ("my key: 1", "a:b: 1", '"my key": 1'))


def test_the_same_data_set_measured_in_another_way_is_another_result():
    ours, theirs = result("gsm8k", 30), result("gsm8k", 71)
    ours["dataset"] |= {"args": {"num_few_shot": 5}}
    theirs["dataset"] |= {"args": {"num_few_shot": 8}}
    united = unite({}, index(theirs), index(ours))["model-index"][0]["results"]
    assert sorted(map(str, united)) == sorted(map(str, [ours, theirs]))


@pytest.mark.parametrize(
    "text", ["{license: mit, tags: [a]}", '"license": mit\n? tags\n: [a]', "license: >\n  mit\ntags: &t [a]\nmore: *t"]
)
def test_metadata_in_any_spelling_can_be_changed(text):
    front = read_front_matter(f"---\n{text}\n---\n")
    wanted = {**front.data, "license": "llama3", "language": ["en"]}
    assert yaml.safe_load(write_front_matter(front, wanted)) == wanted
