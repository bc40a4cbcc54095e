"""Training times: their distribution, and the weights of the losses."""

import torch

from data import GIVEN, HIDDEN, OWN, SHARED
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


def test_own_times_are_independent_and_more_often_near_0_and_1():
    torch.manual_seed(0)
    segment_ids = torch.arange(1, 3001).repeat_interleave(3).view(100, 90)
    t, weight = draw_times(segment_ids, torch.full_like(segment_ids, OWN))
    t = t.view(3000, 3)
    assert (weight == 1).all() and torch.corrcoef(t.T).sub(torch.eye(3)).abs().max() < 0.05
    for column in t.T:
        expected = (1 - torch.cos(torch.pi * torch.linspace(0, 1, len(column)))) / 2
        torch.testing.assert_close(column.sort().values, expected, atol=0.04, rtol=0)


def test_what_is_hidden_has_time_0_and_its_text_counts_as_if_all_of_it_were_hidden():
    torch.manual_seed(0)
    segment_ids = torch.arange(1, 3001).repeat_interleave(4).view(100, 120)
    is_hidden = (torch.rand(3000) < 0.4).repeat_interleave(4).view(100, 120)
    given = torch.rand(segment_ids.shape) < 0.5
    seen = torch.where(given, GIVEN, torch.where(is_hidden, HIDDEN, SHARED))
    t, weight = draw_times(segment_ids, seen)
    hidden = seen == HIDDEN
    assert (t[hidden] == 0).all() and (t[~hidden] > 0).all() and (weight[~hidden] == 1).all()
    total = (weight * hidden).view(3000, 4).sum(1)[hidden.view(3000, 4).any(1)]
    torch.testing.assert_close(total, torch.full_like(total, 4.0))
