"""The bound and its errors against exact distributions; the command."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact import ExactNetwork, draw, random_joint
from runs import make_run

import bfn
import cli
import data
import evaluate
import quality
import toy

SEQUENCES, P = random_joint()
CPU = torch.device("cpu")


def exact_model(s1):
    network = ExactNetwork(SEQUENCES, P)

    def model(theta, t, segment_ids):
        return network(theta, t)

    model.config = SimpleNamespace(K=4, d_model=1, s1=s1)
    return model


def tokens_of(ids):
    """A text of one document a row, without bos and eos, a character and a byte a token."""
    B, L = ids.shape
    return data.Tokens(ids.numpy().ravel(), np.arange(B + 1) * L, ids.numel(), ids.numel(), 0, "test")


def code_length(ids):
    """-log P of the rows, nats per token."""
    return -P.log()[(ids * torch.tensor([16, 4, 1])).sum(-1)].sum().item() / ids.numel()


@pytest.mark.parametrize("s1, n_steps, tight", [(2, None, False), (8, None, True), (8, 400, False)])
def test_the_bound_of_a_text_is_its_code_length_under_the_exact_network_and_never_less(s1, n_steps, tight):
    """Given the text, so that only noise and times are left to err."""
    ids = draw(SEQUENCES, P, 4000)
    tokens = tokens_of(ids)
    scores = evaluate.score(exact_model(s1), tokens, 3, -1, CPU, n_draws=8, n_steps=n_steps, batch_size=500)
    figures = evaluate.likelihood(scores, tokens, -1)
    gap = figures["bound_nats_per_token"] - code_length(ids)
    error = figures["monte_carlo_error_nats_per_token"]
    assert 0 < error < 0.02
    assert gap > -4 * error
    assert gap < 4 * error or not tight
    assert figures["bits_per_byte"] == pytest.approx(figures["bound_nats_per_token"] / math.log(2))


@pytest.mark.parametrize("n_steps", [None, 5])
def test_what_is_read_together_changes_no_figure(n_steps):
    tokens = tokens_of(draw(SEQUENCES, P, 50))
    one, seven = (evaluate.score(exact_model(4), tokens, 3, -1, CPU, n_steps=n_steps, batch_size=n) for n in (1, 7))
    for name in ("t", "loss", "cross_entropy", "reconstruction"):
        np.testing.assert_allclose(getattr(one, name), getattr(seven, name), rtol=1e-4, atol=1e-5)


def test_the_monte_carlo_error_is_the_spread_over_seeds():
    """And the error of the text is that of the mean code length."""
    ids = draw(SEQUENCES, P, 500)
    tokens = tokens_of(ids)
    bounds, errors = [], []
    for seed in range(16):
        scores = evaluate.score(exact_model(4), tokens, 3, -1, CPU, n_draws=4, seed=seed, batch_size=250)
        bounds.append(sum(scores.nats_per_token))
        errors.append(scores.monte_carlo_error())
    assert 0.6 < np.std(bounds, ddof=1) / np.mean(errors) < 1.5
    error, n_documents = scores.text_error()
    per_text = -P.log()[(ids * torch.tensor([16, 4, 1])).sum(-1)] / 3
    assert n_documents == 500
    assert error == pytest.approx(per_text.std().item() / math.sqrt(500), rel=0.3)


@pytest.mark.parametrize("n_texts", [1, 10])
def test_the_monte_carlo_error_of_few_windows_is_not_taken_for_nothing(n_texts):
    """Their times are not spread evenly, and no curve can be fitted to them."""
    tokens = tokens_of(draw(SEQUENCES, P, n_texts))
    scores = [evaluate.score(exact_model(4), tokens, 3, -1, CPU, n_draws=8, seed=seed) for seed in range(30)]
    spread = np.std([sum(s.nats_per_token) for s in scores], ddof=1)
    assert 0.5 < np.sqrt(np.mean([s.monte_carlo_error() ** 2 for s in scores])) / spread < 2
    assert math.isnan(scores[0].text_error()[0]) == (n_texts == 1)


def test_draws_are_added_until_the_error_asked_for_is_reached():
    tokens = tokens_of(draw(SEQUENCES, P, 200))
    scores = evaluate.score(exact_model(4), tokens, 3, -1, CPU, error=0.03)
    assert scores.monte_carlo_error() < 0.04 and 2 < len(scores.loss) < evaluate.MOST_DRAWS
    again = evaluate.score(exact_model(4), tokens, 3, -1, CPU, error=0.03)
    assert np.array_equal(scores.loss, again.loss)


def test_the_control_variate_of_the_n_step_loss_changes_its_noise_alone():
    torch.manual_seed(0)
    ids = torch.zeros(200_000, 1, dtype=torch.long)
    logits = torch.tensor([1.0, 0.0, -1.0]).expand(200_000, 1, 3)
    i, n, s1 = torch.full_like(ids, 70), 100, 3.0
    loss = bfn.n_step_error(logits, ids, i, n, s1)
    a = torch.tensor(s1 * math.sqrt(139) / n)
    y = bfn.sender_sample(ids, a, 3)
    plain = n * (y[..., 0] - torch.logsumexp(logits.log_softmax(-1) + y, -1))
    error = plain.std() / math.sqrt(len(plain))
    assert abs(loss.mean() - plain.mean()) < 4 * error
    assert loss.std() < plain.std() / 4


def test_every_token_is_scored_once_whatever_the_window():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 30)
    tokens = data.Tokens(rng.integers(1, 4, lengths.sum()), np.append(0, lengths.cumsum()), 1, 1, 0, "test")

    def model(theta, t, segment_ids):
        return torch.zeros_like(theta)

    model.config = SimpleNamespace(K=4, d_model=1, s1=2.0)
    for window in (5, 16, 50):
        scores = evaluate.score(model, tokens, window, 3, CPU)
        assert scores.n.sum() == (tokens.ids != 3).sum()
        by_document = np.bincount(scores.document, scores.n)
        assert by_document.tolist() == [(tokens.ids[a:b] != 3).sum() for a, b in zip(tokens.offsets, tokens.offsets[1:])]
    some = evaluate.score(model, tokens, 16, -1, CPU, max_tokens=100)
    assert 80 < some.n.sum() <= 112


def test_what_is_given_is_not_scored():
    segment_ids = np.array([[1] * 10 + [2] * 5 + [0]])
    assert np.flatnonzero(~evaluate.parse_given("prefix:0.4")(segment_ids)[0, :15]).tolist() == [
        4,
        5,
        6,
        7,
        8,
        9,
        12,
        13,
        14,
    ]
    assert np.flatnonzero(~evaluate.parse_given("around:0.2")(segment_ids)[0, :15]).tolist() == [4, 5, 12]
    tokens = tokens_of(draw(SEQUENCES, P, 3000))
    scores = evaluate.score(
        exact_model(8), tokens, 3, -1, CPU, n_draws=4, given=evaluate.parse_given("prefix:0.34"), batch_size=500
    )
    first = torch.zeros(4).index_add_(0, SEQUENCES[:, 0], P)
    conditional = -(P * (P / first[SEQUENCES[:, 0]]).log()).sum().item() / 2  # H(x2, x3 | x1) a token
    assert sum(scores.nats_per_token) == pytest.approx(
        conditional, abs=4 * (scores.monte_carlo_error() + scores.text_error()[0])
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "char", "char", toy.corpus(300))
    (folder / "new.txt").write_text(toy.corpus(20, seed=5))
    return folder


def command(monkeypatch, capsys, run_dir, *argv):
    """Run evaluate.py -> its standard output."""
    argv = ["evaluate.py", f"-mdir={run_dir}", f"-d={run_dir / 'new.txt'}", f"--cache_dir={run_dir / 'cache'}", *argv]
    monkeypatch.setattr(sys, "argv", argv)
    capsys.readouterr()
    cli.run(evaluate.main)
    return capsys.readouterr().out


def test_the_command_prints_the_same_figures_for_the_same_seed(monkeypatch, capsys, run_dir, tmp_path):
    samples = ("--samples=4", "--steps=2", "--corrections=1", f"--corpus={run_dir / 'text.txt'}")
    quick = ("--se=5", f"--by_time={tmp_path / 'curve'}", *samples)
    figures = json.loads(command(monkeypatch, capsys, run_dir, "--json", *quick))
    assert figures == json.loads(command(monkeypatch, capsys, run_dir, "--json", *quick))
    text = (run_dir / "new.txt").read_text()
    ratio = figures["bits_per_char"] / figures["bits_per_byte"]
    assert ratio == pytest.approx(1) and figures["n_tokens_scored"] == len(text) - 20
    assert set(figures["samples"]) == {"4 samples, 3 calls", "4 real texts"}
    assert figures["samples"]["4 real texts"]["known words"][0] > 0.9
    assert (tmp_path / "curve.png").stat().st_size > 5000
    rows = np.genfromtxt(tmp_path / "curve.csv", delimiter=",", names=True)
    assert np.nanmean(rows["loss_nats_per_token"]) == pytest.approx(figures["L_inf_nats_per_token"], rel=0.3)
    shown = command(monkeypatch, capsys, run_dir, *quick)
    assert f"{figures['bits_per_char']:.4f}" in shown and "n-gram perplexity" in shown
    assert "L_20" in command(monkeypatch, capsys, run_dir, "--se=5", "--n_steps=20")


def test_text_that_the_tokenizer_does_not_know_costs_its_bytes(monkeypatch, capsys, run_dir):
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
def test_bad_flags_get_one_line(monkeypatch, capsys, run_dir, flag, message):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, capsys, run_dir, flag)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_the_n_gram_model_is_witten_and_bells_and_sums_to_one(tmp_path):
    (tmp_path / "text.txt").write_text("a b a b a c\nb a\n")
    (tmp_path / "model").write_bytes(data.train_tokenizer(tmp_path / "text.txt", "word", 100))
    tokenizer = data.load_tokenizer(tmp_path / "model")
    reference = quality.Reference.fit(tmp_path / "text.txt", tokenizer)
    assert reference.words == {"a", "b", "c"}
    K = len(tokenizer)
    nats, n = reference.nats("a")  # at the start of a line: seen twice, a once, followed by 2 kinds
    unigram = (4 + 3 / K) / (8 + 3)
    p = unigram
    for _ in range(5):  # orders 2 to 6: after the marks of a line's beginning
        p = (1 + 2 * p) / (2 + 2)
    assert n == 1 and nats == pytest.approx(-math.log(p))
    known = sum(math.exp(-reference.nats(f"a b {w}")[0] + reference.nats("a b")[0]) for w in "abc")
    unseen = math.exp(-reference.nats("a b zebra")[0] + reference.nats("a b")[0])  # the unknown token
    assert known + (K - 3) * unseen == pytest.approx(1)


def test_repetition_shows_in_entropy_and_distinct_bigrams():
    words = toy.corpus(30).splitlines()
    reference = SimpleNamespace(words=set(toy.vocabulary()), nats=lambda text: (len(text.split()), len(text.split())))
    real, dull = quality.figures(words, reference), quality.figures([words[0]] * 30, reference)
    assert real["known words"][0] == dull["known words"][0] == 1
    assert real["n-gram perplexity"][0] == pytest.approx(math.e)
    for name in ("distinct bigrams", "word entropy (bits)"):
        assert dull[name][2] < real[name][1]


def test_a_training_text_without_text_is_refused_before_anything_is_scored(monkeypatch, capsys, run_dir, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    monkeypatch.setattr(evaluate, "score", None)
    with pytest.raises(SystemExit):
        command(monkeypatch, capsys, run_dir, "--samples=4", f"--corpus={tmp_path / 'empty.txt'}")
    assert "has no text to hold samples against" in capsys.readouterr().err
