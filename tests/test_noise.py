"""Random numbers computed from keys."""

import math

import numpy as np
import pytest
import torch

from common import noise
from common.noise import mix_seed


def test_noise_is_standard_normal():
    """Its moments, its tails, and its distribution function (Kolmogorov-Smirnov)."""
    torch.manual_seed(0)
    eps = noise.noise(noise.draw_keys(1000), 1001).double().flatten()
    n = len(eps)
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        error = eps.pow(power).std().item() / math.sqrt(n)
        assert eps.pow(power).mean().item() == pytest.approx(moment, abs=4 * error)
    assert (eps.abs() > 4).sum().item() == pytest.approx(n * math.erfc(4 / math.sqrt(2)), abs=30)
    steps = torch.arange(n) / n
    assert (torch.special.ndtr(eps.sort().values) - steps).abs().max() < 1.95 / math.sqrt(
        n
    )  # p = 0.001


@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (1, 1), (0, 500), (0, 501), (7, 250)])
def test_noise_of_neighbouring_tokens_and_classes_is_independent(shift):
    """The numbers and their squares: the two numbers of a pair share a radius."""
    torch.manual_seed(1)
    eps = noise.noise(noise.draw_keys(1000), 1000)
    a, b = eps[shift[0] :, shift[1] :], eps[: 1000 - shift[0], : 1000 - shift[1]]
    for x, y in ((a, b), (a.square() - 1, b.square() - 1)):
        z = (x * y).mean() * math.sqrt(a.numel()) / (x.std() * y.std())
        assert abs(z) < 4


def test_noise_depends_only_on_its_own_keys():
    keys = noise.draw_keys(3, 5)
    together = noise.noise(keys, 7)
    assert together.shape == (3, 5, 7) and torch.equal(together[1, 2], noise.noise(keys[1, 2], 7))
    assert not torch.equal(together[0, 0], together[0, 1])


def test_noise_follows_box_and_mullers_rule():
    """The polynomials for sine and cosine are close enough."""
    torch.manual_seed(2)
    keys = noise.draw_keys(100)
    i = torch.arange(500, dtype=torch.int32)
    u = noise._hash(i + keys[:, :1]).double().abs().float().double() / 2**31
    angle = noise._hash(i ^ keys[:, 1:]).double() * math.pi / 2**31
    radius = (-2 * u.log()).sqrt()
    expected = torch.cat([radius * angle.cos(), radius * angle.sin()], -1)
    assert (noise.noise(keys, 1000) - expected).abs().max() < 2e-5


def test_noise_is_finite_for_every_hash(monkeypatch):
    """Also where the logarithm in Box and Muller's rule would be log 0."""
    hashes = torch.tensor([-(2**31), -(2**31) + 64, -1, 0, 1, 2**31 - 1], dtype=torch.int32)
    monkeypatch.setattr(noise, "_hash", lambda x: hashes.expand(*x.shape[:-1], 6))
    assert (noise.noise(noise.draw_keys(2), 12).abs() < 6.7).all()


def test_uniform_numbers_have_more_than_30_random_bits_and_stay_below_one(monkeypatch):
    torch.manual_seed(0)
    u = noise.uniform(noise.draw_keys(100_000))
    steps = torch.arange(100_000) / 100_000
    assert (u.sort().values - steps).abs().max() < 1.95 / math.sqrt(
        100_000
    ) and u.unique().numel() == 100_000
    assert ((u * 2**30) % 1).std() > 0.28  # of U(0, 1): 0.289
    monkeypatch.setattr(noise, "_hash", lambda x: torch.full_like(x, 2**31 - 1))
    assert noise.uniform(noise.draw_keys(1)) < 1


def test_categorical_draws_follow_p():
    p = torch.tensor([0.1, 0.0, 0.6, 0.3]).expand(100_000, 4)
    counts = torch.bincount(noise.sample_categorical(p, torch.rand(100_000)), minlength=4) / 100_000
    torch.testing.assert_close(counts, p[0], atol=0.01, rtol=0)
    assert counts[1] == 0


def test_a_row_draws_the_same_numbers_whatever_its_neighbours_and_new_ones_each_time():
    single, together = noise.Draws.seeded([8], [5]), noise.Draws.seeded([3, 8], [9, 5])
    first, second = single.normal(4), single.normal(4)
    assert torch.equal(first[0], together.normal(4)[1, :5]) and torch.equal(
        second[0], together.normal(4)[1, :5]
    )
    assert not (first == second).any()


def test_successive_draws_are_independent():
    draws = noise.Draws.seeded([0], [1000])
    a, b = draws.normal(100), draws.normal(100)
    assert abs((a * b).mean()) < 4 / math.sqrt(a.numel())
    p = torch.tensor([0.25, 0.75]).expand(1, 1000, 2)
    counts = sum(draws.tokens(p).sum().item() for _ in range(20))
    assert counts == pytest.approx(15_000, abs=4 * math.sqrt(20_000 * 0.1875))


def test_streams_of_different_calls_and_phases_share_no_numbers():
    draws = noise.Draws.seeded([0], [3])
    streams = [draws.at(phase, call) for phase in range(6) for call in (0, 1, 2, 500)]
    numbers = [stream.normal(2)[0, 0, 0].item() for stream in [draws, *streams] for _ in range(3)]
    assert len(set(numbers)) == len(numbers) == 3 * 25


def test_the_stream_of_a_call_does_not_depend_on_what_was_drawn_before():
    fresh, used = noise.Draws.seeded([0], [3]), noise.Draws.seeded([0], [3])
    used.normal(2), used.at(1, 7).normal(2)
    assert torch.equal(fresh.at(1, 8).normal(5), used.at(1, 8).normal(5))


def test_seeds_mixed_from_different_numbers_differ():
    seeds = {noise.mix_seed(a, b, c) for a in range(5) for b in range(5) for c in ("x", 1)}
    assert len(seeds) == 50 and all(0 <= seed < 2**63 for seed in seeds)
    assert noise.mix_seed(1, 2) != noise.mix_seed(12)


@pytest.mark.parametrize("seed", [np.int64(5), np.uint8(5), torch.tensor(5)])
def test_a_number_is_the_same_seed_in_any_type(seed):
    assert mix_seed(seed, 1) == mix_seed(5, 1)
    assert mix_seed(True) == mix_seed(1)


@pytest.mark.parametrize("seed", [5.0, None, [5], torch.tensor(5.0)])
def test_a_seed_that_is_no_whole_number_is_refused(seed):
    with pytest.raises(ValueError, match="is not a whole number"):
        mix_seed(seed, 1)
