"""Lengths that fit a prompt, against the exact conditional of a small language."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sampling import generate as generation
from sampling import prompts
from sampling.generate import fit_lengths, given_log_likelihood
from sampling.prompts import FREE, GAP

K, L = 4, 5
SHARES = torch.tensor([0.0, 0.0, 0.4, 0.3, 0.2, 0.1])  # of texts with 0, 1, ..., L tokens


def random_language(seed=0):
    """P(text | length) for each length, as tensors (K, K, ..., K)."""
    generator = torch.Generator().manual_seed(seed)
    return {n: (2.0 * torch.randn([K] * n, generator=generator)).flatten().softmax(0).view([K] * n) for n in range(2, L + 1)}


LANGUAGE = random_language()


class ExactNetwork(torch.nn.Module):
    """Answers with the exact conditional of each position given the given ones (theta one-hot) and the row's length."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(K=K, d_model=1, s1=3.0)
        self.n_rows = 0
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, theta, t, segment_ids):
        logits = torch.zeros(theta.shape)
        self.n_rows += len(theta)
        for row, n in enumerate(segment_ids.sum(1).tolist()):
            joint = LANGUAGE[n].clone()
            for d in range(n):
                shape = [1] * n
                shape[d] = K
                joint = joint * theta[row, d].view(shape)
            for d in range(n):
                others = [i for i in range(n) if i != d]
                logits[row, d] = joint.sum(others).clamp(min=1e-30).log()
        return logits


class Letters:
    """A tokenizer of the letters a to d, without bos and eos."""

    def bos_id(self):
        return -1

    def eos_id(self):
        return -1

    def encode(self, text, out_type=int):
        return list(text) if out_type is str else ["abcd".index(c) for c in text]


def templates_of(given):
    return [given + [FREE] * (n - len(given)) for n in range(max(2, len(given) + 1), L + 1)]


def probability_of_beginning(given, n):
    """P(a text of length n begins so)."""
    return LANGUAGE[n][tuple(given)].sum().item()


@pytest.mark.parametrize("given", [[0], [2, 1], [3, 3, 0]])
def test_the_likelihood_of_given_tokens_is_exact_for_the_exact_network(given):
    found = given_log_likelihood(ExactNetwork(), Letters(), templates_of(given)).exp().tolist()
    assert found == pytest.approx([probability_of_beginning(given, len(t)) for t in templates_of(given)], rel=1e-4)


def test_given_tokens_between_gaps_count_wherever_they_stand():
    templates = [[GAP, 1, GAP, 2], [GAP, GAP, 1, GAP, 2]]
    exact = [LANGUAGE[4][:, 1, :, 2].sum().item(), LANGUAGE[5][:, :, 1, :, 2].sum().item()]
    assert given_log_likelihood(ExactNetwork(), Letters(), templates).exp().tolist() == pytest.approx(exact, rel=1e-4)


def test_lengths_given_a_prompt_follow_the_exact_conditional():
    given = [2, 1]
    templates = templates_of(given)
    weights = [SHARES[len(t)].item() for t in templates]
    _, fitted = fit_lengths(ExactNetwork(), Letters(), templates, weights)
    exact = np.array([w * probability_of_beginning(given, len(t)) for t, w in zip(templates, weights, strict=True)])
    np.testing.assert_allclose(np.array(fitted) / sum(fitted), exact / exact.sum(), rtol=1e-4)
    assert abs(np.array(weights) / sum(weights) - exact / exact.sum()).max() > 0.05  # the prompt tells something


def test_without_given_tokens_or_with_one_candidate_nothing_is_computed():
    network = ExactNetwork()
    for templates in ([[FREE] * 2, [FREE] * 3], [[1, FREE]]):
        assert fit_lengths(network, Letters(), templates, [1.0] * len(templates)) == (templates, [1.0] * len(templates))
    assert network.n_rows == 0


def test_long_prompts_and_many_lengths_take_a_bounded_number_of_calls(monkeypatch):
    """Several tokens per call, and only some of the lengths; log P of the others is interpolated."""
    monkeypatch.setattr(generation, "MAX_CALLS", 2)
    monkeypatch.setattr(generation, "MAX_CANDIDATES", 2)
    network, templates = ExactNetwork(), templates_of([0])
    _, fitted = fit_lengths(network, Letters(), templates, [1.0] * len(templates))
    assert network.n_rows <= 2 * 2 and len(fitted) == len(templates) == 4
    log_w = np.log(fitted)
    np.testing.assert_allclose(log_w[1:3], np.interp([1, 2], [0, 3], log_w[[0, 3]]), atol=1e-9)


def test_the_same_prompt_has_the_same_likelihood_next_to_longer_templates():
    alone = given_log_likelihood(ExactNetwork(), Letters(), [[1, 2, FREE]])
    together = given_log_likelihood(ExactNetwork(), Letters(), [[0, 1, 2, 3, FREE], [1, 2, FREE]])
    torch.testing.assert_close(alone[0], together[1])


def test_a_gap_with_a_range_has_a_template_for_each_size_and_the_lightest_are_left_out(monkeypatch):
    run = dict(args=dict(sequence_length=9), lengths=[0, 0, 0, 5, 0, 2, 1], word_lengths=[0, 1])
    monkeypatch.setattr(prompts, "space_style", lambda tokenizer: (False, True))
    monkeypatch.setattr(prompts, "adds_prefix", lambda tokenizer: False)
    monkeypatch.setattr(prompts, "label_ids", lambda tokenizer: {})
    templates, weights = prompts.candidates("a___{1-4}b", Letters(), run)
    assert templates == [[0, GAP, 1], [0, GAP, GAP, GAP, 1], [0, *[GAP] * 4, 1]] and weights == [5, 2, 1]  # no text has 4 tokens
    monkeypatch.setattr(prompts, "MAX_CANDIDATES", 3)
    assert len(prompts.parse_prompt("___{1-9}___{1-9}", Letters(), [0, 1])[0]) == 3
