"""The pictures of plot.py, without the command."""

import math

import numpy as np
import pytest
import torch
from exact import ExactNetwork

from common import drawing
from plotting import pictures


def test_paths_of_theta_begin_uniform_and_end_in_the_flow_at_time_one():
    """The difference of two logits is normal, of mean s1^2 and variance 2 s1^2."""
    s1, n = 2.0, 4000
    paths = pictures.flow_paths(
        torch.zeros(n, 1, dtype=torch.long), 7, s1, 3, torch.Generator().manual_seed(0)
    )
    assert paths.shape == (8, n, 1, 3) and torch.allclose(paths[0], torch.tensor(1 / 3))
    difference = (paths[-1, :, 0, 0] / paths[-1, :, 0, 1]).log()
    assert difference.mean().item() == pytest.approx(s1**2, abs=4 * math.sqrt(2 * s1**2 / n))
    assert difference.var().item() == pytest.approx(2 * s1**2, rel=0.1)


def test_the_network_of_two_positions_is_exact():
    network = pictures.AgreeingPair(3)
    sequences = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    theta = torch.rand(5, 2, 3).softmax(-1)
    expected = ExactNetwork(sequences, network.P.flatten())(theta, None)
    assert network.P.sum().item() == pytest.approx(1) and torch.allclose(
        network(theta, None), expected, atol=1e-5
    )


def test_the_clouds_rise_to_the_corner_and_the_sampled_paths_end_near_their_tokens():
    with drawing.style():
        figure = pictures.simplex(seed=6)
    clouds, pair = figure.axes[: len(pictures.CLOUD_TIMES)], figure.axes[-2:]
    heights = [np.asarray(axes.collections[0].get_offsets())[:, 1].mean() for axes in clouds]
    assert heights == sorted(heights) and heights[0] > math.sqrt(3) / 6 and heights[-1] > 0.8
    for axes in pair:
        token = pictures.TOKENS.index(axes.get_title()[-1])
        path = axes.lines[1].get_xydata()
        assert len(path) == pictures.CALLS and path[0] == pytest.approx([0.5, math.sqrt(3) / 6])
        assert np.hypot(*(path[-1] - pictures.CORNERS[token])) < 0.1


def test_wide_letters_do_not_overlap_in_an_animation():
    assert pictures.n_columns("ab\u5929\u6c14c") == 7


def test_texts_in_an_animation_are_dark_where_they_are_certain():
    with drawing.style():
        image = pictures.emerging([[[("MMMM", 1.0)], [("MMMM", 0.1)]]], "title")[0]
    pixels = np.asarray(image.convert("L"))[len(np.asarray(image)) // 3 :]
    upper, lower = np.array_split(pixels, 2)
    assert upper.min() < 80 and 170 < lower.min() < 250
