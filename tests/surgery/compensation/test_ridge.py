"""Streamed least squares against numpy's on the whole system, written out with its ridge as further rows."""

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402

from downcycle.surgery.compensation.ridge import ROWS, ChannelEquations, NormalEquations  # noqa: E402


def rows(count, width, seed):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sum_up(inputs, errors, pieces=1):
    sums = NormalEquations(inputs.shape[-1], errors.shape[-1])
    for some, lacking in zip(inputs.chunk(pieces), errors.chunk(pieces), strict=True):
        sums.add(some, lacking)
    return sums


def lstsq(inputs, errors, ridge):
    """min |A X - E|^2 + r |X|^2 is min |[A; sqrt(r) I] X - [E; 0]|^2."""
    width = inputs.shape[-1]
    system = np.concatenate([inputs.numpy(), np.eye(width) * ridge**0.5])
    wanted = np.concatenate([errors.numpy(), np.zeros((width, errors.shape[-1]))])
    return np.linalg.lstsq(system, wanted, rcond=None)[0]


def mean_square(inputs):
    return float((inputs**2).sum(0).mean())


@pytest.mark.parametrize("ridge", [1e-9, 0.1, 10.0])
def test_change_is_what_lstsq_finds(ridge):
    inputs, errors = rows(200, 12, 0) * torch.logspace(-1, 1, 12, dtype=torch.float64), rows(200, 5, 1)
    change, note = sum_up(inputs, errors).solve(ridge)
    assert note == "" and change.shape == (5, 12) and change.dtype == torch.float64
    np.testing.assert_allclose(change.T, lstsq(inputs, errors, ridge * mean_square(inputs)), rtol=1e-9, atol=1e-12)


def test_map_that_made_the_errors_is_found_again():
    inputs, truth = rows(300, 8, 2), rows(3, 8, 3)
    change, _ = sum_up(inputs, inputs @ truth.T).solve(1e-12)
    np.testing.assert_allclose(change, truth, rtol=1e-8)


def test_sums_do_not_depend_on_how_rows_are_given():
    inputs, errors = rows(2 * ROWS + 17, 6, 4).float(), rows(2 * ROWS + 17, 4, 5).float()
    whole, pieces = sum_up(inputs, errors), sum_up(inputs, errors, 7)
    np.testing.assert_allclose(whole.gram, pieces.gram, rtol=1e-12)
    np.testing.assert_allclose(whole.gram, inputs.double().T @ inputs.double(), rtol=1e-12)
    np.testing.assert_allclose(whole.cross, inputs.double().T @ errors.double(), rtol=1e-9, atol=1e-9)


def test_sums_are_float64_of_numbers_of_16_bits():
    inputs = torch.full((40_000, 1), 1.0, dtype=torch.bfloat16)  # as sums of 16 bits stop at 256, those of 32 at 2^24
    big = torch.full((1, 1), 4096.0, dtype=torch.bfloat16)
    sums = NormalEquations(1, 1)
    for _ in range(2):
        sums.add(big, big)
        sums.add(inputs, inputs)
    assert float(sums.gram) == 2 * 4096**2 + 80_000


def test_direction_without_data_stays():
    inputs, errors = rows(100, 6, 6), rows(100, 3, 7)
    inputs[:, 4] = 0
    change, note = sum_up(inputs, errors).solve(0.1)
    assert note == "" and (change[:, 4] == 0).all() and (change[:, 3] != 0).all()


def test_sums_that_are_not_positive_take_a_larger_ridge_and_say_so():
    sums = NormalEquations(3, 1)
    sums.gram += torch.diag(torch.tensor([1.0, 1.0, -1e-6], dtype=torch.float64))  # as rounding leaves it of channels that are alike
    sums.cross += 1
    change, note = sums.solve(1e-9)
    ridge = 1e-9 * 10_000 * (2 - 1e-6) / 3  # 1000 times as much is less than 1e-6
    assert note == "ill-conditioned; a ridge 10000 times as large was taken"
    np.testing.assert_allclose(change[0], [1 / (1 + ridge), 1 / (1 + ridge), 1 / (ridge - 1e-6)], rtol=1e-9)


def test_sums_that_no_ridge_mends_leave_the_weight():
    sums = sum_up(rows(20, 3, 8), rows(20, 2, 9))
    sums.gram[0, 0] = -1e9
    sums.gram[1, 1] = 2e9
    change, note = sums.solve(1e-9)
    assert note == "ill-conditioned; left as it was" and (change == 0).all()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_inputs_that_say_nothing_leave_the_weight(value):
    change, note = sum_up(torch.full((20, 4), value, dtype=torch.float64), rows(20, 3, 10)).solve(0.1)
    assert note == "ill-conditioned; left as it was" and change.shape == (3, 4) and (change == 0).all()


def test_solving_leaves_the_sums():
    sums = sum_up(rows(50, 5, 11), rows(50, 2, 12))
    first, second = sums.solve(0.1)[0], sums.solve(0.1)[0]
    assert torch.equal(first, second) and not torch.equal(first, sums.solve(1.0)[0])


def test_rows_and_errors_must_be_as_many():
    with pytest.raises(ValueError):
        NormalEquations(3, 3).add(rows(2 * ROWS, 3, 0), rows(ROWS, 3, 0))


@pytest.mark.parametrize("ridge", [1e-9, 0.5])
def test_factors_are_what_lstsq_finds_channel_by_channel(ridge):
    outputs, errors = rows(90, 4, 13) * torch.tensor([0.1, 1.0, 3.0, 9.0]), rows(90, 4, 14)
    sums = ChannelEquations(4)
    for some, lacking in zip(outputs.split(25), errors.split(25), strict=True):
        sums.add(some, lacking)
    change, note = sums.solve(ridge)
    wanted = [lstsq(outputs[:, [c]], errors[:, [c]], ridge * mean_square(outputs)).item() for c in range(4)]
    assert note == ""
    np.testing.assert_allclose(change, wanted, rtol=1e-9)


def test_channels_without_data_keep_their_factor():
    sums = ChannelEquations(3)
    sums.add(torch.zeros(5, 3), rows(5, 3, 15))
    change, _ = sums.solve(0.1)
    assert (change == 0).all()
