"""A layer's fit against numpy's least squares on what its maps were given, and what it does with fits that do not help."""

from functools import partial

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np  # noqa: E402

from downcycle.surgery.compensation.layer_fit import RIDGE, Sample, fit_layer, streams_at  # noqa: E402
from downcycle.surgery.compensation.output import Writer  # noqa: E402
from downcycle.surgery.importance.pruned import find_stack  # noqa: E402

from tiny_models import tiny_model  # noqa: E402

DEPTH, BATCH, TOKENS, LAYER = 8, 10, 13, 2
CHECKED = torch.arange(BATCH) % 5 == 4


def hidden(returned):
    return returned[0] if isinstance(returned, tuple) else returned


class Layer:
    """A layer of a family in float32, and two batches that its model gives to it."""

    def __init__(self, family):
        self.model = tiny_model(family).requires_grad_(False)
        self.layer = self.model.get_submodule(find_stack(self.model, DEPTH))[LAYER]
        random = torch.Generator().manual_seed(3)
        self.given = [self._given(torch.randint(10, 60, (BATCH, TOKENS), generator=random)) for _ in range(2)]

    def _given(self, ids):
        seen = []
        handle = self.layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        self.model(input_ids=ids, use_cache=False)
        handle.remove()
        return seen[0]

    def run(self, place):
        args, kwargs = self.given[place]
        return hidden(self.layer(*args, **kwargs))

    def seen(self, name):
        """What a module is given and gives, [rows of both batches that are fitted on, width]."""
        pairs = []
        handle = self.layer.get_submodule(name).register_forward_hook(lambda module, args, output: pairs.append((args[0], output)))
        for place in range(2):
            self.run(place)
        handle.remove()
        return [torch.cat([pair[i].reshape(BATCH, TOKENS, -1)[~CHECKED].flatten(0, 1) for pair in pairs]).double() for i in range(2)]

    def fit(self, writers, wanted, between=lambda: {}):
        batches = [Sample(partial(self.run, place), partial(wanted.__getitem__, place), between, CHECKED) for place in range(2)]
        return fit_layer(self.layer, writers, batches, dict.fromkeys([one.name for one in writers], torch.float32))

    def error(self, wanted, chosen):
        return sum(float((self.run(place) - wanted[place])[chosen].square().sum()) for place in range(2))


def noise(layer, seed=5):
    return [torch.randn(layer.run(0).shape, generator=torch.Generator().manual_seed(seed + place)) * 0.1 for place in range(2)]


def towards(layer, module, scale=0.3):
    """What would leave the layer, were a module's weight another, and noise."""
    weight = layer.layer.get_submodule(module).weight
    kept = weight.clone()
    weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)) * scale
    wanted = [layer.run(place) + some for place, some in enumerate(noise(layer))]
    weight.copy_(kept)
    return wanted


def fit_rows(values):
    return torch.cat([value[~CHECKED].flatten(0, 1) for value in values]).double()


@pytest.mark.parametrize(
    ("family", "name", "coefficient"),
    [("llama", "mlp.down_proj", 1.0), ("gpt2", "mlp.c_proj", 1.0), ("opt", "fc2", 1.0), ("minicpm3", "mlp.down_proj", 1.4 / 8**0.5)],
)
def test_weight_is_the_ridge_solution(family, name, coefficient):
    layer = Layer(family)
    wanted, module = towards(layer, name), layer.layer.get_submodule(name)
    before, given = module.weight.clone(), layer.seen(name)[0].numpy()
    lacks = fit_rows([wanted[place] - layer.run(place) for place in range(2)]).numpy() / coefficient
    ridge = RIDGE * (given**2).sum(0).mean()
    system = np.concatenate([given, np.eye(given.shape[1]) * ridge**0.5])
    solution = np.linalg.lstsq(system, np.concatenate([lacks, np.zeros((given.shape[1], lacks.shape[1]))]), rcond=None)[0]
    errors = layer.error(wanted, CHECKED)
    assert layer.fit([Writer(name, coefficient)], wanted) == ([name], [])
    np.testing.assert_allclose(module.weight - before, solution if family == "gpt2" else solution.T, rtol=1e-3, atol=1e-5)
    assert layer.error(wanted, CHECKED) < 0.5 * errors


@pytest.mark.parametrize(("family", "name", "offset"), [("gemma2", "post_feedforward_layernorm", 1.0), ("bert", "output.LayerNorm", 0.0)])
def test_norm_is_fitted_channel_by_channel(family, name, offset):
    layer = Layer(family)
    wanted, module = towards(layer, name), layer.layer.get_submodule(name)
    before, bias = (module.weight + offset).double(), getattr(module, "bias", None)
    scaled = layer.seen(name)[1] - (0 if bias is None else bias)
    lacks = fit_rows([wanted[place] - layer.run(place) for place in range(2)])
    squares = scaled.square().sum(0)
    factors = 1 + (scaled * lacks).sum(0) / (squares + RIDGE * squares.mean())
    assert layer.fit([Writer(name, 1.0, norm=True, offset=offset)], wanted) == ([name], [])
    torch.testing.assert_close((module.weight + offset).double(), before * factors, rtol=1e-4, atol=1e-5)


def test_attention_is_fitted_to_the_stream_between():
    layer = Layer("llama")
    writers = [Writer("self_attn.o_proj", 1.0, "post_attention_layernorm"), Writer("mlp.down_proj", 1.0)]
    weight, given = layer.layer.self_attn.o_proj.weight, layer.seen("self_attn.o_proj")[0]
    kept, streams = weight.clone(), layer.seen("post_attention_layernorm")[0]
    weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(7))
    lacks, wanted, places = layer.seen("post_attention_layernorm")[0] - streams, [], []
    for place in range(2):
        with streams_at(layer.layer, ["post_attention_layernorm", "no such module"]) as seen:
            wanted.append(layer.run(place))
        places.append(dict(seen))
    weight.copy_(kept)
    assert [list(place) for place in places] == [["post_attention_layernorm"]] * 2
    batches = [Sample(partial(layer.run, p), partial(wanted.__getitem__, p), partial(places.__getitem__, p), CHECKED) for p in range(2)]
    before = layer.error(wanted, CHECKED)
    changed, _ = fit_layer(layer.layer, writers, batches, {one.name: torch.float32 for one in writers})
    assert changed == ["self_attn.o_proj", "mlp.down_proj"] and layer.error(wanted, CHECKED) < 0.05 * before
    gram = given.T @ given
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    torch.testing.assert_close((weight - kept).double().T, torch.linalg.solve(gram + ridge, given.T @ lacks), rtol=1e-3, atol=1e-4)


def test_inner_map_is_left_where_the_parent_has_no_such_place():
    layer = Layer("llama")
    wanted = towards(layer, "mlp.down_proj")
    writers = [Writer("self_attn.o_proj", 1.0, "post_attention_layernorm"), Writer("mlp.down_proj", 1.0)]
    assert layer.fit(writers, wanted)[0] == ["mlp.down_proj"]


def test_fit_that_does_not_help_others_is_left():
    """What is wanted of the samples that are fitted on is noise, and of the others what the layer gives already."""
    layer = Layer("llama")
    wanted = [layer.run(place) for place in range(2)]
    for some, rest in zip(wanted, noise(layer), strict=True):
        some[~CHECKED] += 30 * rest[~CHECKED]
    before = layer.layer.mlp.down_proj.weight.clone()
    assert layer.fit([Writer("mlp.down_proj", 1.0)], wanted) == ([], [])
    assert torch.equal(layer.layer.mlp.down_proj.weight, before)


def test_samples_that_decide_are_not_fitted_on():
    """A little noise in what is wanted of them changes no fitted number."""
    found = []
    for much in (0.0, 0.01):
        layer = Layer("llama")
        wanted = towards(layer, "mlp.down_proj")
        for some, rest in zip(wanted, noise(layer), strict=True):
            some[CHECKED] += much * rest[CHECKED]
        assert layer.fit([Writer("mlp.down_proj", 1.0)], wanted)[0] == ["mlp.down_proj"]
        found.append(layer.layer.mlp.down_proj.weight.clone())
    assert torch.equal(*found)


def test_where_too_few_samples_are_there_to_leave_one_out_all_decide():
    layer, none = Layer("llama"), torch.zeros(BATCH, dtype=torch.bool)
    wanted = towards(layer, "mlp.down_proj")
    batches = [Sample(partial(layer.run, place), partial(wanted.__getitem__, place), dict, none) for place in range(2)]
    before = layer.error(wanted, ~none)
    assert fit_layer(layer.layer, [Writer("mlp.down_proj", 1.0)], batches, {"mlp.down_proj": torch.float32})[0] == ["mlp.down_proj"]
    assert layer.error(wanted, ~none) < 0.5 * before


def test_a_weight_is_rounded_to_what_it_is_stored_in():
    exact, rounded = Layer("llama"), Layer("llama")
    for layer, dtype in ((exact, torch.float32), (rounded, torch.bfloat16)):
        wanted = towards(layer, "mlp.down_proj")
        batches = [Sample(partial(layer.run, place), partial(wanted.__getitem__, place), dict, CHECKED) for place in range(2)]
        fit_layer(layer.layer, [Writer("mlp.down_proj", 1.0)], batches, {"mlp.down_proj": dtype})
    assert torch.equal(rounded.layer.mlp.down_proj.weight, exact.layer.mlp.down_proj.weight.to(torch.bfloat16).float())


def test_nothing_to_fit_runs_nothing():
    layer = Layer("llama")
    assert layer.fit([], [None, None]) == ([], [])
