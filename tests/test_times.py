"""Training times: their distribution, and the weights of the losses."""

import pytest
import torch

from training.times import draw_evenly, draw_times, segment_numbers


def test_each_segment_has_one_time_and_the_times_are_uniform():
    torch.manual_seed(0)
    j = segment_numbers(torch.tensor([[1, 1, 2, 2, 2, 0], [1, 2, 3, 4, 5, 6]]))
    t = draw_evenly(j)
    assert t[0, 0] == t[0, 1] and t[0, 2] == t[0, 3] == t[0, 4] and len(t.unique()) == 9
    draws = torch.stack([draw_evenly(j) for _ in range(4000)])
    torch.testing.assert_close(draws.mean(0), torch.full((2, 6), 0.5), atol=0.03, rtol=0)
    torch.testing.assert_close(draws.var(0), torch.full((2, 6), 1 / 12), atol=0.01, rtol=0)
    many = draw_evenly(torch.arange(1, 100_001)[None]).sort().values
    assert many.diff(dim=-1).max() < 3 / 100_000  # many times leave no large gap


def test_in_the_chosen_share_of_segments_each_position_has_its_own_time_more_often_near_0_and_1():
    torch.manual_seed(0)
    segment_ids = torch.arange(1, 10_001).repeat_interleave(3).view(100, 300)
    t, weight = draw_times(segment_ids, segment_ids == 0, own_share=0.3)
    assert (weight == 1).all()
    t = t.view(10_000, 3)
    differ = t[:, 0] != t[:, 1]
    assert torch.equal(differ, t[:, 1] != t[:, 2])  # all positions of a segment or none
    assert differ.float().mean().item() == pytest.approx(0.3, abs=0.06)
    assert torch.corrcoef(t[differ].T).sub(torch.eye(3)).abs().max() < 0.25
    for column in t[differ].T:
        expected = (1 - torch.cos(torch.pi * torch.linspace(0, 1, len(column)))) / 2
        torch.testing.assert_close(column.sort().values, expected, atol=0.12, rtol=0)
    for column in t[~differ].T:
        expected = torch.linspace(0, 1, len(column))
        torch.testing.assert_close(column.sort().values, expected, atol=0.06, rtol=0)


def test_a_hidden_segment_has_time_0_and_counts_as_if_all_of_it_were_unknown():
    torch.manual_seed(0)
    segment_ids = torch.arange(1, 3001).repeat_interleave(4).view(100, 120)
    cond_mask = torch.rand(segment_ids.shape) < 0.5
    t, weight = draw_times(segment_ids, cond_mask, own_share=0.5, hidden_share=0.4)
    t, weight, unknown = (x.view(3000, 4) for x in (t, weight, ~cond_mask))
    hidden = (t == 0).all(1)
    assert hidden.float().mean().item() == pytest.approx(0.4, abs=0.03)
    assert (weight[~hidden] == 1).all() and (t[~hidden] > 0).all()
    has_unknown = hidden & unknown.any(1)
    total = (weight * unknown)[has_unknown].sum(1)
    torch.testing.assert_close(total, torch.full_like(total, 4.0))
    assert weight.isfinite().all()  # also where all is given
