"""The Bayesian flow over discrete data: flow, losses, Bayesian update and samplers.

Paper: Graves et al. 2023, "Bayesian Flow Networks", arXiv 2308.07037, section 6. Algorithm 7 is
`n_step_error`, 8 `squared_error_loss` of `predict_noisy`, 9 `solve` with the step `ancestral`.
Softmax ignores what all classes share, so the paper's y ~ N(beta (K e_x - 1), beta K I) becomes

    z = s eps + s^2 e_x,  theta = softmax(z),  s = s1 t,  s1 = sqrt(K beta(1)),  eps ~ N(0, I_K)

    ids       (B, L)     int64    tokens x
    z         (B, L, K)  float32  the state: log theta up to a constant per position
    theta     (B, L, K)  float32  input distribution
    t         (B, L)     float32  time in [0, 1], one per position
    log_p     (B, L, K)  float32  log_softmax of the network's logits
    cond_mask (B, L)     bool     True = given: the network sees the token's one-hot and time 1

A network is any callable `network(theta, t) -> logits`, of any dtype; all else here is float32.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch

from common.noise import Draws, draw_keys

CROSS_ENTROPY = 5.0  # weight of the cross-entropy in the training loss


# ---------------------------------------------------------------- choosing beta(1)


def evidence_accuracy(s1, K):
    """How often argmax theta is the token at t = 1: the mean of Phi(z + s1)^(K-1), z ~ N(0, 1)."""
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    power = torch.exp((K - 1) * torch.special.log_ndtr(z + s1))
    return torch.trapezoid(density * power, z).item()


def auto_beta1(K, accuracy=0.955):
    """Find the beta(1) of this `evidence_accuracy`, by default the paper's for text8 (K = 27).

    Raises ValueError for K < 2.
    """
    if K < 2:
        raise ValueError(f"a vocabulary of {K} leaves nothing to predict: 2 tokens at least")
    low, high = 0.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        is_low = evidence_accuracy(middle, K) < accuracy
        low, high = (middle, high) if is_low else (low, middle)
    return low**2 / K


# ---------------------------------------------------------------- the network's input and output


def flow(ids, t, s1, K, eps=None):
    """Draw the state at time t: z = s eps + s^2 e_x,  s = s1 t [Graves et al. 2023, eqs. 182-185].

    ids (B, L), t (B, L), eps (B, L, K) or None for fresh noise -> z (B, L, K).
    """
    if eps is None:
        eps = torch.randn(*ids.shape, K, device=ids.device)
    s = s1 * t[..., None]
    return (s * eps).scatter_add_(-1, ids[..., None], s.square())


def clamp_given(theta, t, ids, cond_mask):
    """Set given positions to the one-hot of their token and time 1 -> theta (B, L, K), t (B, L)."""
    theta = theta.masked_fill(cond_mask[..., None], 0.0)
    theta = theta.scatter_add(-1, ids[..., None], cond_mask[..., None].to(theta.dtype))
    return theta, t.masked_fill(cond_mask, 1.0)


def predict(network, theta, t, ids, cond_mask):
    """Call the network with the given positions filled in -> log_p (B, L, K) float32."""
    return network(*clamp_given(theta, t, ids, cond_mask)).float().log_softmax(-1)


def predict_noisy(network, ids, t, cond_mask, s1, K, eps=None):
    """Call the network on a draw of the flow at time t -> log_p (B, L, K).

    Training and evaluation see the network through this; fused training is compared with it at the
    start of a run. eps: see `flow`.
    """
    return predict(network, flow(ids, t, s1, K, eps).softmax(-1), t, ids, cond_mask)


# ---------------------------------------------------------------- losses, in nats per token


def pick(x, ids):
    """Select x[..., ids]: x (..., K), ids (...) -> (...)."""
    k = torch.arange(x.shape[-1], device=x.device)
    # Unlike gather, this compiles into the loops around it.
    return torch.where(k == ids[..., None], x, 0.0).sum(-1)


def squared_error_loss(log_p, ids, t, s1):
    """Integrand of the continuous-time loss [Graves et al. 2023, algorithm 8, eq. 205].

        s1^2 t |e_x - p|^2,    |e_x - p|^2 = 1 - 2 p_x + sum_k p_k^2

    log_p (B, L, K), ids, t (B, L) -> (B, L). Its mean over t ~ U(0, 1) is L_inf.
    """
    p_x = pick(log_p, ids).exp()
    return s1**2 * t * (1 - 2 * p_x + log_p.exp().square().sum(-1))


def cross_entropy(log_p, ids):
    """-log p_x: log_p (B, L, K), ids (B, L) -> (B, L)."""
    return -pick(log_p, ids)


def training_loss(log_p, ids, t, s1):
    """The loss that is trained, in one place: log_p (B, L, K), ids, t (B, L) -> (B, L).

        s1^2 t |e_x - p|^2 - CROSS_ENTROPY log p_x

    The first term vanishes as t -> 0, where only the context tells the token; the second teaches
    the network there.
    """
    return squared_error_loss(log_p, ids, t, s1) + CROSS_ENTROPY * cross_entropy(log_p, ids)


def n_step_error(log_p, ids, i, n, s1, eps=None):
    """Integrand of the n-step loss [Graves et al. 2023, algorithm 7, eq. 189, alpha_i of eq. 193].

        y = a eps + a^2 e_x,  a = s1 sqrt(2i - 1) / n
        n (y_x - logsumexp_k(log p_k + y_k) - a (eps_x - sum_k p_k eps_k))

    log_p (B, L, K) at t = (i - 1) / n, steps i (B, L) in 1..n -> (B, L). Its mean over i is L_n.
    Constants of sender and receiver cancel. The last term has mean zero and removes most noise.
    """
    a = s1 * (2 * i - 1).float().sqrt() / n
    eps = torch.randn_like(log_p) if eps is None else eps
    y = sender_sample(ids, a, log_p.shape[-1], eps)
    divergence = pick(y, ids) - torch.logsumexp(log_p + y, -1)
    noise = pick(eps, ids) - (log_p.exp() * eps).sum(-1)
    return n * (divergence - a * noise)


def reconstruction_loss(network, ids, cond_mask, s1, K, eps=None):
    """One draw of L_rec = -log p_x from the output at t = 1 -> (B, L). eps: see `flow`."""
    t = torch.ones(ids.shape, device=ids.device)
    return cross_entropy(predict_noisy(network, ids, t, cond_mask, s1, K, eps), ids)


# ---------------------------------------------------------------- the Bayesian update


def sender_sample(ids, a, K, eps=None):
    """Draw evidence of accuracy a^2 = K alpha: y = a eps + a^2 e_x -> (B, L, K)."""
    return flow(ids, t=a.expand(ids.shape), s1=1.0, K=K, eps=eps)


def bayesian_update(z, y):
    """Take in evidence y: theta <- softmax(log theta + y) [Graves et al. 2023, eq. 171]."""
    return z + y


# ---------------------------------------------------------------- how to sample


@dataclass(frozen=True, eq=False)  # it may hold tensors
class Controls:
    """How to sample. None of these changes a given token."""

    sampler: str = "pace"  # a name in SAMPLERS
    steps: int = 32  # most calls in which pace and commit fill the text; the solvers make steps + 1
    corrections: int = 0  # further calls of pace that redraw tokens
    temperature: float = 1.0
    top_p: float = 1.0  # draw only from the likeliest tokens that sum to this
    argmax: bool = False  # take the likeliest tokens instead of drawing them
    until: float = 0.0  # finish a row once its open positions have a mean entropy below this, nats
    hint: torch.Tensor | None = None  # log-odds from elsewhere, broadcast to (B, L, K)
    hint_time: float = 0.0  # the hint counts as observed at this noise level t
    allowed: torch.Tensor | None = None  # (..., K) bool, False for tokens that must not be drawn
    watch: object = None  # called with (t, p, given) at each call; t (B, L) is without the hint


@dataclass
class Task:
    """One batch to sample: what all samplers need."""

    network: object
    ids: torch.Tensor  # (B, L), read where cond_mask is True
    cond_mask: torch.Tensor  # (B, L)
    s1: float
    K: int
    controls: Controls
    draws: Draws

    @property
    def n_open(self):
        """Positions to fill in each row: (B,)."""
        return (~self.cond_mask).sum(1)

    def ask(self, z, t):
        """Call the network on the state z (B, L, K) at time t (B, L) -> log_p, p, both (B, L, K).

        log_p tells how certain a token is; p is sharpened and drawn from. With a hint, accuracies
        add. A hint is added here and never to z, where an ODE would amplify it.
        """
        c = self.controls
        theta = (z if c.hint is None else z + c.hint).softmax(-1)
        t = t.clamp(max=1.0)
        times = (t.square() + c.hint_time**2).sqrt().clamp(max=1.0)
        log_p = predict(self.network, theta, times, self.ids, self.cond_mask)
        if c.allowed is not None:
            log_p = log_p.masked_fill(~c.allowed, -torch.inf).log_softmax(-1)
        p = log_p.exp()
        if c.watch is not None:
            c.watch(t, p, self.cond_mask)
        return log_p, sharpen(p, c.temperature, c.top_p)

    def read(self, p, draws, index=...):
        """Choose tokens from p (B, L, K) -> (B, L), or (n,) at the n positions `index`."""
        return p[index].argmax(-1) if self.controls.argmax else draws.tokens(p, index)

    def is_certain(self, log_p, u):
        """Rows whose mean entropy at the earliest open time u (B, L) is below `until` -> (B,)."""
        if not self.controls.until:
            return torch.zeros_like(self.n_open, dtype=torch.bool)
        u = u.masked_fill(self.cond_mask, torch.inf)
        waiting = (u == u.amin(1, keepdim=True)) & ~self.cond_mask
        mean_entropy = (entropy(log_p) * waiting).sum(1) / waiting.sum(1).clamp(min=1)
        return mean_entropy < self.controls.until


@torch.no_grad()
def sample(network, ids, cond_mask, s1, K, controls, draws=None):
    """Sample the open positions -> ids (B, L), network calls (B,).

    ids (B, L) are read where cond_mask (B, L) is True and come back unchanged there. draws: a
    `Draws` of shape (B, L), or None for fresh random numbers.
    """
    draws = draws or Draws(draw_keys(*ids.shape, device=ids.device))
    return SAMPLERS[controls.sampler](Task(network, ids, cond_mask, s1, K, controls, draws))[:2]


START, READ, STEP = range(3)  # each phase of a call has its own random numbers


def ancestral(z, p, dp, k, u, v, s1, eps):
    """z + a eps + a^2 e_k,  k ~ p,  a^2 = s1^2 (v^2 - u^2) [Graves et al. 2023, algorithm 9]."""
    a = s1 * (v * v - u * u).sqrt()
    return bayesian_update(z, sender_sample(k, a, z.shape[-1], eps))


def sde1(z, p, dp, k, u, v, s1, eps):
    """z + a eps + a^2 p,  a^2 = s1^2 (v^2 - u^2) [Xue et al. 2024, SDE-solver 1]."""
    a = s1 * (v * v - u * u).sqrt()
    return z + a * eps + a * a * p


def sde2(z, p, dp, k, u, v, s1, eps):
    """SDE-1 + s1^2 / 3 h^2 (u + 2 v) dp,  h = v - u [Xue et al. 2024, SDE-solver 2]."""
    return sde1(z, p, dp, k, u, v, s1, eps) + s1**2 / 3 * (v - u) ** 2 * (u + 2 * v) * dp


def ode1(z, p, dp, k, u, v, s1, eps):
    """(v / u) z + s1^2 v h p,  h = v - u, u > 0 [Xue et al. 2024, ODE-solver 1]."""
    return v / u * z + s1**2 * v * (v - u) * p


def ode2(z, p, dp, k, u, v, s1, eps):
    """ODE-1 + s1^2 v h^2 / 2 dp,  h = v - u [Xue et al. 2024, ODE-solver 2]."""
    return ode1(z, p, dp, k, u, v, s1, eps) + s1**2 * v * (v - u) ** 2 / 2 * dp


ODE_START = 1e-3  # time at which an ODE starts, from z = s1 u eps


def time_grid(n_steps, start=0.0):
    """List n_steps + 1 even times, from `start` (at most a tenth of the first step) to 1."""
    times = torch.linspace(0, 1, n_steps + 1, dtype=torch.float64)
    return [min(start, times[1].item() / 10), *times[1:-1].tolist(), 1.0]


def solve(task, step, start=0.0, times=None):
    """Move all positions together, by `time_grid` or at given times -> ids (B, L), calls (B,).

    With `ancestral` as the step, this is the paper's sampler [Graves et al. 2023, algorithm 9]. The
    tokens of a row's last call are its text. A row ends at the last time, or once it is certain.
    """
    ids = task.ids
    times = torch.tensor(times or time_grid(task.controls.steps, start), device=ids.device)
    calls = torch.zeros_like(task.n_open)
    running = torch.ones_like(calls, dtype=torch.bool)
    z = task.s1 * times[0] * task.draws.at(START, 0).normal(task.K)
    p_before = None
    for i, u in enumerate(times):
        t = u.expand(ids.shape)
        log_p, p = task.ask(z, t)
        k = task.read(p, task.draws.at(READ, i))  # k ~ p
        ids = torch.where(running[:, None] & ~task.cond_mask, k, ids)
        calls += running
        running = running & ~task.is_certain(log_p, t)
        if i + 1 == len(times) or not running.any():
            return ids, calls
        dp = (p - p_before) / (u - times[i - 1]) if i else 0.0
        eps = task.draws.at(STEP, i).normal(task.K)
        z = step(z, p, dp, k, u, times[i + 1], task.s1, eps)
        p_before = p


# ---------------------------------------------------------------- paces: each position in its turn

CERTAIN = 1e6  # a time so late that theta is the one-hot of a token: infinite evidence


def fill(task, pace):
    """Move a few positions in each call -> ids (B, L), calls (B,), log_p of the tokens (B, L).

    The time u of a position is 0 while it waits, and the pace's `far` once it has received the
    evidence for its token. A row ends with the last call of its pace, or once it is certain. Then
    all of its tokens that are not CERTAIN are drawn from the output.
    """
    ids, K, pace = task.ids, task.K, pace(task)
    u = torch.zeros(ids.shape, device=ids.device)
    z = torch.zeros(*ids.shape, K, device=ids.device)
    log_p_of_ids = torch.zeros_like(u)
    calls = torch.zeros_like(task.n_open)
    running = torch.ones_like(calls, dtype=torch.bool)
    for i in count():
        # Take evidence back, and ask the network.
        back = pace.take_back(i, u, log_p_of_ids) & running[:, None]
        u = u.masked_fill(back, 0.0)
        z = z.masked_fill_(back[..., None], 0.0)
        log_p, p = task.ask(z, u)
        calls += running

        # Draw the tokens of the positions that move, and in the rows that end all that are open.
        moving = pace.chosen(i, u, log_p) & running[:, None]
        ending = running & ((i + 1 == pace.n_calls) | task.is_certain(log_p, u))
        uncertain = u < CERTAIN
        finishing = ending[:, None] & uncertain & ~task.cond_mask
        drawn = (moving | finishing).nonzero(as_tuple=True)  # waits for the device
        ids = ids.index_put(drawn, task.read(p, task.draws.at(READ, i), drawn))
        log_p_of_ids = torch.where(uncertain, log_p_given_others(log_p, z, ids), log_p_of_ids)
        running = running & ~ending
        if not running.any():
            return ids, calls, log_p_of_ids

        # Give the positions that move the evidence for their tokens.
        a = (task.s1 * pace.far * moving)[drawn]
        eps = task.draws.at(STEP, i).normal(K, drawn)
        y = sender_sample(ids[drawn], a, K, eps)
        z = z.index_put(drawn, bayesian_update(z[drawn], y))
        u = u.masked_fill(moving, pace.far)


def spread_out(score, open_mask, n):
    """Choose n (B,) of the positions `open_mask` (B, L): the lowest score in each of n stretches.

        open     . x x . x x x x       n = 2: the open positions are cut into two stretches
        stretch    0 0   0 1 1 1       of equal length
        score      5 1   2 4 5 3
        chosen       ^         ^       -> (B, L) bool

    Tokens drawn in the same call are independent, and far apart they depend on each other least.
    """
    B, L = score.shape
    number = open_mask.cumsum(1) - 1  # counts the open positions of a row from 0
    n_open = open_mask.sum(1, keepdim=True).clamp(min=1)
    stretch = (number * n[:, None] // n_open).masked_fill(~open_mask, L)
    rank = score.argsort(dim=1, stable=True).argsort(dim=1)  # 0 for the lowest score
    lowest = rank.new_full((B, L + 1), L).scatter_reduce(1, stretch, rank, "amin")
    is_lowest = rank == lowest.gather(1, stretch)
    return is_lowest & open_mask & (n > 0)[:, None]


def log_p_given_others(log_p, z, ids):
    """log p(ids | the evidence of all other positions), by Bayes' rule from the output -> (B, L).

        p(k | all) = p(k | others) theta_k / sum,   so   p(. | others) = softmax(log p - log theta)
    """
    others = log_p - z.log_softmax(-1).clamp(min=math.log(1e-37))  # log theta, as the head reads it
    return others.gather(-1, ids[..., None]).squeeze(-1) - others.logsumexp(-1)


class Pace:
    """In each call a few positions receive more evidence than at t = 1, and the others none.

    After `steps` calls all positions have theirs. In the `corrections` that follow, an eighth of
    the positions starts again without evidence: in each stretch the token that is least likely
    given all others. choose: which positions are next, see `spread_out`.
    """

    far = 1.25  # the time to which a position moves; at 1, words agree less often
    can_correct = True

    def __init__(self, task, choose=spread_out):
        self.task, self.choose = task, choose
        self.n_fill = task.n_open.clamp(1, task.controls.steps)
        corrections = task.controls.corrections if self.can_correct else 0
        self.n_calls = self.n_fill + (task.n_open // 2).clamp(max=corrections)

    def take_back(self, i, u, log_p_of_ids):
        """Choose the positions that lose their evidence, by log_p_of_ids (B, L) -> (B, L) bool."""
        n = (self.task.n_open // 8).clamp(min=1)  # tokens of one call did not know each other yet
        return spread_out(log_p_of_ids, u > 0, n.where(i >= self.n_fill, 0))

    def chosen(self, i, u, log_p):
        """Choose the positions that receive their evidence -> (B, L) bool."""
        waiting = (u == 0) & ~self.task.cond_mask
        n_open = self.task.n_open
        n_filled = (n_open * (i + 1) // self.n_fill).minimum(n_open)  # after this call
        return self.choose(entropy(log_p), waiting, n_filled - n_open + waiting.sum(1))


class Commit(Pace):
    """Infinite evidence: the tokens are then as good as given, and none is taken back."""

    far = CERTAIN
    can_correct = False


SAMPLERS = {  # function of a Task that obeys its controls -> ids (B, L), network calls (B,), ...
    "pace": partial(fill, pace=Pace),
    "commit": partial(fill, pace=Commit),
    "ancestral": partial(solve, step=ancestral),
    "sde1": partial(solve, step=sde1),
    "sde2": partial(solve, step=sde2),
    "ode1": partial(solve, step=ode1, start=ODE_START),
    "ode2": partial(solve, step=ode2, start=ODE_START),
}


# ---------------------------------------------------------------- the likelihood of a text


class Reading(Task):
    """A task in which every draw yields the token that is there: `fill` computes what it costs."""

    def read(self, p, draws, index=...):
        """Choose the tokens that are there."""
        return self.ids[index]


@torch.no_grad()
def log_likelihood(network, ids, cond_mask, s1, K, calls, choose=spread_out):
    """Compute log P(ids) under `commit` with so many calls and temperature 1 -> log p_d (B, L).

        log P(x) = sum over calls, and positions d filled in each, of log p_d(x_d | known before)

    This is no bound and has no noise: the positions are chosen by what is known, and tokens filled
    in the same call are independent [for masked models: "DUEL", arXiv 2603.01367]. A row takes at
    most one call per open position; then it is the chain rule. log p_d is 0 where cond_mask (B, L)
    is True. choose: which positions to fill, see `spread_out`.
    """
    keys = torch.zeros(*ids.shape, 2, dtype=torch.int32, device=ids.device)  # noise is drowned
    task = Reading(network, ids, cond_mask, s1, K, Controls(steps=calls), Draws(keys))
    _, _, log_p_of_ids = fill(task, partial(Commit, choose=choose))
    return log_p_of_ids.masked_fill(cond_mask, 0.0)


def entropy(log_p):
    """-sum_k p_k log p_k in nats: (..., K) -> (...)."""
    return torch.special.entr(log_p.exp()).sum(-1)


def sharpen(p, temperature=1.0, top_p=1.0):
    """Take p^(1 / temperature) and keep the likeliest tokens that sum to `top_p` -> (..., K)."""
    if temperature != 1:
        log_ratio = (p / p.amax(-1, keepdim=True)).log()  # 0 for the likeliest
        p = (log_ratio / max(temperature, 1e-6)).softmax(-1)
    if top_p < 1:
        largest, order = p.sort(-1, descending=True)
        kept = largest.cumsum(-1) - largest < max(top_p, 1e-6)  # also the token that crosses top_p
        p = torch.zeros_like(p).scatter(-1, order, largest * kept)
        p /= p.sum(-1, keepdim=True)
    return p
