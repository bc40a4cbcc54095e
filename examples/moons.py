"""Train a small network with the flow of continuous.py on two moons, points along half circles.

    python -m examples.moons
"""

import math
from functools import partial
from pathlib import Path

from common import cli  # isort: skip - first, because of Ctrl-C
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common import drawing
from examples import continuous as c
from model import MLP, FiLM, TimeEmbedding

NOISE = 0.1  # standard deviation of the points around their half circle
SIGMA1 = 0.02


class Network(nn.Module):
    """A small MLP with FiLM for the time: mu (B, D), t (B, 1) -> eps. Untrained, x_hat = mu."""

    def __init__(self, D, sigma1, d_model=64, n_layers=3, d_time=32):
        super().__init__()
        self.sigma1 = sigma1
        self.linear_in, self.time = nn.Linear(D, d_model), TimeEmbedding(d_time)
        self.films = nn.ModuleList(FiLM(d_model, d_time) for _ in range(n_layers))
        self.mlps = nn.ModuleList(MLP(d_model) for _ in range(n_layers))
        self.film_out, self.linear_out = FiLM(d_model, d_time), nn.Linear(d_model, D)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def forward(self, mu, t):
        h, time = self.linear_in(mu), self.time(t.squeeze(-1))
        for film, mlp in zip(self.films, self.mlps, strict=True):
            h = h + mlp(film(h, time))
        x = self.linear_out(self.film_out(h, time))
        return x + mu / c.beta(t.clamp(min=c.T_MIN), self.sigma1).sqrt()


def half_circles(angle, moon):
    """Points at an angle in [0, pi] on the upper (moon = 0) or lower half circle -> (n, 2)."""
    sign = 1 - 2 * moon
    return np.stack([moon + sign * np.cos(angle), moon / 2 + sign * np.sin(angle)], -1)


def two_moons(n, rng):
    """Draw n points -> (n, 2) float32. rng: a numpy Generator."""
    points = half_circles(rng.uniform(0, np.pi, n), rng.integers(2, size=n))
    points += NOISE * rng.normal(size=(n, 2))
    return torch.from_numpy(points).float()


def two_moons_log_density(x, n_angles=200):
    """Integrate the density of points (n, 2) over the angles -> its logarithm (n,), nats."""
    angle = np.repeat((np.arange(n_angles) + 0.5) * np.pi / n_angles, 2)
    moon = np.tile([0, 1], n_angles)
    square = torch.cdist(x.double(), torch.from_numpy(half_circles(angle, moon))).square()
    log_total = (-square / (2 * NOISE**2)).logsumexp(-1)
    return log_total - math.log(2 * n_angles * 2 * math.pi * NOISE**2)


def train(network, x, max_steps, B=256, learning_rate=3e-3):
    """Train on data x (n, D)."""
    optimizer = torch.optim.Adam(network.parameters())
    for step in (progress := tqdm(range(max_steps), "train")):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / max_steps)
        batch, t = x[torch.randint(len(x), (B,))], torch.rand(B, 1)
        x_hat = c.predict_noisy(network, batch, t, network.sigma1)
        loss = c.squared_error_loss(x_hat, batch, t, network.sigma1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


@torch.no_grad()
def bound(network, x):
    """Estimate L_inf and L_rec of data x (n, D), one draw per row -> two means, nats per row."""
    t = torch.rand(len(x), 1)
    x_hat = c.predict_noisy(network, x, t, network.sigma1)
    L_inf = c.squared_error_loss(x_hat, x, t, network.sigma1)
    return L_inf.mean().item(), c.reconstruction_loss(network, x, network.sigma1).mean().item()


def draw(panels, means):
    """Draw the points of {title: (n, 2)}, and the paths of means (n_steps + 1, n, 2) -> figure."""
    figure = drawing.new_figure(2.5, width=3 * len(panels) + 3)
    *axes, last = figure.subplots(1, len(panels) + 1, sharex=True, sharey=True)
    for ax, (title, x) in zip(axes, panels.items(), strict=True):
        ax.scatter(*x.T, s=2, alpha=0.6, linewidths=0)
        ax.set(title=title, xlim=(-1.7, 2.7), ylim=(-1.3, 1.8), aspect="equal")
    last.plot(*means.unbind(-1), linewidth=0.8, alpha=0.8)
    last.scatter(*means[-1].T, s=12, color="black", zorder=3)
    last.set(title=f"{means.shape[1]} paths of the mean", aspect="equal")
    return figure


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    p.add_argument("--max_steps", type=cli.count, default=3000, help="training steps (3000)")
    p.add_argument("--seed", type=cli.natural, default=0, help="seed of everything random (0)")
    p.add_argument("--output", type=cli.path, default="runs/moons.png",
        help="picture to write (runs/moons.png)")
    return p


def main(argv=None):
    args = flags().parse_args(argv)
    output = Path(args.output)
    drawing.check_output(output, [".png", ".svg"])
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    network = Network(2, SIGMA1)
    train(network, two_moons(100_000, rng), args.max_steps)
    x = two_moons(20_000, rng)
    L_inf, L_rec = np.mean([bound(network, x) for _ in range(10)], axis=0)
    exact = -two_moons_log_density(x).mean().item()
    parts = f"L_inf {L_inf:.2f}, L_rec {L_rec:.2f}"
    print(f"bound {L_inf + L_rec:.2f} nats per point ({parts}), exact {exact:.2f}")
    panels = {"data": x[:2000]}
    for n_steps in (5, 100):
        panels[f"samples, {n_steps} steps"], means = c.sample(network, 2000, 2, n_steps, SIGMA1)
    drawing.save(output, partial(draw, panels, means[:, :8]))
    print(output)


if __name__ == "__main__":
    cli.run(main)
