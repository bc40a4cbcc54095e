"""The continuous flow, its losses and its sampler against closed forms and an exact network.

Expectations over one-dimensional data are integrals on a grid, so they have no sampling error.
"""

import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from examples import continuous, moons


class Mixture:
    """A mixture of normals N(m_k, s_k^2 I) and its exact network: the posterior mean of x.

    Evidence of accuracy beta shows x + noise of variance 1 / beta: a mixture of normals too.
    """

    def __init__(self, weights, means, deviations, sigma1):
        self.weights, self.means, self.deviations = (
            torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, deviations)
        )
        self.sigma1 = sigma1

    def log_density(self, x, variance=0.0):
        """log density of x plus noise: (..., D), variance (..., 1) -> (..., n_components)."""
        total = self.deviations**2 + variance
        square = (x[..., None, :] - self.means).square().sum(-1)
        return (
            self.weights.log()
            - square / (2 * total)
            - x.shape[-1] / 2 * torch.log(2 * math.pi * total)
        )

    def posterior_mean(self, mu, t):
        b = continuous.beta(t.clamp(min=continuous.T_MIN), self.sigma1)
        shown = mu * (1 + b) / b
        share = self.log_density(shown, 1 / b).softmax(-1)[..., None]
        precision = (b * self.deviations**2)[..., None]
        return (share * (self.means + precision * shown[..., None, :]) / (1 + precision)).sum(-2)

    def __call__(self, mu, t):
        mu, t = mu.double(), t.double()
        b = continuous.beta(t.clamp(min=continuous.T_MIN), self.sigma1)
        return (mu * (1 + b) / b - self.posterior_mean(mu, t)) * b.sqrt()

    def grid(self, n=161, reach=7.0):
        """All pairs of a value of x (n_components * n * n, 1) and one of eps, and their weights."""
        z = torch.linspace(-reach, reach, n, dtype=torch.float64)
        q = (-z.square() / 2).exp()
        q /= q.sum()
        x = self.means[:, :, None] + self.deviations[:, None, None] * z  # (n_components, 1, n)
        x = x.expand(-1, n, n).reshape(-1, 1)
        eps = z[:, None].expand(len(self.means), n, n).reshape(-1, 1)
        return x, eps, (self.weights[:, None, None] * q[:, None] * q).flatten()


def mixture(sigma1):
    """Three normals between -4 and 6, far from the prior N(0, 1)."""
    return Mixture([0.3, 0.5, 0.2], [[-2.0], [0.5], [4.0]], [0.5, 0.3, 0.6], sigma1)


def entropy(log_density, low=-12.0, high=14.0, n=200_001):
    """-integral p log p of a density on the line."""
    x = torch.linspace(low, high, n, dtype=torch.float64)
    log_p = log_density(x[:, None]).logsumexp(-1)
    return -torch.trapezoid(log_p.exp() * log_p, x).item()


def information(m):
    """I(x; mu(1)) = entropy of x + noise of variance 1 / beta(1), less the noise's own."""
    variance = 1 / (m.sigma1**-2 - 1)
    return (
        entropy(lambda x: m.log_density(x, variance))
        - math.log(2 * math.pi * math.e * variance) / 2
    )


def times(t, x):
    return torch.full_like(x, t)


def continuous_time_loss(m, x, eps, n_times=40):
    """L_inf for each x, eps: the mean over t by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(n_times)
    total = 0.0
    for t, w in zip((nodes + 1) / 2, weights / 2, strict=True):
        t = times(t, x)
        total = total + w * continuous.squared_error_loss(
            continuous.predict_noisy(m, x, t, m.sigma1, eps), x, t, m.sigma1
        )
    return total


def n_step_loss(m, x, eps, n):
    """L_n for each x, eps: the sum over steps i of alpha_i / 2 |x - x_hat|^2 at t = (i - 1) / n.

    Each term is the divergence between sender and receiver [Graves et al. 2023, algorithm 1].
    """
    total = 0.0
    for i in range(1, n + 1):
        i = times(float(i), x)
        x_hat = continuous.predict_noisy(m, x, (i - 1) / n, m.sigma1, eps)
        alpha = continuous.alpha(i, n, m.sigma1)
        total = total + (alpha * (x - x_hat).square()).sum(-1) / 2
    return total


# ---------------------------------------------------------------- flow and update


@pytest.mark.parametrize("sigma1", [0.5, 0.02, 0.001])
def test_the_flow_has_the_mean_and_the_variance_of_the_paper(sigma1):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
    x, zero = torch.full_like(t, 3.7), torch.zeros_like(t)
    gamma = 1 - sigma1 ** (2 * t)
    torch.testing.assert_close(continuous.flow(x, t, sigma1, eps=zero), gamma * x)
    torch.testing.assert_close(
        continuous.flow(zero, t, sigma1, eps=zero + 1).square(), gamma * (1 - gamma)
    )
    torch.testing.assert_close(continuous.beta(t, sigma1), sigma1 ** (-2 * t) - 1)


def test_the_flow_is_precise_in_float32_at_both_ends():
    t = torch.tensor([[1e-6], [1e-3], [0.5], [1.0]])
    one = torch.ones_like(t)
    for eps in (one, -one):
        torch.testing.assert_close(
            continuous.flow(one, t, 1e-3, eps),
            continuous.flow(one.double(), t.double(), 1e-3, eps.double()).float(),
        )


def test_fresh_noise_is_standard_normal():
    torch.manual_seed(0)
    x, t = torch.full((100_000, 1), 2.0), torch.full((100_000, 1), 0.3)
    gamma = 1 - 0.1**0.6
    mu = continuous.flow(x, t, 0.1)
    assert mu.mean().item() == pytest.approx(2 * gamma, abs=0.01)
    assert mu.var().item() == pytest.approx(gamma * (1 - gamma), rel=0.02)
    assert continuous.sender_sample(x, 4.0).var().item() == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_updates_by_the_accuracies_of_n_steps_are_exactly_the_flow(n):
    """The mean after n updates is linear in x and the n noises: n + 1 unit inputs tell all."""
    sigma1 = 0.05
    inputs = torch.eye(
        n + 1, dtype=torch.float64
    )  # row 0: x = 1 without noise; row i: only the noise of step i
    x, noises = inputs[:, :1], inputs[:, 1:]
    mu, rho = torch.zeros_like(x), torch.ones_like(x)
    for i in range(1, n + 1):
        a = continuous.alpha(times(float(i), x), n, sigma1)
        mu, rho = continuous.bayesian_update(
            mu, rho, continuous.sender_sample(x, a, noises[:, i - 1 : i]), a
        )
        gamma = 1 - sigma1 ** (2 * i / n)
        torch.testing.assert_close(rho, torch.full_like(rho, sigma1 ** (-2 * i / n)))
        assert mu[0].item() == pytest.approx(gamma, rel=1e-12)
        assert mu[1:].square().sum().item() == pytest.approx(gamma * (1 - gamma), rel=1e-12)


def test_an_update_is_bayes_rule():
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    mu, rho, y, a = 0.7, 2.0, -1.5, 3.0
    p = torch.exp(-rho / 2 * (x - mu) ** 2 - a / 2 * (y - x) ** 2)
    p /= p.sum()
    new_mu, new_rho = continuous.bayesian_update(mu, rho, y, a)
    assert new_mu == pytest.approx((p * x).sum().item())
    assert 1 / new_rho == pytest.approx((p * (x - new_mu) ** 2).sum().item())


@pytest.mark.parametrize("sigma1", [0.0, 1.0, -0.1, 3.0, math.nan])
def test_a_sigma1_that_no_flow_has_is_refused(sigma1):
    with pytest.raises(ValueError, match="sigma1"):
        continuous.flow(torch.zeros(1, 1), torch.zeros(1, 1), sigma1)


# ---------------------------------------------------------------- the parametrisation


def test_the_networks_noise_gives_back_x():
    torch.manual_seed(1)
    x, eps, t = (
        5 * torch.randn(50, 3).double(),
        torch.randn(50, 3).double(),
        torch.rand(50, 1).double() * 0.99 + 0.01,
    )
    torch.testing.assert_close(continuous.predict_noisy(lambda mu, t: eps, x, t, 0.02, eps), x)
    mu, gamma = torch.randn(50, 3).double(), 1 - 0.02 ** (2 * t)
    published = mu / gamma - ((1 - gamma) / gamma).sqrt() * eps
    torch.testing.assert_close(continuous.predict(lambda mu, t: eps, mu, t, 0.02), published)


def test_before_t_min_the_prediction_is_0_and_the_gradient_finite():
    eps = torch.ones(3, 2, requires_grad=True)
    t = torch.tensor([[0.0], [continuous.T_MIN / 2], [continuous.T_MIN]])
    x_hat = continuous.predict(lambda mu, t: eps, torch.ones(3, 2), t, 0.02)
    assert (x_hat[:2] == 0).all() and (x_hat[2] != 0).all() and x_hat.isfinite().all()
    x_hat.sum().backward()
    assert (eps.grad[:2] == 0).all() and eps.grad.isfinite().all()


@pytest.mark.parametrize("sigma1", [0.5, 0.02])
def test_an_untrained_network_predicts_the_mean_and_its_bound_is_the_entropy_of_the_prior(sigma1):
    """x_hat = mu is exact for x ~ N(0, 1), up to E[x^2] sigma1^2 / 2.

    So L_inf = log(1 / sigma1) and L_inf + L_rec = log(2 pi e) / 2.
    """
    torch.manual_seed(2)
    mu, t = torch.randn(100, 2), torch.rand(100, 1)
    torch.testing.assert_close(
        continuous.predict(moons.Network(2, sigma1), mu, t, sigma1), mu, rtol=1e-4, atol=1e-4
    )
    network = moons.Network(1, sigma1).double()
    x, eps, q = Mixture([1.0], [[0.0]], [1.0], sigma1).grid(n=41)
    with torch.no_grad():
        L_inf = (q * continuous_time_loss(network, x, eps, n_times=3)).sum().item()
        L_rec = (q * continuous.reconstruction_loss(network, x, sigma1, eps)).sum().item()
    assert L_inf == pytest.approx(-math.log(sigma1), rel=1e-5)
    assert L_inf + L_rec == pytest.approx(math.log(2 * math.pi * math.e) / 2, abs=1e-4)


# ---------------------------------------------------------------- losses with the exact network


@pytest.mark.parametrize("sigma1", [0.5, 0.1, 0.02])
def test_with_the_exact_network_l_inf_is_the_information_in_the_evidence(sigma1):
    m = mixture(sigma1)
    x, eps, q = m.grid(n=121)
    assert (q * continuous_time_loss(m, x, eps)).sum().item() == pytest.approx(
        information(m), abs=1e-4
    )


def test_the_n_step_loss_falls_to_the_continuous_loss():
    m = mixture(0.1)
    x, eps, q = m.grid(n=81)
    losses = [(q * n_step_loss(m, x, eps, n)).sum().item() for n in (1, 4, 16, 64, 256)]
    excess = [loss - information(m) for loss in losses]
    assert losses[0] == pytest.approx(
        (0.1**-2 - 1) / 2 * (q * x.squeeze().square()).sum().item()
    )  # x_hat = 0
    assert all(0 < later < earlier / 2.5 for earlier, later in pairwise(excess)), excess
    assert excess[-2] / excess[-1] == pytest.approx(
        4, rel=0.05
    )  # a fourth of the step, a fourth of the error
    assert excess[-1] < 0.05


@pytest.mark.parametrize("sigma1, excess", [(0.5, 0.3), (0.1, 0.002), (0.02, 1e-5)])
def test_on_average_the_bound_falls_to_the_entropy_of_the_data_and_never_below(sigma1, excess):
    """E[L_inf + L_rec] - h(x) = E KL(p(x | mu(1)) || N(x_hat, sigma1^2)); sharp: 0."""
    m = mixture(sigma1)
    x, eps, q = m.grid()
    L_rec = (q * continuous.reconstruction_loss(m, x, sigma1, eps)).sum().item()
    gap = information(m) + L_rec - entropy(m.log_density)
    assert 0 <= gap < excess


@pytest.mark.parametrize("x", [-2.0, 0.5, 1.3, 2.2, 4.5])
def test_for_each_x_the_bound_is_above_the_models_negative_log_density(x):
    """The model draws mu(1) from its marginal, then x from N(x_hat, sigma1^2): its own density.

    L_inf is, for each x, the divergence of the flow at t = 1 from its marginal.
    """
    m = mixture(0.3)
    b = 0.3**-2 - 1
    shown = torch.linspace(-15, 15, 20_001, dtype=torch.float64)[
        :, None
    ]  # x plus noise of variance 1 / b
    one = torch.ones_like(shown)
    log_q = m.log_density(shown, 1 / b).logsumexp(-1)
    log_q_x = (-b / 2 * (shown - x).square() + math.log(b / (2 * math.pi)) / 2).squeeze(-1)
    x_hat = continuous.predict(m, shown * b / (1 + b), one, 0.3)
    log_p_x = (-((x - x_hat) / 0.3).square() / 2 - math.log(0.3 * math.sqrt(2 * math.pi))).squeeze(
        -1
    )
    step = (shown[1] - shown[0]).item()
    divergence = (log_q_x.exp() * (log_q_x - log_q)).sum().item() * step
    exact = -math.log((log_q + log_p_x).exp().sum().item() * step)
    eps = torch.linspace(-7, 7, 401, dtype=torch.float64)[:, None]
    q = (-eps.square() / 2).exp().squeeze(-1)
    q /= q.sum()
    xs = torch.full_like(eps, x)
    L_inf = (q * continuous_time_loss(m, xs, eps)).sum().item()
    L_rec = (q * continuous.reconstruction_loss(m, xs, 0.3, eps)).sum().item()
    assert L_inf == pytest.approx(divergence, abs=1e-4)
    assert exact <= L_inf + L_rec < exact + 0.5


def test_a_wrong_network_costs_more():
    m, wrong = mixture(0.1), Mixture([0.5, 0.5], [[-2.0], [4.0]], [1.0, 1.0], 0.1)
    x, eps, q = m.grid(n=81)
    assert (q * continuous_time_loss(wrong, x, eps)).sum().item() > information(m) + 0.05


# ---------------------------------------------------------------- the sampler


def test_with_the_exact_network_samples_follow_the_distribution():
    torch.manual_seed(3)
    m = Mixture(
        [0.3, 0.5, 0.2], [[-2.0, 3.0], [0.5, -0.5], [4.0, 1.0]], [0.5, 0.3, 0.6], sigma1=0.05
    )
    n = 4000
    x, path = continuous.sample(m, n, 2, 400, m.sigma1)
    assert path.shape == (401, n, 2) and (path[0] == 0).all()
    x = x.double()
    mean = m.weights @ m.means
    centred = m.means - mean
    covariance = (m.weights[:, None] * centred).T @ centred + (
        m.weights * m.deviations**2
    ).sum() * torch.eye(2)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=3 * math.sqrt(covariance.max() / n))
    torch.testing.assert_close(x.T.cov(), covariance, rtol=0.05, atol=0.1)
    for d in (0, 1):
        ordered = x[:, d].sort().values
        cdf = (
            m.weights * torch.special.ndtr((ordered[:, None] - m.means[:, d]) / m.deviations)
        ).sum(-1)
        distance = (cdf - (torch.arange(n) + 0.5) / n).abs().max().item()
        assert distance < 1.63 / math.sqrt(
            n
        )  # Kolmogorov's distance exceeds this once in a hundred


def test_one_step_samples_from_a_normal_have_the_variance_of_its_algebra():
    """Data N(0, s^2): y ~ N(0, 1 / beta) around 0, and x_hat = beta s^2 / (1 + beta s^2) y."""
    torch.manual_seed(4)
    s, sigma1, n = 2.0, 0.5, 100_000
    x, _ = continuous.sample(Mixture([1.0], [[0.0]], [s], sigma1), n, 1, 1, sigma1)
    b = sigma1**-2 - 1
    assert x.var().item() == pytest.approx((b * s * s / (1 + b * s * s)) ** 2 / b, rel=0.02)


# ---------------------------------------------------------------- two moons


def test_the_half_circles_face_each_other():
    angle, moon = np.array([0, np.pi / 2, np.pi] * 2), np.repeat([0, 1], 3)
    upper, lower = [[1, 0], [0, 1], [-1, 0]], [[0, 0.5], [1, -0.5], [2, 0.5]]
    np.testing.assert_allclose(moons.half_circles(angle, moon), upper + lower, atol=1e-12)


def test_the_density_of_two_moons_sums_to_1_and_fits_the_points():
    g = torch.linspace(-2, 3, 201, dtype=torch.float64)
    log_p = moons.two_moons_log_density(torch.cartesian_prod(g, g))
    p = log_p.exp() * (g[1] - g[0]) ** 2
    assert p.sum().item() == pytest.approx(1, abs=1e-4)
    x = moons.two_moons(20_000, np.random.default_rng(0))
    assert -moons.two_moons_log_density(x).mean().item() == pytest.approx(
        -(p * log_p).sum().item(), abs=0.03
    )


def test_training_lowers_the_bound():
    torch.manual_seed(5)
    rng = np.random.default_rng(5)
    network, x = moons.Network(2, moons.SIGMA1), moons.two_moons(20_000, rng)
    before = sum(moons.bound(network, x))
    moons.train(network, x, 150)
    assert sum(moons.bound(network, x)) < before - 0.3


def test_the_command_draws_a_picture_and_refuses_other_endings(tmp_path, monkeypatch, capsys):
    output = tmp_path / "new" / "picture.png"
    monkeypatch.setattr(sys, "argv", ["moons.py", "--max_steps=2", f"--output={output}"])
    moons.main()
    assert capsys.readouterr().out.startswith("bound ")
    assert output.read_bytes()[1:4] == b"PNG" and list(tmp_path.rglob("*")) == [
        output.parent,
        output,
    ]
    monkeypatch.setattr(sys, "argv", ["moons.py", f"--output={tmp_path / 'picture.txt'}"])
    with pytest.raises(ValueError, match=r"\.png"):
        moons.main()
