"""The page: its numbers are those of the results, its words are inert, and its folder is left as it should be."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import pytest

from downcycle import DowncycleError
from downcycle.eval.results import Logged, Results, read_results

pytest.importorskip("matplotlib")
from downcycle.eval.report.page import PICTURES, check_folder, page, write_report  # noqa: E402

ALL = {"report.html", "results.json", "layers.png", "benchmarks.png", "perplexity.png", "loss.png", "speed.png", "ternary.png"}
VOID = {"meta", "link", "br"}


class Reader(HTMLParser):
    """Reads headings, tables (rows of cells; what stands small in a cell is behind a bar), ids, and checks that tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.headings, self.ids, self.tags, self.terms = [], {}, [], [], [], []
        self.section = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for key, value in attributes if key == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attributes)["id"]
        elif tag == "table":
            self.tables.setdefault(self.section, []).append([])
        elif tag == "tr":
            self.tables[self.section][-1].append([])
        elif tag in ("td", "th"):
            self.tables[self.section][-1][-1].append("")
        elif tag == "small":
            self.handle_data("|")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")
        elif tag in ("dt", "dd"):
            self.terms.append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[self.section][-1][-1][-1] += data
        elif {"h1", "h2", "h3"} & set(self.open):
            self.headings[-1] += data
        elif {"dt", "dd"} & set(self.open[-1:]):
            self.terms[-1] += data


def rows(table):
    return {row[0].partition("|")[0]: row[1:] for row in table[1:]}


@pytest.fixture(scope="module")
def llama(made):
    return made.llama()


@pytest.fixture(scope="module")
def pages(made, llama):
    return {"llama": page(llama), "many": page(made.many())}


@pytest.fixture(scope="module")
def read(pages):
    return Reader(pages["llama"])


def test_the_summary_holds_the_facts(read):
    (table,) = read.tables["summary"]
    assert table[0] == ["", "Meta-Llama-3-8B", "Llama-3-6B-v0", "Llama-3-6B-v0.1"]
    facts = rows(table)
    assert facts["Layers"] == ["32", "24 of 32 (0-23)", "24 of 32 (0-23)"]
    assert facts["Parameters"] == ["8.03 B", "6.29 B|78.3%", "6.29 B|78.3%"]
    assert facts["Made as"] == ["parent", "cut", "healed"]
    assert facts["Measured in"] == ["bf16 on cuda"] * 3


def test_the_scores_are_those_measured(llama, read):
    (table,) = read.tables["benchmarks"]
    assert len(table) == 1 + 6 + 1
    for place, score in enumerate(llama.models[0].scores):
        title, *cells = table[place + 1]
        assert title.startswith(f"{score.title}|{score.metric}, {score.shots} shots, {score.examples:,} examples")
        for index, cell in enumerate(cells):
            mine, first = llama.models[index].scores[place], llama.models[0].scores[place]
            share = f"|{mine.value / first.value * 100:.1f}%" if index else ""
            assert cell == f"{mine.value * 100:.1f} ± {mine.stderr * 100:.1f}{share}"
    means = [sum(score.value for score in model.scores) / 6 for model in llama.models]
    errors = [math.sqrt(sum(score.stderr**2 for score in model.scores)) / 6 for model in llama.models]
    shares = ["", *(f"|{100 * mean / means[0]:.1f}%" for mean in means[1:])]
    wanted = [f"{100 * mean:.1f} ± {100 * error:.1f}{share}" for mean, error, share in zip(means, errors, shares, strict=True)]
    assert table[-1] == ["Average|openllm, 6 benchmarks", *wanted]


def test_the_perplexities_are_those_measured(llama, read):
    tables = read.tables["perplexity"]
    assert len(tables) == 2
    for place, table in enumerate(tables):
        for model, cells in zip(llama.models, table[1:], strict=True):
            one = model.perplexity[place]
            assert cells[1:2] == [f"{one.loss:.4f}|± {one.stderr:.4f}"]
            assert float(cells[2].replace(",", "")) == pytest.approx(math.exp(one.loss), rel=5e-3)
            assert cells[3:] == [f"{one.loss * one.tokens / math.log(2) / one.bytes:.4f}", f"{one.tokens:,}"]


def test_the_losses_are_listed_by_epoch_and_step(made, read):
    (table,) = read.tables["healing"]
    assert table[0] == ["Epoch", "Step", "Training loss", "Held-out loss"]
    wanted = [(f"{step / made.STEPS:.2f}", f"{step:,}", f"{loss:.4f}") for step, loss in made.HEALING.items()]
    assert [(row[0], row[1], row[3]) for row in table[1:]] == wanted


def test_the_speeds_are_those_measured(llama, read):
    facts = rows(read.tables["speed"][0])
    first = llama.models[0].speed
    assert facts["Prefill"][0] == f"{first.prefill_rate:,.0f}"
    assert facts["Decoding"] == ["41.20", "52.82|128.2%", "52.82|128.2%"]
    assert facts["Peak memory"] == ["16.9 GB", "13.2 GB|78.0%", "13.2 GB|78.0%"]


def test_it_says_how_it_was_measured(llama, read):
    terms = dict(zip(read.terms[-6::2], read.terms[-5::2], strict=True))
    assert terms["Versions"] == "downcycle 0.1.0, torch 2.13.0, transformers 5.16.1, lm_eval 0.4.11"
    assert terms["Machine"] == llama.machine and terms["Measured"] == "2026-11-22"
    text = " ".join(read.terms)
    for said in ("windows of 2,048 tokens, 1,024 from one", "25 shots", "a prompt of 512 tokens, 128 decoded", "5 runs", "bf16 on cuda"):
        assert said in text
    assert all(model.content[:12] in text for model in llama.models)


def test_headings_and_figures(read):
    wanted = ["Summary", "Layers", "Benchmarks", "Perplexity", "Healing", "Size and speed", "Ternary weights", "How it was measured"]
    assert [heading for heading in read.headings if heading in wanted] == wanted
    figures = [attributes["id"] for tag, attributes in read.tags if tag == "figure"]
    assert figures == [f"figure-{name}" for name in PICTURES]


@pytest.mark.parametrize("sample", ["llama", "many"])
def test_the_page_is_small_and_stands_alone(pages, sample):
    text = pages[sample]
    reader = Reader(text)
    assert len(text.encode()) < 3_000_000
    assert len(reader.ids) == len(set(reader.ids)) > 10
    assert not {"script", "iframe", "img", "object", "embed", "form"} & {tag for tag, _ in reader.tags}
    links = [value for _, attributes in reader.tags for key, value in attributes.items() if key in ("src", "href", "xlink:href", "action")]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert "@import" not in text and set(re.findall(r"url\((.)", text)) <= {"#"}
    assert set(re.findall(r"https?://[^\"<> ]*", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(nan|inf|None|Infinity)\b", re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL))


def test_a_part_of_a_benchmark_is_named_so(made):
    scores = made.score("mmlu", 0.5, limit=3), made.score("gsm8k", 0.4, limit=3)
    tables = Reader(page(Results((made.model("a", scores=scores),)))).tables
    assert [row[0] for row in tables["benchmarks"][0][1:]] == [
        "MMLU|acc, 5 shots, 14,042 examples, first 3, chance 25",
        "GSM8K|exact_match, 5 shots, 1,319 examples, first 3",
        "Average|openllm, 2 benchmarks, first 3",
    ]
    assert "Average score|openllm, first 3" in [row[0] for row in tables["summary"][0]]


def test_sections_without_data_are_absent(made):
    bare = Results((made.model("a"), made.model("b", "cut", (0, 1), 32)))
    read = Reader(page(bare))
    assert read.headings[1:] == ["Summary", "Layers", "Size and speed", "How it was measured"]
    alone = Reader(page(Results((made.model("a"),))))
    assert alone.headings == ["a", "Summary", "How it was measured"]
    assert not [tag for tag, _ in alone.tags if tag in ("figure", "svg")]
    assert "Machine" not in alone.terms


def test_what_comes_from_outside_is_inert(made):
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)> ${title} &amp; \x00'
    score = dataclasses.replace(made.score("mmlu", 0.5), title=evil, metric=evil, version=evil, group=evil)
    log = (Logged(1, 0.5, 2.0, 2.1), Logged(2, 1.0, 1.9, 2.0))
    measured = {"scores": (score, made.score("gsm8k", 0.5, group=evil)), "perplexity": (made.perplexity(2.0, text=evil),), "training": log}
    one = dataclasses.replace(made.model(evil, evil, (0, 1), 32, **measured), load=evil, device=evil, revision=evil, content=evil)
    two = dataclasses.replace(one, name=evil + "2")
    text = page(Results((one, two), evil, {evil: evil}, evil))
    reader = Reader(text)
    assert not {"script", "img"} & {tag for tag, _ in reader.tags}
    assert not [key for _, attributes in reader.tags for key in attributes if key.startswith("on")]
    assert "\x00" not in text
    assert "script> ${title} &amp; \\x00" in reader.headings[0] or "${title} &amp; \\x00" in reader.headings[0]


def test_the_summary_says_what_happened(pages):
    text = pages["llama"]
    lead = re.search(r'<div class="lead">(.*?)</div>', text, re.DOTALL)[1]
    assert "Llama-3-6B-v0.1 keeps 24 of 32 layers (78.3% of the parameters of Meta-Llama-3-8B)" in lead
    assert lead.count("<p>") == 2
    assert re.search(r'<div class="lead">(.*?)</div>', pages["many"], re.DOTALL)[1].count("<li>") == 6


def test_losses_that_are_no_number_are_named(made):
    log = (Logged(10, 0.1, math.nan), Logged(20, 0.2, 2.0, math.inf), Logged(30, 0.3, 2.0, 2.5), Logged(31, 0.3))
    text = page(Results((made.model("a", training=log),)))
    assert "The loss that was logged at steps 10 and 20 is no finite number; it is left out." in text
    assert "nan" not in re.sub(r"<[^>]*>", "", text)


def test_everything_is_written_and_nothing_else(made, tmp_path):
    paths = write_report(made.llama(), tmp_path / "new" / "report")
    assert {path.name for path in paths} == ALL == {path.name for path in (tmp_path / "new" / "report").iterdir()}
    assert paths[0].name == "report.html"
    assert read_results(tmp_path / "new" / "report" / "results.json") == made.llama()
    assert paths[0].read_text(encoding="utf-8") == page(made.llama())


def test_a_second_report_replaces_its_own_files_only(made, tmp_path):
    write_report(Results(made.llama().models[2:]), tmp_path)
    assert (tmp_path / "loss.png").exists() and (tmp_path / "benchmarks.png").exists()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "sub").mkdir()
    results = Results((made.model("a"), made.model("b", "cut", (0, 1), 32)))
    paths = write_report(results, tmp_path)
    assert {path.name for path in paths} == {"report.html", "results.json", "layers.png", "speed.png"}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths} | {"notes.txt", "sub"}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(json.loads((tmp_path / "results.json").read_text())["models"]) == 2


def test_pictures_of_others_are_left_alone(made, tmp_path):
    (tmp_path / "loss.png").write_text("mine")
    write_report(Results((made.model("a"),)), tmp_path)
    assert (tmp_path / "loss.png").read_text() == "mine"


def test_a_file_in_the_way_is_refused_untouched(made, tmp_path):
    (tmp_path / "report").write_text("mine")
    for folder in (tmp_path / "report", tmp_path / "report" / "below"):
        for call in (lambda path: write_report(made.llama(), path), check_folder):
            with pytest.raises(DowncycleError, match=r"^--report \S+: \S+/report is no folder; choose another name$"):
                call(folder)
    assert (tmp_path / "report").read_text() == "mine"


def test_a_folder_in_the_place_of_a_file_is_one_line(made, tmp_path, tree):
    (tmp_path / "report.html").mkdir()
    (tmp_path / "report.html" / "mine").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(DowncycleError, match=r"^--report [^\n]*$"):
        write_report(Results((made.model("a"),)), tmp_path)
    assert tree(tmp_path) == before


def test_a_number_that_is_none_leaves_the_earlier_report(made, tmp_path, tree):
    write_report(Results((made.model("a"),)), tmp_path)
    before = tree(tmp_path)
    bad = dataclasses.replace(made.perplexity(2.0), perplexity=math.inf)
    with pytest.raises(DowncycleError, match="perplexity is inf, no finite number"):
        write_report(Results((made.model("a", perplexity=(bad,)),)), tmp_path)
    assert tree(tmp_path) == before


def test_results_are_json_that_any_reader_takes(made, tmp_path):
    write_report(Results((made.model("a", training=(Logged(1, 0.1, math.nan), Logged(2, 0.2, 2.0))),)), tmp_path)

    def refuse(name):
        raise AssertionError(name)

    value = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert [entry["loss"] for entry in value["models"][0]["training"]] == [None, 2.0]


def test_a_missing_matplotlib_is_told_before_anything_is_made(made, tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    for call in (lambda path: write_report(made.llama(), path), check_folder):
        with pytest.raises(DowncycleError, match=r"^figures need matplotlib: pip install 'downcycle\[eval\]'$"):
            call(tmp_path / "report")
    assert list(tmp_path.iterdir()) == []
