"""Every causal-LM family of the installed transformers is run layer by layer as the whole model runs, or refused with the reason.

The oracle is tests/families.py: the parent in memory, whose dropped layers pass on what they are given.
"""

from contextlib import suppress

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from downcycle.surgery.checkpoint import open_checkpoint  # noqa: E402
from downcycle.surgery.errors import DowncycleError  # noqa: E402
from downcycle.surgery.importance.calibration import Batch  # noqa: E402
from downcycle.surgery.importance.parts import Parts  # noqa: E402
from downcycle.surgery.importance.paths import WHOLE, run_paths  # noqa: E402
from downcycle.surgery.importance.pruned import find_stack  # noqa: E402
from downcycle.surgery.importance.states import States  # noqa: E402
from downcycle.surgery.layers import keep_layers  # noqa: E402

import families  # noqa: E402
from tiny_models import DEPTH, FAMILIES, VARIANTS, stand_in_for_timm, tiny_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet")

# All that cannot be run layer by layer, and what is said of it.
REFUSED = {
    "emu3": "lacks lm_head.weight, model.embed_tokens.weight, .*, which a Emu3ForCausalLM needs",  # as `load_model` says of it whole
    "gemma4_assistant": "does not run on text alone: inputs_embeds and shared_kv_states cannot be None",
    "gemma4_unified_assistant": "does not run on text alone: inputs_embeds and shared_kv_states cannot be None",
    "hrm_text": "each of its layers is spread over 2 lists",
    "musicgen": "it is an encoder with a decoder, and does not run on text alone",
    "musicgen_melody": "it is an encoder with a decoder, and does not run on text alone",
    "reformer": "its layers hand on two streams of hidden states",
    "rwkv": "its layers change as the model goes through them",
    "xlm": "each of its layers is spread over 4 lists",
}
UNUSED = {"mllama": {1, 4, 6}, "mllama_text_model": {1, 4, 6}}  # layers that look at images only
DROPPED = [frozenset(range(DEPTH)) - frozenset(kept) for kept in families.CUTS.values()] + [frozenset({0}), frozenset({3}), frozenset({7})]
IDS = torch.randint(10, 60, (2, 13), generator=torch.Generator().manual_seed(2))


def saved(name, folder):
    """Write a tiny model of a family; return it as stock transformers loads it whole."""
    if name == "gemma3n":
        stand_in_for_timm()
    model = tiny_model(name)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def outputs(model):
    """Run a whole model; return the hidden states that each layer returned."""
    seen = {}

    def look(number):
        def hook(module, given, returned):
            seen[number] = (returned[0] if isinstance(returned, tuple | list) else returned).clone()

        return hook

    layers: nn.Module = model.get_submodule(find_stack(model, DEPTH))
    hooks = [layer.register_forward_hook(look(number)) for number, layer in enumerate(layers)]
    logits(model)
    for hook in hooks:
        hook.remove()
    return seen


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def accepted(checkpoint):
    for path in DROPPED:
        with suppress(DowncycleError):
            keep_layers(checkpoint, sorted(set(range(DEPTH)) - path))
            yield path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_every_family_runs_as_a_whole_or_is_refused(name, tmp_path):
    model = saved(name, tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    batch = Batch(IDS.numpy(), (1, 1), (0, 1))
    if name in REFUSED:
        with pytest.raises(DowncycleError, match=f"model: .*{REFUSED[name]}") as refusal:
            run_paths(Parts(checkpoint), [batch], [WHOLE], States(tmp_path / "states"))
        assert "\n" not in str(refusal.value)
        return

    parts, paths, states = Parts(checkpoint), [*accepted(checkpoint)], States(tmp_path / "states")
    without_first = [path for path in paths if 0 in path][:1]
    alone = run_paths(parts, [batch], without_first, States(tmp_path / "first"))  # nothing has shown yet what a layer returns
    found = run_paths(parts, [batch], [WHOLE, *paths], states, keep_states=True)
    assert alone == {path: found[path] for path in without_first}

    seen = outputs(model)
    assert set(seen) == set(range(DEPTH)) - UNUSED.get(name, set())
    with torch.inference_mode():
        for number, hidden in seen.items():
            torch.testing.assert_close(states.get(number + 1, WHOLE, 0).hidden, hidden, rtol=1e-5, atol=1e-5)
        for path, losses in found.items():
            got = parts.logits(IDS, states.get(DEPTH, path, 0))
            with families.without_layers(model, sorted(path)):
                wanted = logits(model)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)
            nats = cross_entropy(wanted[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="none").view(2, -1).sum(1)
            torch.testing.assert_close(torch.tensor([one.nats for one in losses]), nats, rtol=1e-5, atol=1e-5)
