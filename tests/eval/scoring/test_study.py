"""A model that does not fit is refused with the figures; what decides a measurement is in its name, and nothing else is."""

import re
from dataclasses import replace
from threading import Event, Thread

import pytest

torch = pytest.importorskip("torch")

from downcycle import DowncycleError, open_checkpoint  # noqa: E402
from downcycle.eval.scoring import study as study_module  # noqa: E402
from downcycle.eval.scoring.study import check_memory  # noqa: E402

MIB = 2**20


def sizes(folder):
    """Bytes of one layer, and of what is around the layers."""
    tensors = open_checkpoint(folder).tensors
    one = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("model.layers.0."))
    ends = sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith("model.layers."))
    return one, ends


def test_a_layer_and_the_ends_must_fit(tiny, monkeypatch):
    one, ends = sizes(tiny())
    needs = one + ends + study_module.WORKING
    checkpoint = open_checkpoint(tiny())
    for free in (needs - 1, 1000):
        monkeypatch.setattr(study_module, "free_memory", lambda device, free=free: free)
        with pytest.raises(DowncycleError, match="use a machine with more memory") as refusal:
            check_memory(checkpoint, "stored", "cpu")
    assert "\n" not in str(refusal.value)
    figures = re.findall(r"([0-9.]+) (MiB|GiB)", str(refusal.value))
    wanted = [one / MIB, ends / MIB, needs / MIB / 1024, 1000 / MIB]
    assert [float(number) for number, _ in figures] == pytest.approx(wanted, rel=5e-3)
    monkeypatch.setattr(study_module, "free_memory", lambda device: needs)
    check_memory(checkpoint, "stored", "cpu")


def test_a_model_stays_loaded_where_it_fits(tiny, monkeypatch):
    """Into half of a GPU's free memory; on a CPU a small one, as of others the kernel keeps the files."""
    one, ends = sizes(tiny())
    whole, checkpoint = 6 * one + ends, open_checkpoint(tiny())
    monkeypatch.setattr(study_module, "free_memory", lambda device: 2 * (whole + study_module.WORKING))
    assert check_memory(checkpoint, "stored", "cuda:0") is True
    monkeypatch.setattr(study_module, "free_memory", lambda device: 2 * (whole + study_module.WORKING) - 1)
    assert check_memory(checkpoint, "stored", "cuda:0") is False
    monkeypatch.setattr(study_module, "SMALL", whole)
    assert check_memory(checkpoint, "stored", "cpu") is True
    monkeypatch.setattr(study_module, "SMALL", whole - 1)
    assert check_memory(checkpoint, "stored", "cpu") is False


@pytest.mark.parametrize(("load", "part"), [("bf16", 0.5), ("fp32", 1.0)])
def test_memory_follows_how_it_is_loaded(load, part, tiny, monkeypatch):
    one, ends = sizes(tiny())
    monkeypatch.setattr(study_module, "free_memory", lambda device: 0)
    with pytest.raises(DowncycleError, match=f"one layer as {load} takes") as refusal:
        check_memory(open_checkpoint(tiny()), load, "cpu")
    figures = re.findall(r"([0-9.]+) MiB", str(refusal.value))
    assert [float(number) for number in figures[:2]] == pytest.approx([part * one / MIB, part * ends / MIB], rel=1e-2)


def test_what_does_not_fit_is_refused_on_the_command_line(tiny, text, refused, monkeypatch):
    monkeypatch.setattr(study_module, "free_memory", lambda device: 5 * MIB)
    err = refused("score", tiny(), "--calibrate", text)
    assert "takes 0.0461 MiB" in err or "cpu has 5 MiB free; use a machine with more memory" in err


def test_what_decides_a_measurement_is_in_its_name(tiny, study):
    of = study(tiny())
    other = replace(of.calibration, digest="0" * 64)
    keys = {of.key, replace(of, load="bf16").key, replace(of, device="cuda:0").key, replace(of, calibration=other).key}
    assert len(keys) == 4
    assert replace(of, device="cuda:0").key == replace(of, device="cuda:1").key
    assert replace(of, progress=print).key == of.key == study(tiny()).key


def test_what_was_kept_is_recalled_under_its_own_name(tiny, study):
    of = study(tiny())
    assert of.recall("bi") is None
    assert of.keep([1.5, None], "bi", [2, 3]) == [1.5, None]
    again = study(tiny())
    assert (again.recall("bi", [2, 3]), again.recall("bi", [3, 2]), again.recall("bi")) == ([1.5, None], None, None)
    assert replace(again, load="bf16").recall("bi", [2, 3]) is None
    assert replace(again, content="0" * 64).recall("bi", [2, 3]) is None


def test_batches_hold_each_sample_once(tiny, study):
    of = study(tiny())
    for batches, samples in ((of.fit, of.calibration.fit), (of.held_out, of.calibration.held_out)):
        rows = [tuple(row) for batch in batches for row in batch.ids]
        assert sorted(rows) == sorted(tuple(one.ids) for one in samples)


# One after the other.


def test_who_measures_the_same_waits(tiny, study):
    """And says so; another calibration is no reason to wait."""
    said, entered, of = [], Event(), study(tiny())
    waiting = replace(study(tiny()), progress=lambda what, done, total: said.append(what))

    def second():
        with waiting.held():
            entered.set()

    thread = Thread(target=second)
    with of.held():
        with study(tiny(), seed=7).held():
            pass
        thread.start()
        assert not entered.wait(0.2)
        assert said == ["waiting for another run that measures the same"]
    thread.join(20)
    assert entered.is_set()


def test_a_cache_that_cannot_be_written_is_one_line(tiny, study, monkeypatch):
    of = study(tiny())
    monkeypatch.setenv("DOWNCYCLE_CACHE", "/proc/x")
    with pytest.raises(DowncycleError, match=r"^/proc/x: nothing can be kept there \(.*\); give another DOWNCYCLE_CACHE$"), of.held():
        pass


def test_an_interrupted_measurement_says_that_it_goes_on(tiny, study):
    with pytest.raises(KeyboardInterrupt, match="^interrupted; the same command goes on from where it was$"), study(tiny()).held():
        raise KeyboardInterrupt
