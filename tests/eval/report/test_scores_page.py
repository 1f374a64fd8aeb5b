"""The page of scores: its numbers are those that were measured, its words are inert, and its folder is left as it should be."""

import dataclasses
import importlib.util
import json
import math
import re
from html.parser import HTMLParser

import pytest

from downcycle import DowncycleError
from downcycle.surgery.importance.scores import Choice, Importance, Loss, parse_scores

from synthetic_scores import DEPTHS, UNCUT, make_scores

pytest.importorskip("matplotlib")
from downcycle.eval.report.scores_page import scores_page, summarise_scores, write_scores_report  # noqa: E402

ALL = {"report.html", "scores.json", "scores.png"}
HEADINGS = [
    *("At a glance", "What each rule keeps and loses", "Commands", "Importance of each layer"),
    *("Work", "Refused, or kept plain", "How it was measured"),
]


class Reader(HTMLParser):
    """Reads headings, tables by section (rows of cells; what stands small is behind a bar), terms and commands; all tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.headings, self.terms, self.commands, self.tags = [], {}, [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        new = {"h1": self.headings, "h2": self.headings, "dt": self.terms, "dd": self.terms, "code": self.commands}
        if tag == "section":
            self.section = dict(attributes)["id"]
        elif tag == "table":
            self.tables[self.section] = []
        elif tag == "tr":
            self.tables[self.section].append([])
        elif tag in ("td", "th"):
            self.tables[self.section][-1].append("")
        elif tag == "small":
            self.handle_data("|")
        elif tag == "b":
            self.handle_data("!")
        elif tag in new:
            new[tag].append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        inside = set(self.open)
        for tags, found in (({"h1", "h2"}, self.headings), ({"dt", "dd"}, self.terms), ({"code"}, self.commands)):
            if tags & inside:
                found[-1] += data
        if {"td", "th"} & inside:
            self.tables[self.section][-1][-1] += data


@pytest.fixture(scope="module")
def scores():
    return make_scores(32)


@pytest.fixture(scope="module")
def text(scores):
    return scores_page(scores)


@pytest.fixture(scope="module")
def read(text):
    return Reader(text)


def test_the_losses_are_those_measured(scores, read):
    table = read.tables["choices"]
    assert table[0] == ["Rule, layers kept", "cut", "scale", "refit"]
    assert table[1] == ["uncut", "2.1034 ± 0.0123", "", ""]
    by_rule = {row[0].partition("|")[0]: row for row in table[2:]}
    assert list(by_rule) == [choice.rule for choice in scores.choices]
    assert by_rule["bi"][0] == "bi|0-19, 28-31"
    for choice in scores.choices:
        cells = dict(zip(table[0][1:], by_rule[choice.rule][1:], strict=True))
        assert cells["cut"] == f"{choice.cut.loss:.4f} ± {choice.cut.stderr:.4f}|{choice.cut.loss - UNCUT:+.4f}"
        for way, loss in choice.compensated.items():
            share = (choice.cut.loss - loss.loss) / (choice.cut.loss - UNCUT)
            assert cells[way] == f"{loss.loss:.4f} ± {loss.stderr:.4f}|{loss.loss - UNCUT:+.4f}|won back {100 * share:.1f}%"
    assert by_rule["taylor"][2] == "–|plain kept" and by_rule["first"][3] == "–|not done"


def test_only_the_best_rule_is_marked(text):
    marked = re.findall(r'<tr class="average"><th scope="row">(\w+)<', text)
    assert marked == ["bi"]


def test_a_loss_that_was_measured_though_plain_weights_are_kept_is_shown():
    choice = Choice("bi", (0, 1, 2), Loss(3.0, 0.1), {"refit": Loss(3.5, 0.1)}, kept_plain={"refit": "worse"})
    read = Reader(scores_page(make_scores(4, choices=(choice,))))
    assert read.tables["choices"][-1][-1] == "3.5000 ± 0.1000|+1.3966|won back -55.8%|plain kept"
    assert "--compensate" not in read.commands[0]


@pytest.mark.parametrize("layers", DEPTHS)
def test_every_score_of_every_layer_is_listed(layers):
    scores = make_scores(layers)
    head, *rows = Reader(scores_page(scores)).tables["importance"]
    assert [cell.partition("|")[0] for cell in head[1:-1]] == [one.metric for one in scores.importance]
    assert [row[0] for row in rows] == [str(layer) for layer in range(layers)]
    drop = layers - DEPTHS[layers]
    for place, one in enumerate([*(one.scores for one in scores.importance), scores.angular[drop - 1]], 1):
        for layer, row in enumerate(rows):
            score = one[layer] if layer < len(one) else None
            cell = row[place].removeprefix("!")
            assert cell == "–" if score is None else float(cell.replace(",", "")) == pytest.approx(score, rel=1e-3)
        marked = [layer for layer, row in enumerate(rows) if row[place].startswith("!")]
        known = sorted(score for score in one if score is not None)
        count = 1 if place == len(head) - 1 else min(drop, len(known))
        assert [one[layer] for layer in marked] == [score for score in one if score in known[:count]]


def test_the_work_is_counted(scores, read):
    rows = {row[0]: row[1:] for row in read.tables["work"][1:]}
    assert rows["single-pass metrics"] == ["1", "32", "32", "128|4 times as many", "128|4 times as many"]
    assert rows["leave one out"] == ["1", "32", "528", "1,024|32 times as many", "992|1.88 times as many"]


def test_commands_make_each_choice_in_its_best_way(scores, read):
    assert read.commands[0] == read.commands[1]  # above all, and in the list
    begin = f"downcycle --src {scores.model} --revision {scores.revision} --keep 24 --select "
    ends = {one.rule: "scale" if one.rule == "first" else "refit" for one in scores.choices}
    text = "--calibrate fineweb-calibration.parquet --length 2048 --seed 42 --load bf16"
    protect = {rule: "" if rule == "first" else " --protect 0,31" for rule in ends}
    wanted = [f"{begin}{rule} {text}{protect[rule]} --compensate {way}" for rule, way in ends.items()]
    assert read.commands[1:] == wanted


def test_it_says_what_was_measured_and_what_was_not(scores, read):
    terms = dict(zip(read.terms[::2], read.terms[1::2], strict=True))
    assert terms["curvature"] == scores.refused["curvature"]
    assert terms["scale for taylor"].startswith("plain weights kept: its weights lose")
    assert terms["refit for first"].startswith("not done: a norm follows")
    assert terms["Model"].startswith(f"meta-llama/Meta-Llama-3-8B at {scores.revision}; 32 layers; weights in bf16, on cuda; SHA-256 of")
    assert terms["Text"] == "fineweb-calibration.parquet" and terms["SHA-256 of the tokens"] == scores.calibration["digest"]
    assert (terms["Samples"], terms["Length"], terms["Seed"], terms["Held out tokens"]) == ("64", "2,048", "42", "32,768")
    assert terms["Protected layers"] == "0, 31" and terms["Machine"] == scores.machine
    assert terms["Versions"] == "downcycle 0.1.0, torch 2.13.0, transformers 5.16.1"


def test_headings_and_the_figure(read):
    assert read.headings == ["Layers of Meta-Llama-3-8B", *HEADINGS]
    assert [attributes["id"] for tag, attributes in read.tags if tag == "figure"] == ["figure-scores"]


def test_the_lead_says_what_is_best(scores):
    best = scores.choices[0]
    refit = best.compensated["refit"].loss
    assert summarise_scores(scores) == [
        f"To keep 24 of 32 layers, the rule bi loses least: {refit:.4f} nats per token on held-out text, {refit - UNCUT:+.4f} against the "
        "whole model's 2.1034; refit wins back 50% of what its plain cut costs."
    ]
    plain = make_scores(4, choices=(Choice("bi", (0, 1, 2), Loss(3.0, 0.1)),))
    assert summarise_scores(plain)[0].endswith("whole model's 2.1034.")
    assert summarise_scores(make_scores(4, choices=())) == ["Meta-Llama-3-8B has 4 layers and a held-out loss of 2.1034 nats per token."]


def test_the_page_is_small_and_stands_alone():
    text = scores_page(make_scores(126))
    reader = Reader(text)
    assert len(text.encode()) < 500_000
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 7
    assert not {"script", "iframe", "img", "object", "embed", "form"} & {tag for tag, _ in reader.tags}
    links = [value for _, attributes in reader.tags for key, value in attributes.items() if key in ("src", "href", "xlink:href", "action")]
    assert all(link.startswith(("#", "data:image/png;base64,")) or link == "data:," for link in links)
    assert "@import" not in text and set(re.findall(r"url\((.)", text)) <= {"#"}
    assert set(re.findall(r"https?://[^\"<> ]*", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(nan|inf|None|Infinity)\b", re.sub(r"<style>.*?</style>|base64,[^\"]*", "", text, flags=re.DOTALL))


def test_sections_without_data_are_absent():
    bare = make_scores(4, choices=(), importance=(), angular=(), work=(), refused={}, protect=(), machine="")
    read = Reader(scores_page(bare))
    assert read.headings == ["Layers of Meta-Llama-3-8B", "At a glance", "How it was measured"]
    assert "Machine" not in read.terms and read.commands == []
    assert dict(zip(read.terms[::2], read.terms[1::2], strict=True))["Protected layers"] == "none"
    whole = Reader(scores_page(make_scores(4, 4)))
    assert not any("d(i" in cell for cell in whole.tables["importance"][0])


def test_what_comes_from_outside_is_inert():
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)> ${title} &amp; \x00'
    choice = Choice(evil, (0, 1, 2), Loss(3.0, 0.1), {evil: Loss(2.5, 0.1)}, {"a": evil}, {"b": evil})
    named = {name: evil for name in ("model", "revision", "content", "load", "device", "machine")}
    scores = make_scores(
        4,
        **named,
        choices=(choice,),
        importance=(Importance(evil, evil, (1.0, 2.0, 3.0, None)),),
        work=(dataclasses.replace(make_scores(4).work[0], what=evil),),
        calibration={evil: evil, "text": evil},
        refused={evil: evil},
        versions={evil: evil},
    )
    text = scores_page(scores)
    reader = Reader(text)
    assert not {"script", "img"} & {tag for tag, _ in reader.tags}
    assert not [key for _, attributes in reader.tags for key in attributes if key.startswith("on")]
    assert "\x00" not in text and "${title} &amp; \\x00" in reader.headings[0]


def test_everything_is_written_and_nothing_else(scores, text, tmp_path):
    path = write_scores_report(scores, tmp_path / "new" / "scores")
    assert path == tmp_path / "new" / "scores" / "report.html"
    assert {one.name for one in path.parent.iterdir()} == ALL
    assert path.read_text(encoding="utf-8") == text
    assert parse_scores(json.loads((path.parent / "scores.json").read_text())) == dataclasses.replace(scores)
    assert (path.parent / "scores.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "layers.png").write_text("mine")
    write_scores_report(make_scores(12), tmp_path)
    write_scores_report(make_scores(4), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == ALL | {"notes.txt", "layers.png"}
    assert json.loads((tmp_path / "scores.json").read_text())["layers"] == 4


def test_a_file_in_the_way_is_refused_untouched(tmp_path):
    (tmp_path / "scores").write_text("mine")
    with pytest.raises(DowncycleError, match=r"^--report \S+: \S+/scores is no folder; choose another name$"):
        write_scores_report(make_scores(4), tmp_path / "scores")
    assert (tmp_path / "scores").read_text() == "mine"


def test_a_number_that_is_none_leaves_the_earlier_report(tmp_path, tree):
    write_scores_report(make_scores(4), tmp_path)
    before = tree(tmp_path)
    with pytest.raises(DowncycleError, match=r"scores\.uncut\.loss is nan"):
        write_scores_report(make_scores(4, uncut=Loss(math.nan, 0.1)), tmp_path)
    assert tree(tmp_path) == before


def test_a_missing_matplotlib_is_told_before_anything_is_made(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    with pytest.raises(DowncycleError, match=r"^figures need matplotlib: pip install 'downcycle\[eval\]'$"):
        write_scores_report(make_scores(4), tmp_path / "report")
    assert list(tmp_path.iterdir()) == []
