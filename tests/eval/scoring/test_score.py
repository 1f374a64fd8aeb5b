"""What is reported without writing a model is what the written one loses; what is known is not measured again; a killed run goes on."""

import json
import math
import mmap
import os
import signal
import struct
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
from transformers import AutoModelForCausalLM  # noqa: E402

from downcycle import DowncycleError, keep_layers, write  # noqa: E402
from downcycle.eval.scoring import study as study_module  # noqa: E402
from downcycle.eval.scoring.compensated import compensate  # noqa: E402
from downcycle.eval.scoring.score import score  # noqa: E402
from downcycle.surgery.importance.parts import Parts  # noqa: E402
from downcycle.surgery.importance.rules import RULES  # noqa: E402
from downcycle.surgery.importance.scores import parse_scores, scores_json  # noqa: E402

FREE = ("first", "tail", "ends", "even")


def losses(folder, samples, dtype=torch.float32):
    """The loss and its clustered error, by stock transformers, of a folder that was written."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    nats, tokens = [], []
    for one in samples:
        ids = torch.as_tensor(one.ids)
        with torch.no_grad():
            chances = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        nats.append(-sum(float(chances[place - 1, ids[place]]) for place in range(one.given, len(ids))))
        tokens.append(len(ids) - one.given)
    return sum(nats) / sum(tokens)


def test_losses_are_those_of_written_models(tiny, study, tmp_path):
    """Of the uncut model, of each rule's cut, and of what each compensation makes of it."""
    of = study(tiny())
    scores = score(of, 4)
    samples = of.calibration.held_out
    assert scores.uncut.loss == pytest.approx(losses(tiny(), samples), abs=1e-5)
    assert {choice.rule for choice in scores.choices} == {*RULES, *FREE} and not scores.refused
    seen = set()
    for choice in scores.choices:
        assert not choice.refused and len(choice.kept) == 4
        if choice.kept in seen:
            continue
        seen.add(choice.kept)
        plain = write(keep_layers(of.checkpoint, list(choice.kept)), tmp_path / f"plain{len(seen)}")
        assert choice.cut.loss == pytest.approx(losses(plain, samples), abs=1e-5)
        assert choice.compensated.keys() | choice.kept_plain.keys() == {"scale", "refit"}
        for method in ("scale", "refit"):
            child, notes = compensate(of, list(choice.kept), choice.rule, method)
            folder = write(child, tmp_path / f"{method}{len(seen)}")
            if method in choice.compensated:
                assert choice.compensated[method].loss < choice.cut.loss
                assert choice.compensated[method].loss == pytest.approx(losses(folder, samples), abs=1e-5)
                assert f"{method}: {choice.cut.loss:.3f} -> {choice.compensated[method].loss:.3f}" in notes[0]
            else:
                assert (folder / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
                assert "the plain weights are kept" in notes[0]
    assert any("refit" in choice.compensated for choice in scores.choices)


def test_scores_say_what_was_measured(tiny, study, whole):
    of = study(tiny())
    scores = score(of, 4, [2], ["refit"])
    assert (scores.layers, scores.keep, scores.protect, scores.load, scores.device) == (6, 4, (2,), "stored", "cpu")
    assert (scores.model, scores.revision, scores.content) == (str(tiny()), None, of.content)
    assert [one.metric for one in scores.importance] == [rule.metric for rule in RULES.values()]
    assert len(scores.angular) == 6 and [len(row) for row in scores.angular] == [6, 5, 4, 3, 2, 1]
    model, fit = whole(tiny()), of.calibration.fit
    alone = next(one for one in scores.importance if one.metric == "leave-one-out loss").scores
    for layer in range(6):
        assert alone[layer] == pytest.approx(model.loss(fit, [layer]) - model.loss(fit), abs=1e-5)
    measured = [choice for choice in scores.choices if choice.rule in RULES]
    assert all(2 in choice.kept for choice in measured)
    assert [choice.cut.loss for choice in scores.choices] == sorted(choice.cut.loss for choice in scores.choices)
    assert scores.uncut.added_stderr == 0 and all(choice.cut.added_stderr > 0 for choice in scores.choices)
    json.dumps(scores_json(scores), allow_nan=False)
    assert parse_scores(json.loads(json.dumps(scores_json(scores)))) == scores


def test_nothing_is_dropped(tiny, study):
    scores = score(study(tiny()), 6)
    for choice in scores.choices:
        assert choice.cut == scores.uncut
        assert not choice.compensated and not choice.kept_plain and not choice.refused


@pytest.mark.parametrize(
    ("keep", "protect", "says"),
    [
        (0, None, "--keep 0: the model has 6 layers; keep between 1 and 6"),
        (7, None, "--keep 7: the model has 6 layers; keep between 1 and 6"),
        (4, [6], "layer 6 does not exist"),
        (2, [0, 1, 2], "3 layers must stay, but --keep 2 keeps fewer"),
    ],
)
def test_what_no_rule_can_keep_is_refused_before_anything_is_measured(keep, protect, says, tiny, study, loads):
    with pytest.raises(DowncycleError, match=says):
        score(study(tiny()), keep, protect)
    assert loads == []


def test_a_choice_that_the_family_cannot_have_is_refused(tiny, study, copy):
    """GPT-2 with a scale that is computed from a layer's number: any cut but the first layers would be another model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = copy(tiny())
    sizes = {"n_layer": 6, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": 4096, "bos_token_id": 4080, "eos_token_id": 4081}
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes, scale_attn_by_inverse_layer_idx=True)).save_pretrained(folder)
    scores = score(study(folder), 4, methods=[])
    assert all(choice.kept == (0, 1, 2, 3) for choice in scores.choices) and "first" in {choice.rule for choice in scores.choices}
    assert "tail" in scores.refused and "scale_attn_by_inverse_layer_idx" in scores.refused["tail"]
    assert {choice.rule for choice in scores.choices} | scores.refused.keys() == {*RULES, *FREE}


def test_packed_weights_are_scored_but_neither_fitted_nor_differentiated(tiny, study, tmp_path, loads, cache):
    """NF4 by bitsandbytes: what gradients and new weights would be for is packed."""
    from transformers import BitsAndBytesConfig

    pytest.importorskip("bitsandbytes")
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(tiny(4, 64), quantization_config=packing).save_pretrained(tmp_path / "m")
    for path in tiny(4, 64).glob("tokenizer*"):
        (tmp_path / "m" / path.name).write_bytes(path.read_bytes())
    scores = score(study(tmp_path / "m"), 3)
    assert scores.refused.keys() == {"taylor", "magnitude"}
    assert "is packed" in scores.refused["taylor"] and "has no score" in scores.refused["magnitude"]
    assert {choice.rule for choice in scores.choices} == {"bi", "angular", "ppl", *FREE}
    for choice in scores.choices:
        assert not choice.compensated and not choice.kept_plain
        assert all("its weights are packed" in why and "\n" not in why for why in choice.refused.values())
        assert choice.refused.keys() == {"scale", "refit"}
    samples = study(tmp_path / "m").calibration.held_out
    assert scores.uncut.loss == pytest.approx(losses(tmp_path / "m", samples, "auto"), abs=2e-2)  # it computes in bfloat16
    loads.clear()
    assert score(study(tmp_path / "m"), 3) == scores  # refusals are remembered too
    assert loads == []
    assert not list(cache.glob("**/*.pt"))


# What is measured once.


def test_a_second_score_loads_nothing(tiny, study, loads, cache):
    first = score(study(tiny()), 4)
    assert loads.count(None) > 1 and set(range(6)) <= set(loads)
    assert not list(cache.glob("**/*.pt"))  # no states are left
    loads.clear()
    assert score(study(tiny()), 4) == first
    assert loads == []


def test_what_a_score_measured_serves_every_rule(tiny, study, text, downcycle, loads, tmp_path):
    score(study(tiny()), 4)
    loads.clear()
    for rule in RULES:
        given = ("--calibrate", text, "--samples", 10, "--length", 24, "--compensate", "refit")
        code, _, err = downcycle("--src", tiny(), "--keep", 4, "--select", rule, *given, "--out", tmp_path / rule)
        assert code == 0, err
    assert loads == []


def test_a_search_goes_on_from_a_shorter_one(tiny, study, loads, monkeypatch):
    """Of a search for three layers, the first two are known: one pass is left."""
    monkeypatch.setattr(study_module, "SMALL", 0)
    score(study(tiny()), 4, methods=[])
    loads.clear()
    scores = score(study(tiny()), 3, methods=[])
    paths = {choice.kept for choice in scores.choices}
    assert len(paths) > 1
    assert all(loads.count(layer) <= 2 for layer in range(6))  # the third round of the search, and the new cuts


def change_a_byte(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1  # of a norm, or the head
    path.write_bytes(data)
    return folder


def test_anything_else_is_measured_anew(tiny, study, copy, text, loads, tmp_path):
    """Another seed, length, number of samples, text, way of loading, or byte of the model."""
    folder = copy(tiny(4))
    first = score(study(folder), 3, methods=[])
    other = tmp_path / "other.jsonl"
    other.write_text("".join(line.replace("the", "some") for line in text.open()))
    for options in ({"seed": 1}, {"length": 20}, {"samples": 9}, {"calibrate": str(other)}, {"load": "bf16"}):
        loads.clear()
        assert score(study(folder, **options), 3, methods=[]) != first
        assert set(loads) == {None, 0, 1, 2, 3}
    loads.clear()
    assert score(study(change_a_byte(folder)), 3, methods=[]).content != first.content
    assert set(loads) == {None, 0, 1, 2, 3}


def test_a_copy_of_the_model_is_not_measured_anew(tiny, study, copy, loads):
    first = score(study(tiny(4)), 3)
    loads.clear()
    folder = copy(tiny(4))
    assert score(study(folder), 3) == replace(first, model=str(folder))
    assert loads == []


# A run that is killed.


def counting(monkeypatch, folder, study, kill_at):
    """Score in a process of its own, which kills itself when it has run so many layers; return how many it ran and loaded."""
    counts = mmap.mmap(-1, 16)

    def count(place):
        number = struct.unpack("<2q", counts[:])[place] + 1
        counts[8 * place : 8 * place + 8] = struct.pack("<q", number)
        return number

    step, load = Parts.step, Parts._load

    def counted(self, *given):
        if count(0) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *given)

    def loaded(self, number, tensors):
        if number is not None:
            count(1)
        return load(self, number, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "step", counted)
        patch.setattr(Parts, "_load", loaded)
        process = os.fork()
        if not process:
            status = 1
            try:
                text = json.dumps(scores_json(score(study(folder), 4, methods=["refit"])), sort_keys=True)
                (folder / "scores").write_text(text)
                status = 0
            finally:
                os._exit(status)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if kill_at else 0)
    return struct.unpack("<2q", counts[:])


def test_a_killed_score_goes_on(tiny, study, copy, cache, monkeypatch):
    """Wherever it is killed, the next one gives the same and loads again only the layer that was not finished."""
    monkeypatch.setattr(study_module, "SMALL", 0)
    folder = copy(tiny(5))
    steps, loads = counting(monkeypatch, folder, study, kill_at=0)
    wanted = (folder / "scores").read_text()
    (folder / "scores").unlink()
    places = [round(steps * (2 * number + 1) / 12) for number in range(6)]
    assert len({*places}) == 6
    for number, place in enumerate(places):
        monkeypatch.setenv("DOWNCYCLE_CACHE", str(cache / str(number)))
        before = counting(monkeypatch, folder, study, kill_at=place)
        assert before[0] == place and not (folder / "scores").exists()
        after = counting(monkeypatch, folder, study, kill_at=0)
        assert (folder / "scores").read_text() == wanted, place
        (folder / "scores").unlink()
        assert before[1] + after[1] <= loads + 1, (place, steps)
        assert not list((cache / str(number)).glob("**/*.pt"))


def test_a_score_that_is_stopped_while_it_goes_back_finds_what_it_went_forward_for(tiny, study, monkeypatch, tmp_path):
    monkeypatch.setattr(study_module, "SMALL", 0)
    of = study(tiny())

    def stop(what, done, total):
        if what == "going back through the layers" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(replace(of, progress=stop), 4, methods=[])
    stages = []
    scores = score(replace(of, progress=lambda what, done, total: stages.append((what, done))), 4, methods=[])
    assert [done for what, done in stages if what == "scoring the layers"] == [6]
    assert [done for what, done in stages if what == "going back through the layers"] == [3, 4, 5]
    monkeypatch.setenv("DOWNCYCLE_CACHE", str(tmp_path))
    assert scores == score(of, 4, methods=[])


# What it is for.


def test_refit_wins_back_a_good_part_of_what_a_cut_loses(study, monkeypatch):
    """On the built-in model, which has learnt something, with few tokens: 30% and more as the mean over several cuts."""
    from downcycle.eval.scoring.compensated import compensated
    from downcycle.eval.scoring.measure import WHOLE, held_out_losses

    of = study("demo", calibrate="demo", samples=24, length=128)
    paths = [frozenset(path) for path in ({5, 6, 7}, {3, 6, 9}, {8, 9})]
    plain = held_out_losses(of, paths)
    won = []
    for path in paths:
        outcome = compensated(of, path, "refit")
        won.append((plain[path].loss - outcome.loss.loss) / (plain[path].loss - plain[WHOLE].loss))
    assert min(won) > 0.1 and sum(won) / len(won) > 0.3, won
    assert all(math.isfinite(one) for one in won)
