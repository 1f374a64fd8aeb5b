"""The losses of paths are those of whole models without the layers; a pass reads each layer once, and goes on where it was killed."""

import multiprocessing
import os
import signal

import pytest

torch = pytest.importorskip("torch")

from downcycle import DowncycleError, open_checkpoint  # noqa: E402
from downcycle.surgery.importance import paths as module  # noqa: E402
from downcycle.surgery.importance.observers import Influences, LastTokens, Magnitudes  # noqa: E402
from downcycle.surgery.importance.parts import Parts  # noqa: E402
from downcycle.surgery.importance.paths import WHOLE, Observer, SampleLoss, run_paths  # noqa: E402
from downcycle.surgery.importance.search import count_work  # noqa: E402
from downcycle.surgery.importance.states import States  # noqa: E402

from tiny_models import DEPTH  # noqa: E402

ALONE = [WHOLE, *(frozenset({layer}) for layer in range(DEPTH))]
PATHS = [*ALONE, frozenset({0, 1}), frozenset({6, 7}), frozenset({2, 5}), frozenset({1, 2, 3, 4, 5, 6, 7}), frozenset(range(DEPTH))]


class Killed(Exception):
    """What stops a run here."""


def killed_at(number):
    def progress(what, done, total):
        if done == number:
            raise Killed

    return progress


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "mixtral"])
def test_losses_are_those_of_models_without_the_layers(tiny, whole, batches, tmp_path, family):
    found = run_paths(Parts(open_checkpoint(tiny(family))), batches, PATHS, States(tmp_path / "states"))
    model = whole(tiny(family))
    assert [*found] == PATHS
    for path, losses in found.items():
        known = model.losses(batches, path)
        assert [one.nats for one in losses] == pytest.approx([nats for nats, *_ in known], rel=1e-5, abs=1e-5)
        assert [(one.tokens, one.document) for one in losses] == [(tokens, document) for _, tokens, document in known]


def test_only_scored_tokens_count(tiny, batches, tmp_path):
    """Samples of 13 tokens of which 1 or 4 are given, of 9 of which 8 are, and of 2."""
    found = run_paths(Parts(open_checkpoint(tiny())), batches, [WHOLE], States(tmp_path / "states"))[WHOLE]
    assert [one.tokens for one in found] == [12, 12, 9, 12, 1, 1, 1, 1]
    assert [batch.ids.shape for batch in batches] == [(3, 13), (1, 13), (1, 9), (3, 2)]


@pytest.mark.parametrize("size", [1, 96 * 4 * 3 * 5, 1 << 30])
@pytest.mark.parametrize("family", ["llama", "bloom", "glm_moe_dsa"])  # the last one's states do not come apart
def test_logits_in_pieces_are_the_same_losses(tiny, whole, batches, tmp_path, monkeypatch, family, size):
    monkeypatch.setitem(module.LOGITS, "cpu", size)
    found = run_paths(Parts(open_checkpoint(tiny(family))), batches, [WHOLE], States(tmp_path / "states"))[WHOLE]
    assert [one.nats for one in found] == pytest.approx([nats for nats, *_ in whole(tiny(family)).losses(batches)], rel=1e-5)


def test_few_logits_are_made_at_once(tiny, batches, tmp_path, monkeypatch):
    """All of a text by all of a vocabulary would not fit beside a layer."""
    monkeypatch.setitem(module.LOGITS, "cpu", 96 * 4 * 3 * 5)
    parts, shapes, logits = Parts(open_checkpoint(tiny())), [], Parts.logits

    def noted(self, *given):
        shapes.append((found := logits(self, *given)).shape)
        return found

    monkeypatch.setattr(Parts, "logits", noted)
    run_paths(parts, batches, [WHOLE], States(tmp_path / "states"))
    assert [tuple(shape) for shape in shapes] == [*[(1, 12, 96)] * 4, (1, 8, 96), (3, 1, 96)]


# Each layer is read once, and run once for each prefix.


@pytest.mark.parametrize(
    "paths", [[WHOLE], ALONE, PATHS, [frozenset({0, 1})], [frozenset({3}) | {layer} for layer in (0, 1, 2, 4, 5, 6, 7)]]
)
def test_the_work_is_what_is_counted(tiny, batches, tmp_path, paths):
    parts = Parts(open_checkpoint(tiny("gemma3_text")))
    parts.recall(["Tensor", 1])  # what a layer returns: learnt by running one, where the first is dropped on all paths
    run_paths(parts, batches, paths, States(tmp_path / "states"))
    loads, runs = count_work(DEPTH, paths)
    assert (parts.loads, parts.forwards) == (loads, runs * len(batches))


def test_how_a_layer_returns_its_states_is_learnt_by_one_more_load(tiny, whole, batches, tmp_path):
    parts, path = Parts(open_checkpoint(tiny("bloom"))), frozenset({0, 1, 2})
    found = run_paths(parts, batches, [path], States(tmp_path / "states"))[path]
    assert parts.loads == DEPTH - 3 + 1
    assert [one.nats for one in found] == pytest.approx([nats for nats, *_ in whole(tiny("bloom")).losses(batches, path)], rel=1e-5)


def test_one_path_in_one_pass_is_as_in_another(tiny, batches, tmp_path):
    parts = Parts(open_checkpoint(tiny()))
    together = run_paths(parts, batches, PATHS, States(tmp_path / "together"))
    for number, path in enumerate(PATHS):
        assert run_paths(parts, batches, [path], States(tmp_path / str(number))) == {path: together[path]}


def test_states_of_the_whole_model_can_be_kept(tiny, whole, batches, tmp_path):
    states = States(tmp_path / "states")
    run_paths(Parts(open_checkpoint(tiny())), batches, [WHOLE, frozenset({2})], states, keep_states=True)
    for place, batch in enumerate(batches):
        for depth, hidden in [*enumerate(whole(tiny()).hidden(batch.ids))][1:]:
            torch.testing.assert_close(states.get(depth, WHOLE, place).hidden, hidden, rtol=1e-5, atol=1e-5)
    assert not [file for depth in range(1, DEPTH) for file in (tmp_path / "states" / str(depth)).glob("2.*")]


def test_progress_goes_from_layer_to_layer(tiny, batches, tmp_path):
    told = []
    run_paths(
        Parts(open_checkpoint(tiny())), batches, [WHOLE], States(tmp_path / "s"), what="at it", progress=lambda *given: told.append(given)
    )
    assert told == [("at it", number, DEPTH) for number in range(DEPTH + 1)]


# A killed run goes on.


class Count(Observer):
    """Counts what it saw, and goes on counting."""

    def __init__(self):
        self.seen = []

    def loaded(self, number, layer):
        self.seen.append([number, "loaded", sum(1 for _ in layer.parameters())])

    def see(self, number, before, after):
        self.seen.append([number, *before.shape, float(before.double().sum()), float(after.double().sum())])

    def notes(self):
        return self.seen

    def recall(self, notes):
        self.seen = notes


def observers():
    return [Influences(DEPTH), LastTokens(DEPTH), Magnitudes(DEPTH), Count()]


def found_by(watching):
    return watching[0].scores(), watching[1].triangle(), watching[2].scores, watching[3].seen


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma3n_text"])
@pytest.mark.parametrize("stop", [1, 5, DEPTH])
def test_a_stopped_run_goes_on_from_the_last_finished_layer(tiny, batches, tmp_path, family, stop):
    checkpoint, paths = open_checkpoint(tiny(family)), [WHOLE, frozenset({0}), frozenset({0, 1}), frozenset({3})]
    known = run_paths(Parts(checkpoint), batches, paths, States(tmp_path / "sound"), observers=(straight := observers()))
    with pytest.raises(Killed):
        run_paths(Parts(checkpoint), batches, paths, States(tmp_path / "s"), observers=observers(), progress=killed_at(stop))
    parts, again = Parts(checkpoint), observers()
    assert run_paths(parts, batches, paths, States(tmp_path / "s"), observers=again) == known
    assert found_by(again) == found_by(straight)
    assert parts.loads == DEPTH - stop


def test_a_run_that_stops_in_the_middle_of_a_layer(tiny, batches, tmp_path, monkeypatch):
    """Half of the states behind the layer are there, of another run as it were; they are made again."""
    checkpoint, states, put = open_checkpoint(tiny()), States(tmp_path / "s"), States.put
    known = run_paths(Parts(checkpoint), batches, PATHS, States(tmp_path / "sound"))

    def breaks(self, depth, path, batch, state):
        put(self, depth, path, batch, state)
        if (depth, batch) == (4, 2):
            file = self._file(depth, path, batch)
            file.write_bytes(file.read_bytes()[:100])
            raise Killed

    monkeypatch.setattr(States, "put", breaks)
    with pytest.raises(Killed):
        run_paths(Parts(checkpoint), batches, PATHS, states)
    monkeypatch.setattr(States, "put", put)
    parts = Parts(checkpoint)
    assert run_paths(parts, batches, PATHS, states) == known
    assert parts.loads == DEPTH - 3


def run_and_die(folder, batches, states):
    """Run in a process of its own, which is killed as it begins with the fifth layer."""

    def die(what, done, total):
        if done == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    run_paths(Parts(open_checkpoint(folder)), batches, PATHS, States(states), observers=observers(), progress=die)


def test_a_killed_process(tiny, batches, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=run_and_die, args=(tiny(), batches, tmp_path / "states"))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    checkpoint, parts = open_checkpoint(tiny()), Parts(open_checkpoint(tiny()))
    straight, again = observers(), observers()
    known = run_paths(Parts(checkpoint), batches, PATHS, States(tmp_path / "sound"), observers=straight)
    assert run_paths(parts, batches, PATHS, States(tmp_path / "states"), observers=again) == known
    assert found_by(again) == found_by(straight) and parts.loads == DEPTH - 4


def test_a_run_that_was_finished_runs_no_layer(tiny, batches, tmp_path):
    checkpoint = open_checkpoint(tiny())
    known = run_paths(Parts(checkpoint), batches, ALONE, States(tmp_path / "states"))
    parts = Parts(checkpoint)
    assert run_paths(parts, batches, ALONE, States(tmp_path / "states")) == known
    assert parts.loads == parts.forwards == 0


def test_what_observers_look_at_must_be_run(tiny, batches, tmp_path):
    watching = Influences(DEPTH)
    found = run_paths(Parts(open_checkpoint(tiny())), batches, [frozenset({1})], States(tmp_path / "states"), observers=[watching])
    assert all(isinstance(one, SampleLoss) for one in found[frozenset({1})])
    assert watching.scores()[2:] == [None] * (DEPTH - 2)  # another path's states are not shown as the whole model's


def test_a_loss_that_is_not_finite_is_refused(tiny, batches, tmp_path, monkeypatch):
    logits = Parts.logits
    monkeypatch.setattr(Parts, "logits", lambda self, *given: logits(self, *given) - float("inf"))
    with pytest.raises(
        DowncycleError, match="the output of the final norm or the head is not finite, though its weights are; try --load fp32"
    ):
        run_paths(Parts(open_checkpoint(tiny())), batches, [WHOLE], States(tmp_path / "states"))
