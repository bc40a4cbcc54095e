"""The exact likelihood of text: against the joint distribution that the exact network knows, and on
the command line.
"""

import json
import math
import random
import signal
import sys
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact import ExactGrammar, ExactNetwork, draw, random_joint
from untrained import make_run

import evaluate
from common import cli
from evaluation import bounds, likelihood, tables
from text import toy

SEQUENCES, P = random_joint()
CPU = torch.device("cpu")
ALL = likelihood.figures_of([1, 2, 3], ["sampler", "left", "random", "any", "spread"])


def network(theta, t, segment_ids):
    """The exact network of P for windows of 3 tokens."""
    return ExactNetwork(SEQUENCES, P)(theta, t)


network.config = SimpleNamespace(K=4, d_model=1, s1=6.0)


def score(ids, functions, given=bounds.nothing_given, **options):
    work = bounds.Work(CPU, **options)
    return likelihood.score(network, list(ids.numpy()), -1, functions, work, given=given)


def test_the_chain_rule_of_the_exact_network_is_the_joint_in_every_order():
    scores = score(SEQUENCES, ALL)
    for name in ("exact, 3 calls", "exact, a call per token", "left to right", "random order"):
        np.testing.assert_allclose(scores.nats[name], -P.log().numpy(), atol=1e-5)
    np.testing.assert_allclose(scores.nats["spread over orders"], 0, atol=1e-5)
    assert (
        scores.nats["exact, 1 call"] @ P.numpy()
        > scores.nats["exact, 2 calls"] @ P.numpy()
        > -(P @ P.log())
    )


def test_a_network_that_depends_on_the_order_has_a_spread():
    def uneven(theta, t, segment_ids):
        """Of what the first token says, it knows the more the more is given."""
        return network(theta, t, segment_ids) * t.mean(1)[:, None, None]

    uneven.config = network.config
    functions, work = likelihood.figures_of(orders=["spread"]), bounds.Work(CPU)
    scores = likelihood.score(uneven, list(SEQUENCES.numpy()), -1, functions, work)
    assert scores.nats["spread over orders"].mean() > 0.1


def test_the_spread_has_no_cost_of_unknown_text(monkeypatch):
    monkeypatch.setattr(tables, "unknown_nats_per_token", lambda tokens: 1.0)
    nats = {"random order": np.array([2.0, 2.0]), "spread over orders": np.zeros(2)}
    text = SimpleNamespace(document=np.array([0, 1]), tokens=None)
    figures = tables.exact_figures(text, likelihood.Likelihoods(nats, np.array([2.0, 2.0])))
    assert figures["random_order_nats_per_token"] == 2
    assert figures["spread_over_orders_nats_per_token"] == 0


def test_the_bound_over_all_orders_is_the_mean_over_orders():
    """Which for the exact network is -log P itself; its only noise is how many and which tokens are
    unknown.
    """
    ids = draw(SEQUENCES, P, 4000)
    nats = score(ids, likelihood.figures_of(orders=["any"])).nats["any order (bound)"]
    truth = -P.log()[(ids * torch.tensor([16, 4, 1])).sum(-1)].numpy()
    assert (nats - truth).mean() == pytest.approx(
        0, abs=4 * (nats - truth).std() / math.sqrt(len(nats))
    )


def test_what_is_given_costs_nothing_and_the_rest_its_conditional():
    scores = score(
        SEQUENCES,
        likelihood.figures_of([9]),
        given=lambda segment_ids: torch.tensor([[True, False, False]]),
    )
    first = torch.stack([P[SEQUENCES[:, 0] == k].sum() for k in range(4)])
    np.testing.assert_allclose(
        scores.nats["exact, 9 calls"], -(P / first[SEQUENCES[:, 0]]).log().numpy(), atol=1e-5
    )
    assert (scores.n_scored == 2).all()


def test_windows_are_read_in_chunks_until_the_time_is_over_or_ctrl_c(monkeypatch):
    monkeypatch.setattr(likelihood, "CHUNK_TOKENS", 9)
    figures = likelihood.figures_of([2], ["random"])
    whole = score(SEQUENCES, figures)
    monkeypatch.setattr(likelihood, "CHUNK_TOKENS", 60)
    for name, nats in score(SEQUENCES, figures).nats.items():
        np.testing.assert_allclose(nats, whole.nats[name], atol=1e-5)
    assert (
        len(score(SEQUENCES, figures, seconds=1e-9).n_scored)
        == len(score(SEQUENCES, figures, interrupts=[2]).n_scored)
        == 20
    )


def test_a_text_of_which_all_is_given_is_refused():
    with pytest.raises(ValueError, match="nothing of this text is left to score"):
        score(SEQUENCES, ALL, given=lambda segment_ids: segment_ids > 0)


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_the_command_prints_exact_likelihoods_next_to_the_bound(
    tmp_path, monkeypatch, capsys, kind
):
    """Packed rows, windows of different lengths: as many calls as tokens are the sampler's own
    order.
    """
    run_dir = make_run(tmp_path / kind, kind, toy.corpus(60))
    flags = [
        "-d",
        str(run_dir / "text.txt"),
        f"--cache_dir={tmp_path}",
        "--draws=1",
        "--max_tokens=300",
        "--calls=2,99",
    ]
    command = ["evaluate.py", f"-mdir={run_dir}", *flags, "--order=sampler,any"]
    monkeypatch.setattr(sys, "argv", command)
    cli.run(evaluate.main)
    lines = capsys.readouterr().out.splitlines()
    values = {
        line[:24].strip(): line.split()[-4:]
        for line in lines
        if line.startswith(("exact", "any", "bound"))
    }
    assert list(values) == [
        "bound",
        "exact, 2 calls",
        "exact, 99 calls",
        "exact, a call per token",
        "any order (bound)",
    ]
    assert values["exact, 99 calls"] == values["exact, a call per token"]
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    cli.run(evaluate.main)
    figures = json.loads(capsys.readouterr().out)
    assert f"{figures['exact_2_calls_nats_per_token']:.4f}" == values["exact, 2 calls"][0]
    assert figures["exact_99_calls_text_error_nats_per_token"] > 0


def test_ctrl_c_prints_the_figures_so_far_and_says_that_they_are_partial(
    tmp_path, monkeypatch, capsys
):
    """During the bound, without exact likelihoods; during these, with those of the windows that
    were read.
    """
    run_dir = make_run(tmp_path / "run", "word", toy.corpus(600))
    flags = ["-d", str(run_dir / "text.txt"), f"--cache_dir={tmp_path}", "--draws=2", "--calls=2"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", f"-mdir={run_dir}", *flags])
    for module, name, n_exact in ((bounds, "score_once", 0), (likelihood, "pad", 2)):
        real = getattr(module, name)

        def interrupted(*inputs, real=real, **more):
            signal.raise_signal(signal.SIGINT)
            return real(*inputs, **more)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupted)
            with pytest.raises(SystemExit) as error:
                cli.run(evaluate.main)
        out, err = capsys.readouterr()
        assert error.value.code == 130 and "these figures are partial" in err
        assert out.count("exact") == n_exact and "bound" in out


def test_an_order_that_does_not_exist_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "-d=x", "--order=left,up"])
    with pytest.raises(SystemExit) as error:
        cli.run(evaluate.main)
    assert error.value.code == 2
    assert "write some of sampler,left,random,spread,any" in capsys.readouterr().err


# ---------------------------------------------------------------- gaps


@pytest.fixture(scope="module")
def grammar():
    """Sentences of the built-in language, all of one length, their ids, its exact network."""
    exact, rng = ExactGrammar(), random.Random(3)
    drawn = (toy.sample(rng) for _ in range(10_000))
    sentences = list(islice((words for words in drawn if len(words) == 9), 40))
    windows = [np.array([exact.words[word] for word in words]) for words in sentences]

    def network(theta, t, segment_ids):
        return exact(theta, t)

    network.config = SimpleNamespace(K=len(exact.words), d_model=1, s1=6.0)
    return sentences, windows, network


def hidden_nats(words, begin, size):
    """-log of the probability of words[begin : begin + size], given all others."""
    others = [*words[:begin], *[None] * size, *words[begin + size :]]
    return math.log(toy.probability(others) / toy.probability(words))


def test_a_gap_costs_what_the_grammar_says(grammar):
    sentences, windows, network = grammar
    functions = likelihood.figures_of(gaps=[1, 3])
    scores = likelihood.score(network, windows, -1, functions, bounds.Work(CPU))
    for size in (1, 3):
        found = scores.nats[f"gap of {size}"] * size / scores.n_scored
        for nats, words in zip(found, sentences, strict=True):
            possible = [hidden_nats(words, d, size) for d in range(len(words) - size + 1)]
            assert min(abs(nats - x) for x in possible) < 1e-5
    for name in ("1 from the left", "3 from the left"):
        size = int(name[0])
        for nats, words in zip(scores.nats[name] * size / scores.n_scored, sentences, strict=True):
            n = len(words)
            before = [[*words[:d], *[None] * (n - d)] for d in range(n + 1)]
            p = [toy.probability(x) for x in before]
            possible = [math.log(p[d] / p[d + size]) for d in range(n - size + 1)]
            assert min(abs(nats - x) for x in possible) < 1e-5
    whole = [-math.log(toy.probability(w) / toy.lengths()[len(w)]) for w in sentences]
    np.testing.assert_allclose(scores.nats["100% unknown"], whole, atol=1e-4)
