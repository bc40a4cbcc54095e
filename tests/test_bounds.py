"""The bound and its errors, for known distributions."""

import io
import math
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact import ExactNetwork, draw, exact_model, random_joint, tokens_of, uniform_model

import bfn
import evaluate
from evaluation import bounds, tables
from text import cache

SEQUENCES, P = random_joint()

CPU = torch.device("cpu")


def score_text(
    model,
    tokens,
    window,
    bos,
    device,
    batch_size=None,
    seconds=math.inf,
    interrupts=(),
    max_tokens=None,
    given=bounds.nothing_given,
    **draws,
):
    """The scores of a text, or of about max_tokens of it."""
    tokens = replace(tokens, tokenizer=SimpleNamespace(bos=bos))
    text = bounds.Text(tokens, window, given)
    text = text.first_tokens(max_tokens) if max_tokens else text
    return bounds.score(model, text, bounds.Work(device, batch_size, seconds, interrupts), **draws)


def code_length(ids):
    """-log P of the rows, nats per token."""
    return -P.log()[(ids * torch.tensor([16, 4, 1])).sum(-1)].sum().item() / ids.numel()


@pytest.mark.parametrize("s1, n_steps, tight", [(2, None, False), (8, None, True), (8, 400, False)])
def test_the_bound_of_the_exact_network_is_above_the_code_length_and_reaches_it_for_large_s1(
    s1, n_steps, tight
):
    """For the continuous-time loss.

    Both are of the same text, so only noise and times can make a difference.
    """
    ids = draw(SEQUENCES, P, 4000)
    tokens = tokens_of(ids)
    scores = score_text(
        exact_model(s1), tokens, 3, -1, CPU, n_draws=8, n_steps=n_steps, batch_size=500
    )
    figures = tables.likelihood_figures(scores)
    gap = figures["bound_nats_per_token"] - code_length(ids)
    error = figures["monte_carlo_error_nats_per_token"]
    assert 0 < error < 0.02
    assert gap > -4 * error
    assert gap < 4 * error or not tight
    assert figures["bits_per_byte"] == pytest.approx(figures["bound_nats_per_token"] / math.log(2))


def test_the_n_step_loss_of_each_step_agrees_with_a_direct_estimate():
    ids, n, s1 = draw(SEQUENCES, P, 3000), 3, 4.0
    scores = score_text(
        exact_model(s1), tokens_of(ids), 3, -1, CPU, n_draws=4, n_steps=n, batch_size=500
    )
    _, loss_by_step, _ = scores.by_time()
    torch.manual_seed(0)
    for i in range(1, n + 1):
        t, nothing = torch.full(ids.shape, (i - 1) / n), torch.zeros_like(ids, dtype=torch.bool)
        log_p = bfn.predict_noisy(ExactNetwork(SEQUENCES, P), ids, t, nothing, s1, 4)
        direct = bfn.n_step_error(log_p, ids, torch.full_like(ids, i), n, s1).mean().item()
        assert loss_by_step[i - 1] == pytest.approx(direct, rel=0.1)


@pytest.mark.parametrize("n_steps", [None, 5])
def test_the_batch_size_changes_no_figure(n_steps):
    tokens = tokens_of(draw(SEQUENCES, P, 50))
    one, seven = (
        score_text(exact_model(4), tokens, 3, -1, CPU, n_steps=n_steps, batch_size=n)
        for n in (1, 7)
    )
    for name in ("t", "loss", "cross_entropy", "reconstruction"):
        np.testing.assert_allclose(getattr(one, name), getattr(seven, name), rtol=1e-4, atol=1e-5)


def test_the_two_errors_are_the_spread_over_seeds_and_the_spread_over_texts():
    """The Monte-Carlo error against 16 seeds, the error of the text against that of the mean code
    length.
    """
    ids = draw(SEQUENCES, P, 500)
    tokens = tokens_of(ids)
    estimates, errors = [], []
    for seed in range(16):
        scores = score_text(
            exact_model(4), tokens, 3, -1, CPU, n_draws=4, seed=seed, batch_size=250
        )
        estimates.append(sum(scores.nats_per_token))
        errors.append(scores.monte_carlo_error())
    assert 0.6 < np.std(estimates, ddof=1) / np.mean(errors) < 1.5
    error, n_documents = scores.text_error()
    per_text = -P.log()[(ids * torch.tensor([16, 4, 1])).sum(-1)] / 3
    assert n_documents == 500
    assert error == pytest.approx(per_text.std().item() / math.sqrt(500), rel=0.3)


@pytest.mark.parametrize("n_texts", [1, 10])
def test_the_monte_carlo_error_holds_for_very_short_texts(n_texts):
    """Times of few windows do not cover [0, 1], and a curve fitted to them would explain away all
    of the variance.
    """
    tokens = tokens_of(draw(SEQUENCES, P, n_texts))
    scores = [
        score_text(exact_model(4), tokens, 3, -1, CPU, n_draws=8, seed=seed) for seed in range(30)
    ]
    spread = np.std([sum(s.nats_per_token) for s in scores], ddof=1)
    assert 0.5 < np.sqrt(np.mean([s.monte_carlo_error() ** 2 for s in scores])) / spread < 2
    assert math.isnan(scores[0].text_error()[0]) == (n_texts == 1)


def test_draws_are_added_until_the_requested_error_is_reached():
    tokens = tokens_of(draw(SEQUENCES, P, 200))
    scores = score_text(exact_model(4), tokens, 3, -1, CPU, error=0.03)
    assert scores.monte_carlo_error() < 0.04 and 2 < len(scores.loss) < bounds.MAX_DRAWS
    repeated = score_text(exact_model(4), tokens, 3, -1, CPU, error=0.03)
    assert np.array_equal(scores.loss, repeated.loss)


def test_a_missed_error_is_reported_with_what_to_do(monkeypatch):
    """More text if there is more, more draws if the time has limited them, or else the limit that
    was met.
    """
    monkeypatch.setattr(bounds, "MAX_DRAWS", 3)
    tokens, options = tokens_of(draw(SEQUENCES, P, 5)), dict(error=1e-4, batch_size=2)
    cases = [
        ({}, "MAX_DRAWS"),
        (dict(max_tokens=6), "more text"),
        (dict(seconds=11), "more draws lower it (--all)"),
    ]
    for limit, advice in cases:
        scores = score_text(
            clocked(exact_model(4), monkeypatch, lambda n_calls: 1.0),
            tokens,
            3,
            -1,
            CPU,
            **options,
            **limit,
        )
        *_, line = tables.notes(scores, 1e-4, quick=False)
        assert f"after {len(scores.loss)} draws, not 0.0001" in line and advice in line
        assert not tables.notes(scores, 5.0, quick=False)


def clocked(model, monkeypatch, seconds_per_row):
    """Make a model whose calls move evaluate's clock -> model.

    seconds_per_row: function of the number of calls so far.
    """
    now, calls = [0.0], []

    def call(theta, t, segment_ids):
        calls.append(0)
        now[0] += (
            seconds_per_row(len(calls)) * len(t) / 2
        )  # two calls per batch, one of them for L_rec
        return model(theta, t, segment_ids)

    call.config = model.config
    monkeypatch.setattr(bounds, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return call


@pytest.mark.parametrize(
    "seconds, shape",
    [(20.5, (2, 10)), (0.5, (2, 1)), (100.5, (2, 50)), (201, (4, 50)), (9e9, (8, 50))],
)
def test_two_draws_of_as_many_rows_as_possible_fit_in_the_time_and_a_small_text_gets_more(
    seconds, shape, monkeypatch
):
    """A row takes one second; the text has 50."""
    monkeypatch.setattr(bounds, "MAX_DRAWS", 8)
    model = clocked(exact_model(4), monkeypatch, lambda n_calls: 1.0)
    scores = score_text(
        model,
        tokens_of(draw(SEQUENCES, P, 50)),
        3,
        -1,
        CPU,
        error=1e-4,
        batch_size=5,
        seconds=seconds,
    )
    assert scores.loss.shape == shape and not scores.partial


def test_a_machine_that_becomes_slow_reads_fewer_rows_in_the_same_time(monkeypatch):
    """The first draw has 40 seconds.

    A batch takes 4 when the speed is measured and 16 afterwards: the third is the last.
    """
    model = clocked(exact_model(4), monkeypatch, lambda n_calls: 1.0 if n_calls <= 4 else 4.0)
    tokens = tokens_of(draw(SEQUENCES, P, 50))
    scores = score_text(model, tokens, 3, -1, CPU, error=1e-4, batch_size=4, seconds=80)
    assert scores.loss.shape == (2, 12) and not scores.partial
    repeated = score_text(
        exact_model(4), tokens, 3, -1, CPU, n_draws=2, batch_size=4, max_tokens=36
    )
    assert np.array_equal(scores.loss, repeated.loss)


def test_the_speed_is_that_of_the_second_batch_per_row(monkeypatch):
    """The first one is a warm-up: it takes 100 seconds per row here, the second one 2."""
    model = clocked(exact_model(4), monkeypatch, lambda n_calls: 100.0 if n_calls <= 2 else 2.0)
    tokens = tokens_of(draw(SEQUENCES, P, 3))
    text = bounds.Text(tokens, 3)
    assert bounds.seconds_per_row(model, text, CPU, None, most=100) == 2.0


def test_what_fits_in_the_time_has_the_same_figures_as_that_many_tokens(monkeypatch):
    tokens, model = (
        tokens_of(draw(SEQUENCES, P, 50)),
        clocked(exact_model(4), monkeypatch, lambda n_calls: 1.0),
    )
    limited = score_text(model, tokens, 3, -1, CPU, error=1e-4, batch_size=4, seconds=20)
    assert limited.loss.shape == (2, 10) and limited.share == 0.2 and not limited.partial
    lines = tables.notes(limited, 1e-4, quick=True)
    assert "looked at 20 % of the text: --all looks at everything" in lines
    assert "the same figures again: --max_tokens=30 --draws=2" in lines
    repeated = score_text(
        exact_model(4), tokens, 3, -1, CPU, n_draws=2, batch_size=4, max_tokens=30
    )
    assert np.array_equal(limited.loss, repeated.loss) and np.array_equal(
        limited.text.document, repeated.text.document
    )


@pytest.mark.parametrize(
    "n_batches, shape", [(1, (1, 4)), (2, (1, 8)), (3, (1, 10)), (5, (1, 10)), (7, (2, 10))]
)
def test_after_an_interrupt_the_complete_draws_are_kept_or_the_complete_rows_of_the_first(
    n_batches, shape
):
    """A draw has three batches: rows 0 to 3, 4 to 7, 8 and 9. One of three draws is not reached."""
    tokens, interrupts, calls = tokens_of(draw(SEQUENCES, P, 10)), [], []
    model = exact_model(4)

    def interrupted(theta, t, segment_ids):
        calls.append(t)  # two per batch, one of them for L_rec
        if len(calls) == 2 * n_batches:
            interrupts.append(signal.SIGINT)
        return model(theta, t, segment_ids)

    interrupted.config = model.config
    scores = score_text(
        interrupted, tokens, 3, -1, CPU, n_draws=3, batch_size=4, interrupts=interrupts
    )
    assert scores.partial and scores.loss.shape == shape and scores.share == shape[1] / 10
    repeated = score_text(
        model, tokens, 3, -1, CPU, n_draws=shape[0], batch_size=4, max_tokens=3 * shape[1]
    )
    assert np.array_equal(scores.loss, repeated.loss)
    assert len(calls) == 2 * n_batches and not repeated.partial


@pytest.mark.parametrize("n_unknown_bytes", [0, 5])
def test_the_progress_bar_shows_the_bound(n_unknown_bytes, monkeypatch):
    ids = draw(SEQUENCES, P, 20)
    tokens = cache.Tokens(
        ids.numpy().ravel(), np.arange(21) * 3, 60, 60, n_unknown_bytes, "test", None
    )
    bars = []

    class Bar(bounds.BoundBar):
        def __init__(self, **options):
            super().__init__(**options | dict(disable=False, file=io.StringIO()))
            bars.append(self)

    monkeypatch.setattr(bounds, "BoundBar", Bar)
    scores = score_text(exact_model(4), tokens, 3, -1, CPU, n_draws=3, batch_size=7)
    bound = tables.likelihood_figures(scores)["bound_nats_per_token"]
    assert len(bars) == 1 and bars[0].n == bars[0].total == 9
    assert bars[0].postfix == f"bound {bound:.3f} nats/token"


def test_the_control_variate_of_the_n_step_loss_changes_only_its_variance():
    torch.manual_seed(0)
    ids = torch.zeros(200_000, 1, dtype=torch.long)
    log_p = torch.tensor([1.0, 0.0, -1.0]).log_softmax(-1).expand(200_000, 1, 3)
    i, n, s1 = torch.full_like(ids, 70), 100, 3.0
    loss = bfn.n_step_error(log_p, ids, i, n, s1)
    a = torch.tensor(s1 * math.sqrt(139) / n)
    y = bfn.sender_sample(ids, a, 3)
    plain = n * (y[..., 0] - torch.logsumexp(log_p + y, -1))
    error = plain.std() / math.sqrt(len(plain))
    assert abs(loss.mean() - plain.mean()) < 4 * error
    assert loss.std() < plain.std() / 4


def test_every_token_is_scored_once_for_any_window():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 30)
    tokens = cache.Tokens(
        rng.integers(1, 4, lengths.sum()), np.append(0, lengths.cumsum()), 1, 1, 0, "test", None
    )
    for window in (5, 16, 50):
        scores = score_text(uniform_model(4), tokens, window, 3, CPU)
        assert scores.n_scored.sum() == (tokens.ids != 3).sum()
        by_document = np.bincount(scores.text.document, scores.n_scored)
        assert by_document.tolist() == [
            (tokens.ids[a:b] != 3).sum() for a, b in zip(tokens.offsets, tokens.offsets[1:])
        ]
    some = score_text(uniform_model(4), tokens, 16, -1, CPU, max_tokens=100)
    assert 80 < some.n_scored.sum() <= 112


def test_given_tokens_are_not_scored_and_the_bound_is_the_conditional_code_length():
    segment_ids = torch.tensor([[1] * 10 + [2] * 5 + [0]])
    prefix, around = (
        evaluate.parse_given(text)(segment_ids)[0, :15] for text in ("prefix:0.4", "around:0.2")
    )
    assert (~prefix).nonzero().flatten().tolist() == [4, 5, 6, 7, 8, 9, 12, 13, 14]
    assert (~around).nonzero().flatten().tolist() == [4, 5, 12]
    assert (
        ~evaluate.parse_given("around:0.01")(segment_ids)[0, :15]
    ).sum() == 2  # one token of each window
    tokens = tokens_of(draw(SEQUENCES, P, 3000))
    scores = score_text(
        exact_model(8),
        tokens,
        3,
        -1,
        CPU,
        n_draws=4,
        given=evaluate.parse_given("prefix:0.34"),
        batch_size=500,
    )
    first = torch.zeros(4).index_add_(0, SEQUENCES[:, 0], P)
    conditional = (
        -(P * (P / first[SEQUENCES[:, 0]]).log()).sum().item() / 2
    )  # H(x2, x3 | x1) per token
    assert sum(scores.nats_per_token) == pytest.approx(
        conditional, abs=4 * (scores.monte_carlo_error() + scores.text_error()[0])
    )
