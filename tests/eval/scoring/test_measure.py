"""Losses and their errors by hand; only what is missing is measured, and each pass reads each layer once."""

import math
from itertools import combinations

import pytest

torch = pytest.importorskip("torch")

from downcycle.eval.scoring import study as study_module  # noqa: E402
from downcycle.eval.scoring.measure import (  # noqa: E402
    ALONE,
    HIDDEN,
    TAYLOR,
    WHOLE,
    fit_losses,
    held_out_losses,
    measure,
    search,
    to_loss,
)
from downcycle.surgery.importance.paths import SampleLoss  # noqa: E402

ALL = (HIDDEN, ALONE, TAYLOR)


def error(clusters):
    """The standard error of a mean over clusters of (nats, tokens), as in the paper: with every token's deviation written out."""
    tokens = sum(count for _, count in clusters)
    mean = sum(nats for nats, _ in clusters) / tokens
    total = sum(sum(nats / count - mean for _ in range(count)) ** 2 for nats, count in clusters)
    return mean, math.sqrt(total * len(clusters) / (len(clusters) - 1)) / tokens


def test_errors_are_clustered_by_document():
    whole = [SampleLoss(10.0, 5, 1), SampleLoss(21.0, 7, 2), SampleLoss(9.0, 4, 1)]
    cut = [SampleLoss(12.0, 5, 1), SampleLoss(25.0, 7, 2), SampleLoss(8.0, 4, 1)]
    found = to_loss(cut, whole)
    assert (found.loss, found.stderr) == pytest.approx(error([(20.0, 9), (25.0, 7)]))
    assert found.added_stderr == pytest.approx(error([(1.0, 9), (4.0, 7)])[1])
    assert to_loss(whole, whole).added_stderr == 0


def test_of_one_document_each_sample_is_a_cluster():
    whole = [SampleLoss(10.0, 5, 0), SampleLoss(21.0, 7, 0)]
    cut = [SampleLoss(12.0, 5, 0), SampleLoss(25.0, 7, 0)]
    found = to_loss(cut, whole)
    assert (found.loss, found.stderr) == pytest.approx(error([(12.0, 5), (25.0, 7)]))
    assert found.added_stderr == pytest.approx(error([(2.0, 5), (4.0, 7)])[1])
    assert (to_loss(cut[:1], whole[:1]).loss, to_loss(cut[:1], whole[:1]).stderr) == (2.4, 0.0)


def test_held_out_losses_are_those_of_the_whole_model_in_memory(tiny, study, whole):
    of, model = study(tiny()), whole(tiny())
    paths = [frozenset({2}), frozenset({0, 5}), frozenset({1, 2, 3})]
    found = held_out_losses(of, paths)
    assert found.keys() == {WHOLE, *paths}
    samples = of.calibration.held_out
    base = [float(model.nats(one)) for one in samples]
    for path, loss in found.items():
        nats = [float(model.nats(one, path)) for one in samples]
        documents = {one.document for one in samples}
        assert len(documents) > 1
        clusters, more = [], []
        for document in documents:
            mine = [place for place, one in enumerate(samples) if one.document == document]
            tokens = sum(samples[place].scored for place in mine)
            clusters.append((sum(nats[place] for place in mine), tokens))
            more.append((sum(nats[place] - base[place] for place in mine), tokens))
        assert (loss.loss, loss.stderr) == pytest.approx(error(clusters), abs=1e-5)
        assert loss.added_stderr == pytest.approx(error(more)[1], abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_in_whatever_order_things_are_asked_for_they_are_the_same(size, tiny, study, monkeypatch, tmp_path):
    of = study(tiny())
    together = measure(of, *ALL)
    for number, first in enumerate(combinations(ALL, size)):
        monkeypatch.setenv("DOWNCYCLE_CACHE", str(tmp_path / str(number)))
        apart = measure(study(tiny()), *first)
        for what in first:
            assert apart[what] == together[what]
        assert {what: measure(of, *ALL)[what] for what in ALL} == {what: together[what] for what in ALL}


def test_all_that_one_pass_can_measure_is_measured_in_one(tiny, study, loads, monkeypatch):
    monkeypatch.setattr(study_module, "SMALL", 0)
    measure(study(tiny()), *ALL)
    assert sorted(layer for layer in loads if layer is not None) == sorted([*range(6)] * 2)  # forward, and back for the gradients
    loads.clear()
    assert set(measure(study(tiny()), HIDDEN)) == {HIDDEN} and measure(study(tiny()), ALONE)[ALONE].keys() >= {WHOLE, frozenset({5})}
    assert loads == []


def test_losses_that_are_known_are_not_measured_again(tiny, study, loads, monkeypatch):
    monkeypatch.setattr(study_module, "SMALL", 0)
    measure(study(tiny()), ALONE)
    loads.clear()
    known = fit_losses(study(tiny()), [frozenset({2}), frozenset({5})], "")
    assert loads == [] and len(known) == 2
    fit_losses(study(tiny()), [frozenset({2}), frozenset({2, 3})], "")
    assert [layer for layer in loads if layer is not None] == [0, 1, 4, 5]


def test_the_first_round_of_a_search_is_what_leaving_one_out_measured(tiny, study, loads):
    alone = measure(study(tiny()), ALONE)[ALONE]
    loads.clear()
    (first,) = search(study(tiny()), 1, [])
    assert loads == []
    assert (first.loss, alone[frozenset({first.layer})]) == (min(alone[frozenset({layer})] for layer in range(6)),) * 2
    assert search(study(tiny()), 1, [first.layer])[0].layer != first.layer


def test_held_out_losses_are_not_those_to_fit_on(tiny, study):
    """What is kept of one never stands for the other."""
    of = study(tiny())
    path = frozenset({3})
    fit, held_out = fit_losses(of, [path], "")[path], held_out_losses(of, [path])[path].loss
    assert fit != held_out
    again = study(tiny())
    assert (fit_losses(again, [path], "")[path], held_out_losses(again, [path])[path].loss) == (fit, held_out)
