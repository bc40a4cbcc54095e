"""Sampling and evaluation in bfloat16, as on a GPU: every caller uses it, and figures stay."""

from pathlib import Path

import pytest
import torch

from common import precision
from common.noise import mix_seed
from evaluation import bounds, grammar, likelihood
from sampling import proofread
from sampling.generate import generate, given_log_likelihood
from sampling.prompts import make_template
from text import cache, toy
from text.reading import Corpus
from training.checkpoint import load

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The trained model of the built-in language and a held-out text."""
    path = tmp_path_factory.mktemp("precision") / "text.txt"
    path.write_text(toy.corpus(100, seed=12345))
    model, tokenizer, run = load(Path(__file__).parent.parent / "examples" / "toy")
    tokens = cache.load_corpus(Corpus(str(path), "text"), tokenizer, str(path.parent))
    return model, tokenizer, run, tokens


def read_in_bf16(monkeypatch, low):
    monkeypatch.setattr(precision, "reads_in_bf16", lambda device: low)


def bound_of(model, tokens, n=448):
    text = bounds.Text(tokens, 64).first_tokens(n)
    return bounds.score(model, text, bounds.Work(CPU), seed=1)


def exact_of(model, tokens, n=8):
    windows, bos = bounds.Text(tokens, 64).windows()[:n], tokens.tokenizer.bos
    return likelihood.score(model, windows, bos, likelihood.COMMIT, bounds.Work(CPU))


def texts_of(model, tokenizer, run, n=8):
    templates = [make_template("", tokenizer, run, mix_seed(i)) for i in range(n)]
    return [tokenizer.decode(ids) for ids, _ in generate(model, tokenizer, templates, seed=0)]


def test_on_a_cpu_a_network_is_called_as_it_is(example):
    model, *_ = example
    theta, t = torch.rand(2, 5, model.config.K).softmax(-1), torch.rand(2, 5)
    segment_ids = torch.tensor([[1, 1, 2, 2, 0], [1] * 5])
    assert not precision.reads_in_bf16(CPU)
    with torch.no_grad():
        found = precision.network_of(model, segment_ids)(theta, t)
        assert found.equal(model(theta, t, segment_ids))


CALLERS = {
    "bound": lambda model, tokens, run: bound_of(model, tokens, 64),
    "exact": lambda model, tokens, run: exact_of(model, tokens, 1),
    "grammar": lambda model, tokens, run: grammar.hidden_word_nats(model, tokens, 1),
    "samples": lambda model, tokens, run: texts_of(model, tokens.tokenizer, run, 1),
    "lengths": lambda model, tokens, run: given_log_likelihood(
        model, tokens.tokenizer, [[*tokens.ids[:3].tolist(), -1, -1]]
    ),
    "proofread": lambda model, tokens, run: proofread.leave_one_out_log_p(
        model, tokens.ids[:5].tolist()
    ),
}


@pytest.mark.parametrize("caller", CALLERS)
def test_sampling_and_evaluation_follow_the_one_decision(caller, example, monkeypatch):
    model, _, run, tokens = example
    dtypes = set()

    def record(head, inputs, output):
        dtypes.add(output.dtype)

    hook = model.linear_out.register_forward_hook(record)
    try:
        for low, dtype in ((True, torch.bfloat16), (False, torch.float32)):
            read_in_bf16(monkeypatch, low)
            dtypes.clear()
            CALLERS[caller](model, tokens, run)
            assert dtypes == {dtype}
    finally:
        hook.remove()


def test_in_bfloat16_the_figures_are_those_of_float32_within_their_errors(example, monkeypatch):
    """With the same noise only rounding is left: a tenth of the errors of noise and text."""
    model, tokenizer, run, tokens = example
    found = []
    for low in (False, True):
        read_in_bf16(monkeypatch, low)
        scores, exact = bound_of(model, tokens), exact_of(model, tokens)
        assert scores.monte_carlo_error() > 0.03
        nats = sum(scores.nats_per_token), exact.nats["exact"].sum() / exact.n_scored.sum()
        n_grammatical = sum(map(toy.is_grammatical, texts_of(model, tokenizer, run)))
        found.append((nats, n_grammatical))
    (nats, n_grammatical), (low_nats, n_low) = found
    assert low_nats != nats
    assert low_nats == pytest.approx(nats, abs=0.003)
    assert min(n_grammatical, n_low) >= 7
