"""The Bayesian flow over continuous data, with the names of bfn.py. moons.py trains with it.

Paper: Graves et al. 2023, "Bayesian Flow Networks", arXiv 2308.07037, section 4. What the flow
knows of x is a normal distribution N(mu, 1 / rho). It starts as N(0, 1), and evidence of accuracy
beta makes it

    rho = 1 + beta,  rho mu = sqrt(beta) eps + beta x,  beta = sigma1^(-2t) - 1,  eps ~ N(0, I)

    x, x_hat  (B, D)  float32  data, of any range, and its prediction
    mu, rho   (B, D)  float32  input distribution; rho is everywhere the same: a number or (B, 1)
    t         (B, 1)  float32  time in [0, 1]
    sigma1    number           standard deviation of the input distribution at t = 1, in (0, 1)

A network is any callable `network(mu, t) -> eps`, its prediction of the flow's noise. Losses are
nats per row.
"""

import math

import torch

T_MIN = 1e-6  # before this time nothing is known of x, and the prediction is 0


# ---------------------------------------------------------------- the network's input and output


def beta(t, sigma1):
    """Accuracy of all evidence until t: sigma1^(-2t) - 1. Raises ValueError for a wrong sigma1."""
    if not 0 < sigma1 < 1:
        message = f"sigma1 is {sigma1}: it must be above 0 and below 1"
        raise ValueError(f"{message}, the standard deviation at t = 0")
    return torch.expm1(-2 * math.log(sigma1) * t)


def alpha(i, n, sigma1):
    """Accuracy of step i of n: beta(i / n) - beta((i - 1) / n)."""
    return (1 + beta((i - 1) / n, sigma1)) * math.expm1(-2 * math.log(sigma1) / n)


def flow(x, t, sigma1, eps=None):
    """Draw the mean at time t: gamma x + sqrt(gamma (1 - gamma)) eps, gamma = 1 - sigma1^(2t).

    x (B, D), t (B, 1), eps (B, D) or None for fresh noise -> mu (B, D).
    """
    b = beta(t, sigma1)
    return (b.sqrt() * (torch.randn_like(x) if eps is None else eps) + b * x) / (1 + b)


def predict(network, mu, t, sigma1):
    """x_hat = mu / gamma - sqrt((1 - gamma) / gamma) eps, and 0 before T_MIN -> (B, D)."""
    b = beta(t.clamp(min=T_MIN), sigma1)
    return torch.where(t < T_MIN, 0.0, mu * (1 + b) / b - network(mu, t) / b.sqrt())


def predict_noisy(network, x, t, sigma1, eps=None):
    """Predict x (B, D) from a draw of the flow at time t (B, 1) -> x_hat (B, D)."""
    return predict(network, flow(x, t, sigma1, eps), t, sigma1)


# ---------------------------------------------------------------- losses, in nats per row


def squared_error_loss(x_hat, x, t, sigma1):
    """Integrand of the continuous-time loss, also of training [Graves et al. 2023, algorithm 2].

        beta'(t) / 2 |x - x_hat|^2 = -log(sigma1) sigma1^(-2t) |x - x_hat|^2

    x_hat, x (B, D), t (B, 1) -> (B,). Its mean over t ~ U(0, 1) is L_inf.
    """
    return -math.log(sigma1) * ((1 + beta(t, sigma1)) * (x - x_hat).square()).sum(-1)


def reconstruction_loss(network, x, sigma1, eps=None):
    """One draw of L_rec = -log N(x | x_hat, sigma1^2 I) from the output at t = 1: x (B, D) -> (B,).

    This is the log of a density, so L_rec may be negative.
    """
    x_hat = predict_noisy(network, x, torch.ones_like(x[:, :1]), sigma1, eps)
    return (((x - x_hat) / sigma1).square() / 2 + math.log(sigma1 * math.sqrt(2 * math.pi))).sum(-1)


# ---------------------------------------------------------------- Bayesian update and sampler


def sender_sample(x, alpha, eps=None):
    """Draw evidence of accuracy alpha (B, 1) or a number: y ~ N(x, 1 / alpha) -> (B, D)."""
    return x + (torch.randn_like(x) if eps is None else eps) / alpha**0.5


def bayesian_update(mu, rho, y, alpha):
    """Take in evidence y (B, D) of accuracy alpha [Graves et al. 2023, section 4] -> mu, rho.

    Precisions add, and the new mean is the mean of mu and y, weighted by their precisions.
    """
    return (rho * mu + alpha * y) / (rho + alpha), rho + alpha


@torch.no_grad()
def sample(network, B, D, n_steps, sigma1):
    """Draw B samples [Graves et al. 2023, algorithm 3] in n_steps + 1 network calls.

    -> x (B, D), means (n_steps + 1, B, D)
    """
    mu, rho = torch.zeros(B, D), torch.ones(B, 1)
    means = [mu]
    for step in range(1, n_steps + 1):
        i = torch.full((B, 1), step)
        x_hat, a = predict(network, mu, (i - 1) / n_steps, sigma1), alpha(i, n_steps, sigma1)
        mu, rho = bayesian_update(mu, rho, sender_sample(x_hat, a), a)
        means.append(mu)
    return predict(network, mu, torch.ones(B, 1), sigma1), torch.stack(means)
