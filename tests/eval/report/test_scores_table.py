"""The scores in a terminal: what stands in it, that it fits, and that it needs neither torch nor matplotlib."""

import dataclasses
import io
import os
import re
import subprocess
import sys

import pytest

from downcycle.eval.report.score_facts import kept_words
from downcycle.eval.report.scores_table import map_lines, print_scores
from downcycle.surgery.importance.scores import Choice, Importance, Loss

from synthetic_scores import DEPTHS, make_scores


def printed(scores, width=80, encoding="utf-8"):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    print_scores(scores, file, width)
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def joined(scores, width, unicode=True):
    """The maps and curves of all blocks, title: row."""
    rows = {}
    for block in map_lines(scores, width, unicode):
        gutter = re.match(r"layer +", block[0]).end()
        length = max(len(line) for line in block[1:]) - gutter
        for line in block[1:]:
            rows.setdefault(line[:gutter].strip(), []).append(line[gutter:].ljust(length))
    return {title: "".join(parts) for title, parts in rows.items()}


@pytest.mark.parametrize("layers", DEPTHS)
@pytest.mark.parametrize("width", [40, 80, 200])
def test_maps_and_curves_are_whole_however_they_are_folded(layers, width):
    scores = make_scores(layers)
    assert max(len(line) for block in map_lines(scores, width) for line in block) <= width + 2  # a number may end behind the last layer
    rows = joined(scores, width)
    for choice in scores.choices[:4]:
        assert rows[choice.rule] == "".join("█" if layer in choice.kept else "░" for layer in range(layers))
    for one in scores.importance[:3]:
        row = rows[one.metric]
        assert len(row) == layers
        assert row[one.scores.index(max(one.scores))] == "█" and row[one.scores.index(min(one.scores))] == "▁"
    taylor = scores.importance[3].scores
    assert [sign == " " for sign in rows["Taylor"]] == [score is None for score in taylor]


def test_a_curve_rises_where_scores_do():
    one = Importance("m", "u", tuple(float(n) for n in range(8)))
    assert joined(make_scores(8, 6, importance=(one,), choices=()), 80)["m"] == "▁▂▃▄▅▆▇█"
    assert joined(make_scores(8, 6, importance=(one,), choices=()), 80, unicode=False)["m"] == "01234567"


def test_layers_are_numbered_above_the_maps():
    for width in (40, 60, 80):
        for block in map_lines(make_scores(126), width):
            ruler, row = block[0], block[1]
            first = int(ruler.split()[1])
            gutter = ruler.index(str(first), 5)
            for number in ruler.split()[1:]:
                assert ruler.index(f" {number}", 5) + 1 - gutter == int(number) - first
            assert len(row) > gutter


def test_losses_and_differences_are_those_measured():
    scores = make_scores(32)
    lines = printed(scores).splitlines()
    for choice in scores.choices:
        line = next(line for line in lines if line.startswith((f"{choice.rule} ", f"{choice.rule}*")) and f"{choice.cut.loss:.4f}" in line)
        cells = line.split()[1:]
        wanted = [f"{choice.cut.loss:.4f}", f"{choice.cut.loss - scores.uncut.loss:+.4f}"]
        assert cells[:2] == wanted
        for method, loss in choice.compensated.items():
            best = "*" if loss.loss == min(one.loss for one in (choice.cut, *choice.compensated.values())) else ""
            assert f"{loss.loss:.4f} {loss.loss - scores.uncut.loss:+.4f}{best}" in line, method
        assert line.count("*") == (2 if choice.rule == "bi" else 1)
    assert "uncut it loses 2.1034 ±0.0123 nats per token" in lines[0]
    assert "* least: of the ways of a rule, and of all rules (bi, refit)" in lines


@pytest.mark.parametrize("width", [70, 80, 120])
@pytest.mark.parametrize("layers", DEPTHS)
def test_kept_layers_are_listed_in_ranges_and_nothing_is_cut(layers, width):
    scores = make_scores(layers)
    text = printed(scores, width)
    assert "…" not in text
    flat = " ".join(text.split())
    for choice in scores.choices:
        assert f"{choice.rule} keeps {kept_words(choice)}" in flat
    tables = [line for line in text.splitlines() if ":" not in line and "least: of" not in line]
    assert max(map(len, tables)) <= max(width, 74)


def test_126_layers_do_not_flood_a_terminal():
    assert len(printed(make_scores(126)).splitlines()) < 85  # three blocks of maps
    assert len(printed(make_scores(32)).splitlines()) < 52


def test_metrics_with_their_range_and_the_least_important_layers():
    one = Importance("m", "watts", (0.5, None, 0.25, 20.0))
    text = printed(make_scores(4, importance=(one,)))
    line = next(line for line in text.splitlines() if line.startswith("m ") and "watts" in line)
    assert line.split("  ")[0] == "m" and [part.strip() for part in line.split("   ") if part.strip()] == [
        "m",
        "watts, log",
        "0.25",
        "20",
        "2, 0, 3",
    ]


def test_what_was_refused_or_kept_plain_is_said():
    text = printed(make_scores(12))
    assert "\ncurvature: needs gradients of every weight, and this model is loaded in nf4; load it in bf16\n" in text
    assert "\nscale for taylor kept plain: its weights lose 2.9107 where the plain cut loses less\n" in text
    assert "\nrefit for first: a norm follows the MLP of layer 3; try --compensate scale\n" in text
    assert "not done" in text and "plain kept" in text


def test_of_one_way_only_the_best_rule_is_marked():
    choices = tuple(Choice(rule, (0,), Loss(loss, 0.1)) for rule, loss in (("a", 3.0), ("b", 2.5)))
    text = printed(make_scores(4, choices=choices))
    assert "\nb* " in text and "2.5000 +0.3966\n" in text and text.count("*") == 2


def test_one_reason_is_said_once():
    choices = tuple(Choice(rule, (0,), Loss(3.0, 0.1), refused={"refit": "experts"}) for rule in ("a", "b"))
    text = printed(make_scores(4, choices=choices))
    assert "refit for a, refit for b: experts\n" in text and text.count("experts") == 1


def test_a_terminal_without_unicode():
    text = printed(make_scores(32), encoding="ascii")
    assert "# kept  . dropped; 0 matters least  7 most" in text and "2.1034 +-0.0123" in text
    assert "#" * 20 + "." * 8 + "#" * 4 in text


def test_plain_text_where_it_is_piped_and_names_are_no_markup():
    choice = Choice("[red]r[/red]", (0, 1, 2), Loss(3.0, 0.1), refused={":smile:\x1b": "\x1b[31m[b]why[/b]"})
    text = printed(make_scores(4, model="[b]\x1b[31m", choices=(choice,)), 160)
    assert "\x1b" not in text
    assert "[b]\\x1b[31m: keep 3 of 4" in text and "[red]r[/red]" in text and "\\x1b[31m[b]why[/b]" in text


def test_little_is_printed_of_little():
    bare = make_scores(4, choices=(), importance=(), refused={})
    lines = [line for line in printed(bare).splitlines() if line.strip()]
    assert lines == ["meta-llama/Meta-Llama-3-8B: keep 3 of 4 layers; uncut it loses 2.1034 ±0.0123 nats per token"]
    nothing = Importance("m", "u", (None,) * 4)
    text = printed(dataclasses.replace(bare, importance=(nothing,)))
    assert [line for line in text.splitlines() if line.startswith("m ")][-1].split() == ["m", "u"]


def test_neither_torch_nor_matplotlib_is_imported():
    modules = "downcycle.eval.report.scores_table, downcycle.eval.report.scores_page"
    code = f"import sys, {modules}; print({{'torch', 'matplotlib', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "set()"
