"""Guidance: with exact networks and exact labels, samples follow the exact conditional
distribution.
"""

import pytest
import torch
from exact import ExactNetwork, random_joint

import bfn
from sampling import guidance

K, L, N, S1 = 3, 3, 6000, 3.0


@pytest.fixture(scope="module")
def joint():
    return random_joint(K, L, seed=3, spread=1.5)


def sample(network, sampler, steps, n=N, **controls):
    torch.manual_seed(0)
    ids, given = torch.zeros(n, L, dtype=torch.long), torch.zeros(n, L, dtype=torch.bool)
    return bfn.sample(
        network, ids, given, S1, K, bfn.Controls(sampler=sampler, steps=steps, **controls)
    )[0]


def frequencies(ids):
    return torch.bincount(ids @ K ** torch.arange(L - 1, -1, -1), minlength=K**L) / len(ids)


def distance(p, q):
    """Total variation."""
    return (p - q).abs().sum().item() / 2


def label_guide(sequences, probabilities, has_label):
    """The exact log p(label | z) of a label that is a function of the sequence."""

    def guide(z, t):
        log_weight = probabilities.log() + torch.einsum(
            "blk,nlk->bn", z, torch.nn.functional.one_hot(sequences, K).float()
        )
        return log_weight.masked_fill(~has_label, -torch.inf).logsumexp(1) - log_weight.logsumexp(1)

    return guide


def guided_exactly(network, guide):
    """Guide by the true log p(label | z), with Tweedie's formula -> network(theta, t).

        p(x | z, label)  =  p(x | z) + d log p(label | z) / dz_x

    z is e_x with Gaussian noise, so the slope of log p(z) tells the mean of e_x, with and without
    the label.
    """

    def guided(theta, t):
        z = theta.clamp(min=guidance.SMALLEST).log().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(guide(z, t).sum(), z)
        p = network(theta, t).log_softmax(-1).exp()
        return (p + slope).clamp(min=guidance.SMALLEST).log()

    return guided


@pytest.mark.parametrize(
    "sampler, steps", [("commit", 3), ("pace", 3), ("ancestral", 100), ("sde1", 100), ("ode2", 100)]
)
def test_with_an_exact_guide_of_scale_1_samples_follow_the_exact_conditional(joint, sampler, steps):
    sequences, P = joint
    has_label = sequences.sum(1) >= 4  # about a quarter
    target = torch.where(has_label, P, 0) / P[has_label].sum()
    exact = ExactNetwork(sequences, P)
    network = guided_exactly(exact, label_guide(sequences, P, has_label))
    floor = (
        sum(
            distance(torch.multinomial(target, N, True).bincount(minlength=K**L) / N, target)
            for _ in range(5)
        )
        / 5
    )
    guided = frequencies(sample(network, sampler, steps))
    assert distance(frequencies(sample(exact, sampler, steps)), target) > 0.4
    assert distance(guided, target) < floor + (0.03 if sampler == "commit" else 0.06)
    assert guided[has_label].sum() > 0.97


def test_the_answer_with_an_exact_guide_is_the_exact_conditional(joint):
    sequences, P = joint
    has_label = sequences[:, 0] == sequences[:, 2]
    z = torch.randn(5, L, K, generator=torch.Generator().manual_seed(0))
    guide = label_guide(sequences, P, has_label)
    network = guided_exactly(ExactNetwork(sequences, P), guide)
    expected = ExactNetwork(sequences, torch.where(has_label, P, 1e-30))(z.softmax(-1), None).exp()
    torch.testing.assert_close(
        network(z.softmax(-1), torch.zeros(5, L)).exp(), expected, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("sampler, steps", [("commit", 3), ("ancestral", 100)])
def test_to_first_order_samples_have_the_label_more_often_the_larger_the_scale(
    joint, sampler, steps
):
    sequences, P = joint
    has_label = sequences.sum(1) >= 4
    guide, exact = label_guide(sequences, P, has_label), ExactNetwork(sequences, P)
    shares = [
        frequencies(sample(guidance.by_function(exact, guide, scale), sampler, steps, n=1000))[
            has_label
        ]
        .sum()
        .item()
        for scale in (0.0, 1.0, 3.0)
    ]
    assert shares[0] == pytest.approx(P[has_label].sum().item(), abs=0.05)
    assert shares[0] + 0.2 < shares[1] < shares[2]


def test_a_guide_brings_in_no_token_that_the_network_rules_out():
    p = torch.tensor([[[0.5, 0.5, 1e-9]]])
    network = guidance.by_function(
        lambda theta, t: p.log(), lambda z, t: z.softmax(-1)[:, 0, 2].log(), scale=1.0
    )
    assert network(torch.full((1, 1, 3), 1 / 3), torch.zeros(1, 1)).softmax(-1)[0, 0, 2] < 1e-8
