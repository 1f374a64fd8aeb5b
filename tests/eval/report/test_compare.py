"""Rows, averages, shares and sentences, against sums done by hand."""

import dataclasses
import math

import pytest

from downcycle import DowncycleError
from downcycle.eval.report.compare import averages, check_finite, labels, recovered, score_rows, text_rows
from downcycle.eval.report.numbers import join_words, write_chance, write_count, write_figure, write_share, write_spread
from downcycle.eval.report.summary import kept_words, summarise, title_of
from downcycle.eval.results import Logged, Results, Score

PARENT, CUT, HEALED = (
    (0.592, 0.821, 0.667, 0.439, 0.781, 0.505),
    (0.331, 0.421, 0.512, 0.451, 0.623, 0.011),
    (0.452, 0.702, 0.588, 0.442, 0.711, 0.121),
)


def lower(value):
    return Score("lambada", "LAMBADA", "perplexity", value, 0.1, 0, 5153, None, "1", False, None, "lambada")


def test_every_benchmark_is_a_row_and_their_average_the_last(made):
    rows = score_rows(made.llama())
    assert [row.title for row in rows] == ["ARC-challenge", "HellaSwag", "MMLU", "TruthfulQA", "Winogrande", "GSM8K", "Average"]
    assert [row.tasks for row in rows] == [1] * 6 + [6]
    assert [row.values for row in rows[:6]] == list(zip(PARENT, CUT, HEALED, strict=True))
    assert rows[-1].values == pytest.approx([sum(values) / 6 for values in (PARENT, CUT, HEALED)])
    examples = [1172, 10042, 14042, 817, 1267, 1319]
    variances = [sum(p * (1 - p) / n for p, n in zip(values, examples, strict=True)) for values in (PARENT, CUT, HEALED)]
    assert rows[-1].stderrs == pytest.approx([math.sqrt(total) / 6 for total in variances])
    assert rows[-1].chance is None  # TruthfulQA's is not known


def test_the_share_of_an_average_is_that_of_the_averages(made):
    row = averages(made.llama())[0]
    assert row.retained(2) == pytest.approx(sum(HEALED) / sum(PARENT))
    assert row.retained(0) == 1


def test_a_model_without_one_of_the_benchmarks_has_no_average(made):
    results = made.llama()
    models = (*results.models[:2], dataclasses.replace(results.models[2], scores=results.models[2].scores[:5]))
    rows = score_rows(Results(models))
    assert rows[-1].values[2] is None and rows[-1].stderrs[2] is None and rows[-1].retained(2) is None
    assert rows[-1].values[1] == pytest.approx(sum(CUT) / 6)
    assert rows[5].values == (0.505, 0.011, None)


def test_without_a_standard_error_of_one_there_is_none_of_the_average(made):
    scores = (made.score("gsm8k", 0.5), made.score("mmlu", 0.5, stderr=None))
    assert averages(Results((made.model("a", scores=scores),)))[0].stderrs == (None,)


def test_other_shots_limits_or_versions_are_other_rows(made):
    whole, part = made.score("mmlu", 0.6), made.score("mmlu", 0.7, limit=100)
    rows = score_rows(Results((made.model("a", scores=(whole,)), made.model("b", scores=(part,)))))
    assert [(row.values, row.limit) for row in rows] == [((0.6, None), None), ((None, 0.7), 100)]
    assert [row.retained(1) for row in rows] == [None, None]


def test_two_metrics_of_one_benchmark_count_once(made):
    again = dataclasses.replace(made.score("mmlu", 0.1), metric="acc_norm")
    row = averages(Results((made.model("a", scores=(made.score("mmlu", 0.6), again, made.score("gsm8k", 0.2))),)))[0]
    assert (row.tasks, row.values) == (2, (pytest.approx(0.4),))


def test_where_lower_is_better_the_share_is_the_other_way_round(made):
    results = Results((made.model("a", scores=(lower(3.0), made.score("mmlu", 0.5))), made.model("b", scores=(lower(12.0),))))
    row = score_rows(results)[0]
    assert (row.percent, row.retained(1)) == (False, 0.25)
    assert averages(results) == []


@pytest.mark.parametrize(("first", "second", "share"), [(0.5, 0.0, 0.0), (0.0, 0.5, None), (0.0, 0.0, None)])
def test_a_score_of_zero(made, first, second, share):
    results = Results((made.model("a", scores=(made.score("gsm8k", first),)), made.model("b", scores=(made.score("gsm8k", second),))))
    assert score_rows(results)[0].retained(1) == share
    assert all("nan" not in line and "inf" not in line for line in summarise(results))


def test_a_negative_score_has_no_share(made):
    scores = [Score("ll", "LL", "ll", value, None, None, 9, None, "1", True, None, "ll") for value in (-1.0, -3.0)]
    assert score_rows(Results(tuple(made.model(str(score.value), scores=(score,)) for score in scores)))[0].retained(1) is None


def test_texts_read_as_other_tokens_are_not_comparable(made):
    same, other = made.perplexity(2.0), made.perplexity(2.5, tokens=200000)
    rows = text_rows(Results((made.model("a", perplexity=(same,)), made.model("b", perplexity=(other,)))))
    assert [(row.comparable, row.models) for row in rows] == [(False, (same, other))]
    assert [row.comparable for row in text_rows(made.llama())] == [True, True]


def test_texts_read_in_other_windows_are_other_rows(made):
    short = made.perplexity(2.0, length=512, stride=256)
    rows = text_rows(Results((made.model("a", perplexity=(made.perplexity(2.0),)), made.model("b", perplexity=(short,)))))
    assert [(row.length, row.models[1]) for row in rows] == [(2048, None), (512, short)]


def test_what_healing_won_back(made):
    results = made.llama()
    assert recovered(results, 2) == pytest.approx((5.112 - 2.494) / (5.112 - 1.815))
    assert recovered(results, 1) is None
    assert recovered(Results(results.models[::2]), 1) is None  # no cut to heal from
    other = dataclasses.replace(results.models[1], kept=tuple(range(8, 32)))
    assert recovered(Results((results.models[0], other, results.models[2])), 2) is None  # another cut


def test_the_sentences(made):
    assert summarise(made.llama())[1] == (
        "Llama-3-6B-v0.1 keeps 24 of 32 layers (78.3% of the parameters of Meta-Llama-3-8B) and 79.3% of its average score (openllm); "
        "perplexity on fineweb-1b, held out: 6.14 → 12.11. Healing won back 79.4% of the loss that the cut added."
    )
    assert title_of(made.llama()) == "Meta-Llama-3-8B, Llama-3-6B-v0 and Llama-3-6B-v0.1"
    assert title_of(made.many()).endswith(" and 6 others")


def test_one_model_is_compared_with_nothing(made):
    results = Results(made.llama().models[:1])
    assert summarise(results) == [
        "Meta-Llama-3-8B has 32 layers and 8.03 B parameters, an average score of 63.4 of 100 and a perplexity of 6.14 on "
        "fineweb-1b, held out."
    ]


def test_the_sentences_say_that_only_a_part_was_measured(made):
    first, second = (
        made.model(name, scores=(made.score("mmlu", value, limit=3), made.score("gsm8k", value, limit=3)))
        for name, value in (("a", 0.5), ("b", 0.4))
    )
    assert summarise(Results((first, second))) == [
        "b has 32 layers (100.0% of the parameters of a) and 80.0% of its average score (openllm, first 3 examples)."
    ]
    assert "an average score of 50.0 of 100 (first 3 examples)." in " ".join(summarise(Results((first,))))
    single = [dataclasses.replace(model, scores=(dataclasses.replace(model.scores[0], limit=1),)) for model in (first, second)]
    assert "and 80.0% of its result on MMLU (first 1 example)." in summarise(Results(tuple(single)))[0]


def test_an_average_is_of_a_part_where_one_of_its_benchmarks_is(made):
    scores = made.score("truthfulqa_mc2", 0.5, limit=1000), made.score("mmlu", 0.5, limit=1000)
    rows = score_rows(Results((made.model("a", scores=scores),)))
    assert [row.part for row in rows] == ["", "first 1,000", "first 1,000"]
    rows = score_rows(Results((made.model("a", scores=tuple(dataclasses.replace(score, limit=20_000) for score in scores)),)))
    assert [row.part for row in rows] == ["", "", ""]


def test_repeated_layers_are_counted_once_and_said(made):
    solar = made.model("solar", "cut", (*range(24), *range(8, 32)), 32, parameters=10_700_000_000)
    assert kept_words(solar) == "32 of 32, 48 in all (0-23,8-31)"
    said = summarise(Results((made.llama().models[0], solar)))[0]
    assert said.startswith(
        "solar keeps 32 of 32 layers, 48 in all with those that it repeats (133.2% of the parameters of Meta-Llama-3-8B)"
    )


def test_a_long_list_of_layers_is_left_to_the_picture(made):
    assert kept_words(made.model("x", "cut", tuple(range(0, 126, 2)), 126)) == "63 of 126"


def test_names_are_short_and_differ(made):
    def named(*names, **fields):
        return labels(Results(tuple(made.model(name, **fields) for name in names)))

    assert named("meta-llama/Llama", "./build/child/") == ["Llama", "child"]
    assert named("a/x", "b/x") == ["a/x", "b/x"]
    assert len(set(named("a/x", "a/x", "a/x"))) == 3
    model = made.model("a/x")
    assert labels(Results((model, dataclasses.replace(model, load="nf4")))) == ["a/x (bf16)", "a/x (nf4)"]
    assert named("a\nb\x1b[31m") == ["a b\\x1b[31m"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["perplexity", "scores", "speed"])
def test_what_is_no_number_is_refused(made, kind, bad):
    parts = {"perplexity": dataclasses.replace(made.perplexity(2.0), loss=bad), "scores": made.score("mmlu", bad, stderr=0.1)}
    parts |= {"speed": dataclasses.replace(made.speed(1), decode_rate=bad)}
    model = made.model("a/x", **{kind: parts[kind] if kind == "speed" else (parts[kind],)})
    with pytest.raises(DowncycleError, match=r"^a/x: .* is -?(nan|inf), no finite number; measure this model again$"):
        check_finite(Results((model,)))


def test_a_loss_that_is_no_number_becomes_none(made):
    log = (Logged(1, 0.1, math.nan, 2.0), Logged(2, 0.2, 1.5, math.inf))
    checked = check_finite(Results((made.model("a", training=log),)))
    assert checked.models[0].training == (Logged(1, 0.1, None, 2.0), Logged(2, 0.2, 1.5, None))


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (write_count(6_285_365_248), "6.29 B"),
        (write_count(999_600_000), "1 B"),
        (write_count(950), "950"),
        (write_share(0.78271), "78.3%"),
        (write_share(None), ""),
        (write_share(250.0), "250 times"),
        (write_figure(6.1411), "6.14"),
        (write_figure(2288.4), "2,288"),
        (write_figure(0.0), "0.00"),
        (write_figure(7.2e10), "7.2e+10"),
        (write_spread(0.5921, 0.0144, True), "59.2 ± 1.4"),
        (write_spread(0.5921, None, True), "59.2"),
        (write_chance(0.25, True), "25"),
        (write_chance(1 / 3, True), "33.3"),
        (write_spread(14.2, 0.8, False, "+-"), "14.20 +- 0.80"),
        (join_words(["a", "b", "c"]), "a, b and c"),
    ],
)
def test_numbers_as_people_read_them(said, wanted):
    assert said == wanted
