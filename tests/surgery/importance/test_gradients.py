"""Taylor scores layer by layer are those of the whole model's own backward pass."""

import pytest

torch = pytest.importorskip("torch")
from torch.nn.functional import cross_entropy  # noqa: E402

from downcycle import DowncycleError, open_checkpoint  # noqa: E402
from downcycle.surgery.importance.gradients import taylor_scores  # noqa: E402
from downcycle.surgery.importance.parts import Parts  # noqa: E402
from downcycle.surgery.importance.paths import WHOLE, run_paths  # noqa: E402
from downcycle.surgery.importance.pruned import find_stack  # noqa: E402
from downcycle.surgery.importance.states import States  # noqa: E402

from tiny_models import DEPTH  # noqa: E402


def taylor(parts, batches, folder, **options):
    """Run forward and back."""
    states = States(folder / "states")
    run_paths(parts, batches, [WHOLE], states, keep_states=True)
    return taylor_scores(parts, batches, states, States(folder / "gradients"), **options)


def by_autograd(model, batches):
    """The oracle: sum |w dL/dw| over a layer's matrices, L being the mean over all scored tokens."""
    tokens = sum(batch.ids.shape[1] - given for batch in batches for given in batch.given)
    model.zero_grad()
    for batch in batches:
        ids = torch.from_numpy(batch.ids)
        logits = model(input_ids=ids, use_cache=False).logits.float()
        for row, given in enumerate(batch.given):
            (cross_entropy(logits[row, given - 1 : -1], ids[row, given:], reduction="sum") / tokens).backward(retain_graph=True)
    layers = model.get_submodule(find_stack(model, DEPTH))
    weights = [[weight for weight in layer.parameters() if weight.ndim > 1 and weight.grad is not None] for layer in layers]
    return [sum((weight.double() * weight.grad.double()).abs().sum().item() for weight in layer) for layer in weights]


@pytest.mark.parametrize("family", ["llama", "gemma3n_text", "mixtral", "bloom", "glm_moe_dsa", "zaya", "openai-gpt", "mllama"])
def test_scores_are_those_of_the_whole_models_gradients(tiny, whole, batches, tmp_path, family):
    found = taylor(Parts(open_checkpoint(tiny(family))), batches, tmp_path)
    assert found == pytest.approx(by_autograd(whole(tiny(family)).model, batches), rel=1e-4, abs=1e-7)
    assert sum(score > 0 for score in found) == (DEPTH - 3 if family == "mllama" else DEPTH)


def test_of_shared_weights_the_use_in_each_layer_counts(tiny, whole, batches, tmp_path):
    """Zamba 2 has one block in several layers; autograd gives it one gradient, the sum over its uses."""
    found = taylor(Parts(open_checkpoint(tiny("zamba2"))), batches, tmp_path)
    known = by_autograd(whole(tiny("zamba2")).model, batches)
    shared = [layer for layer in range(DEPTH) if found[layer] != pytest.approx(known[layer], rel=1e-4)]
    assert shared == [1, 3, 4, 6] and all(found[layer] > 0 for layer in shared)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tiny, whole, batches, tmp_path, dtype):
    found = taylor(Parts(open_checkpoint(tiny("llama", dtype))), batches, tmp_path)
    assert found == pytest.approx(by_autograd(whole(tiny("llama", dtype)).model, batches), rel=0.05)


def test_resident_layers(tiny, batches, tmp_path):
    """Those that a forward pass loaded have gradients too, and give the same forward pass afterwards."""
    checkpoint = open_checkpoint(tiny())
    known = taylor(Parts(checkpoint), batches, tmp_path / "one by one")
    parts = Parts(checkpoint, resident=True)
    before = run_paths(parts, batches, [WHOLE], States(tmp_path / "before"))
    assert taylor(parts, batches, tmp_path / "resident") == known
    assert run_paths(parts, batches, [WHOLE], States(tmp_path / "after")) == before
    assert parts.loads == DEPTH
    weights = [weight for number in range(DEPTH) for weight in parts.layer(number).parameters()]
    assert not [weight for weight in weights if weight.requires_grad or weight.grad is not None]


def test_each_layer_is_read_once_on_the_way_back(tiny, batches, tmp_path):
    parts, told = Parts(open_checkpoint(tiny())), []
    taylor(parts, batches, tmp_path, progress=lambda *given: told.append(given))
    assert parts.loads == 2 * DEPTH
    assert told == [("going back through the layers", number, DEPTH) for number in range(DEPTH)]


def test_a_stopped_run_goes_on(tiny, batches, tmp_path):
    checkpoint = open_checkpoint(tiny("gemma3n_text"))
    known = taylor(Parts(checkpoint), batches, tmp_path / "sound")

    def stop(what, done, total):
        if done == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        taylor(Parts(checkpoint), batches, tmp_path / "s", progress=stop)
    parts = Parts(checkpoint)
    assert taylor(parts, batches, tmp_path / "s") == known
    assert parts.loads == DEPTH - 5
    assert taylor(parts, batches, tmp_path / "s") == known and parts.loads == DEPTH - 5


def test_a_damaged_gradient_is_not_used(tiny, batches, tmp_path):
    parts, states = Parts(open_checkpoint(tiny())), States(tmp_path / "states")
    run_paths(parts, batches, [WHOLE], states, keep_states=True)

    def spoil(what, done, total):
        if done == 2:
            file = next((tmp_path / "gradients" / "3").glob("*.pt"))
            file.write_bytes(file.read_bytes()[:-9] + b"123456789")

    with pytest.raises(DowncycleError, match="gradients/3/whole.*: what was left there is damaged"):
        taylor_scores(parts, batches, states, States(tmp_path / "gradients"), progress=spoil)
    found = taylor_scores(parts, batches, states, States(tmp_path / "gradients"))
    assert found == taylor_scores(parts, batches, states, States(tmp_path / "sound"))


def test_packed_weights_are_refused(tiny, batches, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    parts = Parts(open_checkpoint(tiny()), quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(DowncycleError, match=r"layer 7's self_attn.q_proj.weight is packed \(torch.int8\), and has no gradient; choose"):
        taylor(parts, batches, tmp_path)
