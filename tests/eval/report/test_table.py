"""The comparison in a terminal: what stands in it, that it fits, and that it needs neither torch nor matplotlib."""

import dataclasses
import io
import os
import subprocess
import sys

import pytest

from downcycle.eval.report.table import print_table
from downcycle.eval.results import Results


def printed(results, width=80, encoding="utf-8"):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    print_table(results, file, width)
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def cells(text, title):
    """The cells of the first line that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(title))
    return line.removeprefix(title).split()


def test_it_holds_what_was_measured(made):
    text = printed(made.llama(), 120)
    assert cells(text, "parameters") == ["8.03", "B", "6.29", "B", "78.3%", "6.29", "B", "78.3%"]
    assert cells(text, "MMLU, acc (chance 25)") == ["66.7", "±0.4", "51.2", "±0.4", "76.8%", "58.8", "±0.4", "88.2%"]
    assert cells(text, "average, openllm") == ["63.4", "±0.5", "39.1", "±0.4", "61.7%", "50.3", "±0.5", "79.3%"]
    assert cells(text, "perplexity, wikitext-2") == ["9.88", "2,287", "17.57"]
    assert cells(text, "  loss, nats per token") == ["1.8150", "±0.0041", "5.1120", "±0.0041", "2.4940", "±0.0041"]
    assert cells(text, "decoding, tokens/s") == ["41.20", "52.82", "128.2%", "52.82", "128.2%"]
    assert text.endswith("Percentages: of Meta-Llama-3-8B.\n")


def test_chance_is_said_where_guessing_scores(made):
    text = printed(made.llama(), 120)
    assert "HellaSwag, acc_norm " in text and text.count("(chance 25)") == 3 and text.count("(chance 50)") == 1
    assert text.count("chance") == 4  # TruthfulQA's is not known, GSM8K's is nothing


def test_a_part_of_a_benchmark_is_named_so(made):
    part = Results((made.model("a", scores=(made.score("mmlu", 0.5, limit=3), made.score("gsm8k", 0.4, limit=3))),))
    text = printed(part, 120)
    assert cells(text, "MMLU, acc, first 3") == ["50.0", "±0.4"]
    assert cells(text, "GSM8K, exact_match, first 3")[0] == "40.0" and cells(text, "average, openllm, first 3")[0] == "45.0"
    assert text.count("first 3") == 3
    assert "first" not in printed(Results((made.model("a", scores=(made.score("truthfulqa_mc2", 0.5, limit=818),)),)), 120)  # it has 817
    assert "first" not in printed(made.llama(), 120)


def test_a_parent_that_stands_behind_its_child_is_asked_for(made):
    parent, cut, healed = made.llama().models
    parent = dataclasses.replace(parent, role="model")
    said = printed(Results((healed, cut, parent))).splitlines()[-1]
    assert said == (
        "Llama-3-6B-v0.1 was cut from a model of 32 layers, and Meta-Llama-3-8B has 32. If that is its parent, name it first: "
        "`downcycle eval` compares with the first."
    )


def test_no_parent_is_asked_for_where_none_can_be_told(made):
    parent, cut, healed = made.llama().models
    deeper, whole = dataclasses.replace(parent, layers=40), dataclasses.replace(healed, kept=None, depth=None)
    for models in [(parent, cut, healed), (cut, healed), (cut, deeper), (whole, parent), (cut, dataclasses.replace(parent, role="healed"))]:
        assert printed(Results(models)).splitlines()[-1].startswith("Percentages: of ")


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_it_fits_and_nothing_is_lost(made, width):
    text = printed(made.many(), width)
    lines = text.splitlines()
    assert max(map(len, lines[:-1])) <= width
    assert "…" not in text
    for value in ("90.0 ±0.3", "81.0 ±0.4  90.0%", "36.0 ±0.5  40.0%", "1,339", "492.7", "225 B  55.6%"):
        assert value in text


def test_three_long_names_fit_side_by_side(made):
    text = printed(Results(made.many().models[:3]))
    assert sum(line.startswith("parameters") for line in text.splitlines()) == 1
    rows = [line.strip() for line in text[: text.index("─")].splitlines()]
    joined = "".join("".join(row.split()) for row in rows)
    names = "".join(f"A-Very-Large-Language-Model-405B-pruned-by-rule-{n}-and-healed-2026-11" for n in range(3))
    assert sorted(joined) == sorted(names)


def test_plain_text_where_it_is_piped(made):
    assert "\x1b" not in printed(made.llama())


def test_a_terminal_without_unicode(made):
    text = printed(made.llama(), encoding="ascii")
    assert "59.2 +-1.4" in text


def test_names_are_text_and_no_markup(made):
    model = made.model("[red]x :smile: \x1b[31m", scores=(dataclasses.replace(made.score("mmlu", 0.5), title="[b]T[/b]"),))
    text = printed(Results((model,)), 120)
    assert "[red]x :smile: \\x1b[31m" in text
    assert "[b]T[/b], acc" in text
    assert "\x1b" not in text


def test_one_model_is_a_share_of_nothing(made):
    text = printed(Results(made.llama().models[:1]))
    assert "%" not in text and "Percentages" not in text


def test_rows_without_values_are_absent(made):
    text = printed(Results((made.model("a"), made.model("b"))))
    assert [line.split("  ")[0] for line in text.splitlines()[2:-1]] == ["made as", "layers", "parameters", "size", "measured in"]


def test_other_tokenizers_are_said(made):
    models = made.model("a", perplexity=(made.perplexity(2.0),)), made.model("b", perplexity=(made.perplexity(2.0, tokens=9),))
    assert "tokenizers differ" in " ".join(printed(Results(models), 160).split())


def test_neither_torch_nor_matplotlib_is_imported():
    code = "import sys, downcycle.eval.report.table, downcycle.eval.report.page; print({'torch', 'matplotlib', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "set()"
