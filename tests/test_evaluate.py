"""Evaluation: validation, the check of the built-in language, and the command."""

import json
import math
import random
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact import draw, exact_model, random_joint, tokens_of, uniform_model
from untrained import make_run

import bfn
import evaluate
from common import cli
from evaluation import bounds, grammar
from text import cache, toy
from text.tokenizer import load_tokenizer, train_tokenizer
from training.checkpoint import load

SEQUENCES, P = random_joint()
CPU = torch.device("cpu")


# ---------------------------------------------------------------- validation


def test_a_validation_plans_its_text_once(monkeypatch):
    plan_validation, calls = bounds.data.plan_validation, []

    def counted(*inputs):
        calls.append(inputs)
        return plan_validation(*inputs)

    monkeypatch.setattr(bounds.data, "plan_validation", counted)
    evaluate.validate(exact_model(4), tokens_of(draw(SEQUENCES, P, 50)), 3, CPU, max_tokens=90)
    assert len(calls) == 1


def test_two_validations_use_the_same_tokens_and_noise_and_agree_exactly():
    tokens = tokens_of(draw(SEQUENCES, P, 1000))
    first, second = (
        evaluate.validate(exact_model(4), tokens, 3, CPU, max_tokens=600) for _ in range(2)
    )
    assert first == second
    figures, loss_by_time = first
    assert len(loss_by_time) == 20 and figures["n_tokens_scored"] == 600
    assert 0 < figures["exact_nats_per_token"] < figures["bound_nats_per_token"]


def test_bits_per_character_count_eos_but_not_bos_and_all_characters_of_the_raw_text(
    tmp_path, monkeypatch
):
    """The losses are set to one nat per token for L_inf and to nothing for L_rec."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(toy.corpus(300))
    (tmp_path / "model").write_bytes(train_tokenizer(corpus, "word", 500))
    tokenizer = load_tokenizer(tmp_path / "model")
    monkeypatch.setattr(bfn, "squared_error_loss", lambda log_p, ids, *rest: torch.ones(ids.shape))
    monkeypatch.setattr(
        bfn, "reconstruction_loss", lambda network, ids, *rest: torch.zeros(ids.shape)
    )
    tokens = cache.load_corpus(corpus, tokenizer, tmp_path / "cache")
    figures, _ = evaluate.validate(uniform_model(len(tokenizer)), tokens, 32, CPU)
    lines = corpus.read_text().splitlines()
    assert figures["bound_nats_per_token"] == pytest.approx(1)
    expected = sum(len(line.split()) + 1 for line in lines) / sum(map(len, lines)) / math.log(2)
    assert figures["bits_per_char"] == pytest.approx(expected)


def test_the_check_of_the_built_in_language_counts_grammatical_and_new_sentences(
    tmp_path, monkeypatch
):
    """64 samples from the corpus, 128 new sentences, 64 that are not grammatical; a bound 10% above
    the exact entropy.
    """
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
    monkeypatch.setattr(
        grammar, "excess_nats_per_token", lambda *inputs: -0.02 * 1.792 * math.log(2)
    )
    monkeypatch.setattr(grammar, "hidden_word_nats", lambda *inputs: (1.1, 1.0))
    lines = evaluate.check_toy(
        SimpleNamespace(model=None, tokenizer=tokenizer, run=run), None, bound, 0, corpus
    )
    above = "10.0% above the exact entropy given the length, 1.792"
    assert lines == [
        f"bound {bound / math.log(2):.3f} bits per token, {above}",
        "exact likelihood under commit 1.756 bits per token, 2.0% below",
        "a hidden word 1.587 bits, 10.0% above the grammar",
        "75.0% of 256 samples are grammatical, 67% of these are not in the corpus",
    ]


def test_the_excess_over_the_grammar_is_what_the_model_costs_more_on_the_same_sentences(tmp_path):
    """For a model that predicts every token with probability 1 / K.

    eos is scored too, and every sentence has its length.
    """
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(toy.corpus(300))
    (tmp_path / "model").write_bytes(train_tokenizer(corpus, "word", 500))
    tokenizer = load_tokenizer(tmp_path / "model")
    val = cache.load_corpus(corpus, tokenizer, tmp_path / "cache")
    model = uniform_model(len(tokenizer))
    model.parameters = lambda: iter([torch.zeros(1)])
    sentences = [line.split() for line in corpus.read_text().splitlines()[:50]]
    truth = -sum(
        math.log(toy.probability(words) / toy.lengths()[len(words)]) for words in sentences
    )
    n_tokens = sum(len(words) + 1 for words in sentences)
    excess = grammar.excess_nats_per_token(model, val, n=50)
    assert excess == pytest.approx(math.log(len(tokenizer)) - truth / n_tokens, rel=1e-5)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "char", "char", toy.corpus(300))
    (folder / "new.txt").write_text(toy.corpus(20, seed=5))
    return folder


def command(monkeypatch, capsys, run_dir, *argv, both=False):
    """Run evaluate.py -> its standard output, with `both` also its standard error."""
    argv = [
        "evaluate.py",
        f"-mdir={run_dir}",
        f"-d={run_dir / 'new.txt'}",
        f"--cache_dir={run_dir / 'cache'}",
        *argv,
    ]
    monkeypatch.setattr(sys, "argv", argv)
    capsys.readouterr()
    cli.run(evaluate.main)
    out, errors = capsys.readouterr()
    return (out, errors) if both else out


def test_a_window_that_no_document_fills_takes_no_more_memory(monkeypatch, capsys, run_dir):
    line = command(monkeypatch, capsys, run_dir, "--window=1000000", "--draws=1").splitlines()[0]
    longest = 2 + max(
        map(len, (run_dir / "new.txt").read_text().splitlines())
    )  # a character vocabulary, with bos and eos
    assert int(line.split("windows of ")[1].split(",")[0]) in (longest, longest - 2)


def test_the_command_prints_the_same_figures_for_the_same_seed(
    monkeypatch, capsys, run_dir, tmp_path
):
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
    window = json.loads(
        command(monkeypatch, capsys, run_dir, "--json", "--max_tokens=1", "--draws=1")
    )["n_tokens_scored"]
    assert window < quick["n_tokens_scored"]
    for flags in (["--all", "--se=5"], ["--se=5"], ["--draws=2"]):
        assert (
            json.loads(command(monkeypatch, capsys, run_dir, "--json", *flags))["share_of_text"]
            == 1
        )
    monkeypatch.setattr(evaluate, "ERROR", 5.0)
    assert json.loads(command(monkeypatch, capsys, run_dir, "--json", "--all"))["n_draws"] == 2


def test_the_printed_flags_repeat_the_figures(monkeypatch, capsys, run_dir):
    monkeypatch.setattr(bounds, "seconds_per_row", lambda *inputs: evaluate.SECONDS / 8)
    monkeypatch.setattr(bounds, "MAX_DRAWS", 3)
    shown, errors = command(monkeypatch, capsys, run_dir, both=True)
    flags = next(line for line in errors.splitlines() if "the same figures again" in line).split()[
        -2:
    ]
    monkeypatch.setattr(bounds, "MAX_DRAWS", 9)
    assert command(monkeypatch, capsys, run_dir, *flags) == shown


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_ctrl_c_prints_partial_figures_and_leaves_with_code_130(
    monkeypatch, capsys, run_dir, json_flag
):
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
        assert (
            figures["partial"]
            and figures["n_draws"] == 1
            and figures["monte_carlo_error_nats_per_token"] is None
        )
    else:
        assert "perplexity per token" in out


def test_ctrl_c_while_sampling_still_prints_the_bound(monkeypatch, capsys, run_dir):
    def interrupted(*inputs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "sample_quality", interrupted)
    with pytest.raises(SystemExit) as stop:
        command(
            monkeypatch,
            capsys,
            run_dir,
            "--json",
            "--se=5",
            "--samples=4",
            f"--corpus={run_dir / 'text.txt'}",
        )
    figures = json.loads(capsys.readouterr().out)
    assert (
        stop.value.code == 130
        and figures["partial"]
        and figures["n_draws"] == 2
        and "samples" not in figures
    )


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


def test_text_that_the_tokenizer_does_not_know_costs_nine_bits_per_byte(
    monkeypatch, capsys, run_dir
):
    (run_dir / "new.txt").write_text("the \U0001f600\U0001f600 king\n")
    figures = json.loads(command(monkeypatch, capsys, run_dir, "--json", "--se=5"))
    known = figures["bound_nats_per_token"] - figures["unknown_nats_per_token"]
    n = figures["n_tokens_scored"]
    assert figures["unknown_nats_per_token"] * n == pytest.approx(9 * 8 * math.log(2))
    assert figures["bits_per_byte"] == pytest.approx(
        (known * n / math.log(2) + 72) / len(b"the  king" + b"8" * 8)
    )


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--given=middle", "write prefix:SHARE"),
        ("--given=around:1.5", "must be below 1"),
        ("--ema=3", "there is no 3"),
    ],
)
def test_a_bad_flag_gets_one_line_and_exit_code_2(monkeypatch, capsys, run_dir, flag, message):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, capsys, run_dir, flag)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_both_names_of_the_sampler_flag_are_read():
    for flag in ("--sampler", "--solver"):
        assert evaluate.flags().parse_args(["-d=text.txt", f"{flag}=sde2"]).sampler == "sde2"


def test_an_empty_training_text_is_refused_before_anything_is_scored(
    monkeypatch, capsys, run_dir, tmp_path
):
    (tmp_path / "empty.txt").write_text("\n")
    monkeypatch.setattr(bounds, "score", None)
    with pytest.raises(SystemExit):
        command(monkeypatch, capsys, run_dir, "--samples=4", f"--corpus={tmp_path / 'empty.txt'}")
    assert "has no text to compare samples with" in capsys.readouterr().err


def test_a_training_text_that_was_replaced_is_named_before_samples_are_compared_with_it(
    tmp_path, capsys
):
    run_dir = make_run(tmp_path / "run", "word", toy.corpus(300))
    _, tokenizer, run = load(run_dir)
    args = SimpleNamespace(
        corpus=str(run_dir / "text.txt"), model_dir=run_dir, cache_dir=tmp_path / "cache"
    )
    part = "all" if run["args"]["val_path"] else "train"
    tokens = cache.load_corpus(args.corpus, tokenizer, args.cache_dir, part)
    run["identity"] = dict(run.get("identity", {}), corpus=tokens.key)
    evaluate.find_corpus(args, tokenizer, run)
    assert not capsys.readouterr().err
    (run_dir / "text.txt").write_text(toy.corpus(300, seed=1))
    evaluate.find_corpus(args, tokenizer, run)
    assert "text.txt is not the text that the model was trained on" in capsys.readouterr().err
