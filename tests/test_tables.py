"""The figures of evaluate.py as a table."""

import warnings
from types import SimpleNamespace

import numpy as np

from evaluation import bounds, tables


def test_a_bound_of_exactly_zero_and_an_error_that_no_draws_reach_are_no_error():
    """A network may be certain; --se=1e-300 asks for the most draws."""
    names = "L_inf L_rec bound monte_carlo_error text_error unknown".split()
    figures = {f"{name}_nats_per_token": 0.0 for name in names} | dict(
        bits_per_char=0.0, bits_per_byte=0.0, perplexity_per_token=1.0
    )
    assert "nan" in tables.table(figures, None)[1]
    scores = SimpleNamespace(loss=np.zeros((2, 1)), monte_carlo_error=lambda: np.float64(0.1))
    with warnings.catch_warnings(action="error"):
        assert bounds.draws_needed(scores, 1e-300) == bounds.MAX_DRAWS
