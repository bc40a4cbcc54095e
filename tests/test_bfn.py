"""The flow, its losses and its samplers against closed forms and the exact network."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from exact import ExactNetwork, draw, entropy, random_joint

import bfn
from bfn import Controls
from common.noise import Draws, draw_keys
from evaluation.likelihood import leftmost

SEQUENCES, P = random_joint()
EXACT = ExactNetwork(SEQUENCES, P)
K, L, H = 4, 3, entropy(P)
_, FLAT_P = random_joint(seed=1, spread=1.0)  # 3.64 nats, for the samplers
FLAT = ExactNetwork(SEQUENCES, FLAT_P)


def nothing_given(ids):
    return torch.zeros_like(ids, dtype=torch.bool)


def continuous_time_loss(network, ids, t, cond_mask, s1, K):
    """One draw of the integrand of L_inf at times t (B, L) -> (B, L)."""
    return bfn.squared_error_loss(bfn.predict_noisy(network, ids, t, cond_mask, s1, K), ids, t, s1)


def n_step_loss(network, ids, i, n, cond_mask, s1, K):
    """One draw of the n-step loss at steps i (B, L) -> (B, L)."""
    return bfn.n_step_error(
        bfn.predict_noisy(network, ids, (i - 1) / n, cond_mask, s1, K), ids, i, n, s1
    )


def mean_and_error(losses):
    """Nats per sequence and their standard error."""
    per_sequence = losses.double().sum(-1)
    return per_sequence.mean().item(), per_sequence.std().item() / math.sqrt(len(per_sequence))


def exact_bound(s1, n=100_000):
    torch.manual_seed(1)
    ids = draw(SEQUENCES, P, n)
    t = torch.rand(n, 1).expand(n, L)
    L_inf, error_inf = mean_and_error(
        continuous_time_loss(EXACT, ids, t, nothing_given(ids), s1, K)
    )
    L_rec, error_rec = mean_and_error(
        bfn.reconstruction_loss(EXACT, ids, nothing_given(ids), s1, K)
    )
    return L_inf, L_rec, error_inf + error_rec


def test_a_uniform_prediction_costs_half_s1_squared_times_1_minus_1_over_k():
    ids, s1, K = torch.randint(27, (1, 10_001)), 3.9, 27
    t = torch.linspace(0, 1, 10_001)[None]
    loss = bfn.squared_error_loss(torch.zeros(1, 10_001, K).log_softmax(-1), ids, t, s1)
    assert loss.mean().item() == pytest.approx(s1**2 / 2 * (1 - 1 / K), rel=1e-3)


def test_the_flow_and_its_loss_are_the_papers():
    """softmax of y ~ N(beta (K e_x - 1), beta K I), and K beta1 t |e_x - p|^2, written out as
    published.
    """
    beta1, K = 0.3, 5
    s1 = math.sqrt(K * beta1)
    ids, t, eps = torch.randint(K, (2, 7)), torch.rand(2, 7), torch.randn(2, 7, K)
    e_x = torch.nn.functional.one_hot(ids, K).float()
    beta = (beta1 * t**2)[..., None]
    theta = (beta * (K * e_x - 1) + (beta * K).sqrt() * eps).softmax(-1)
    torch.testing.assert_close(bfn.flow(ids, t, s1, K, eps).softmax(-1), theta)
    logits = torch.randn(2, 7, K)
    published = K * beta1 * t * (e_x - logits.softmax(-1)).square().sum(-1)
    torch.testing.assert_close(
        bfn.squared_error_loss(logits.log_softmax(-1), ids, t, s1), published
    )


def test_the_training_loss_is_the_squared_error_plus_the_weighted_cross_entropy():
    ids, t, logits = torch.randint(5, (2, 7)), torch.rand(2, 7), torch.randn(2, 7, 5)
    log_p = logits.log_softmax(-1)
    published = torch.nn.functional.cross_entropy(logits.mT, ids, reduction="none")
    torch.testing.assert_close(bfn.cross_entropy(log_p, ids), published)
    expected = bfn.squared_error_loss(log_p, ids, t, 3.0) + bfn.CROSS_ENTROPY * published
    torch.testing.assert_close(bfn.training_loss(log_p, ids, t, 3.0), expected)


def test_pick_selects_what_gather_does():
    x, ids = torch.randn(3, 4, 9), torch.randint(9, (3, 4))
    x[0, 0] = -torch.inf
    assert torch.equal(bfn.pick(x, ids), x.gather(-1, ids[..., None]).squeeze(-1))


@pytest.mark.parametrize("s1, excess", [(1, 0.5), (2, 0.2), (3, 0.02), (5, 0.02), (8, 0.02)])
def test_with_the_exact_network_the_bound_falls_to_the_entropy_and_never_below(s1, excess):
    L_inf, L_rec, error = exact_bound(s1)
    assert H - 3 * error <= L_inf + L_rec <= H + excess + 3 * error


def test_the_n_step_loss_falls_to_the_continuous_loss():
    torch.manual_seed(2)
    s1, ids = 3.0, draw(SEQUENCES, P, 100_000)
    L_inf, _, error_inf = exact_bound(s1)
    losses = []
    for n in (1, 3, 10, 100):
        i = torch.randint(1, n + 1, (len(ids), 1)).expand_as(ids)
        loss, error = mean_and_error(n_step_loss(EXACT, ids, i, n, nothing_given(ids), s1, K))
        losses.append(loss)
    assert losses[0] > losses[1] > losses[2] > L_inf - 3 * error_inf
    assert losses[3] == pytest.approx(L_inf, abs=3 * (error + error_inf) + 0.02)


def test_the_one_step_loss_is_at_most_the_negative_log_likelihood():
    """One message that tells less than the token itself cannot cost more than it."""
    torch.manual_seed(3)
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0]])
    for x in range(4):
        ids = torch.full((50_000, 1), x)
        one = torch.ones_like(ids)
        loss = n_step_loss(
            lambda theta, t: logits.expand_as(theta), ids, one, 1, nothing_given(ids), 1.5, 4
        )
        assert loss.mean() <= -logits.log_softmax(-1)[0, x] + 3 * loss.std() / math.sqrt(len(ids))


def test_many_small_updates_equal_one_flow_sample_in_mean_and_variance():
    torch.manual_seed(4)
    s1, n, ids = 2.0, 20, torch.zeros(40_000, 1, dtype=torch.long)
    z = torch.zeros(40_000, 1, 3)
    for i in range(1, n + 1):
        a = torch.tensor(s1 * math.sqrt(2 * i - 1) / n)
        z = bfn.bayesian_update(z, bfn.sender_sample(ids, a, 3))
    flow = bfn.flow(ids, torch.ones(ids.shape), s1, 3)
    torch.testing.assert_close(z.mean(0), flow.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(z.var(0), flow.var(0), atol=0.1, rtol=0)


def frequencies(samples):
    return torch.bincount(
        (samples * K ** torch.arange(L - 1, -1, -1)).sum(-1), minlength=K**L
    ) / len(samples)


def condition(weights):
    """P given what is known of it, as weights of the sequences."""
    return FLAT_P * weights / (FLAT_P * weights).sum()


def total_variation(n_steps, sampler="ancestral", n=40_000, given=None, truth=None, **options):
    torch.manual_seed(5)
    ids, cond_mask = torch.zeros(n, L, dtype=torch.long), torch.zeros(n, L, dtype=torch.bool)
    if given is not None:
        ids[:, 1], cond_mask[:, 1] = given, True
        truth = condition((SEQUENCES[:, 1] == given).float())
    samples, _ = bfn.sample(FLAT, ids, cond_mask, 6.0, K, Controls(sampler, n_steps, **options))
    return (frequencies(samples) - (FLAT_P if truth is None else truth)).abs().sum().item() / 2


@pytest.mark.parametrize(
    "sampler, at_3, at_10",
    [
        ("ancestral", 0.18, 0.059),
        ("sde1", 0.1, 0.039),
        ("sde2", 0.079, 0.015),
        ("ode1", 0.092, 0.029),
        ("ode2", 0.083, 0.018),
    ],
)
def test_every_sampler_reproduces_the_exact_joint_as_well_as_is_known(sampler, at_3, at_10):
    """Total variations known for a joint of 3.46 nats, where 0.0135 is the error of 40,000 perfect
    draws.
    """
    assert total_variation(3, sampler) < 1.2 * at_3
    assert total_variation(10, sampler) < 1.2 * at_10 + 0.005
    assert total_variation(50, sampler) < 0.025


def test_pace_is_exact_with_one_position_a_call_and_errs_less_than_one_pace_for_all():
    assert total_variation(L, "pace") < 0.02
    assert total_variation(2, "pace") < total_variation(2, "ancestral")


def test_the_second_order_sde_errs_less_than_the_first_and_that_less_than_the_ancestral_sampler():
    assert total_variation(5, "sde2") < total_variation(5, "sde1") < total_variation(5, "ancestral")


def test_committing_one_position_a_call_is_exact_and_all_at_once_is_not():
    assert total_variation(L, "commit") < 0.02
    independent = torch.stack(
        [torch.stack([FLAT_P[SEQUENCES[:, d] == k].sum() for k in range(K)]) for d in range(L)]
    )
    product = torch.stack([independent[d, SEQUENCES[:, d]] for d in range(L)]).prod(0)
    assert total_variation(1, "commit", truth=product) < 0.02 < total_variation(1, "commit")


def any_order(score, open_mask, n):
    """The same random order in each call."""
    scores = torch.rand(score.shape, generator=torch.Generator().manual_seed(3))
    return bfn.spread_out(scores, open_mask, n)


def log_p_of_all(n_calls, choose=bfn.spread_out, given=None):
    """log P of every sequence under the sampler -> (K^L,)."""
    cond_mask = nothing_given(SEQUENCES) if given is None else given
    return bfn.log_likelihood(FLAT, SEQUENCES, cond_mask, 6.0, K, n_calls, choose).double().sum(1)


@pytest.mark.parametrize("choose", [bfn.spread_out, leftmost, any_order])
def test_the_likelihood_of_one_position_a_call_is_that_of_the_joint_in_every_order(choose):
    torch.testing.assert_close(log_p_of_all(L, choose), FLAT_P.log().double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(log_p_of_all(99, choose), FLAT_P.log().double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("choose", [bfn.spread_out, leftmost])
@pytest.mark.parametrize("n_calls", [1, 2, 3])
def test_the_likelihoods_of_all_sequences_sum_to_one_and_cost_at_least_the_entropy(n_calls, choose):
    log_p = log_p_of_all(n_calls, choose)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-4)
    cost = -(FLAT_P * log_p).sum().item()
    assert cost > entropy(FLAT_P) + (0.01 if n_calls < L else -1e-5)


@pytest.mark.parametrize("n_calls", [1, 2, 3])
def test_what_the_sampler_draws_has_the_likelihood_that_is_computed(n_calls):
    assert total_variation(n_calls, "commit", truth=log_p_of_all(n_calls).exp()) < 0.02


def test_the_likelihood_given_a_token_is_the_conditional_and_given_tokens_cost_nothing():
    given = torch.tensor([False, True, False]).expand_as(SEQUENCES)
    of_token = torch.stack([FLAT_P[SEQUENCES[:, 1] == k].sum() for k in range(K)])
    conditional = FLAT_P / of_token[SEQUENCES[:, 1]]
    torch.testing.assert_close(
        log_p_of_all(L, given=given), conditional.log().double(), atol=1e-5, rtol=0
    )
    terms = bfn.log_likelihood(FLAT, SEQUENCES, given, 6.0, K, L)
    assert not terms[given].any() and (terms[~given] < 0).all()


def test_the_likelihood_of_a_row_does_not_depend_on_longer_rows():
    """Rows of three, two and one open positions in one batch; the shorter ones have ended while the
    first goes on.
    """
    given = torch.tensor([[False] * 3, [True, False, False], [True, True, False]])
    for ids in SEQUENCES[::7]:
        rows = ids.expand(3, L)
        together = bfn.log_likelihood(FLAT, rows, given, 6.0, K, L)
        alone = [
            bfn.log_likelihood(FLAT, rows[i : i + 1], given[i : i + 1], 6.0, K, L) for i in range(3)
        ]
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_the_likelihood_of_a_hopeless_token_is_finite():
    """Also where its probability is zero in float32."""

    def network(theta, t):
        return torch.tensor([0.0, -300.0]).expand(*t.shape, 2)

    ids = torch.tensor([[1, 1]])
    log_p = bfn.log_likelihood(network, ids, nothing_given(ids), 6.0, 2, 2)
    assert log_p.tolist() == [[-300.0, -300.0]]


def test_the_lowest_score_of_each_stretch_of_open_positions_is_chosen():
    """The positions 0, 1, 3, 4, 5, 6 are cut in two; 1 and 6 have the lowest score of their half, 1
    and 3 of all.
    """
    score = torch.tensor([[5.0, 1.0, 0.0, 2.0, 4.0, 5.0, 3.0]])
    open_mask = torch.tensor([[True, True, False, True, True, True, True]])
    assert bfn.spread_out(score, open_mask, torch.tensor([2])).nonzero()[:, 1].tolist() == [1, 6]
    for n in range(7):  # with equal scores, too
        assert bfn.spread_out(torch.zeros_like(score), open_mask, torch.tensor([n])).sum() == n
    assert not bfn.spread_out(score, open_mask & False, torch.tensor([3])).any()


def share_repeated(n_calls, **options):
    """Share of tokens that repeat the one before, in samples of a text of 8 of which 0.95 do ->
    mean, standard error.
    """
    n, share = 8, 0.95
    sequences = torch.cartesian_prod(*[torch.arange(2)] * n)
    same = (sequences[:, 1:] == sequences[:, :-1]).sum(1)
    network = ExactNetwork(sequences, 0.5 * share**same * (1 - share) ** (n - 1 - same))
    ids = torch.zeros(2000, n, dtype=torch.long)
    torch.manual_seed(0)
    samples, calls = bfn.sample(
        network, ids, ids.bool(), 5.0, 2, Controls("pace", n_calls, **options)
    )
    assert (calls == n_calls + options.get("corrections", 0)).all()
    repeated = (samples[:, 1:] == samples[:, :-1]).float().mean(1)
    return repeated.mean().item(), repeated.std().item() / math.sqrt(len(repeated))


# With two calls, positions 0, 2, 4, 6 are fair coins. A token between two equal ones repeats both
# with probability 0.95^2 / (0.95^2 + 0.05^2), one between different ones repeats one of the two,
# and the last repeats its neighbour at 0.95.
SHARE_REPEATED = (3 * (0.95**2 / (0.95**2 + 0.05**2) + 0.5) + 0.95) / 7


def test_tokens_committed_together_are_far_apart():
    """Then the share of repeats is the one above, 0.777; with the first half committed first it
    would be 0.69.
    """
    mean, error = share_repeated(2)
    assert mean == pytest.approx(SHARE_REPEATED, abs=4 * error) and error < 0.01


@pytest.mark.parametrize("s1", [3.0, 30.0])  # also where theta is 0 in float32
def test_the_output_without_a_positions_own_evidence_is_the_prediction_from_the_others(s1):
    torch.manual_seed(8)
    ids = torch.randint(K, (50, L))
    z = bfn.flow(ids, torch.rand(50, L), s1, K)
    found = bfn.log_p_given_others(FLAT(z.softmax(-1), None).log_softmax(-1), z, ids)
    for d in range(L):
        others = z.clone()
        others[:, d] = 0.0
        log_p = FLAT(others.softmax(-1), None).log_softmax(-1)[:, d]
        torch.testing.assert_close(
            found[:, d], log_p.gather(-1, ids[:, d : d + 1]).squeeze(-1), atol=1e-4, rtol=1e-4
        )


def test_corrections_repair_tokens_that_were_drawn_independently():
    mean, error = share_repeated(2, corrections=2)
    assert mean > SHARE_REPEATED + 6 * error


def test_corrections_make_texts_likelier_than_the_networks_own_distribution():
    def mean_log_p(n_steps, corrections):
        torch.manual_seed(5)
        ids = torch.zeros(20_000, L, dtype=torch.long)
        samples, _ = bfn.sample(
            FLAT, ids, ids.bool(), 6.0, K, Controls("pace", n_steps, corrections)
        )
        return (frequencies(samples) * FLAT_P.log()).sum().item()

    entropy = -(FLAT_P * FLAT_P.log()).sum().item()
    assert mean_log_p(2, 0) < -entropy + 0.02 < mean_log_p(2, 4) - 0.1
    assert mean_log_p(L, 1) - 0.1 > mean_log_p(L, 0) == pytest.approx(-entropy, abs=0.03)


def test_corrections_keep_given_tokens_and_are_at_most_one_per_two_open_positions():
    """A row of one free token takes one call, one of three tokens two and, of two corrections, one:
    one for two tokens.
    """
    ids, given = torch.full((2, L), 2), torch.tensor([[False] * L, [True] * (L - 1) + [False]])
    samples, calls = bfn.sample(FLAT, ids, given, 6.0, K, Controls("pace", 2, corrections=2))
    assert calls.tolist() == [3, 1] and (samples[1, :-1] == 2).all()


def test_a_row_of_which_all_open_positions_are_certain_ends_at_once():
    """All tokens repeat the first: after one call the rest is certain, and there is nothing to
    correct.
    """
    sequences = torch.tensor([[k] * L for k in range(K)])
    network = ExactNetwork(sequences, torch.full((K,), 1 / K))
    ids = torch.zeros(50, L, dtype=torch.long)
    for until, n in ((0.01, 2), (0.0, 3)):
        samples, calls = bfn.sample(
            network, ids, ids.bool(), 6.0, K, Controls("pace", 2, corrections=2, until=until)
        )
        assert (
            (samples == samples[:, :1]).all() and len(samples.unique()) == K and (calls == n).all()
        )


def test_committing_makes_no_more_calls_than_there_are_tokens():
    ids, given = (
        torch.zeros(2, L, dtype=torch.long),
        torch.tensor([[False] * L, [True] * (L - 1) + [False]]),
    )
    _, calls = bfn.sample(FLAT, ids, given, 6.0, K, Controls("commit", 10))
    assert calls.tolist() == [L, 1]


@pytest.mark.parametrize("step, order", [(bfn.ode1, 1), (bfn.ode2, 2)])
def test_the_error_of_an_ode_sampler_falls_with_the_number_of_steps_to_the_power_of_its_order(
    step, order
):
    s1, ids, nothing = (
        3.0,
        torch.zeros(200, L, dtype=torch.long),
        torch.zeros(200, L, dtype=torch.bool),
    )

    def end(n_steps):
        times, states = torch.linspace(0.2, 1, n_steps + 1).tolist(), []

        def network(theta, t):
            states.append(theta.log())
            return FLAT(theta, t)

        torch.manual_seed(6)
        draws = Draws(draw_keys(*ids.shape))
        bfn.solve(bfn.Task(network, ids, nothing, s1, K, Controls(), draws), step, times=times)
        return states[-1]

    fine = end(640)
    errors = [(end(n) - fine).square().mean().sqrt().item() for n in (10, 20, 40)]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(order - 0.25 < slope < order + 0.35 for slope in slopes), slopes


@pytest.mark.slow
def test_given_tokens_come_back_and_the_rest_follows_the_conditional_distribution():
    for sampler, n_steps in (("ancestral", 50), ("ode2", 50), ("pace", 2), ("commit", 2)):
        assert total_variation(n_steps, sampler, given=2) < 0.03


@pytest.mark.parametrize(
    "sampler, n_steps", [("sde2", 30), ("ode2", 30), ("pace", 3), ("commit", 3)]
)
def test_a_hint_gives_the_distribution_under_the_same_evidence(sampler, n_steps):
    """Also for an ODE, which would amplify a hint that is added to z."""
    hint = torch.zeros(1, L, K)
    hint[0, 0] = torch.tensor([0.1, 0.6, 0.2, 0.1]).log()
    truth = condition(hint[0, 0].exp()[SEQUENCES[:, 0]])
    assert (truth - FLAT_P).abs().sum() / 2 > 0.1
    assert total_variation(n_steps, sampler, truth=truth, hint=hint) < 0.03


@pytest.mark.parametrize(
    "sampler, n_steps", [("sde2", 30), ("ode2", 30), ("pace", 3), ("commit", 3)]
)
def test_without_a_banned_token_the_others_keep_their_distribution(sampler, n_steps):
    """If the network is told: the hint says what `allowed` enforces."""
    allowed = torch.tensor([True, False, True, True])
    hint = torch.zeros(1, 1, K).masked_fill(~allowed, -100.0)
    truth = condition((SEQUENCES != 1).all(1).float())
    assert total_variation(n_steps, sampler, truth=truth, hint=hint, allowed=allowed) < 0.03


@pytest.mark.parametrize(
    "sampler, n_steps", [("sde2", 30), ("ode2", 30), ("pace", 3), ("commit", 3)]
)
def test_sampling_from_a_draft_follows_the_distribution_given_its_evidence(sampler, n_steps):
    torch.manual_seed(7)
    draft, strength = torch.tensor([[0, 2, 1]]), 0.3
    evidence = bfn.flow(draft, torch.full(draft.shape, strength), 6.0, K)
    truth = condition(sum(evidence[0, d, SEQUENCES[:, d]] for d in range(L)).exp())
    assert (truth - FLAT_P).abs().sum() / 2 > 0.3
    assert total_variation(n_steps, sampler, truth=truth, hint=evidence, hint_time=strength) < 0.03


def test_a_sharper_output_has_the_probabilities_of_its_definition():
    p = torch.tensor([0.5, 0.3, 0.2])
    torch.testing.assert_close(bfn.sharpen(p, 0.5), torch.tensor([25.0, 9, 4]) / 38)
    torch.testing.assert_close(bfn.sharpen(p, 1.0, 0.7), torch.tensor([5.0, 3, 0]) / 8)
    for controls in ((1.0, 0.1), (1e-300, 1.0), (1.0, 1e-300)):
        torch.testing.assert_close(bfn.sharpen(p, *controls), torch.tensor([1.0, 0, 0]))


@pytest.mark.parametrize("controls", [dict(temperature=1e-9), dict(top_p=1e-9)])
def test_the_order_in_which_tokens_are_committed_does_not_depend_on_temperature_or_top_p(controls):
    """The order follows from the network's own output: a sharpened one is certain everywhere."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(K, (200, L), generator=generator)
    given = torch.rand(200, L, generator=generator) < 0.3

    def draw(**more):
        return bfn.sample(FLAT, ids, given, 6.0, K, Controls("pace", 2, corrections=3, **more))[0]

    assert torch.equal(draw(argmax=True), draw(**controls))


def test_a_row_ends_when_its_output_is_certain_and_its_end_changes_no_other_row():
    ids, nothing = torch.zeros(2, L, dtype=torch.long), torch.zeros(2, L, dtype=torch.bool)

    def network(theta, t):  # the first row is certain from t = 0.5 on
        logits = torch.zeros(theta.shape)
        logits[: len(theta) - 1, :, 1] = 100.0 * (t[0, 0] >= 0.5)
        return logits

    def run(rows):
        draws = Draws.seeded([0, 1][-rows:], [L] * rows)
        return bfn.sample(
            network, ids[:rows], nothing[:rows], 3.0, K, Controls("sde1", 10, until=0.1), draws
        )

    samples, calls = run(2)
    assert calls.tolist() == [6, 11] and samples[0].tolist() == [1] * L
    assert torch.equal(samples[1], run(1)[0][0])


def test_a_time_grid_is_even_and_an_ode_starts_a_little_after_zero():
    assert bfn.time_grid(4) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert bfn.time_grid(4, start=1e-3) == pytest.approx([1e-3, 0.25, 0.5, 0.75, 1])
    assert bfn.time_grid(4, start=0.9)[0] == pytest.approx(0.025) and bfn.time_grid(1) == [0, 1]


def test_tokens_that_are_not_allowed_are_never_drawn_by_any_sampler():
    ids = torch.zeros(500, L, dtype=torch.long)
    allowed = torch.tensor([True, False, True, False])
    for sampler in bfn.SAMPLERS:
        samples, _ = bfn.sample(
            EXACT, ids, nothing_given(ids), 6.0, K, Controls(sampler, 5, allowed=allowed)
        )
        assert set(samples.unique().tolist()) == {0, 2}


@pytest.mark.parametrize("t", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("certain", [False, True])
def test_losses_are_finite_at_the_ends_of_time_for_50000_tokens_and_s1_12(t, certain):
    K, s1 = 50_000, 12.0
    ids = torch.tensor([[7, 49_999]])
    logits = torch.zeros(1, 2, K)
    logits[..., 0] = 100.0 if certain else 0.0  # as wrong as can be
    times, given = torch.full((1, 2), t), torch.tensor([[True, False]])

    def network(theta, t):
        assert theta.isfinite().all() and torch.allclose(theta.sum(-1), torch.ones(1, 2), atol=1e-4)
        return logits

    assert continuous_time_loss(network, ids, times, given, s1, K).isfinite().all()
    assert bfn.reconstruction_loss(network, ids, given, s1, K).isfinite().all()
    assert n_step_loss(network, ids, torch.ones_like(ids), 1, given, s1, K).isfinite().all()
    for sampler in bfn.SAMPLERS:
        samples, _ = bfn.sample(network, ids, given, s1, K, Controls(sampler, 2))
        assert samples[0, 0] == 7 and 0 <= samples[0, 1] < K


def test_a_bf16_network_gives_float32_losses():
    ids, t = torch.randint(5, (2, 3)), torch.rand(2, 3)
    loss = continuous_time_loss(
        lambda theta, t: theta.bfloat16(), ids, t, nothing_given(ids), 2.0, 5
    )
    assert loss.dtype == torch.float32


def test_given_positions_show_the_network_a_one_hot_and_time_1():
    theta, t = bfn.clamp_given(
        torch.full((1, 2, 3), 1 / 3),
        torch.tensor([[0.2, 0.2]]),
        torch.tensor([[1, 2]]),
        torch.tensor([[True, False]]),
    )
    torch.testing.assert_close(theta, torch.tensor([[[0.0, 1, 0], [1 / 3] * 3]]))
    torch.testing.assert_close(t, torch.tensor([[1.0, 0.2]]))


@pytest.mark.parametrize(
    "K, beta1", [(2, 2.874), (27, 0.5628), (256, 0.0847), (8192, 0.00381), (50257, 0.000716)]
)
def test_auto_beta1_gives_the_evidence_the_same_accuracy_at_every_vocabulary_size(K, beta1):
    assert bfn.auto_beta1(K) == pytest.approx(beta1, rel=3e-3)
    assert bfn.evidence_accuracy(math.sqrt(K * bfn.auto_beta1(K)), K) == pytest.approx(
        0.955, abs=1e-6
    )


def test_evidence_accuracy_is_the_frequency_with_which_theta_names_the_token():
    ids = torch.zeros(1, 50_000, dtype=torch.long)
    hits = bfn.flow(ids, torch.ones(1, 50_000), 2.0, 27).argmax(-1) == 0
    assert hits.float().mean().item() == pytest.approx(bfn.evidence_accuracy(2.0, 27), abs=0.01)


@pytest.mark.parametrize("sampler", bfn.SAMPLERS)
@pytest.mark.parametrize("more", [{}, dict(until=0.3), dict(corrections=2)])
def test_a_row_is_sampled_the_same_next_to_longer_rows(sampler, more):
    """Longer rows take more calls; padding (given) follows the short row."""

    def run(lengths):
        torch.manual_seed(0)
        table = torch.randn(
            7, 3, K
        )  # any network that depends on position and input, not on other rows
        ids, columns = torch.zeros(len(lengths), 7, dtype=torch.long), torch.arange(7)
        padding = columns >= torch.tensor(lengths)[:, None]

        def network(theta, t):
            return (
                table[:, 0]
                + table[:, 1] * theta.mean(1, keepdim=True) * 4
                + table[:, 2] * t[..., None]
            )

        draws = Draws.seeded(lengths, [7] * len(lengths))
        samples, calls = bfn.sample(
            network, ids, padding, 3.0, K, Controls(sampler, 5, **more), draws
        )
        return samples[-1].tolist(), calls[-1].item()

    assert run([3]) == run([7, 3]) == run([6, 7, 3])


@pytest.mark.parametrize("sampler", bfn.SAMPLERS)
def test_rows_of_one_position_or_with_everything_given_are_sampled(sampler):
    ids = torch.tensor([[3, 1, 2], [3, 1, 2]])
    given = torch.tensor([[True] * 3, [True, False, True]])
    controls = Controls(sampler, 4, corrections=3)
    samples, calls = bfn.sample(FLAT, ids, given, 6.0, K, controls)
    assert (
        samples[0].tolist() == [3, 1, 2]
        and samples[1, [0, 2]].tolist() == [3, 2]
        and (calls >= 1).all()
    )
    one, calls = bfn.sample(
        lambda theta, t: theta, torch.zeros(2, 1).long(), torch.zeros(2, 1).bool(), 3.0, 2, controls
    )
    assert one.shape == (2, 1) and (one < 2).all() and (calls >= 1).all()


left_to_right = partial(
    bfn.fill, pace=partial(bfn.Commit, choose=leftmost)
)  # the recipe of the README


def test_a_sampler_added_to_the_dict_is_exact_for_the_exact_network_at_one_token_per_call(
    monkeypatch,
):
    monkeypatch.setitem(bfn.SAMPLERS, "left_to_right", left_to_right)
    assert total_variation(L, "left_to_right") < 0.02
