"""Evaluation: the bound and its errors for known distributions, the figures of samples, the command, pictures."""

import io
import json
import math
import random
import signal
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact import ExactNetwork, draw, random_joint
from untrained import make_run

import bfn
import evaluate
from common import cli, drawing
from evaluation import bounds, quality, tables
from text import cache, toy
from text.tokenizer import load_tokenizer, train_tokenizer
from training.checkpoint import load

SEQUENCES, P = random_joint()
CPU = torch.device("cpu")


def exact_model(s1):
    """The exact network of P as a model that `score` takes."""
    network = ExactNetwork(SEQUENCES, P)

    def model(theta, t, segment_ids):
        return network(theta, t)

    model.config = SimpleNamespace(K=4, d_model=1, s1=s1)
    return model


def uniform_model(K, s1=2.0):
    """A model that predicts every token with probability 1 / K."""

    def model(theta, t, segment_ids):
        return torch.zeros_like(theta)

    model.config = SimpleNamespace(K=K, d_model=1, s1=s1)
    return model


def tokens_of(ids):
    """A text in which each row is a document, without bos and eos, of one character and one byte per token."""
    B, L = ids.shape
    return cache.Tokens(ids.numpy().ravel(), np.arange(B + 1) * L, ids.numel(), ids.numel(), 0, "test")


def score_text(
    model, tokens, window, bos_id, device, batch_size=None, seconds=math.inf, interrupts=(), max_tokens=None,
    given=bounds.nothing_given, **draws
):  # fmt: skip
    """The scores of a text, or of about max_tokens of it."""
    text = bounds.Text(tokens, window, bos_id, given)
    text = text.first_tokens(max_tokens) if max_tokens else text
    return bounds.score(model, text, bounds.Work(device, batch_size, seconds, interrupts), **draws)


def code_length(ids):
    """-log P of the rows, nats per token."""
    return -P.log()[(ids * torch.tensor([16, 4, 1])).sum(-1)].sum().item() / ids.numel()


# ---------------------------------------------------------------- the bound and its errors


@pytest.mark.parametrize("s1, n_steps, tight", [(2, None, False), (8, None, True), (8, 400, False)])
def test_the_bound_of_the_exact_network_is_above_the_code_length_and_reaches_it_for_large_s1(s1, n_steps, tight):
    """For the continuous-time loss. Both are of the same text, so only noise and times can make a difference."""
    ids = draw(SEQUENCES, P, 4000)
    tokens = tokens_of(ids)
    scores = score_text(exact_model(s1), tokens, 3, -1, CPU, n_draws=8, n_steps=n_steps, batch_size=500)
    figures = tables.likelihood_figures(scores)
    gap = figures["bound_nats_per_token"] - code_length(ids)
    error = figures["monte_carlo_error_nats_per_token"]
    assert 0 < error < 0.02
    assert gap > -4 * error
    assert gap < 4 * error or not tight
    assert figures["bits_per_byte"] == pytest.approx(figures["bound_nats_per_token"] / math.log(2))


def test_the_n_step_loss_of_each_step_agrees_with_a_direct_estimate():
    ids, n, s1 = draw(SEQUENCES, P, 3000), 3, 4.0
    scores = score_text(exact_model(s1), tokens_of(ids), 3, -1, CPU, n_draws=4, n_steps=n, batch_size=500)
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
    one, seven = (score_text(exact_model(4), tokens, 3, -1, CPU, n_steps=n_steps, batch_size=n) for n in (1, 7))
    for name in ("t", "loss", "cross_entropy", "reconstruction"):
        np.testing.assert_allclose(getattr(one, name), getattr(seven, name), rtol=1e-4, atol=1e-5)


def test_the_two_errors_are_the_spread_over_seeds_and_the_spread_over_texts():
    """The Monte-Carlo error against 16 seeds, the error of the text against that of the mean code length."""
    ids = draw(SEQUENCES, P, 500)
    tokens = tokens_of(ids)
    estimates, errors = [], []
    for seed in range(16):
        scores = score_text(exact_model(4), tokens, 3, -1, CPU, n_draws=4, seed=seed, batch_size=250)
        estimates.append(sum(scores.nats_per_token))
        errors.append(scores.monte_carlo_error())
    assert 0.6 < np.std(estimates, ddof=1) / np.mean(errors) < 1.5
    error, n_documents = scores.text_error()
    per_text = -P.log()[(ids * torch.tensor([16, 4, 1])).sum(-1)] / 3
    assert n_documents == 500
    assert error == pytest.approx(per_text.std().item() / math.sqrt(500), rel=0.3)


@pytest.mark.parametrize("n_texts", [1, 10])
def test_the_monte_carlo_error_holds_for_very_short_texts(n_texts):
    """Times of few windows do not cover [0, 1], and a curve fitted to them would explain away all of the variance."""
    tokens = tokens_of(draw(SEQUENCES, P, n_texts))
    scores = [score_text(exact_model(4), tokens, 3, -1, CPU, n_draws=8, seed=seed) for seed in range(30)]
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
    """More text if there is more, more draws if the time has limited them, or else the limit that was met."""
    monkeypatch.setattr(bounds, "MAX_DRAWS", 3)
    tokens, options = tokens_of(draw(SEQUENCES, P, 5)), dict(error=1e-4, batch_size=2)
    cases = [({}, "MAX_DRAWS"), (dict(max_tokens=6), "more text"), (dict(seconds=11), "more draws lower it (--all)")]
    for limit, advice in cases:
        scores = score_text(
            clocked(exact_model(4), monkeypatch, lambda n_calls: 1.0), tokens, 3, -1, CPU, **options, **limit
        )
        *_, line = tables.notes(scores, 1e-4, quick=False)
        assert f"after {len(scores.loss)} draws, not 0.0001" in line and advice in line
        assert not tables.notes(scores, 5.0, quick=False)


# ---------------------------------------------------------------- what fits in the time, and what is complete


def clocked(model, monkeypatch, seconds_per_row):
    """Make a model whose calls move evaluate's clock -> model. seconds_per_row: function of the number of calls so far."""
    now, calls = [0.0], []

    def call(theta, t, segment_ids):
        calls.append(0)
        now[0] += seconds_per_row(len(calls)) * len(t) / 2  # two calls per batch, one of them for L_rec
        return model(theta, t, segment_ids)

    call.config = model.config
    monkeypatch.setattr(bounds, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return call


@pytest.mark.parametrize(
    "seconds, shape", [(20.5, (2, 10)), (0.5, (2, 1)), (100.5, (2, 50)), (201, (4, 50)), (9e9, (8, 50))]
)
def test_two_draws_of_as_many_rows_as_possible_fit_in_the_time_and_a_small_text_gets_more(seconds, shape, monkeypatch):
    """A row takes one second; the text has 50."""
    monkeypatch.setattr(bounds, "MAX_DRAWS", 8)
    model = clocked(exact_model(4), monkeypatch, lambda n_calls: 1.0)
    scores = score_text(model, tokens_of(draw(SEQUENCES, P, 50)), 3, -1, CPU, error=1e-4, batch_size=5, seconds=seconds)
    assert scores.loss.shape == shape and not scores.partial


def test_a_machine_that_becomes_slow_reads_fewer_rows_in_the_same_time(monkeypatch):
    """The first draw has 40 seconds. A batch takes 4 when the speed is measured and 16 afterwards: the third is the last."""
    model = clocked(exact_model(4), monkeypatch, lambda n_calls: 1.0 if n_calls <= 4 else 4.0)
    tokens = tokens_of(draw(SEQUENCES, P, 50))
    scores = score_text(model, tokens, 3, -1, CPU, error=1e-4, batch_size=4, seconds=80)
    assert scores.loss.shape == (2, 12) and not scores.partial
    repeated = score_text(exact_model(4), tokens, 3, -1, CPU, n_draws=2, batch_size=4, max_tokens=36)
    assert np.array_equal(scores.loss, repeated.loss)


def test_the_speed_is_that_of_the_second_batch_per_row(monkeypatch):
    """The first one is a warm-up: it takes 100 seconds per row here, the second one 2."""
    model = clocked(exact_model(4), monkeypatch, lambda n_calls: 100.0 if n_calls <= 2 else 2.0)
    tokens = tokens_of(draw(SEQUENCES, P, 3))
    text = bounds.Text(tokens, 3, -1)
    assert bounds.seconds_per_row(model, text, CPU, None) == 2.0


def test_what_fits_in_the_time_has_the_same_figures_as_that_many_tokens(monkeypatch):
    tokens, model = tokens_of(draw(SEQUENCES, P, 50)), clocked(exact_model(4), monkeypatch, lambda n_calls: 1.0)
    limited = score_text(model, tokens, 3, -1, CPU, error=1e-4, batch_size=4, seconds=20)
    assert limited.loss.shape == (2, 10) and limited.share == 0.2 and not limited.partial
    lines = tables.notes(limited, 1e-4, quick=True)
    assert "looked at 20 % of the text: --all looks at everything" in lines
    assert "the same figures again: --max_tokens=30 --draws=2" in lines
    repeated = score_text(exact_model(4), tokens, 3, -1, CPU, n_draws=2, batch_size=4, max_tokens=30)
    assert np.array_equal(limited.loss, repeated.loss) and np.array_equal(limited.document, repeated.document)


@pytest.mark.parametrize("n_batches, shape", [(1, (1, 4)), (2, (1, 8)), (3, (1, 10)), (5, (1, 10)), (7, (2, 10))])
def test_after_an_interrupt_the_complete_draws_are_kept_or_the_complete_rows_of_the_first(n_batches, shape):
    """A draw has three batches: rows 0 to 3, 4 to 7, 8 and 9. One of three draws is not reached."""
    tokens, interrupts, calls = tokens_of(draw(SEQUENCES, P, 10)), [], []
    model = exact_model(4)

    def interrupted(theta, t, segment_ids):
        calls.append(t)  # two per batch, one of them for L_rec
        if len(calls) == 2 * n_batches:
            interrupts.append(signal.SIGINT)
        return model(theta, t, segment_ids)

    interrupted.config = model.config
    scores = score_text(interrupted, tokens, 3, -1, CPU, n_draws=3, batch_size=4, interrupts=interrupts)
    assert scores.partial and scores.loss.shape == shape and scores.share == shape[1] / 10
    repeated = score_text(model, tokens, 3, -1, CPU, n_draws=shape[0], batch_size=4, max_tokens=3 * shape[1])
    assert np.array_equal(scores.loss, repeated.loss)
    assert len(calls) == 2 * n_batches and not repeated.partial


@pytest.mark.parametrize("n_unknown_bytes", [0, 5])
def test_the_progress_bar_shows_the_bound(n_unknown_bytes, monkeypatch):
    ids = draw(SEQUENCES, P, 20)
    tokens = cache.Tokens(ids.numpy().ravel(), np.arange(21) * 3, 60, 60, n_unknown_bytes, "test")
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
    tokens = cache.Tokens(rng.integers(1, 4, lengths.sum()), np.append(0, lengths.cumsum()), 1, 1, 0, "test")
    for window in (5, 16, 50):
        scores = score_text(uniform_model(4), tokens, window, 3, CPU)
        assert scores.n_scored.sum() == (tokens.ids != 3).sum()
        by_document = np.bincount(scores.document, scores.n_scored)
        assert by_document.tolist() == [(tokens.ids[a:b] != 3).sum() for a, b in zip(tokens.offsets, tokens.offsets[1:])]
    some = score_text(uniform_model(4), tokens, 16, -1, CPU, max_tokens=100)
    assert 80 < some.n_scored.sum() <= 112


def test_given_tokens_are_not_scored_and_the_bound_is_the_conditional_code_length():
    segment_ids = torch.tensor([[1] * 10 + [2] * 5 + [0]])
    prefix, around = (evaluate.parse_given(text)(segment_ids)[0, :15] for text in ("prefix:0.4", "around:0.2"))
    assert (~prefix).nonzero().flatten().tolist() == [4, 5, 6, 7, 8, 9, 12, 13, 14]
    assert (~around).nonzero().flatten().tolist() == [4, 5, 12]
    assert (~evaluate.parse_given("around:0.01")(segment_ids)[0, :15]).sum() == 2  # one token of each window
    tokens = tokens_of(draw(SEQUENCES, P, 3000))
    scores = score_text(
        exact_model(8), tokens, 3, -1, CPU, n_draws=4, given=evaluate.parse_given("prefix:0.34"), batch_size=500
    )
    first = torch.zeros(4).index_add_(0, SEQUENCES[:, 0], P)
    conditional = -(P * (P / first[SEQUENCES[:, 0]]).log()).sum().item() / 2  # H(x2, x3 | x1) per token
    assert sum(scores.nats_per_token) == pytest.approx(
        conditional, abs=4 * (scores.monte_carlo_error() + scores.text_error()[0])
    )


# ---------------------------------------------------------------- validation


def test_a_validation_plans_its_text_once(monkeypatch):
    plan_validation, calls = bounds.data.plan_validation, []

    def counted(*inputs):
        calls.append(inputs)
        return plan_validation(*inputs)

    monkeypatch.setattr(bounds.data, "plan_validation", counted)
    evaluate.validate(exact_model(4), tokens_of(draw(SEQUENCES, P, 50)), -1, 3, CPU, max_tokens=90)
    assert len(calls) == 1


def test_two_validations_use_the_same_tokens_and_noise_and_agree_exactly():
    tokens = tokens_of(draw(SEQUENCES, P, 1000))
    first, second = (evaluate.validate(exact_model(4), tokens, -1, 3, CPU, max_tokens=600) for _ in range(2))
    assert first == second
    figures, loss_by_time = first
    assert len(loss_by_time) == 20 and figures["n_tokens_scored"] == 600
    assert 0 < figures["exact_nats_per_token"] < figures["bound_nats_per_token"]


def test_bits_per_character_count_eos_but_not_bos_and_all_characters_of_the_raw_text(tmp_path, monkeypatch):
    """The losses are set to one nat per token for L_inf and to nothing for L_rec."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(toy.corpus(300))
    (tmp_path / "model").write_bytes(train_tokenizer(corpus, "word", 500))
    tokenizer = load_tokenizer(tmp_path / "model")
    monkeypatch.setattr(bfn, "squared_error_loss", lambda log_p, ids, *rest: torch.ones(ids.shape))
    monkeypatch.setattr(bfn, "reconstruction_loss", lambda network, ids, *rest: torch.zeros(ids.shape))
    tokens = cache.load_corpus(corpus, tmp_path / "model", tmp_path / "cache")
    figures, _ = evaluate.validate(uniform_model(len(tokenizer)), tokens, tokenizer.bos_id(), 32, CPU)
    lines = corpus.read_text().splitlines()
    assert figures["bound_nats_per_token"] == pytest.approx(1)
    expected = sum(len(line.split()) + 1 for line in lines) / sum(map(len, lines)) / math.log(2)
    assert figures["bits_per_char"] == pytest.approx(expected)


def test_the_check_of_the_built_in_language_counts_grammatical_and_new_sentences(tmp_path, monkeypatch):
    """64 samples from the corpus, 128 new sentences, 64 that are not grammatical; a bound 10% above the exact entropy."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(toy.corpus(400))
    known = corpus.read_text().splitlines()
    new = [line for line in toy.corpus(400, seed=1).splitlines() if line not in known][:128]
    (tmp_path / "model").write_bytes(train_tokenizer(corpus, "word", 500))
    tokenizer = load_tokenizer(tmp_path / "model")
    samples = [(tokenizer.encode(text), 1) for text in known[:64] + new + ["the the cat"] * 64]
    random.Random(0).shuffle(samples)
    monkeypatch.setattr(evaluate, "generate", lambda *inputs, **options: iter(samples))
    run = dict(lengths=[0, 0, 0, 0, 1], word_lengths=[0, 1], args=dict(sequence_length=32))
    bound = 1.1 * toy.entropy_given_length() / (toy.mean_length() + 1)
    monkeypatch.setattr(evaluate, "excess_nats_per_token", lambda *inputs: -0.02 * 1.792 * math.log(2))
    lines = evaluate.check_toy(SimpleNamespace(model=None, tokenizer=tokenizer, run=run), None, bound, 0, corpus)
    assert lines == [
        f"bound {bound / math.log(2):.3f} bits per token, 10.0% above the exact entropy given the length, 1.792",
        "exact likelihood under commit 1.756 bits per token, 2.0% below",
        "75.0% of 256 samples are grammatical, 67% of these are not in the corpus",
    ]


def test_the_excess_over_the_grammar_is_what_the_model_costs_more_on_the_same_sentences(tmp_path):
    """For a model that predicts every token with probability 1 / K. eos is scored too, and every sentence has its length."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(toy.corpus(300))
    (tmp_path / "model").write_bytes(train_tokenizer(corpus, "word", 500))
    tokenizer = load_tokenizer(tmp_path / "model")
    val = cache.load_corpus(corpus, tmp_path / "model", tmp_path / "cache")
    model = uniform_model(len(tokenizer))
    model.parameters = lambda: iter([torch.zeros(1)])
    sentences = [line.split() for line in corpus.read_text().splitlines()[:50]]
    truth = -sum(math.log(toy.probability(words) / toy.lengths()[len(words)]) for words in sentences)
    n_tokens = sum(len(words) + 1 for words in sentences)
    excess = evaluate.excess_nats_per_token(model, tokenizer, val, n=50)
    assert excess == pytest.approx(math.log(len(tokenizer)) - truth / n_tokens, rel=1e-5)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "char", "char", toy.corpus(300))
    (folder / "new.txt").write_text(toy.corpus(20, seed=5))
    return folder


def command(monkeypatch, capsys, run_dir, *argv, both=False):
    """Run evaluate.py -> its standard output, with `both` also its standard error."""
    argv = ["evaluate.py", f"-mdir={run_dir}", f"-d={run_dir / 'new.txt'}", f"--cache_dir={run_dir / 'cache'}", *argv]
    monkeypatch.setattr(sys, "argv", argv)
    capsys.readouterr()
    cli.run(evaluate.main)
    out, errors = capsys.readouterr()
    return (out, errors) if both else out


def test_a_bound_of_exactly_zero_and_an_error_that_no_draws_reach_are_no_error():
    """A network may be certain; --se=1e-300 asks for the most draws."""
    names = "L_inf L_rec bound monte_carlo_error text_error unknown".split()
    figures = {f"{name}_nats_per_token": 0.0 for name in names} | dict(bits_per_char=0.0, bits_per_byte=0.0, perplexity_per_token=1.0)
    assert "nan" in tables.table(figures, None)[1]
    scores = SimpleNamespace(loss=np.zeros((2, 1)), monte_carlo_error=lambda: np.float64(0.1))
    with warnings.catch_warnings(action="error"):
        assert bounds.draws_needed(scores, 1e-300) == bounds.MAX_DRAWS


def test_a_window_that_no_document_fills_takes_no_more_memory(monkeypatch, capsys, run_dir):
    line = command(monkeypatch, capsys, run_dir, "--window=1000000", "--draws=1").splitlines()[0]
    longest = 2 + max(map(len, (run_dir / "new.txt").read_text().splitlines()))  # a character vocabulary, with bos and eos
    assert int(line.split("windows of ")[1].split(",")[0]) in (longest, longest - 2)


def test_the_command_prints_the_same_figures_for_the_same_seed(monkeypatch, capsys, run_dir, tmp_path):
    samples = ("--samples=4", "--steps=2", "--corrections=1", f"--corpus={run_dir / 'text.txt'}")
    quick = ("--se=5", *samples)
    figures = json.loads(command(monkeypatch, capsys, run_dir, "--json", *quick))
    assert figures == json.loads(command(monkeypatch, capsys, run_dir, "--json", *quick))
    text = (run_dir / "new.txt").read_text()
    ratio = figures["bits_per_char"] / figures["bits_per_byte"]
    assert ratio == pytest.approx(1) and figures["n_tokens_scored"] == len(text) - 20
    assert set(figures["samples"]) == {"4 samples, 3 calls", "4 real texts"}
    assert figures["samples"]["4 real texts"]["known words"][0] > 0.9
    losses = figures["by_time"]["loss_nats_per_token"]
    assert np.mean(losses) == pytest.approx(figures["L_inf_nats_per_token"], rel=0.3)
    shown = command(monkeypatch, capsys, run_dir, *quick)
    assert f"{figures['bits_per_char']:.4f}" in shown and "n-gram perplexity" in shown
    assert "L_20" in command(monkeypatch, capsys, run_dir, "--se=5", "--n_steps=20")


def test_without_a_flag_for_the_amount_the_time_limits_what_is_scored(monkeypatch, capsys, run_dir):
    """The speed is set to a value with which two draws of four rows fit in the time."""
    (run_dir / "new.txt").write_text(toy.corpus(40, seed=5))
    monkeypatch.setattr(bounds, "seconds_per_row", lambda *inputs: evaluate.SECONDS / 8)
    monkeypatch.setattr(bounds, "MAX_DRAWS", 3)
    quick = json.loads(command(monkeypatch, capsys, run_dir, "--json"))
    assert quick["n_draws"] == 3 and quick["share_of_text"] < 0.9 and not quick["partial"]
    monkeypatch.setattr(bounds, "seconds_per_row", None)
    window = json.loads(command(monkeypatch, capsys, run_dir, "--json", "--max_tokens=1", "--draws=1"))["n_tokens_scored"]
    assert window < quick["n_tokens_scored"]
    for flags in (["--all", "--se=5"], ["--se=5"], ["--draws=2"]):
        assert json.loads(command(monkeypatch, capsys, run_dir, "--json", *flags))["share_of_text"] == 1
    monkeypatch.setattr(evaluate, "ERROR", 5.0)
    assert json.loads(command(monkeypatch, capsys, run_dir, "--json", "--all"))["n_draws"] == 2


def test_the_printed_flags_repeat_the_figures(monkeypatch, capsys, run_dir):
    monkeypatch.setattr(bounds, "seconds_per_row", lambda *inputs: evaluate.SECONDS / 8)
    monkeypatch.setattr(bounds, "MAX_DRAWS", 3)
    shown, errors = command(monkeypatch, capsys, run_dir, both=True)
    flags = next(line for line in errors.splitlines() if "the same figures again" in line).split()[-2:]
    monkeypatch.setattr(bounds, "MAX_DRAWS", 9)
    assert command(monkeypatch, capsys, run_dir, *flags) == shown


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_ctrl_c_prints_partial_figures_and_leaves_with_code_130(monkeypatch, capsys, run_dir, json_flag):
    """The signal arrives in the third batch of the first draw."""
    losses_at, calls = bounds.losses_at, []

    def interrupted(*inputs):
        calls.append(0)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return losses_at(*inputs)

    monkeypatch.setattr(bounds, "losses_at", interrupted)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, capsys, run_dir, "--all", "--batch_size=1", *json_flag)
    out, errors = capsys.readouterr()
    assert stop.value.code == 130 and len(calls) == 3 and "these figures are partial" in errors
    if json_flag:
        figures = json.loads(out)
        assert figures["partial"] and figures["n_draws"] == 1 and figures["monte_carlo_error_nats_per_token"] is None
    else:
        assert "perplexity per token" in out


def test_ctrl_c_while_sampling_still_prints_the_bound(monkeypatch, capsys, run_dir):
    def interrupted(*inputs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "sample_quality", interrupted)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, capsys, run_dir, "--json", "--se=5", "--samples=4", f"--corpus={run_dir / 'text.txt'}")
    figures = json.loads(capsys.readouterr().out)
    assert stop.value.code == 130 and figures["partial"] and figures["n_draws"] == 2 and "samples" not in figures


def test_a_second_ctrl_c_stops_at_once_and_afterwards_the_first_one_does(monkeypatch):
    """Unless it comes within a second: torchrun and a terminal send the same one twice."""
    before = signal.getsignal(signal.SIGINT)
    with cli.catch_signals(["SIGINT"]):
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
    with cli.catch_signals(["SIGINT"]) as interrupts:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert interrupts == [signal.SIGINT]
        monkeypatch.setattr(cli.time, "monotonic", lambda: math.inf)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_text_that_the_tokenizer_does_not_know_costs_nine_bits_per_byte(monkeypatch, capsys, run_dir):
    (run_dir / "new.txt").write_text("the \U0001f600\U0001f600 king\n")
    figures = json.loads(command(monkeypatch, capsys, run_dir, "--json", "--se=5"))
    known = figures["bound_nats_per_token"] - figures["unknown_nats_per_token"]
    n = figures["n_tokens_scored"]
    assert figures["unknown_nats_per_token"] * n == pytest.approx(9 * 8 * math.log(2))
    assert figures["bits_per_byte"] == pytest.approx((known * n / math.log(2) + 72) / len(b"the  king" + b"8" * 8))


@pytest.mark.parametrize(
    "flag, message",
    [("--given=middle", "write prefix:SHARE"), ("--given=around:1.5", "must be below 1"), ("--ema=3", "there is no 3")],
)
def test_a_bad_flag_gets_one_line_and_exit_code_2(monkeypatch, capsys, run_dir, flag, message):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, capsys, run_dir, flag)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_both_names_of_the_sampler_flag_are_read():
    for flag in ("--sampler", "--solver"):
        assert evaluate.flags().parse_args(["-d=text.txt", f"{flag}=sde2"]).sampler == "sde2"


# ---------------------------------------------------------------- the figures of samples


def test_the_n_gram_model_follows_witten_and_bells_rule_and_sums_to_one(tmp_path):
    (tmp_path / "text.txt").write_text("a b a b a c\nb a\n")
    (tmp_path / "model").write_bytes(train_tokenizer(tmp_path / "text.txt", "word", 100))
    tokenizer = load_tokenizer(tmp_path / "model")
    reference = quality.Reference.fit(tmp_path / "text.txt", tokenizer)
    assert reference.words == {"a", "b", "c"}
    K = len(tokenizer)
    nats, n = reference.nats("a")  # the start of a line was seen twice, with 2 successors, "a" once
    unigram = (4 + 3 / K) / (8 + 3)
    p = unigram
    for _ in range(5):  # orders 2 to 6, whose histories are the marks before the line
        p = (1 + 2 * p) / (2 + 2)
    assert n == 1 and nats == pytest.approx(-math.log(p))
    known = sum(math.exp(-reference.nats(f"a b {w}")[0] + reference.nats("a b")[0]) for w in "abc")
    unseen = math.exp(-reference.nats("a b zebra")[0] + reference.nats("a b")[0])  # the unknown token
    assert known + (K - 3) * unseen == pytest.approx(1)


def test_repetition_lowers_entropy_distinct_bigrams_and_compressed_size():
    texts = toy.corpus(30).splitlines()
    reference = SimpleNamespace(words=set(toy.vocabulary()), nats=lambda text: (len(text.split()), len(text.split())))
    real, repeated = quality.figures(texts, reference), quality.figures([texts[0]] * 30, reference)
    assert real["known words"][0] == repeated["known words"][0] == 1
    assert real["n-gram perplexity"][0] == pytest.approx(math.e)
    for name in ("distinct bigrams", "word entropy (bits)", "compressed (bits per character)"):
        assert repeated[name][2] < real[name][1]


def test_an_empty_training_text_is_refused_before_anything_is_scored(monkeypatch, capsys, run_dir, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    monkeypatch.setattr(bounds, "score", None)
    with pytest.raises(SystemExit):
        command(monkeypatch, capsys, run_dir, "--samples=4", f"--corpus={tmp_path / 'empty.txt'}")
    assert "has no text to compare samples with" in capsys.readouterr().err


# ---------------------------------------------------------------- pictures


@pytest.fixture
def picture(tmp_path, monkeypatch):
    """picture(name) draws a line into a file of tmp_path."""
    monkeypatch.setattr(drawing, "_reported", set())
    return lambda name: drawing.lines(tmp_path / name, {"a line": ([0, 1], [1, 2])}, "t", "nats", "title")


def test_without_matplotlib_a_picture_is_one_line_on_standard_error(picture, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not picture("a.png") and not picture("a.png")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"no picture at {tmp_path / 'a.png'}: " in error
    assert error.endswith("(pip install matplotlib)\n")
    assert not picture("b.png") and "b.png" in capsys.readouterr().err


def test_a_broken_matplotlib_does_not_stop_a_run(picture, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(figure=None))
    assert not picture("a.png")
    assert capsys.readouterr().err.count("\n") == 1


def test_a_picture_that_cannot_be_written_leaves_nothing_behind(picture, tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    assert not picture("folder.png")
    assert "directory (give a path that can be written)" in capsys.readouterr().err
    (tmp_path / "file").write_text("text")
    assert not picture("file/a.png") and not picture("a.unknown")
    assert capsys.readouterr().err.count("\n") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_picture_that_fails_keeps_the_one_that_was_there(picture, tmp_path, monkeypatch, capsys):
    assert picture("a.png") and capsys.readouterr().err == ""
    before = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: path.write_text("half") / 0)
    assert not picture("a.png")
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_training_text_that_was_replaced_is_named_before_samples_are_compared_with_it(tmp_path, capsys):
    run_dir = make_run(tmp_path / "run", "word", toy.corpus(300))
    run = load(run_dir)[2]
    args = SimpleNamespace(corpus=str(run_dir / "text.txt"), model_dir=run_dir, cache_dir=tmp_path / "cache")
    part = "all" if run["args"]["val_path"] else "train"
    tokens = cache.load_corpus(args.corpus, run_dir / "tokenizer.model", args.cache_dir, part)
    run["identity"] = dict(run.get("identity", {}), corpus=tokens.key)
    evaluate.find_corpus(args, run)
    assert not capsys.readouterr().err
    (run_dir / "text.txt").write_text(toy.corpus(300, seed=1))
    evaluate.find_corpus(args, run)
    assert "text.txt is not the text that the model was trained on" in capsys.readouterr().err
