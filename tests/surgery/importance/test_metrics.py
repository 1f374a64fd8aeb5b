"""Every metric equals its formula, computed naively on whole tensors or with as many digits as it takes."""

import json
import math
from dataclasses import asdict

import pytest

torch = pytest.importorskip("torch")
mpmath = pytest.importorskip("mpmath")

from downcycle.surgery.importance import metrics  # noqa: E402
from downcycle.surgery.importance.metrics import Influence, angular_triangle, counts, last_tokens, magnitude, taylor  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(11)


def _states(*shape, depths=2, dtype=torch.float32):
    states = [torch.randn(*shape)]
    while len(states) < depths:
        states.append(states[-1] + 0.7 * torch.randn(*shape))
    return [state.to(dtype) for state in states]


def _cosine(left, right):
    """One pair of vectors, entry by entry."""
    pairs = list(zip(left.tolist(), right.tolist(), strict=True))
    dot, ll, rr = (math.fsum(f) for f in ([x * y for x, y in pairs], [x * x for x, _ in pairs], [y * y for _, y in pairs]))
    return dot / math.sqrt(ll * rr)


def _influence(before, after):
    width = before.shape[-1]
    pairs = zip(before.reshape(-1, width), after.reshape(-1, width), strict=True)
    values = [1 - _cosine(*pair) for pair in pairs]
    return sum(values) / len(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 7, 16), (4, 2, 5, 16), (1, 16)])  # the second is Gemma 3n's
def test_block_influence_is_one_minus_the_mean_cosine(shape, dtype):
    before, after = _states(*shape, dtype=dtype)
    assert Influence().add(before, after).score == pytest.approx(_influence(before, after), rel=1e-12)


def test_every_state_weighs_the_same_in_batches_of_any_size():
    before, after = _states(10, 8)
    whole = Influence().add(before, after)
    parts = Influence().add(before[:3], after[:3]).add(before[3:4], after[3:4]).add(before[4:], after[4:])
    assert parts.states == whole.states == 10
    assert parts.score == pytest.approx(_influence(before, after), rel=1e-12)
    assert parts.score != pytest.approx((_influence(before[:3], after[:3]) + _influence(before[3:], after[3:])) / 2, rel=1e-3)


def test_block_influence_goes_on_from_what_was_saved():
    before, after = _states(12, 8)
    saved = json.loads(json.dumps(asdict(Influence().add(before[:5], after[:5]))))
    assert Influence(**saved).add(before[5:], after[5:]) == Influence().add(before[:5], after[:5]).add(before[5:], after[5:])


def test_block_influence_at_its_limits():
    state = torch.randn(6, 32)
    assert Influence().add(state, state).score == 0
    assert Influence().add(state, 3 * state).score == pytest.approx(0, abs=1e-12)
    assert Influence().add(state, -state).score == 2
    assert Influence().add(torch.zeros(6, 32), state).score == 1  # no direction: at right angles
    assert all(Influence().add(one, 3 * one).score >= 0 for one in torch.randn(400, 1, 7))
    huge = torch.full((2, 32), 3e38)
    assert Influence().add(huge, huge).score == 0
    assert math.isnan(Influence().add(torch.full((1, 4), math.nan), torch.ones(1, 4)).score)


def test_chunks_change_nothing(monkeypatch):
    before, after, *more = _states(9, 16, depths=5)
    weight, gradient = torch.randn(13, 11), torch.randn(13, 11)
    whole = Influence().add(before, after).score, angular_triangle([before, after, *more]), taylor([(weight, gradient)])
    monkeypatch.setattr(metrics, "CHUNK", 40)
    parts = Influence().add(before, after).score, angular_triangle([before, after, *more]), taylor([(weight, gradient)])
    assert parts[0] == pytest.approx(whole[0], rel=1e-13)
    assert [value for row in parts[1] for value in row] == pytest.approx([value for row in whole[1] for value in row], rel=1e-13)
    assert parts[2] == pytest.approx(whole[2], rel=1e-13)


def test_the_triangle_holds_every_start_and_length():
    states = _states(6, 24, depths=8)
    triangle = angular_triangle(states)
    assert [len(row) for row in triangle] == [7, 6, 5, 4, 3, 2, 1]
    for size, row in enumerate(triangle, start=1):
        for start, distance in enumerate(row):
            pairs = zip(states[start], states[start + size], strict=True)
            angles = [math.acos(_cosine(*pair)) / math.pi for pair in pairs]
            assert distance == pytest.approx(sum(angles) / 6, rel=1e-12)


def _exact_angle(left, right):
    with mpmath.workdps(60):
        dot, ll, rr = (mpmath.fsum(mpmath.mpf(x) * mpmath.mpf(y) for x, y in zip(a, b, strict=True)) for a, b in
                       ((left, right), (left, left), (right, right)))  # fmt: skip
        return float(mpmath.acos(dot / mpmath.sqrt(ll * rr)) / mpmath.pi)


@pytest.mark.parametrize("away", [1e-7, 1e-5, 1e-3, 1.0])
def test_small_angles_keep_their_digits(away):
    one = torch.randn(1, 64, dtype=torch.float64)
    other = 5 * one + away * torch.randn(1, 64, dtype=torch.float64)
    for right in (other, -other):
        exact = _exact_angle(one[0].tolist(), right[0].tolist())
        assert angular_triangle([one, right])[0][0] == pytest.approx(exact, rel=1e-8)
    by_arccos = torch.nn.functional.cosine_similarity(one, other).acos().item() / math.pi
    assert away > 1e-7 or abs(by_arccos / _exact_angle(one[0].tolist(), other[0].tolist()) - 1) > 1e-4  # what is avoided


def test_angles_at_their_limits():
    state = torch.randn(3, 16)
    assert angular_triangle([state, state])[0][0] == 0
    assert angular_triangle([state, 2 * state])[0][0] == pytest.approx(0, abs=1e-15)
    assert angular_triangle([state, -state])[0][0] == 1
    assert angular_triangle([torch.tensor([[1.0, 0]]), torch.tensor([[0, 4.0]])])[0][0] == 0.5
    assert angular_triangle([torch.zeros(1, 16), state[:1]])[0][0] == 0.5
    assert math.isnan(angular_triangle([state, torch.full((3, 16), math.nan)])[0][0])


@pytest.mark.parametrize("shape", [(2, 5, 8), (4, 2, 5, 8), (5, 8)])
def test_last_tokens_are_a_float32_copy_of_the_last_ones(shape):
    state = torch.randn(*shape).bfloat16()
    last = last_tokens(state)
    assert last.dtype == torch.float32
    assert torch.equal(last.bfloat16(), state.reshape(-1, 5, 8)[:, 4])
    single = torch.randn(*shape)
    held = last_tokens(single)
    assert held.untyped_storage().nbytes() == held.numel() * 4  # not a view that keeps the whole batch in memory


def test_taylor_is_the_sum_of_weight_times_gradient_in_absolute_value():
    layer = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3, bias=False)).double()
    for _ in range(2):  # two batches, added up before the absolute value
        layer(torch.randn(7, 6, dtype=torch.float64)).square().mean().backward()
    linear = [layer[0].weight, layer[2].weight]
    expected = sum(abs(w * g) for weight in linear for w, g in zip(weight.flatten().tolist(), weight.grad.flatten().tolist(), strict=True))
    assert taylor((weight, weight.grad) for weight in layer.parameters()) == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(sum((w.detach() * w.grad).abs().sum().item() for w in linear), rel=1e-12)


def test_norms_and_biases_do_not_count():
    norm, matrix, experts = torch.ones(4), torch.ones(4, 4), torch.ones(2, 4, 4)
    assert [counts(weight) for weight in (norm, matrix, experts)] == [False, True, True]
    assert magnitude([norm, matrix, experts]) == 48
    assert taylor([(norm, norm), (matrix, -matrix)]) == 16
    assert taylor([]) == magnitude([]) == 0


def test_magnitude_is_exact_where_float32_is_not():
    weight = torch.cat([torch.full((1, 1), 2.0**25), torch.full((1, 4096), -1.0)], dim=1)
    assert magnitude([weight]) == 2**25 + 4096
    small = torch.randn(300, 50).bfloat16()
    assert magnitude([small.T]) == pytest.approx(math.fsum(abs(w) for w in small.flatten().tolist()), rel=1e-13)


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 4, 8\) before a layer and \(4, 8\) after"):
        Influence().add(torch.ones(1, 4, 8), torch.ones(4, 8))
    for states in ([torch.ones(2, 4)], [torch.ones(0, 4)] * 2, [torch.ones(2, 4), torch.ones(1, 4)]):
        with pytest.raises(ValueError, match="must be alike"):
            angular_triangle(states)
    with pytest.raises(ValueError, match="a gradient of"):
        taylor([(torch.ones(4, 4), torch.ones(4, 1))])
    for packed in (torch.ones(8, 1, dtype=torch.uint8), torch.ones(8, 8).to(torch.float8_e4m3fn)):
        with pytest.raises(TypeError, match="packed or scaled"):
            magnitude([packed])
