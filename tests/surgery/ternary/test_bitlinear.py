"""BitLinear is nn.Linear at lambda 0, BitNet's arithmetic at 1, and its gradients pass straight through the roundings."""

import copy

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
from torch import nn  # noqa: E402
from torch.nn.functional import linear  # noqa: E402

from downcycle.surgery.ternary.bitlinear import BitLinear, convert, round_input, round_weight, set_strength, weight_scale  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]


def pair(dtype=torch.float32, bias=True, seed=0):
    """A linear map and the same one converted."""
    torch.manual_seed(seed)
    plain = nn.Linear(48, 32, bias=bias, dtype=dtype)
    ternary = copy.deepcopy(plain)
    convert(ternary)
    return plain, ternary


def inputs(dtype=torch.float32, seed=1):
    return torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(seed)).to(dtype)


# The formulas, by numpy in float64.


def by_hand_weight(weight):
    weight = weight.detach().double().numpy()
    scale = max(np.abs(weight).mean(), 1e-5)
    return np.clip(np.round(weight / scale), -1, 1) * scale


def by_hand_input(value):
    value = value.double().numpy()
    scale = 127 / np.maximum(np.abs(value).max(-1, keepdims=True), 1e-5)
    return np.clip(np.round(value * scale), -128, 127) / scale


@pytest.mark.parametrize("dtype", DTYPES)
def test_roundings_are_the_published_formulas(dtype):
    plain, _ = pair(dtype)
    np.testing.assert_allclose(round_weight(plain.weight).detach().numpy(), by_hand_weight(plain.weight), rtol=1e-6)
    np.testing.assert_allclose(round_input(inputs(dtype)).numpy(), by_hand_input(inputs(dtype)), rtol=1e-6, atol=1e-7)
    assert len(round_weight(plain.weight).unique()) == 3


def test_zeros_stay_zeros():
    assert not round_weight(torch.zeros(4, 4)).any() and not round_input(torch.zeros(2, 4)).any()
    assert float(weight_scale(torch.zeros(4, 4))) == pytest.approx(1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_lambda_0_it_is_linear_bit_for_bit(dtype):
    plain, ternary = pair(dtype)
    x, y = inputs(dtype).requires_grad_(), inputs(dtype).requires_grad_()
    one, other = plain(x), ternary(y)
    assert torch.equal(one, other)
    one.square().sum().backward()
    other.square().sum().backward()
    assert (
        torch.equal(x.grad, y.grad)
        and torch.equal(plain.weight.grad, ternary.weight.grad)
        and torch.equal(plain.bias.grad, ternary.bias.grad)
    )


@pytest.mark.parametrize("strength", [0.001, 0.25, 0.5, 0.999, 1.0])
def test_forward_is_the_blend_of_value_and_rounding(strength):
    plain, ternary = pair()
    set_strength(ternary, strength)
    x, weight = inputs().double().numpy(), plain.weight.detach().double().numpy()
    x = x + strength * (by_hand_input(inputs()) - x)
    weight = weight + strength * (by_hand_weight(plain.weight) - weight)
    np.testing.assert_allclose(ternary(inputs()).detach().numpy(), x @ weight.T + plain.bias.detach().numpy(), atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_lambda_1_the_operands_are_exactly_the_roundings(dtype):
    plain, ternary = pair(dtype)
    set_strength(ternary, 1)
    x = inputs(dtype)
    wanted = linear(round_input(x).to(dtype), round_weight(plain.weight).to(dtype), plain.bias)
    assert torch.equal(ternary(x), wanted)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_gradients_pass_straight_through(strength):
    """y = x^ W^T: as if x^ and W^ were what is trained."""
    _, ternary = pair(bias=False)
    set_strength(ternary, strength)
    x = inputs().requires_grad_()
    near, weight = (
        torch.lerp(value, rounded, strength).detach().requires_grad_()
        for value, rounded in ((x.detach(), round_input(x.detach())), (ternary.weight.detach(), round_weight(ternary.weight.detach())))
    )
    ternary(x).sin().sum().backward()
    linear(near, weight).sin().sum().backward()
    torch.testing.assert_close(x.grad, near.grad)
    torch.testing.assert_close(ternary.weight.grad, weight.grad)
    assert float(x.grad.norm()) > 0 and float(ternary.weight.grad.norm()) > 0


def test_converting_keeps_the_parameter_and_saves_nothing_new():
    plain, ternary = pair()
    weight = ternary.weight
    assert isinstance(ternary, BitLinear) and isinstance(ternary, nn.Linear)
    assert ternary.weight is weight and ternary.state_dict().keys() == plain.state_dict().keys()


def test_lambda_is_set_in_every_map_of_a_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    convert(model[0])
    convert(model[1][0])
    set_strength(model, 0.7)
    assert [float(one.strength) for one in (model[0], model[1][0])] == pytest.approx([0.7, 0.7])


def test_under_autocast_the_product_is_of_16_bits():
    plain, ternary = pair()
    set_strength(ternary, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = ternary(inputs())
        wanted = linear(round_input(inputs()), round_weight(plain.weight), plain.bias)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)
    found.float().sum().backward()
    assert ternary.weight.grad.dtype == torch.float32 and float(ternary.weight.grad.norm()) > 0


def test_gradient_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    _, once = pair()
    twice = copy.deepcopy(once)
    for one in (once, twice):
        set_strength(one, 0.6)
    x, y = inputs().requires_grad_(), inputs().requires_grad_()
    once(x).sin().sum().backward()
    checkpoint(twice, y, use_reentrant=False).sin().sum().backward()
    assert torch.equal(x.grad, y.grad) and torch.equal(once.weight.grad, twice.weight.grad)


# The norm.


def with_norm(dtype=torch.float32):
    """A converted map, the same one with a norm, and the norm as transformers computes it."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    _, plain = pair(dtype)
    normed = copy.deepcopy(plain)
    normed.__class__ = nn.Linear
    convert(normed, norm=True)
    theirs = LlamaRMSNorm(48, eps=1e-6).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(torch.linspace(0.5, 2, 48))
        normed.rms_norm.weight.copy_(theirs.weight)
    return plain, normed, theirs


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_transformers_bit_for_bit(dtype, strength):
    plain, normed, theirs = with_norm(dtype)
    for one in (plain, normed):
        set_strength(one, strength)
    x, y = (3 * inputs(dtype)).requires_grad_(), (3 * inputs(dtype)).requires_grad_()
    found, wanted = normed(x), plain(theirs(y))
    assert found.dtype == dtype and torch.equal(found, wanted) and not torch.equal(found, plain(x))
    found.float().sin().sum().backward()
    wanted.float().sin().sum().backward()
    assert torch.equal(x.grad, y.grad) and torch.equal(normed.rms_norm.weight.grad, theirs.weight.grad)
    assert float(theirs.weight.grad.float().norm()) > 0


def test_under_autocast_the_norm_is_computed_in_float32():
    plain, normed, theirs = with_norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(normed(inputs()), plain(theirs(inputs())))


def test_a_fresh_norm_has_weight_1_and_is_saved_under_the_name_that_transformers_reads():
    _, ternary = pair(torch.bfloat16)
    normed = nn.Linear(48, 32, bias=False, dtype=torch.bfloat16)
    convert(normed, norm=True)
    assert torch.equal(normed.rms_norm.weight, torch.ones(48, dtype=torch.bfloat16))
    assert list(normed.state_dict()) == ["weight", "rms_norm.weight"] and list(ternary.state_dict()) == ["weight", "bias"]


def test_lambda_is_a_number_where_weights_are_yet_to_come():
    """As in the processes that get a model's weights from the first one."""
    with torch.device("meta"):
        later = nn.Linear(48, 32)
    convert(later, norm=True)
    set_strength(later, 0.5)
    assert float(later.strength) == 0.5 and later.rms_norm.weight.is_meta


def test_lambda_moves_without_compiling_anew():
    """Through dynamo and the traced autograd of torch.compile; lambda is a tensor, so that it is no constant of the graph."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    _, ternary = pair()
    compiled = torch.compile(ternary, backend=counter)
    with torch.compiler.set_stance("default"):  # a packed model that was measured in this process turned compiling off
        for strength in (0.0, 0.5, 1.0):
            set_strength(ternary, strength)
            x, y = inputs().requires_grad_(), inputs().requires_grad_()
            found, wanted = compiled(x), ternary(y)
            torch.testing.assert_close(found, wanted)
            found.sin().sum().backward()
            wanted.sin().sum().backward()
            torch.testing.assert_close(x.grad, y.grad)
    assert counter.frame_count == 1
