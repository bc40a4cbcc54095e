"""Training times: their distribution, and what is learned of the loss."""

import pytest
import torch

from training.times import N_BINS, UNIFORM_SHARE, Times, draw_evenly


def test_each_segment_has_one_time_and_the_times_are_uniform():
    torch.manual_seed(0)
    segment_ids = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 2, 3, 4, 5, 6]])
    t = draw_evenly(segment_ids)
    assert t[0, 0] == t[0, 1] and t[0, 2] == t[0, 3] == t[0, 4] and len(t.unique()) == 9
    draws = torch.stack([draw_evenly(segment_ids) for _ in range(4000)])
    torch.testing.assert_close(draws.mean(0), torch.full((2, 6), 0.5), atol=0.03, rtol=0)
    torch.testing.assert_close(draws.var(0), torch.full((2, 6), 1 / 12), atol=0.01, rtol=0)
    many = (
        draw_evenly(torch.arange(1, 100_001)[None]).sort().values
    )  # many times leave no large gap
    assert many.diff(dim=-1).max() < 3 / 100_000


def test_in_the_chosen_share_of_segments_each_position_has_its_own_time_more_often_near_0_and_1():
    torch.manual_seed(0)
    segment_ids = torch.arange(1, 10_001).repeat_interleave(3).view(100, 300)
    t = Times("stratified", 0.3).draw(segment_ids)[0].view(10_000, 3)
    differ = t[:, 0] != t[:, 1]
    assert torch.equal(differ, t[:, 1] != t[:, 2])  # all positions of a segment or none
    assert differ.float().mean().item() == pytest.approx(0.3, abs=0.06)
    assert torch.corrcoef(t[differ].T).sub(torch.eye(3)).abs().max() < 0.25
    for column in t[differ].T:
        expected = (1 - torch.cos(torch.pi * torch.linspace(0, 1, len(column)))) / 2
        torch.testing.assert_close(column.sort().values, expected, atol=0.12, rtol=0)
    for column in t[~differ].T:
        torch.testing.assert_close(
            column.sort().values, torch.linspace(0, 1, len(column)), atol=0.06, rtol=0
        )


def learned(curve, position_share=0.0):
    """Learned times that have this curve already."""
    times = Times("learned", position_share)
    times.curve = curve
    return times


def test_learned_times_follow_their_density_and_the_weights_keep_every_mean():
    """The mean of weighted losses equals that over uniform times."""
    torch.manual_seed(0)
    times = learned(torch.linspace(3, 0, N_BINS).square())
    segment_ids = torch.arange(1, 100_001)[None]
    t, weight = times.draw(segment_ids)
    counts = torch.histc(t, N_BINS, 0, 1) / 100_000 * N_BINS
    torch.testing.assert_close(counts, times.density(), atol=0.01, rtol=0)
    assert (
        weight.max() <= 1 / UNIFORM_SHARE + 1e-4
        and times.density().mean().item() == pytest.approx(1)
    )
    for f in (torch.ones_like, torch.square, torch.sin, lambda t: (t > 0.9).float()):
        assert (weight * f(t)).mean().item() == pytest.approx(
            f(torch.linspace(0, 1, 10_001)).mean().item(), abs=2e-3
        )


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_learned_curve_changes_no_mean_if_positions_have_their_own_times(share):
    segment_ids = torch.arange(1, 100_001)[None]
    for f in (torch.ones_like, torch.square, lambda t: (t > 0.9).float()):
        means = []
        for curve in (torch.ones(N_BINS), torch.linspace(3, 0, N_BINS).square()):
            torch.manual_seed(0)
            t, weight = learned(curve, share).draw(segment_ids)
            means.append((weight * f(t)).mean().item())
        assert means[0] == pytest.approx(means[1], abs=0.01)


def test_learned_times_lower_the_variance_of_the_loss():
    """The loss of a segment falls from 10 to 0; with learned times its variance is a quarter."""
    torch.manual_seed(1)

    def loss(t):
        return 10 * (1 - t).pow(3)

    times = Times("learned", 0.0)
    segment_ids = torch.arange(1, 2001)[None]
    for _ in range(600):
        t, _ = times.draw(segment_ids)
        times.learn(t, loss(t), torch.ones_like(t, dtype=torch.bool))
        times.fold()
    t, weight = times.draw(segment_ids)
    u = torch.rand(2000)
    assert loss(u).var() > 4 * (weight * loss(t)).var()
    assert (weight * loss(t)).mean().item() == pytest.approx(2.5, abs=0.02)


def test_the_curve_learns_the_mean_square_of_the_losses_in_the_mask():
    times = Times("learned", 0.0)
    t = torch.tensor([[0.0, 0.0, 0.999, 0.5]])
    mask = torch.tensor([[True, True, True, False]])
    for _ in range(2000):
        times.learn(t, torch.tensor([[1.0, 3.0, 4.0, 100.0]]), mask)
        times.fold()
    assert times.curve[[0, -1]].tolist() == pytest.approx([5, 16], rel=1e-3)
    assert (times.curve[1:-1] == 1).all()


def test_a_loss_that_is_not_finite_does_not_change_the_curve():
    times = learned(torch.ones(N_BINS))
    before = times.curve.clone()
    times.learn(torch.tensor([[0.5]]), torch.tensor([[float("nan")]]), torch.tensor([[True]]))
    times.fold()
    assert torch.equal(times.curve, before)


def test_the_curve_of_each_validation_is_kept_as_it_was_then():
    times = Times("learned", 0.0)
    times.remember(1)
    times.learn(torch.full((1, 4), 0.5), torch.full((1, 4), 3.0), torch.ones(1, 4))
    times.fold()
    times.remember(2)
    (first, before), (second, after) = times.history
    assert (first, second) == (1, 2) and set(before) == {1.0} and max(after) > 1
