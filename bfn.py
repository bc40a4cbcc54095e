"""The Bayesian flow over discrete data: flow, losses, Bayesian update and samplers, as pure functions.

Paper: Graves et al. 2023, "Bayesian Flow Networks", arXiv 2308.07037, section 6. Softmax ignores what is the same for all
classes, so the paper's y ~ N(beta (K e_x - 1), beta K I) shortens to

    z = s eps + s^2 e_x,    theta = softmax(z),    s = s1 t,    s1 = sqrt(K beta(1)),    eps ~ N(0, I_K)

    ids       (B, L)     int64    tokens x
    z         (B, L, K)  float32  the state: log theta up to a constant per position
    theta     (B, L, K)  float32  input distribution
    t         (B, L)     float32  time in [0, 1], one per position
    log_p     (B, L, K)  float32  log_softmax of the network's logits
    cond_mask (B, L)     bool     True = given: the network sees the token's one-hot and time 1

A network is any callable `network(theta, t) -> logits`. All arithmetic here is float32, whatever the network's dtype.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch

from noise import Draws, draw_keys

CROSS_ENTROPY = 5.0  # weight of the cross-entropy in the training loss

# ---------------------------------------------------------------- choosing beta(1)


def evidence_accuracy(s1, K):
    """How often argmax theta is the token at t = 1: E_{z ~ N(0,1)}[Phi(z + s1)^(K-1)], in [1/K, 1]."""
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return torch.trapezoid(density * torch.exp((K - 1) * torch.special.log_ndtr(z + s1)), z).item()


def auto_beta1(K, accuracy=0.955):
    """Find the beta(1) at which `evidence_accuracy` is 0.955, as in the paper's text8 setting (K = 27, beta1 = 0.5625).

    Raises ValueError for K < 2, where there is nothing to predict.
    """
    if K < 2:
        raise ValueError(f"a vocabulary of {K} leaves nothing to predict: at least 2 tokens are needed")
    low, high = 0.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if evidence_accuracy(middle, K) < accuracy else (low, middle)
    return low**2 / K


# ---------------------------------------------------------------- the network's input and output


def flow(ids, t, s1, K, eps=None):
    """Draw the state at time t from the Bayesian flow [Graves et al. 2023, eqs. 182-185]: z = s eps + s^2 e_x, s = s1 t.

    ids (B, L), t (B, L), eps (B, L, K) or None for fresh noise -> z (B, L, K).
    """
    if eps is None:
        eps = torch.randn(*ids.shape, K, device=ids.device)
    s = s1 * t[..., None]
    return (s * eps).scatter_add_(-1, ids[..., None], s.square())


def clamp_given(theta, t, ids, cond_mask):
    """Replace the input at given positions by the token's one-hot and time 1 -> theta (B, L, K), t (B, L)."""
    theta = theta.masked_fill(cond_mask[..., None], 0.0)
    theta = theta.scatter_add(-1, ids[..., None], cond_mask[..., None].to(theta.dtype))
    return theta, t.masked_fill(cond_mask, 1.0)


def predict(network, theta, t, ids, cond_mask):
    """Call the network on theta at time t with the given positions filled in -> log_p (B, L, K) float32."""
    return network(*clamp_given(theta, t, ids, cond_mask)).float().log_softmax(-1)


def predict_noisy(network, ids, t, cond_mask, s1, K, eps=None):
    """Draw the network's input at time t from the flow and call it -> log_p (B, L, K). eps: see `flow`.

    Plain training, validation and evaluation see the network through this function; fused training is compared with it
    when a run starts.
    """
    return predict(network, flow(ids, t, s1, K, eps).softmax(-1), t, ids, cond_mask)


# ---------------------------------------------------------------- losses, in nats per token


def pick(x, ids):
    """Select x[..., ids]: x (..., K), ids (...) -> (...)."""
    k = torch.arange(x.shape[-1], device=x.device)
    return torch.where(k == ids[..., None], x, 0.0).sum(-1)  # unlike gather, this compiles into the loops around it


def squared_error_loss(log_p, ids, t, s1):
    """Integrand of the continuous-time loss [Graves et al. 2023, eq. 205]: log_p (B, L, K), ids, t (B, L) -> (B, L).

        s1^2 t |e_x - p|^2,    |e_x - p|^2 = 1 - 2 p_x + sum_k p_k^2

    Its mean over t ~ U(0, 1) is L_inf.
    """
    return s1**2 * t * (1 - 2 * pick(log_p, ids).exp() + log_p.exp().square().sum(-1))


def cross_entropy(log_p, ids):
    """-log p_x: log_p (B, L, K), ids (B, L) -> (B, L)."""
    return -pick(log_p, ids)


def training_loss(log_p, ids, t, s1):
    """The loss that is trained, in one place: log_p (B, L, K), ids, t (B, L) -> (B, L).

        s1^2 t |e_x - p|^2 - CROSS_ENTROPY log p_x

    The first term vanishes as t -> 0, where only the context tells the token; the second teaches the network there.
    """
    return squared_error_loss(log_p, ids, t, s1) + CROSS_ENTROPY * cross_entropy(log_p, ids)


def n_step_error(log_p, ids, i, n, s1, eps=None):
    """Integrand of the n-step loss at steps i (B, L) in 1..n, from the output at t = (i - 1) / n -> (B, L).

        y = a eps + a^2 e_x,  a = s1 sqrt(2i - 1) / n
        n (y_x - logsumexp_k(log p_k + y_k) - a (eps_x - sum_k p_k eps_k))

    The constants of sender and receiver cancel [Graves et al. 2023, eq. 189, with alpha_i of eq. 193]. The last term has
    mean zero and removes most of the noise. eps (B, L, K), or None for fresh noise. Its mean over i is L_n.
    """
    a = s1 * (2 * i - 1).float().sqrt() / n
    eps = torch.randn_like(log_p) if eps is None else eps
    y = sender_sample(ids, a, log_p.shape[-1], eps)
    return n * (pick(y, ids) - torch.logsumexp(log_p + y, -1) - a * (pick(eps, ids) - (log_p.exp() * eps).sum(-1)))


def reconstruction_loss(network, ids, cond_mask, s1, K, eps=None):
    """One draw of L_rec = -log p_x from the output at t = 1 -> (B, L). eps (B, L, K), or None for fresh noise."""
    t = torch.ones(ids.shape, device=ids.device)
    return cross_entropy(predict_noisy(network, ids, t, cond_mask, s1, K, eps), ids)


# ---------------------------------------------------------------- the Bayesian update


def sender_sample(ids, a, K, eps=None):
    """Draw evidence of accuracy a^2 = K alpha: y = a eps + a^2 e_x, the flow with a instead of s -> (B, L, K)."""
    return flow(ids, t=a.expand(ids.shape), s1=1.0, K=K, eps=eps)


def bayesian_update(z, y):
    """Take in evidence y: theta <- softmax(log theta + y) [Graves et al. 2023, eq. 171], a sum of logits."""
    return z + y


# ---------------------------------------------------------------- solvers: one step of the flow from time u to v > u
# Of n positions: z, p, dp, eps (n, K), tokens k (n,), u and v (n, 1). p is the network's output at u, dp its slope in time.


def ancestral(z, p, dp, k, u, v, s1, eps):
    """z + a eps + a^2 e_k,  k ~ p,  a^2 = s1^2 (v^2 - u^2) [Graves et al. 2023, algorithm 9]."""
    a = s1 * (v * v - u * u).sqrt().squeeze(-1)
    return bayesian_update(z, sender_sample(k, a, z.shape[-1], eps))


def sde1(z, p, dp, k, u, v, s1, eps):
    """z + a eps + a^2 p,  a^2 = s1^2 (v^2 - u^2) [Xue et al. 2024, SDE-solver 1]."""
    a = s1 * (v * v - u * u).sqrt()
    return z + a * eps + a * a * p


def sde2(z, p, dp, k, u, v, s1, eps):
    """SDE-1 + s1^2 / 3 h^2 (u + 2 v) dp,  h = v - u [Xue et al. 2024, SDE-solver 2]."""
    return sde1(z, p, dp, k, u, v, s1, eps) + s1**2 / 3 * (v - u) ** 2 * (u + 2 * v) * dp


def ode1(z, p, dp, k, u, v, s1, eps):
    """(v / u) z + s1^2 v h p,  h = v - u, u > 0 [Xue et al. 2024, ODE-solver 1]. All of its noise is in the start."""
    return v / u * z + s1**2 * v * (v - u) * p


def ode2(z, p, dp, k, u, v, s1, eps):
    """ODE-1 + s1^2 v h^2 / 2 dp,  h = v - u [Xue et al. 2024, ODE-solver 2]."""
    return ode1(z, p, dp, k, u, v, s1, eps) + s1**2 * v * (v - u) ** 2 / 2 * dp


SECOND_ORDER = sde2, ode2  # only these read dp, and they need positions that all move in each call

# ---------------------------------------------------------------- sampling


@dataclass(frozen=True, eq=False)  # it may hold tensors
class Controls:
    """How to sample. None of these changes a given token."""

    sampler: str = "pace"  # a name in SAMPLERS
    steps: int = 32  # most calls in which pace and commit fill the text; the solvers make steps + 1
    corrections: int = 0  # further calls of pace that redraw tokens
    temperature: float = 1.0
    top_p: float = 1.0  # draw only from the likeliest tokens that sum to this
    argmax: bool = False  # take the likeliest tokens instead of drawing them
    until: float = 0.0  # finish a row once its open positions have a mean entropy below this, in nats
    hint: torch.Tensor | None = None  # log-odds from elsewhere, broadcast to (B, L, K)
    hint_time: float = 0.0  # the hint counts as observed at this noise level t
    allowed: torch.Tensor | None = None  # (..., K) bool, False for tokens that must not be drawn
    watch: object = None  # called with (t, p, given) at each network call, t (B, L) of the flow without the hint


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
        """Call the network on the state z (B, L, K) at time t (B, L) -> log_p, sharpened p, both (B, L, K).

        log_p tells how certain a token is; the sharpened p is drawn from. With a hint, accuracies add: t becomes
        sqrt(t^2 + hint_time^2). A hint is added here and never to z, where an ODE would amplify it.
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

    def read(self, p, draws, index):
        """Choose tokens from the sharpened p (B, L, K) at the n positions `index` -> (n,)."""
        return p[index].argmax(-1) if self.controls.argmax else draws.tokens(p, index)

    def is_certain(self, log_p, u):
        """Rows whose open positions of the earliest time u (B, L) have a mean entropy below `until` -> (B,) bool."""
        u = u.masked_fill(self.cond_mask, torch.inf)
        waiting = (u == u.amin(1, keepdim=True)) & ~self.cond_mask
        return (entropy(log_p) * waiting).sum(1) / waiting.sum(1).clamp(min=1) < self.controls.until


@torch.no_grad()
def sample(network, ids, cond_mask, s1, K, controls, draws=None):
    """Sample the open positions -> ids (B, L), network calls (B,).

    ids (B, L) are read where cond_mask (B, L) is True and come back unchanged there. draws: a `Draws` of shape (B, L), or
    None for fresh random numbers.
    """
    draws = draws or Draws(draw_keys(*ids.shape, device=ids.device))
    return SAMPLERS[controls.sampler](Task(network, ids, cond_mask, s1, K, controls, draws))[:2]


START, READ, STEP = range(3)  # each phase has its own random numbers
ODE_START = 1e-3  # time at which an ODE starts, from z = s1 u eps
CERTAIN = 1e6  # a time so late that theta is the one-hot of a token: infinite evidence


def solve(task, step, pace):
    """Sample by moving each position through time -> ids (B, L), network calls (B,), log_p of the tokens (B, L), 0 for OnePace.

    The one loop of all samplers. In each call the network reads the state z of every position at its time u, and `step`
    takes some of them on to a time v, with evidence from the output; `pace` says which, and how far. A row ends with the
    last call of its pace, or earlier if it is certain. Then all of its tokens that are not CERTAIN are drawn from the output.
    """
    open_mask, K, until = ~task.cond_mask, task.K, task.controls.until
    pace = pace(task)
    u = pace.start * open_mask
    z = torch.zeros(*u.shape, K, device=u.device)
    if pace.start:
        z += task.s1 * u[..., None] * task.draws.at(START, 0).normal(K)
    ids, score = task.ids, torch.zeros(u.shape, device=u.device)
    calls, running, before = torch.zeros_like(task.n_open), torch.ones_like(task.n_open, dtype=torch.bool), None
    n_calls = pace.n_calls.max().item()
    for i in range(n_calls):
        back = pace.take_back(i, u, score) & running[:, None]
        z, u = z.masked_fill_(back[..., None], 0.0), u.masked_fill(back, 0.0)
        log_p, p = task.ask(z, u)
        v = torch.where(running[:, None] & open_mask, pace.next_time(i, u, log_p), u)
        calls += running
        ends = running & ((i + 1 == pace.n_calls) | (task.is_certain(log_p, u) if until else False))
        index = ((v > u) | (ends[:, None] & open_mask & (u < CERTAIN))).nonzero(as_tuple=True)  # waits for the device
        k = task.read(p, task.draws.at(READ, i), index)
        ids = ids.index_put(index, k)
        if pace.needs_score:
            score = torch.where(u < CERTAIN, log_p_given_others(log_p, z, ids), score)
        running = running & ~ends
        if i + 1 == n_calls or (until and not running.any()):
            break
        here, there, dp = u[index][:, None], v[index][:, None], 0.0
        if step in SECOND_ORDER and before:
            dp = (p[index] - before[0][index]) / (here - before[1][index][:, None])
        eps = task.draws.at(STEP, i).normal(K, index)
        z = z.index_put(index, step(z[index], p[index], dp, k, here, there, task.s1, eps))
        before = p, u
        u = v
    return ids, calls, score


def spread_out(score, open_mask, n):
    """Choose n (B,) of the positions `open_mask` (B, L), far from each other: the lowest score in each of n stretches.

        open     . x x . x x x x       n = 2: the open positions are cut into two stretches of equal length
        stretch    0 0   0 1 1 1
        score      5 1   2 4 5 3
        chosen       ^         ^       -> (B, L) bool

    Tokens that are drawn in the same call are independent, and far apart they depend on each other least.
    """
    L, n_open = score.shape[1], open_mask.sum(1, keepdim=True)
    stretch = (open_mask.cumsum(1) - 1) * n[:, None] // n_open.clamp(min=1)
    stretch = stretch.masked_fill(~open_mask, L)  # after all others
    by_score = score.argsort(dim=1, stable=True)
    order = by_score.gather(1, stretch.gather(1, by_score).argsort(dim=1, stable=True))  # by stretch, then by score
    stretch = stretch.gather(1, order)
    is_first = stretch.diff(dim=1, prepend=torch.full_like(stretch[:, :1], -1)) != 0
    return torch.zeros_like(open_mask).scatter(1, order, is_first) & open_mask & (n > 0)[:, None]


def log_p_given_others(log_p, z, ids):
    """log p(ids | the evidence of all other positions): by Bayes' rule, the output without a position's own -> (B, L).

        p(k | all) = p(k | others) exp(z_k) / sum,   so   p(k | others) = softmax(log p(k | all) - z_k)
    """
    others = log_p - z
    return others.gather(-1, ids[..., None]).squeeze(-1) - others.logsumexp(-1)


class OnePace:
    """All positions have the same time: from `start` to 1, by `time_grid` or at the given times."""

    needs_score = False

    def __init__(self, task, start=0.0, times=None):
        self.times = times or time_grid(task.controls.steps, start)
        self.start, self.n_calls = self.times[0], torch.full_like(task.n_open, len(self.times))

    def take_back(self, i, u, score):
        """Take nothing back."""
        return torch.zeros_like(u, dtype=torch.bool)

    def next_time(self, i, u, log_p):
        """The next time of the grid."""
        return torch.full_like(u, self.times[min(i + 1, len(self.times) - 1)])


class OwnPace:
    """A few positions receive all of their evidence in each call, up to the time `far`, and the others none.

    After `steps` calls all positions have had theirs. In the `corrections` that follow, an eighth of the positions starts
    again without evidence: in each stretch the token that is least likely given all others. choose: see `spread_out`.
    """

    start, needs_score = 0.0, True

    def __init__(self, task, far=1.0, choose=spread_out):
        self.task, self.far, self.choose = task, far, choose
        self.n_fill = task.n_open.clamp(1, task.controls.steps)
        corrections = task.controls.corrections if far < CERTAIN else 0
        self.n_calls = self.n_fill + (task.n_open // 2).clamp(max=corrections)

    def take_back(self, i, u, score):
        """score (B, L): log-probability of each position's token given what the last call knew of all others.

        Tokens that were drawn in that call did not know each other yet.
        """
        n = (self.task.n_open // 8).clamp(min=1) * (i >= self.n_fill)
        return spread_out(score, u > 0, n)

    def next_time(self, i, u, log_p):
        """`far` for the chosen positions, u for the others."""
        n_open = self.task.n_open
        waiting = (u == 0) & ~self.task.cond_mask
        n_moved = (n_open * (i + 1) // self.n_fill).minimum(n_open)  # after this call
        chosen = self.choose(entropy(log_p), waiting, n_moved - n_open + waiting.sum(1))
        return torch.where(chosen, self.far, u)


Commit = partial(OwnPace, far=CERTAIN)  # infinite evidence: the tokens are then as good as given


class Reading(Task):
    """A task in which every draw yields the token that is there, so that `solve` computes what the text costs."""

    def read(self, p, draws, index):
        """Choose the tokens that are there."""
        return self.ids[index]


@torch.no_grad()
def log_likelihood(network, ids, cond_mask, s1, K, calls, choose=spread_out):
    """Compute log P(ids) under `commit` with so many calls and temperature 1 -> log p_d (B, L).

        log P_N(x) = sum over calls n of sum over positions d filled in call n of log p_d(x_d | what is known before n)

    Each position's term, 0 where cond_mask (B, L) is True. There is no bound and no noise: the positions are chosen by
    what is known, and tokens filled in the same call are independent [for masked models: "DUEL", arXiv 2603.01367]. A
    row takes at most one call per open position; then it is the chain rule. choose: which positions to fill, see
    `spread_out`.
    """
    draws = Draws(torch.zeros(*ids.shape, 2, dtype=torch.int32, device=ids.device))  # of the noise, which is drowned out
    task = Reading(network, ids, cond_mask, s1, K, Controls(steps=calls), draws)
    return solve(task, ancestral, partial(Commit, choose=choose))[2].masked_fill(cond_mask, 0.0)


SAMPLERS = {
    "pace": partial(solve, step=ancestral, pace=OwnPace),
    "commit": partial(solve, step=ancestral, pace=Commit),
    "ancestral": partial(solve, step=ancestral, pace=OnePace),
    "sde1": partial(solve, step=sde1, pace=OnePace),
    "sde2": partial(solve, step=sde2, pace=OnePace),
    "ode1": partial(solve, step=ode1, pace=partial(OnePace, start=ODE_START)),
    "ode2": partial(solve, step=ode2, pace=partial(OnePace, start=ODE_START)),
}


def entropy(log_p):
    """-sum_k p_k log p_k in nats: (..., K) -> (...)."""
    return torch.special.entr(log_p.exp()).sum(-1)


def sharpen(p, temperature=1.0, top_p=1.0):
    """Take p^(1 / temperature), normalised, and keep the likeliest tokens that sum to `top_p` -> (..., K)."""
    if temperature != 1:
        log_ratio = (p / p.amax(-1, keepdim=True)).log()  # 0 for the likeliest token, which every temperature keeps
        p = (log_ratio / max(temperature, 1e-6)).softmax(-1)
    if top_p < 1:
        largest, order = p.sort(-1, descending=True)
        kept = largest.cumsum(-1) - largest < max(top_p, 1e-6)  # the token that crosses top_p is kept
        p = torch.zeros_like(p).scatter(-1, order, largest * kept)
        p /= p.sum(-1, keepdim=True)
    return p


def time_grid(n_steps, start=0.0):
    """List even times of the network calls, from `start` (at most a tenth of the first step) to 1 -> n_steps + 1 numbers."""
    times = torch.linspace(0, 1, n_steps + 1, dtype=torch.float64)
    return [min(start, times[1].item() / 10), *times[1:-1].tolist(), 1.0]
