"""The flow, its losses and its sampler against closed forms and the exact network."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from exact import ExactNetwork, draw, entropy, random_joint

import bfn

SEQUENCES, P = random_joint()
EXACT = ExactNetwork(SEQUENCES, P)
K, L, H = 4, 3, entropy(P)
_, FLAT_P = random_joint(seed=1, spread=1.0)  # of 3.64 nats, for the samplers: the published comparisons are on such
FLAT = ExactNetwork(SEQUENCES, FLAT_P)


def nothing_given(ids):
    return torch.zeros_like(ids, dtype=torch.bool)


def mean_and_error(losses):
    """Nats per sequence and their standard error."""
    per_sequence = losses.double().sum(-1)
    return per_sequence.mean().item(), per_sequence.std().item() / math.sqrt(len(per_sequence))


def exact_bound(s1, n=100_000):
    torch.manual_seed(1)
    ids = draw(SEQUENCES, P, n)
    t = torch.rand(n, 1).expand(n, L)
    L_inf, error_inf = mean_and_error(bfn.continuous_time_loss(EXACT, ids, t, nothing_given(ids), s1, K))
    L_rec, error_rec = mean_and_error(bfn.reconstruction_loss(EXACT, ids, nothing_given(ids), s1, K))
    return L_inf, L_rec, error_inf + error_rec


def test_a_uniform_prediction_costs_half_s1_squared_times_1_minus_1_over_k():
    ids, s1, K = torch.randint(27, (1, 10_001)), 3.9, 27
    t = torch.linspace(0, 1, 10_001)[None]
    loss = bfn.squared_error_loss(torch.zeros(1, 10_001, K), ids, t, s1)
    assert loss.mean().item() == pytest.approx(s1**2 / 2 * (1 - 1 / K), rel=1e-3)


def test_the_flow_is_the_papers():
    """softmax of y ~ N(beta (K e_x - 1), beta K I), and K beta1 t |e_x - p|^2, written out as published."""
    beta1, K = 0.3, 5
    s1 = math.sqrt(K * beta1)
    ids, t, eps = torch.randint(K, (2, 7)), torch.rand(2, 7), torch.randn(2, 7, K)
    e_x = torch.nn.functional.one_hot(ids, K).float()
    beta = (beta1 * t**2)[..., None]
    theta = (beta * (K * e_x - 1) + (beta * K).sqrt() * eps).softmax(-1)
    torch.testing.assert_close(bfn.flow(ids, t, s1, K, eps).softmax(-1), theta)
    logits = torch.randn(2, 7, K)
    published = K * beta1 * t * (e_x - logits.softmax(-1)).square().sum(-1)
    torch.testing.assert_close(bfn.squared_error_loss(logits, ids, t, s1), published)


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
        loss, error = mean_and_error(bfn.n_step_loss(EXACT, ids, i, n, nothing_given(ids), s1, K))
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
        loss = bfn.n_step_loss(lambda theta, t: logits.expand_as(theta), ids, one, 1, nothing_given(ids), 1.5, 4)
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
    return torch.bincount((samples * K ** torch.arange(L - 1, -1, -1)).sum(-1), minlength=K**L) / len(samples)


def condition(weights):
    """P given what is known of it, as weights of the sequences."""
    return FLAT_P * weights / (FLAT_P * weights).sum()


def total_variation(n_steps, solver="ancestral", n=40_000, given=None, truth=None, **options):
    torch.manual_seed(5)
    ids, cond_mask = torch.zeros(n, L, dtype=torch.long), torch.zeros(n, L, dtype=torch.bool)
    if given is not None:
        ids[:, 1], cond_mask[:, 1] = given, True
        truth = condition((SEQUENCES[:, 1] == given).float())
    times = bfn.time_grid(solver, n_steps)
    samples, _ = bfn.sample(FLAT, ids, cond_mask, 6.0, K, times, solver, **options)
    return (frequencies(samples) - (FLAT_P if truth is None else truth)).abs().sum().item() / 2


@pytest.mark.parametrize(
    "solver, at_3, at_10",
    [
        ("ancestral", 0.18, 0.059),
        ("sde1", 0.1, 0.039),
        ("sde2", 0.079, 0.015),
        ("ode1", 0.092, 0.029),
        ("ode2", 0.083, 0.018),
    ],
)
def test_every_solver_reproduces_the_exact_joint_as_well_as_is_known(solver, at_3, at_10):
    """Total variations known for a joint of 3.46 nats, where 0.0135 is the error of 40,000 perfect draws."""
    assert total_variation(3, solver) < 1.2 * at_3
    assert total_variation(10, solver) < 1.2 * at_10 + 0.005
    assert total_variation(50, solver) < 0.025


def test_the_second_order_sde_errs_less_than_the_first_and_that_less_than_the_ancestral_sampler():
    assert total_variation(5, "sde2") < total_variation(5, "sde1") < total_variation(5, "ancestral")


def test_committing_one_position_a_call_is_exact_and_all_at_once_is_not():
    assert total_variation(L, "commit") < 0.02
    independent = torch.stack([torch.stack([FLAT_P[SEQUENCES[:, d] == k].sum() for k in range(K)]) for d in range(L)])
    product = torch.stack([independent[d, SEQUENCES[:, d]] for d in range(L)]).prod(0)
    assert total_variation(1, "commit", truth=product) < 0.02 < total_variation(1, "commit")


def test_of_each_run_of_positions_the_least_score_is_chosen():
    """The positions 0, 1, 3, 4, 5, 6 are cut in two, and 1 and 6 have the least scores of a half; 1 and 3 of all."""
    score = torch.tensor([[5.0, 1.0, 0.0, 2.0, 4.0, 5.0, 3.0]])
    among = torch.tensor([[True, True, False, True, True, True, True]])
    assert bfn.one_of_each_run(score, among, torch.tensor([2])).nonzero()[:, 1].tolist() == [1, 6]
    for n in range(1, 7):  # ties, too
        assert bfn.one_of_each_run(torch.zeros_like(score), among, torch.tensor([n])).sum() == n
    assert not bfn.one_of_each_run(score, among & False, torch.tensor([3])).any()


def repeats(n_calls, **options):
    """Share of tokens that repeat the one before, in samples of a text of 8 in which 0.95 of them do."""
    n, share = 8, 0.95
    sequences = torch.cartesian_prod(*[torch.arange(2)] * n)
    same = (sequences[:, 1:] == sequences[:, :-1]).sum(1)
    network = ExactNetwork(sequences, 0.5 * share**same * (1 - share) ** (n - 1 - same))
    ids = torch.zeros(2000, n, dtype=torch.long)
    torch.manual_seed(0)
    samples, calls = bfn.sample(network, ids, ids.bool(), 5.0, 2, bfn.time_grid("commit", n_calls), "commit", **options)
    assert (calls == n_calls + options.get("corrections", 0)).all()
    return (samples[:, 1:] == samples[:, :-1]).float().mean()


def test_committing_far_positions_together_errs_less_than_near_ones():
    """Every second one first, and 0.78 of the tokens repeat; the first half first, and 0.69 do: its repeats are chance."""
    assert repeats(2) > 0.76


def test_corrections_mend_what_was_drawn_apart():
    assert repeats(2, corrections=2) > 0.81 and repeats(2) < 0.79


def test_corrections_make_texts_likelier_than_the_network_means_them():
    def mean_log_p(n_steps, corrections):
        torch.manual_seed(5)
        ids = torch.zeros(20_000, L, dtype=torch.long)
        times = bfn.time_grid("commit", n_steps)
        samples, _ = bfn.sample(FLAT, ids, ids.bool(), 6.0, K, times, "commit", corrections=corrections)
        return (frequencies(samples) * FLAT_P.log()).sum().item()

    entropy = -(FLAT_P * FLAT_P.log()).sum().item()
    assert mean_log_p(2, 0) < -entropy + 0.02 < mean_log_p(2, 4) - 0.1
    assert mean_log_p(L, 1) - 0.1 > mean_log_p(L, 0) == pytest.approx(-entropy, abs=0.03)


def test_corrections_leave_what_is_given_and_end_with_their_row():
    """A row of one free token takes one call, one of three tokens two and, of two corrections, one: one for two tokens."""
    ids, given = torch.full((2, L), 2), torch.tensor([[False] * L, [True] * (L - 1) + [False]])
    times = bfn.time_grid("commit", 2)
    samples, calls = bfn.sample(FLAT, ids, given, 6.0, K, times, "commit", corrections=2)
    assert calls.tolist() == [3, 1] and (samples[1, :-1] == 2).all()


def test_a_row_whose_rest_is_certain_ends_at_once():
    """The second token repeats the first, and so on: after one call nothing is open, and nothing to correct."""
    sequences = torch.tensor([[k] * L for k in range(K)])
    network = ExactNetwork(sequences, torch.full((K,), 1 / K))
    ids, times = torch.zeros(50, L, dtype=torch.long), bfn.time_grid("commit", 2)
    for until, n in ((0.01, 2), (0.0, 3)):
        samples, calls = bfn.sample(network, ids, ids.bool(), 6.0, K, times, "commit", until=until, corrections=2)
        assert (samples == samples[:, :1]).all() and len(samples.unique()) == K and (calls == n).all()


def test_committing_makes_no_more_calls_than_there_are_tokens():
    ids, given = torch.zeros(2, L, dtype=torch.long), torch.tensor([[False] * L, [True] * (L - 1) + [False]])
    _, calls = bfn.sample(FLAT, ids, given, 6.0, K, bfn.time_grid("commit", 10), "commit")
    assert calls.tolist() == [L, 1]


@pytest.mark.parametrize("solver, order", [("ode1", 1), ("ode2", 2)])
def test_the_error_of_an_ode_falls_with_its_order_in_the_steps(solver, order):
    s1, ids, nothing = 3.0, torch.zeros(200, L, dtype=torch.long), torch.zeros(200, L, dtype=torch.bool)

    def end(n_steps):
        times, states = torch.linspace(0.2, 1, n_steps + 1).tolist(), []

        def network(theta, t):
            states.append(theta.log())
            return FLAT(theta, t)

        torch.manual_seed(6)
        bfn.sample(network, ids, nothing, s1, K, times, solver)
        return states[-1]

    fine = end(640)
    errors = [(end(n) - fine).square().mean().sqrt().item() for n in (10, 20, 40)]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(order - 0.25 < slope < order + 0.35 for slope in slopes), slopes


def test_given_tokens_come_back_and_the_rest_follows_the_conditional_distribution():
    for solver, n_steps in (("ancestral", 50), ("ode2", 50), ("commit", 2)):
        assert total_variation(n_steps, solver, given=2) < 0.03


@pytest.mark.parametrize("solver, n_steps", [("sde2", 30), ("ode2", 30), ("commit", 3)])
def test_a_hint_gives_the_distribution_under_the_same_evidence(solver, n_steps):
    """The solver moves z alone: added to z itself, an ODE would amplify the hint."""
    hint = torch.zeros(1, L, K)
    hint[0, 0] = torch.tensor([0.1, 0.6, 0.2, 0.1]).log()
    truth = condition(hint[0, 0].exp()[SEQUENCES[:, 0]])
    assert (truth - FLAT_P).abs().sum() / 2 > 0.1
    assert total_variation(n_steps, solver, truth=truth, hint=hint) < 0.03


@pytest.mark.parametrize("solver, n_steps", [("sde2", 30), ("ode2", 30), ("commit", 3)])
def test_a_banned_token_leaves_the_distribution_of_the_others(solver, n_steps):
    """Where the network knows of it: the hint says what `allowed` enforces."""
    allowed = torch.tensor([True, False, True, True])
    hint = torch.zeros(1, 1, K).masked_fill(~allowed, -100.0)
    truth = condition((SEQUENCES != 1).all(1).float())
    assert total_variation(n_steps, solver, truth=truth, hint=hint, allowed=allowed) < 0.03


@pytest.mark.parametrize("solver, n_steps", [("sde2", 30), ("ode2", 30), ("commit", 3)])
def test_sampling_from_a_draft_follows_the_distribution_given_its_evidence(solver, n_steps):
    torch.manual_seed(7)
    draft, strength = torch.tensor([[0, 2, 1]]), 0.3
    evidence = bfn.flow(draft, torch.full(draft.shape, strength), 6.0, K)
    truth = condition(sum(evidence[0, d, SEQUENCES[:, d]] for d in range(L)).exp())
    assert (truth - FLAT_P).abs().sum() / 2 > 0.3
    assert total_variation(n_steps, solver, truth=truth, hint=evidence, hint_time=strength) < 0.03


def test_a_sharper_output_has_the_probabilities_of_its_definition():
    p = torch.tensor([0.5, 0.3, 0.2])
    torch.testing.assert_close(bfn.sharpen(p, 0.5), torch.tensor([25.0, 9, 4]) / 38)
    torch.testing.assert_close(bfn.sharpen(p, 1.0, 0.7), torch.tensor([5.0, 3, 0]) / 8)
    for controls in ((1.0, 0.1), (1e-300, 1.0), (1.0, 1e-300)):
        torch.testing.assert_close(bfn.sharpen(p, *controls), torch.tensor([1.0, 0, 0]))


@pytest.mark.parametrize("controls", [dict(temperature=1e-9), dict(top_p=1e-9)])
def test_what_is_drawn_first_does_not_depend_on_how_sharply_it_is_drawn(controls):
    """Sharpened outputs are all certain: whose token is the surest, and least likely, the network's own output says."""
    generator = torch.Generator().manual_seed(0)
    ids, times = torch.randint(K, (200, L), generator=generator), bfn.time_grid("commit", 2)
    given = torch.rand(200, L, generator=generator) < 0.3
    draw = partial(bfn.sample, FLAT, ids, given, 6.0, K, times, "commit", corrections=3)
    assert torch.equal(draw(argmax=True)[0], draw(**controls)[0])


def test_a_row_ends_when_its_output_is_certain_and_takes_no_noise_from_others():
    ids, nothing = torch.zeros(2, L, dtype=torch.long), torch.zeros(2, L, dtype=torch.bool)

    def network(theta, t):  # the first row is certain from t = 0.5 on
        logits = torch.zeros(theta.shape)
        logits[: len(theta) - 1, :, 1] = 100.0 * (t[0, 0] >= 0.5)
        return logits

    def run(rows):
        draws = bfn.Draws.seeded([0, 1][-rows:], [L] * rows)
        return bfn.sample(
            network, ids[:rows], nothing[:rows], 3.0, K, bfn.time_grid("sde1", 10), "sde1", until=0.1, draws=draws
        )

    samples, calls = run(2)
    assert calls.tolist() == [6, 11] and samples[0].tolist() == [1] * L
    assert torch.equal(samples[1], run(1)[0][0])


def test_a_time_grid_takes_small_steps_where_the_loss_is():
    assert bfn.time_grid("sde2", 4) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert bfn.time_grid("commit", 3) == [0, 0, 0] and bfn.time_grid("ode1", 4)[0] > 0
    times = bfn.time_grid("sde2", 20, curve=[0, 0, 1, 0])
    within = sum(0.5 <= t < 0.75 for t in times)
    assert within > 12 and all(a < b for a, b in pairwise(times)) and times[0] == 0 and times[-1] == 1


def test_disallowed_tokens_are_never_drawn():
    ids = torch.zeros(500, L, dtype=torch.long)
    allowed = torch.tensor([True, False, True, False])
    for solver in ("ancestral", "commit"):
        samples, _ = bfn.sample(EXACT, ids, nothing_given(ids), 6.0, K, bfn.time_grid(solver, 5), solver, allowed=allowed)
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

    assert bfn.continuous_time_loss(network, ids, times, given, s1, K).isfinite().all()
    assert bfn.reconstruction_loss(network, ids, given, s1, K).isfinite().all()
    assert bfn.n_step_loss(network, ids, torch.ones_like(ids), 1, given, s1, K).isfinite().all()
    for solver in (*bfn.SOLVERS, "commit"):
        samples, _ = bfn.sample(network, ids, given, s1, K, bfn.time_grid(solver, 2), solver)
        assert samples[0, 0] == 7 and 0 <= samples[0, 1] < K


def test_a_bf16_network_gives_float32_losses():
    ids, t = torch.randint(5, (2, 3)), torch.rand(2, 3)
    loss = bfn.continuous_time_loss(lambda theta, t: theta.bfloat16(), ids, t, nothing_given(ids), 2.0, 5)
    assert loss.dtype == torch.float32


def test_given_positions_show_the_network_a_one_hot_and_time_1():
    theta, t = bfn.give(
        torch.full((1, 2, 3), 1 / 3), torch.tensor([[0.2, 0.2]]), torch.tensor([[1, 2]]), torch.tensor([[True, False]])
    )
    torch.testing.assert_close(theta, torch.tensor([[[0.0, 1, 0], [1 / 3] * 3]]))
    torch.testing.assert_close(t, torch.tensor([[1.0, 0.2]]))


@pytest.mark.parametrize("K, beta1", [(2, 2.874), (27, 0.5628), (256, 0.0847), (8192, 0.00381), (50257, 0.000716)])
def test_auto_beta1_gives_the_evidence_the_same_accuracy_at_every_vocabulary_size(K, beta1):
    assert bfn.auto_beta1(K) == pytest.approx(beta1, rel=3e-3)
    assert bfn.evidence_accuracy(math.sqrt(K * bfn.auto_beta1(K)), K) == pytest.approx(0.955, abs=1e-6)


def test_evidence_accuracy_is_the_frequency_with_which_theta_names_the_token():
    ids = torch.zeros(1, 50_000, dtype=torch.long)
    hits = bfn.flow(ids, torch.ones(1, 50_000), 2.0, 27).argmax(-1) == 0
    assert hits.float().mean().item() == pytest.approx(bfn.evidence_accuracy(2.0, 27), abs=0.01)


def test_categorical_draws_follow_p():
    p = torch.tensor([0.1, 0.0, 0.6, 0.3]).expand(100_000, 4)
    counts = torch.bincount(bfn.sample_categorical(p, torch.rand(100_000)), minlength=4) / 100_000
    torch.testing.assert_close(counts, p[0], atol=0.01, rtol=0)
    assert counts[1] == 0


def test_a_rows_noise_depends_on_its_seed_alone_and_is_new_at_each_draw():
    alone, beside = bfn.Draws.seeded([8], [5]), bfn.Draws.seeded([3, 8], [9, 5])
    first, second = alone.normal(4), alone.normal(4)
    assert torch.equal(first[0], beside.normal(4)[1, :5]) and torch.equal(second[0], beside.normal(4)[1, :5])
    assert not (first == second).any()


def test_successive_draws_are_independent():
    draws = bfn.Draws.seeded([0], [1000])
    a, b = draws.normal(100), draws.normal(100)
    assert abs((a * b).mean()) < 4 / math.sqrt(a.numel())
    p = torch.tensor([0.25, 0.75]).expand(1, 1000, 2)
    counts = sum(draws.tokens(p).sum().item() for _ in range(20))
    assert counts == pytest.approx(15_000, abs=4 * math.sqrt(20_000 * 0.1875))
