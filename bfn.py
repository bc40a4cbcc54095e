"""The Bayesian flow over discrete data: flow, losses, update and sampler, as pure functions.

Paper: Graves et al. 2023, "Bayesian Flow Networks", arXiv 2308.07037, section 6. Softmax ignores what all classes share,
so the paper's y ~ N(beta (K e_x - 1), beta K I) is used in its shortest form, with s1 = sqrt(K beta1) and s = s1 t:

    z = s eps + s^2 e_x,    theta = softmax(z),    eps ~ N(0, I_K)

    ids       (B, L)     int64    tokens x
    z         (B, L, K)  float32  the state, a log-posterior up to a constant for each position
    theta     (B, L, K)  float32  input distribution
    t         (B, L)     float32  time in [0, 1], one for each position
    logits    (B, L, K)           output of the network, p = softmax(logits)
    cond_mask (B, L)     bool     True = given: the network sees the token's one-hot and time 1

A network is any callable `network(theta, t) -> logits`. All arithmetic here is float32, whatever the network's dtype.
"""

import hashlib
import math

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------- choosing beta(1)


def evidence_accuracy(s1, K):
    """How often the evidence alone names the token at t = 1: E_{z ~ N(0,1)}[Phi(z + s1)^(K-1)], in [1/K, 1]."""
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return torch.trapezoid(density * torch.exp((K - 1) * torch.special.log_ndtr(z + s1)), z).item()


def auto_beta1(K, accuracy=0.955):
    """The beta(1) at which `evidence_accuracy` is 0.955, as it is in the paper's text8 setting (K = 27, beta1 = 0.5625).

    Raises ValueError for K < 2, where there is nothing to predict.
    """
    if K < 2:
        raise ValueError(f"a vocabulary of {K} leaves nothing to predict: at least 2 tokens are needed")
    low, high = 0.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if evidence_accuracy(middle, K) < accuracy else (low, middle)
    return low**2 / K


# ---------------------------------------------------------------- the network's input


def flow(ids, t, s1, K, eps=None):
    """Draw the state at time t [section 1 of the paper's discrete case, eqs. 182-185]: z = s eps + s^2 e_x, s = s1 t.

    ids (B, L), t (B, L), eps (B, L, K) or None for fresh noise -> z (B, L, K).
    """
    if eps is None:
        eps = torch.randn(*ids.shape, K, device=ids.device)
    s = s1 * t[..., None]
    return (s * eps).scatter_add_(-1, ids[..., None], s.square())


def give(theta, t, ids, cond_mask):
    """Replace the input at given positions by the token's one-hot and time 1 -> (theta, t)."""
    theta = theta.masked_fill(cond_mask[..., None], 0.0)
    theta = theta.scatter_add(-1, ids[..., None], cond_mask[..., None].to(theta.dtype))
    return theta, t.masked_fill(cond_mask, 1.0)


def predict(network, z, t, ids, cond_mask):
    """Call the network on state z at time t with the given positions filled in -> logits (B, L, K), float32."""
    return network(*give(z.softmax(-1), t, ids, cond_mask)).float()


# ---------------------------------------------------------------- losses, nats per token; mask the given positions


def squared_error_loss(logits, ids, t, s1):
    """Integrand of the continuous-time loss [Graves et al. 2023, eq. 205]: s1^2 t |e_x - p|^2 -> (B, L).

    |e_x - p|^2 = 1 - 2 p_x + sum_k p_k^2 needs no one-hot. Its mean over t ~ U(0, 1) is L_inf.
    """
    p = logits.float().softmax(-1)  # bf16 would lose the small errors near t = 1
    p_x = p.gather(-1, ids[..., None]).squeeze(-1)
    return s1**2 * t * (1 - 2 * p_x + p.square().sum(-1))


def cross_entropy(logits, ids):
    """-log p_x in nats: logits (B, L, K), ids (B, L) -> (B, L)."""
    return F.cross_entropy(logits.float().flatten(0, -2), ids.flatten(), reduction="none").view_as(ids)


def continuous_time_loss(network, ids, t, cond_mask, s1, K):
    """One draw of the integrand of L_inf at times t (B, L) -> (B, L); its mean over noise and t ~ U(0, 1) is L_inf."""
    logits = predict(network, flow(ids, t, s1, K), t, ids, cond_mask)
    return squared_error_loss(logits, ids, t, s1)


def n_step_error(logits, ids, i, n, s1):
    """Integrand of the n-step loss at steps i (B, L) in 1..n, from the output at t = (i - 1) / n -> (B, L).

        y = a eps + a^2 e_x,  a = s1 sqrt(2i - 1) / n        n (y_x - logsumexp_k(log p_k + y_k) - a (eps_x - sum_k p_k eps_k))

    The sender's and receiver's constants cancel [eq. 189, with alpha_i of eq. 193]. The last term has mean zero and
    takes most of the noise away.
    """
    a = s1 * (2 * i - 1).float().sqrt() / n
    log_p = logits.float().log_softmax(-1)
    eps = torch.randn_like(log_p)
    y = sender_sample(ids, a, log_p.shape[-1], eps)
    y_x, eps_x = (v.gather(-1, ids[..., None]).squeeze(-1) for v in (y, eps))
    return n * (y_x - torch.logsumexp(log_p + y, -1) - a * (eps_x - (log_p.exp() * eps).sum(-1)))


def n_step_loss(network, ids, i, n, cond_mask, s1, K):
    """One draw of the n-step loss at steps i (B, L) in 1..n -> (B, L); its mean over noise and i is L_n."""
    t = (i - 1) / n
    return n_step_error(predict(network, flow(ids, t, s1, K), t, ids, cond_mask), ids, i, n, s1)


def reconstruction_loss(network, ids, cond_mask, s1, K):
    """One draw of L_rec = -log p_x at theta(t = 1) -> (B, L)."""
    t = torch.ones(ids.shape, device=ids.device)
    logits = predict(network, flow(ids, t, s1, K), t, ids, cond_mask)
    return cross_entropy(logits, ids)


# ---------------------------------------------------------------- update and sampler


def sender_sample(ids, a, K, eps=None):
    """y = a eps + a^2 e_x, the evidence of accuracy a^2 = K alpha: flow's formula with a in place of s -> (B, L, K)."""
    return flow(ids, a.expand(ids.shape), 1.0, K, eps)


def bayesian_update(z, y):
    """Take in evidence y: theta <- softmax(log theta + y) [Graves et al. 2023, eq. 171], in logits a sum."""
    return z + y


def draw_rows(draw, shape, lengths, generators, device):
    """`draw` (torch.randn or torch.rand) for each row from its own generator and for its own length, zero-padded.

    A row's numbers depend on neither its neighbours nor the padding. With generators None: one draw of the whole shape.
    """
    if generators is None:
        return draw(shape, device=device)
    noise = torch.zeros(shape, device=device)
    for row, n, generator in zip(noise, lengths, generators, strict=True):
        row[:n] = draw((n, *shape[2:]), generator=generator, device=device)
    return noise


def sample_categorical(p, u):
    """Invert the cumulative distribution in float64: p (..., K), u (...) in [0, 1) -> (...) int64."""
    cdf = p.double().cumsum(-1)
    u = (u.double() * cdf[..., -1])[..., None]  # p sums to 1 but for rounding
    return torch.searchsorted(cdf, u, right=True).squeeze(-1).clamp(max=p.shape[-1] - 1)


@torch.no_grad()
def sample_ancestral(network, ids, cond_mask, s1, K, n_steps, allowed=None, lengths=None, generators=None, watch=None):
    """Ancestral sampling [Graves et al. 2023, algorithm 9]: n_steps + 1 network calls -> ids (B, L).

        k ~ p(theta, t),    z <- z + a_i eps + a_i^2 e_k,    a_i = s1 sqrt(2i - 1) / n;    at the end k ~ p at t = 1

    ids (B, L) are read where cond_mask is True and come back unchanged there. allowed, broadcastable to (B, L, K),
    is False for tokens never to be drawn. lengths and generators: see `draw_rows`. watch(t, p) sees every step.
    """
    B, L = ids.shape
    z = torch.zeros(B, L, K, device=ids.device)
    for i in range(1, n_steps + 2):
        t = torch.full((B, L), (i - 1) / n_steps, device=ids.device)
        logits = predict(network, z, t, ids, cond_mask)
        p = (logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)).softmax(-1)
        u = draw_rows(torch.rand, (B, L), lengths, generators, ids.device)
        k = torch.where(cond_mask, ids, sample_categorical(p, u))
        if watch is not None:
            watch((i - 1) / n_steps, p)
        if i <= n_steps:
            a = torch.tensor(s1 * math.sqrt(2 * i - 1) / n_steps, device=ids.device)
            eps = draw_rows(torch.randn, (B, L, K), lengths, generators, ids.device)
            z = bayesian_update(z, sender_sample(k, a, K, eps))
    return k


# ---------------------------------------------------------------- randomness


def mix_seed(*numbers):
    """One seed out of several numbers, such as (seed, step, micro-batch) -> int in [0, 2^63)."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1
