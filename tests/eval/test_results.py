"""results.json says what was measured, comes back as it was, and is refused where it is damaged or another model's."""

from dataclasses import replace

import pytest

from downcycle import DowncycleError
from downcycle.eval.cache import best_results, keep, keep_results, key_of, recall
from downcycle.eval.results import Logged, ModelResult, Perplexity, Results, Score, Speed, find_model, read_results, retained, write_results

TEXT = Perplexity("a", "d1", 2.0, 0.1, 7.389, 0.9, 1000, 4000, 3, 2048, 1024)
SCORE = Score("arc", "ARC", "acc_norm", 0.5, None, 25, 100, None, "1.0", chance=0.25, group="openllm")
MODEL = ModelResult(
    "m", "c1", "cut", 3, 10, 20, "bf16", "cpu", depth=4, kept=(0, 1, 3), perplexity=(TEXT,), scores=(SCORE,),
    speed=Speed(512, 64, 100.0, 10.0, 5, 3), training=(Logged(1, 0.5, 2.5), Logged(2, 1.0, None, 2.25)),
)  # fmt: skip
RESULTS = Results((MODEL, replace(MODEL, content="c2", kept=None, speed=None)), "a machine", {"torch": "2"}, "2026-11-21")


def test_results_come_back_as_they_were(tmp_path):
    write_results(RESULTS, tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == RESULTS
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


DAMAGED = ["", "{", "[]", "{}", '{"format": 2, "models": [{}]}', '{"format": 1, "models": []}', '{"format": 1, "models": [{"name": "m"}]}']


@pytest.mark.parametrize("text", DAMAGED)
def test_what_is_no_results_file_is_refused_by_name(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(DowncycleError, match=r"results.json: not .* again$"):
        read_results(tmp_path / "results.json")
    with pytest.raises(DowncycleError, match="none.json: No such file"):
        read_results(tmp_path / "none.json")


def test_results_of_another_model_are_refused(tmp_path):
    assert find_model(RESULTS, "c2", tmp_path).content == "c2"
    with pytest.raises(DowncycleError, match="holds results of m, m, and not of these weights"):
        find_model(RESULTS, "c3", tmp_path)


def test_retained_is_a_ratio_whichever_way_is_better():
    assert (retained(0.4, 0.5), retained(8.0, 6.0, False), retained(0.0, 0.5)) == (0.8, 0.75, 0.0)
    assert retained(0.4, 0.0) is None


def test_measurements_are_kept_by_content_and_key(cache):
    keep("c1", key_of("a", 1), {"x": [1.5]})
    assert recall("c1", key_of("a", 1)) == {"x": [1.5]}
    assert recall("c1", key_of("a", 2)) is recall("c2", key_of("a", 1)) is None
    next((cache / "eval" / "c1").iterdir()).write_text("{")
    assert recall("c1", key_of("a", 1)) is None


def kept(content):
    return find_model(best_results(content), content, "kept")


def test_a_later_comparison_of_the_same_models_adds_to_the_earlier_one():
    keep_results(RESULTS)
    other = replace(SCORE, task="hellaswag")
    keep_results(replace(RESULTS, models=tuple(replace(one, scores=(other,), perplexity=()) for one in RESULTS.models)))
    for content in ("c1", "c2"):
        assert ({one.task for one in kept(content).scores}, kept(content).perplexity) == ({"arc", "hellaswag"}, (TEXT,))


def test_a_quick_look_takes_no_thorough_one_s_place():
    keep_results(RESULTS)
    keep_results(replace(RESULTS, limit=3))
    quantised = replace(RESULTS, models=tuple(replace(one, load="nf4") for one in RESULTS.models))
    keep_results(quantised)
    keep_results(replace(quantised, models=(quantised.models[0],)))
    assert best_results("c1") == RESULTS


def test_of_equal_comparisons_the_last_is_taken_and_more_models_are_better():
    assert best_results("c1") is None
    keep_results(Results((MODEL,), created="later"))
    keep_results(RESULTS)
    assert best_results("c1") == RESULTS
    keep_results(replace(RESULTS, created="later"))
    assert best_results("c1").created == "later"
