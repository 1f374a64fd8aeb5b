"""What is fitted is what a plain implementation over the whole model in memory fits; layers are read once; a killed fit goes on.

The oracle knows nothing of the package: stock transformers runs the model with some of its layers, and least squares are solved by QR.
"""

import shutil
from collections import Counter
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
import transformers  # noqa: E402
from torch import nn  # noqa: E402

from downcycle.surgery.checkpoint import open_checkpoint  # noqa: E402
from downcycle.surgery.compensation import layer_fit  # noqa: E402
from downcycle.surgery.compensation.fold import open_fitted, save_fitted, with_fitted  # noqa: E402
from downcycle.surgery.compensation.refit import refit  # noqa: E402
from downcycle.surgery.errors import DowncycleError, UnsuitableError  # noqa: E402
from downcycle.surgery.importance.calibration import Sample, make_batches  # noqa: E402
from downcycle.surgery.importance.parts import Parts  # noqa: E402
from downcycle.surgery.importance.states import States  # noqa: E402

from tiny_models import DEPTH, FAMILIES, model_class, tiny_config, tiny_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet")

PATHS = [{2, 3, 6}, {0, 1, 5}, {6, 7}, {1}]


def name_of(path):
    return ",".join(map(str, sorted(path)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Write a tiny model of a family, once for each dtype."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def save(name="llama", dtype=torch.float32):
        if (name, dtype) not in made:
            made[name, dtype] = tmp_path_factory.mktemp("model")
            tiny_model(name).to(dtype).save_pretrained(made[name, dtype])
        return made[name, dtype]

    return save


def samples(count=20, seed=0, tokens=20):
    """Some of them shorter than the others."""
    random = np.random.default_rng(seed)
    return [Sample(random.integers(10, 60, tokens - 4 * (place % 3 == 0)), 1, place) for place in range(count)]


def batches(count=20, seed=0):
    return make_batches(samples(count, seed), 100)


def fit(folder, path, states, **options):
    parts = options.pop("parts", None) or Parts(open_checkpoint(folder), **options)
    return refit(parts, batches(), frozenset(path), States(states))


def equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# The oracle, for Llama.


class Oracle:
    """Fit a Llama in memory, in float64."""

    def __init__(self, folder, path):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval().requires_grad_(False)
        self.layers = list(self.model.model.layers)
        self.kept = [number for number in range(DEPTH) if number not in path]
        self.batches = [torch.from_numpy(batch.ids) for batch in batches()]
        numbers = torch.arange(sum(map(len, self.batches))).split([len(batch) for batch in self.batches])
        self.apart = [one % 5 == 4 for one in numbers]  # samples that decide, and are not fitted on

    def run(self, numbers):
        """Run some layers; return what is given to the last one's two projections, its stream in the middle, and what leaves it."""
        self.model.model.layers = nn.ModuleList(self.layers[number] for number in numbers)
        last, found = self.layers[numbers[-1]], []
        looks = {"o": last.self_attn.o_proj, "middle": last.post_attention_layernorm, "down": last.mlp.down_proj, "out": last}
        for ids in self.batches:
            seen = {}

            def look(key, seen=seen):
                return lambda module, given, output: seen.update({key: output if key == "out" else given[0]})

            hooks = [module.register_forward_hook(look(key)) for key, module in looks.items()]
            self.model(input_ids=ids, use_cache=False)
            for hook in hooks:
                hook.remove()
            found.append(seen)
        return found

    def error(self, numbers, wanted):
        runs = self.run(numbers)
        return sum(
            float((run["out"] - want["out"])[apart].square().sum()) for run, want, apart in zip(runs, wanted, self.apart, strict=True)
        )

    def solve(self, numbers, given, stream, targets):
        """Ridge regression as least squares over rows that are the ridge, by QR; return the new weight."""
        module = self.layers[numbers[-1]].self_attn.o_proj if given == "o" else self.layers[numbers[-1]].mlp.down_proj
        runs, rows, lacking = self.run(numbers), [], []
        for run, target, apart in zip(runs, targets, self.apart, strict=True):
            rows.append(run[given][~apart].flatten(0, 1))
            lacking.append((target[stream] - run[stream])[~apart].flatten(0, 1))
        rows, lacking = torch.cat(rows), torch.cat(lacking)
        ridge = 0.1 * rows.square().sum() / rows.shape[1]
        below = torch.eye(rows.shape[1], dtype=rows.dtype) * ridge.sqrt()
        nothing = torch.zeros(len(below), lacking.shape[1], dtype=rows.dtype)
        change = torch.linalg.lstsq(torch.cat([rows, below]), torch.cat([lacking, nothing]))
        return module.weight + change.solution.T

    def fit(self):
        fitted = {}
        depth_targets = {depth: self.run(range(depth)) for depth in range(1, DEPTH + 1)}  # of the parent, before anything is changed
        for place in range(len(self.kept)):
            target = self.kept[place + 1] if place + 1 < len(self.kept) else DEPTH
            if target > place + 1:
                fitted |= self.fit_layer(self.kept[: place + 1], depth_targets[target])
        return fitted

    def fit_layer(self, numbers, wanted):
        number = numbers[-1]
        weights = {"o": self.layers[number].self_attn.o_proj.weight, "down": self.layers[number].mlp.down_proj.weight}
        plain = {key: weight.clone() for key, weight in weights.items()}
        tried = [(self.error(numbers, wanted), {})]
        for order in (["o", "down"], ["down"]):
            for key in order:
                weights[key].copy_(self.solve(numbers, key, "middle" if key == "o" else "out", wanted))
            tried.append((self.error(numbers, wanted), {key: weights[key].clone() for key in order}))
            for key in weights:
                weights[key].copy_(plain[key])
        _, best = min(tried, key=lambda one: one[0])
        for key, weight in best.items():
            weights[key].copy_(weight)
        words = {"o": "self_attn.o_proj", "down": "mlp.down_proj"}
        return {f"model.layers.{number}.{words[key]}.weight": weight for key, weight in best.items()}


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_fitted_weights_are_those_of_a_plain_implementation(path, saved, tmp_path):
    folder = saved("llama", torch.float64)
    found = fit(folder, path, tmp_path / "states", dtype=torch.float64).tensors
    wanted = Oracle(folder, path).fit()
    assert found.keys() == wanted.keys() and found
    for name, weight in wanted.items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], weight, rtol=1e-8, atol=1e-9)


def test_the_last_layer_before_each_run_and_every_later_one_is_fitted(saved, tmp_path):
    """Layers before the first dropped one stay as they are: there the child is the parent."""
    found = fit(saved(), {2, 5}, tmp_path / "states").tensors
    numbers = Counter(int(name.split(".")[2]) for name in found)
    assert {1, 4} <= numbers.keys() <= {1, 3, 4, 6, 7}


def test_a_fit_is_rounded_once_to_what_is_stored(saved, tmp_path):
    """A checkpoint in bfloat16 that is computed with in float32: what is fitted is a number of bfloat16, and the best of it."""
    folder = saved("llama", torch.bfloat16)
    found = fit(folder, {3}, tmp_path / "states", dtype=torch.float32).tensors
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    wider = tmp_path / "wider"
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(wider)
    exact = fit(wider, {3}, tmp_path / "more", dtype=torch.float32).tensors
    name = "model.layers.2.self_attn.o_proj.weight"  # fitted before anything was rounded
    assert torch.equal(found[name], exact[name].to(torch.bfloat16))


# Cases in which the answer is known.


def edit(folder, target, change):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        change(model.model.layers)
    model.save_pretrained(target)
    return target


def test_a_layer_that_its_neighbour_can_do_the_work_of_is_made_up_for_entirely(saved, tmp_path, monkeypatch):
    """Neither's attention gives anything, layer 3's MLP sees what layer 2's does, and that gives nothing: it can give what layer 3 gave."""

    def change(layers):
        layers[2].self_attn.v_proj.weight.zero_()
        layers[2].mlp.down_proj.weight.zero_()
        layers[3].self_attn.v_proj.weight.zero_()
        for name in ("mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm"):
            layers[3].get_submodule(name).weight.copy_(layers[2].get_submodule(name).weight)

    monkeypatch.setattr(layer_fit, "RIDGE", 1e-12)
    folder = edit(saved("llama", torch.float64), tmp_path / "m", change)
    found = fit(folder, {3}, tmp_path / "states", dtype=torch.float64).tensors
    wanted = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).model.layers[3].mlp.down_proj.weight
    torch.testing.assert_close(found["model.layers.2.mlp.down_proj.weight"], wanted.detach(), rtol=1e-6, atol=1e-7)
    for name, weight in found.items():  # all others had nothing to make up for
        if "layers.2.mlp" not in name:
            before = open_checkpoint(folder).tensors[name]
            old = torch.frombuffer(bytearray(b"".join(before.chunks())), dtype=torch.float64).reshape(before.shape)
            torch.testing.assert_close(weight, old, rtol=1e-6, atol=1e-7)


def test_without_a_layer_that_does_nothing_no_weight_is_changed(saved, tmp_path):
    def change(layers):
        layers[4].self_attn.o_proj.weight.zero_()
        layers[4].mlp.down_proj.weight.zero_()

    folder = edit(saved("llama", torch.float64), tmp_path / "m", change)
    found = fit(folder, {4}, tmp_path / "states", dtype=torch.float64)
    assert (dict(found.tensors), found.notes) == ({}, ())


def test_nothing_is_dropped(saved, tmp_path):
    assert dict(fit(saved(), (), tmp_path / "states").tensors) == {}


@pytest.mark.parametrize("count", [1, 4])
def test_few_samples_are_fitted_on_too(count, saved, tmp_path):
    """With fewer than five none can be set apart to decide whether a fit helps."""
    parts = Parts(open_checkpoint(saved()))
    found = refit(parts, make_batches(samples(count), 100), frozenset({3}), States(tmp_path / "states"))
    assert found.tensors


# How it is run.


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_each_layer_is_read_once(path, saved, tmp_path):
    parts = Parts(open_checkpoint(saved()))
    fit(saved(), path, tmp_path / "states", parts=parts)
    assert parts.loads == DEPTH


def contents(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}


def test_the_parents_files_stay_as_they_are(saved, tmp_path):
    before = contents(saved())
    fit(saved(), {2, 3, 6}, tmp_path / "states")
    assert contents(saved()) == before


def test_layers_that_stay_loaded_are_not_changed(saved, tmp_path):
    """The second fit of one process is that of a process of its own, and so is one whose layers are read anew."""
    parts = Parts(open_checkpoint(saved()), resident=True)
    first = fit(saved(), {2, 3, 6}, tmp_path / "1", parts=parts).tensors
    second = fit(saved(), {1, 4}, tmp_path / "2", parts=parts).tensors
    assert parts.loads == DEPTH
    equal(first, fit(saved(), {2, 3, 6}, tmp_path / "3").tensors)
    equal(second, fit(saved(), {1, 4}, tmp_path / "4").tensors)
    fresh = Parts(open_checkpoint(saved()))
    for number in range(DEPTH):
        equal(dict(parts.layer(number).named_parameters()), dict(fresh.layer(number).named_parameters()))


class Killed(Exception):
    pass


def interrupt(monkeypatch, after):
    """Let a layer fail when it has been run so many times."""
    step, left = Parts.step, [after]

    def counted(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return step(self, *arguments)

    monkeypatch.setattr(Parts, "step", counted)


@pytest.mark.parametrize("path", [{2, 3, 6}, {0, 5}], ids=name_of)
def test_a_killed_fit_goes_on_after_the_last_fitted_layer(path, saved, tmp_path, monkeypatch):
    kept = [number for number in range(DEPTH) if number not in path]
    runs, step = [0], Parts.step
    with monkeypatch.context() as counting:
        counting.setattr(Parts, "step", lambda self, *given: runs.__setitem__(0, runs[0] + 1) or step(self, *given))
        wanted = fit(saved(), path, tmp_path / "whole").tensors
    for place, after in enumerate((len(batches()) + 1, runs[0] // 3, runs[0] * 5 // 6)):
        folder = tmp_path / str(place)
        with monkeypatch.context() as killing:
            interrupt(killing, after)
            with pytest.raises(Killed):
                fit(saved(), path, folder)
        parts, left = Parts(open_checkpoint(saved())), States(folder)
        parent, own = left.part("parent").finished()[0], kept[left.part("child").finished()[0]]
        equal(fit(saved(), path, folder, parts=parts).tensors, wanted)
        assert parts.loads == DEPTH - parent + (own < parent)  # the parent may have gone through the layer that was being fitted
    assert own > 5


def test_a_finished_fit_reads_no_layer(saved, tmp_path):
    wanted = fit(saved(), {2, 3, 6}, tmp_path / "states")
    parts = Parts(open_checkpoint(saved()))
    equal(fit(saved(), {2, 3, 6}, tmp_path / "states", parts=parts).tensors, wanted.tensors)
    assert parts.loads == 0


def test_fitted_weights_stand_on_disk_and_damaged_ones_are_fitted_again(saved, tmp_path):
    """What is noted after each layer names the weights and does not hold them."""
    wanted = dict(fit(saved(), {2, 3, 6}, tmp_path / "wanted").tensors)
    fitted = fit(saved(), {2, 3, 6}, tmp_path / "states")
    held = sum(weight.nbytes for weight in wanted.values())
    assert sum(mark.stat().st_size for mark in (tmp_path / "states" / "child").glob("*/done")) < held / 2
    files = sorted((tmp_path / "states" / "fitted").glob("*/*.pt"))
    assert len(files) == len(wanted)
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"?")
    with pytest.raises(DowncycleError, match="is damaged or gone, and the rest is deleted now; run the same once more"):
        dict(fitted.tensors)
    parts = Parts(open_checkpoint(saved()))
    equal(fit(saved(), {2, 3, 6}, tmp_path / "states", parts=parts).tensors, wanted)
    assert parts.loads == DEPTH


# Families.


IMPROVED = [
    *("gpt2", "gemma2", "olmo2", "mixtral", "qwen2_moe", "falcon", "gptj", "opt"),
    "glm_moe_dsa",  # layers that cannot be run without what an earlier one hands on
    "mllama",  # layers that are passed over where there is no picture
]
REFUSED = {
    "zaya": "none of the layers to fit has a map whose output is added to the hidden states",
    "deepseek_v4": "none of the layers to fit has a map whose output is added to the hidden states",
}


def far(folder, fitted, path):
    """How far the child's last hidden states are from the parent's, on samples that nothing was fitted to."""
    save_fitted(folder / "fitted" / "one.safetensors", fitted)
    parent = open_checkpoint(folder)
    child = with_fitted(parent, open_fitted(folder / "fitted" / "one.safetensors"))
    ends = [last_states(Parts(one), left_out) for one, left_out in ((parent, ()), (child, path))]
    return float((ends[0] - ends[1]).norm())


def last_states(parts, path):
    rows = []
    with torch.inference_mode():
        for batch in batches(seed=1):
            state, ids = None, torch.from_numpy(batch.ids)
            for number in range(parts.depth):
                state = state if number in path else parts.step(parts.layer(number), number, ids, state)
            rows.append(state.hidden.flatten().double())
    return torch.cat(rows)


@pytest.mark.parametrize("name", IMPROVED)
def test_families_come_closer_to_the_parent(name, tmp_path):
    if name not in FAMILIES:
        pytest.skip("this transformers does not know it")
    tiny_model(name).save_pretrained(tmp_path)
    path = {2, 3, 6}
    fitted = fit(tmp_path, path, tmp_path / "states")
    assert fitted.tensors
    assert far(tmp_path, fitted.tensors, path) < 0.95 * far(tmp_path, {}, path)


@pytest.mark.parametrize(("name", "why"), REFUSED.items())
def test_families_that_cannot_be_fitted_are_refused(name, why, tmp_path):
    if name not in FAMILIES:
        pytest.skip("this transformers does not know it")
    tiny_model(name).save_pretrained(tmp_path)
    with pytest.raises(UnsuitableError, match=why) as refusal:
        fit(tmp_path, {2, 3}, tmp_path / "states")
    assert "\n" not in str(refusal.value)


def test_packed_weights_are_refused(saved, tmp_path):
    folder = shutil.copytree(saved(), tmp_path / "m")
    config = tiny_config("llama")
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.architectures = [model_class(config).__name__]
    config.save_pretrained(folder)
    parts = Parts(open_checkpoint(folder))
    with pytest.raises(UnsuitableError, match="its weights are packed, and cannot be fitted; try --compensate none"):
        fit(folder, {3}, tmp_path / "states", parts=parts)
    packing = transformers.BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(UnsuitableError, match="its weights are packed, and cannot be fitted; give another --load"):
        fit(saved(), {3}, tmp_path / "states", quantization_config=packing)
    assert parts.loads == 0


def test_a_layer_that_holds_no_number_is_named(saved, tmp_path):
    def change(layers):
        layers[3].mlp.up_proj.weight[0, 0] = torch.nan

    folder = edit(saved("llama", torch.float64), tmp_path / "m", change)
    with pytest.raises(DowncycleError, match="the output of layer 3 is not finite, as its weight mlp.up_proj.weight holds NaN") as refusal:
        fit(folder, {2}, tmp_path / "states", dtype=torch.float64)
    assert not isinstance(refusal.value, UnsuitableError)
