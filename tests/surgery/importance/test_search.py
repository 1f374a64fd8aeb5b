"""Leave-one-out and greedy search give the numbers and the order of whole models run anew for each candidate, and count their work."""

from itertools import count

import pytest

torch = pytest.importorskip("torch")

from downcycle import DowncycleError, open_checkpoint  # noqa: E402
from downcycle.surgery.importance.calibration import Calibration, Sample  # noqa: E402
from downcycle.surgery.importance.parts import Parts  # noqa: E402
from downcycle.surgery.importance.paths import WHOLE, SampleLoss, run_paths  # noqa: E402
from downcycle.surgery.importance.search import Drop, can_drop, count_naive, count_work, greedy, leave_one_out, mean_loss  # noqa: E402
from downcycle.surgery.importance.states import States  # noqa: E402

from tiny_models import DEPTH  # noqa: E402


def runner(parts, batches, folder, asked):
    """Measure paths with the engine, and note what was asked."""
    numbers = count()

    def run(paths, what):
        asked.append((what, [*paths]))
        found = run_paths(parts, batches, paths, States(folder / str(next(numbers))))
        return {path: mean_loss(losses) for path, losses in found.items()}

    return run


def naive(model, batches):
    """The oracle: the mean loss over all tokens of a whole model, run anew."""

    def loss(path):
        found = model.losses(batches, path)
        return sum(nats for nats, *_ in found) / sum(tokens for _, tokens, _ in found)

    return loss


def naive_greedy(loss, free, drop):
    gone, steps = set(), []
    for _ in range(drop):
        losses = {layer: loss(gone | {layer}) for layer in free if layer not in gone}
        best = min(losses, key=lambda layer: (losses[layer], -layer))
        gone.add(best)
        steps.append((best, losses[best]))
    return steps


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_leave_one_out_is_that_of_whole_models(tiny, whole, batches, tmp_path, family):
    checkpoint = open_checkpoint(tiny(family))
    paths = [WHOLE, *(frozenset({layer}) for layer in range(DEPTH))]
    losses = runner(Parts(checkpoint), batches, tmp_path, [])(paths, "")
    loss = naive(whole(tiny(family)), batches)
    known = [loss({layer}) - loss(()) for layer in range(DEPTH)]
    assert leave_one_out(DEPTH, losses) == pytest.approx(known, abs=1e-5)
    assert len(set(known)) == DEPTH


def test_a_layer_that_cannot_go_has_no_loss_without_it():
    assert leave_one_out(3, {WHOLE: 2.0, frozenset({0}): 5.0, frozenset({2}): 1.5}) == [3.0, None, -0.5]


@pytest.mark.parametrize(("family", "protected", "drop"), [("llama", (0, 7), 6), ("gemma3_text", (), 3), ("mixtral", (2, 3, 5), 4)])
def test_greedy_drops_in_the_order_of_whole_models(tiny, whole, batches, tmp_path, family, protected, drop):
    checkpoint, asked = open_checkpoint(tiny(family)), []
    found = greedy(checkpoint, drop, protected, runner(Parts(checkpoint), batches, tmp_path, asked))
    free = [layer for layer in range(DEPTH) if layer not in protected]
    known = naive_greedy(naive(whole(tiny(family)), batches), free, drop)
    assert [one.layer for one in found] == [layer for layer, _ in known]
    assert [one.loss for one in found] == pytest.approx([loss for _, loss in known], rel=1e-5)
    assert [(what, len(paths)) for what, paths in asked] == [
        (f"search: layer {number + 1} of {drop}", len(free) - number) for number in range(drop)
    ]


def test_greedy_costs_one_pass_for_each_dropped_layer(tiny, batches, tmp_path):
    checkpoint, asked = open_checkpoint(tiny()), []
    parts = Parts(checkpoint)
    parts.recall(["Tensor", 1])
    greedy(checkpoint, 4, (0, 7), runner(parts, batches, tmp_path, asked))
    counted = [count_work(DEPTH, paths) for _, paths in asked]
    assert len(asked) == 4
    assert parts.loads == sum(loads for loads, _ in counted) <= 4 * DEPTH
    assert parts.forwards == len(batches) * sum(runs for _, runs in counted)


def test_greedy_goes_on_from_what_was_found(tiny, batches, tmp_path):
    checkpoint, asked = open_checkpoint(tiny()), []
    run = runner(Parts(checkpoint), batches, tmp_path, asked)
    known = greedy(checkpoint, 4, (), run)
    del asked[:]
    assert greedy(checkpoint, 4, (), run, found=known[:2]) == known
    assert [what for what, _ in asked] == ["search: layer 3 of 4", "search: layer 4 of 4"]
    assert greedy(checkpoint, 2, (), run, found=known) == known[:2] and len(asked) == 2


def test_of_equal_losses_the_later_layer_goes(tiny):
    checkpoint = open_checkpoint(tiny())
    found = greedy(checkpoint, 3, (7,), lambda paths, what: dict.fromkeys(paths, 1.0))
    assert found == [Drop(6, 1.0), Drop(5, 1.0), Drop(4, 1.0)]


def test_a_search_without_layers_that_may_go(tiny):
    checkpoint = open_checkpoint(tiny())
    with pytest.raises(DowncycleError, match=r"after 2 dropped layers none is left that may go; --protect fewer layers, or keep more"):
        greedy(checkpoint, 3, range(2, 8), lambda paths, what: dict.fromkeys(paths, 1.0))


def test_a_layer_whose_states_others_use_cannot_go_alone(tiny):
    """Gemma 3n's last layers use keys of earlier ones, and a config cannot say so of others."""
    checkpoint = open_checkpoint(tiny("gemma3n_text"))
    able = can_drop(checkpoint, WHOLE, range(DEPTH))
    assert 0 < len(able) < DEPTH
    assert can_drop(checkpoint, WHOLE, [layer for layer in range(DEPTH) if layer not in able]) == []


def test_the_mean_is_over_tokens():
    assert mean_loss([SampleLoss(6.0, 2, 0), SampleLoss(1.0, 8, 1)]) == 0.7


# The work, by counting.


def by_hand(depth, paths):
    """The oracle: walk down each path, and note (layer, what was dropped before it) each time that a layer is run."""
    walked = {(layer, tuple(sorted(one for one in path if one < layer))) for path in paths for layer in range(depth) if layer not in path}
    return len({layer for layer, _ in walked}), len(walked)


@pytest.mark.parametrize("depth", [1, 2, 12, 32])
def test_counted_work_of_leave_one_out(depth):
    paths = [WHOLE, *(frozenset({layer}) for layer in range(depth))]
    assert count_work(depth, paths) == by_hand(depth, paths) == (depth, depth + depth * (depth - 1) // 2)
    assert count_naive(depth, paths) == depth + depth * (depth - 1)


def test_counted_work_of_32_layers():
    """One pass of 528 layer runs, where whole models take 1024; 32 loads, where they take 1024."""
    alone = [WHOLE, *(frozenset({layer}) for layer in range(32))]
    assert count_work(32, alone) == (32, 528) and count_naive(32, alone) == 1024
    assert count_work(32, [WHOLE]) == (32, 32) and count_work(32, [frozenset(range(32))]) == (0, 0)
    later = [frozenset({3, layer}) for layer in range(32) if layer != 3]
    assert count_work(32, later) == by_hand(32, later)


# Through a study, which keeps what it measured.


class Killed(Exception):
    """What stops a search here."""


@pytest.fixture
def study(tiny, batches, tmp_path, monkeypatch):
    from downcycle.eval.scoring.study import Study

    monkeypatch.setenv("DOWNCYCLE_CACHE", str(tmp_path / "cache"))
    samples = tuple(Sample(batch.ids[row], batch.given[row], batch.documents[row]) for batch in batches for row in range(len(batch.ids)))
    calibration = Calibration("text.txt", "0" * 64, "1" * 64, len(samples), 13, 0, samples, samples[:2])
    return lambda **options: Study(open_checkpoint(tiny()), "2" * 64, calibration, **options)


def test_a_search_that_is_killed_goes_on(study, whole, tiny, batches, tmp_path, monkeypatch):
    from downcycle.eval.scoring.measure import search

    def stop(what, done, total):
        if (what, done) == ("search: layer 3 of 4", 5):
            raise Killed

    with pytest.raises(Killed):
        search(study(progress=stop), 4, (0, 7))
    told = []
    again = study(progress=lambda what, done, total: told.append((what, done)))
    found = search(again, 4, (0, 7))
    known = naive_greedy(naive(whole(tiny()), batches), range(1, 7), 4)
    assert [one.layer for one in found] == [layer for layer, _ in known]
    assert [one.loss for one in found] == pytest.approx([loss for _, loss in known], rel=1e-5)
    assert [done for what, done in told if what == "search: layer 3 of 4"] == [5, 6, 7, 8]
    assert not [what for what, _ in told if what in ("search: layer 1 of 4", "search: layer 2 of 4")]
    monkeypatch.setenv("DOWNCYCLE_CACHE", str(tmp_path / "other"))
    assert search(study(), 4, (0, 7)) == found


def test_a_search_is_not_run_twice(study):
    from downcycle.eval.scoring.measure import search

    first = study()
    found = search(first, 3, ())
    again = study()
    assert search(again, 3, ()) == found and search(again, 2, ()) == found[:2]
    assert again.parts.loads == 0
