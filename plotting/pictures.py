"""The pictures of plot.py: from numbers to matplotlib figures, one function per picture.

    theta   (..., K)   float32  input distribution
    plan    data.Plan           windows in rows

Call them in `drawing.style`, which sets light or dark colours.
"""

import math
import os
import unicodedata
from functools import partial

import numpy as np
import torch

import bfn
from common import cli
from common.drawing import N_COLOURS, WIDTH, fonts_for, ink, mark_level, new_figure, plain
from common.noise import Draws

if not cli.user_cache_dir()[1]:  # matplotlib's as well
    os.environ.setdefault("MPLCONFIGDIR", os.path.join(cli.user_cache_dir()[0], "matplotlib"))


# ---------------------------------------------------------------- simplex: the flow on three tokens

TOKENS = "ABC"
CORNERS = np.array([[0, 0], [1, 0], [0.5, math.sqrt(3) / 2]])  # of the triangle
CLOUD_TIMES = 0.25, 0.5, 0.75, 1.0  # of the flow's density
CLOUD_POINTS, N_PATHS, PATH_STEPS, CALLS = 1000, 3, 40, 16
AGREE = 0.9  # probability that two positions hold the same token


def to_triangle(theta):
    """Place distributions over three tokens in the triangle: theta (..., 3) -> x, y, both (...)."""
    return np.moveaxis(np.asarray(theta, dtype=float) @ CORNERS, -1, 0)


def flow_paths(ids, n_steps, s1, K, generator):
    """Follow theta through n Bayesian updates: ids (B, L) -> theta (n_steps + 1, B, L, K).

    Step i brings evidence of accuracy a^2 = s1^2 (2i - 1) / n^2; theta is then the flow's at i / n.
    """
    states = [torch.zeros(*ids.shape, K)]
    for i in range(1, n_steps + 1):
        a = torch.tensor(s1 * math.sqrt(2 * i - 1) / n_steps)
        eps = torch.randn(*ids.shape, K, generator=generator)
        states.append(bfn.bayesian_update(states[-1], bfn.sender_sample(ids, a, K, eps)))
    return torch.stack(states).softmax(-1)


class AgreeingPair:
    """The exact network of two positions that mostly hold the same token.

    p_d(k) is proportional to the sum over pairs with x_d = k of P(x) theta_1(x_1) theta_2(x_2). It
    keeps what it was asked and what it answered: `asked` and `answers`, lists of (B, 2, K).
    """

    def __init__(self, K):
        self.P = torch.full((K, K), (1 - AGREE) / (K * K - K)).fill_diagonal_(AGREE / K)
        self.asked, self.answers = [], []

    def __call__(self, theta, t):
        joint = self.P * theta[:, 0, :, None] * theta[:, 1, None, :]  # (B, K, K)
        log_p = torch.stack([joint.sum(2), joint.sum(1)], 1).log().log_softmax(-1)  # (B, 2, K)
        self.asked.append(theta)
        self.answers.append(log_p.exp())
        return log_p


def sample_pair(seed, s1, K):
    """Sample both positions as the paper does -> theta, p: both (CALLS, 2, K), tokens (2,)."""
    network = AgreeingPair(K)
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    controls, draws = bfn.Controls("ancestral", steps=CALLS - 1), Draws.seeded([seed], [2])
    ids, _ = bfn.sample(network, nothing.long(), nothing, s1, K, controls, draws)
    return torch.cat(network.asked), torch.cat(network.answers), ids[0]


def simplex(seed=0):
    """Draw the flow on three tokens: its density, paths of theta, the pull of an exact network."""
    K = len(TOKENS)
    s1 = math.sqrt(K * bfn.auto_beta1(K))
    generator = torch.Generator().manual_seed(seed)
    figure = new_figure(5.6)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.3))
    above.suptitle("The flow of token C: draws of theta (the dot is their mean)", fontsize=10)
    pull = "the arrows lead to the network's answer, which pulls it"
    below.suptitle(f"Theta step by step from the square; {pull}", fontsize=10)
    clouds, paths = above.subplots(1, len(CLOUD_TIMES)), below.subplots(1, 3)
    token = K - 1  # the corner at the top
    for axes, t in zip(clouds, CLOUD_TIMES, strict=True):
        ids = torch.full((1, CLOUD_POINTS), token)
        eps = torch.randn(*ids.shape, K, generator=generator)
        theta = bfn.flow(ids, torch.full(ids.shape, t), s1, K, eps).softmax(-1)[0]
        frame(axes, f"t = {t:g}")
        axes.scatter(*to_triangle(theta), s=3, alpha=0.25, linewidths=0, rasterized=True)
        axes.plot(*to_triangle(theta.mean(0)), "o", color="C1", markersize=5)
    ids = torch.full((N_PATHS, 1), token)
    frame(paths[0], f"{N_PATHS} paths of the flow of C")
    for path in flow_paths(ids, PATH_STEPS, s1, K, generator)[:, :, 0].unbind(1):
        paths[0].plot(*to_triangle(path), linewidth=1.1)
    mark_prior(paths[0])
    theta, p, tokens = sample_pair(seed, s1, K)
    arrows = dict(angles="xy", scale_units="xy", scale=1, width=0.006, color="C1", alpha=0.7)
    for d, axes in enumerate(paths[1:]):
        frame(axes, f"position {d + 1} of two that agree: {TOKENS[tokens[d]]}")
        begin, end = to_triangle(theta[:, d]), to_triangle(p[:, d])
        axes.quiver(*begin, *(end - begin), **arrows)
        axes.plot(*begin, "o-", color="C0", markersize=3, linewidth=1.4)
        mark_prior(axes)
    return figure


def frame(axes, title):
    """Draw the triangle with the tokens at its corners."""
    axes.plot(*CORNERS[[0, 1, 2, 0]].T, color=ink(0.4), linewidth=1)
    for (x, y), name in zip(CORNERS, TOKENS, strict=True):
        offset, va = ((0, 4), "bottom") if y else ((0, -4), "top")
        axes.annotate(name, (x, y), xytext=offset, textcoords="offset points", ha="center", va=va)
    axes.set(aspect="equal", xlim=(-0.08, 1.08), ylim=(-0.14, 1.0))
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def mark_prior(axes):
    """Mark where all paths begin, the uniform distribution."""
    axes.plot(*to_triangle(np.full(3, 1 / 3)), "s", color=ink(), markersize=5, zorder=3)


# ---------------------------------------------------------------- beta: how much the evidence tells

VOCABULARIES = 2, 27, 256, 4096, 32_000
ACCURACY = 0.955  # at t = 1, of beta(1) = auto
PUBLISHED = [  # K, beta(1), where, offset of the label in points
    (27, 0.75**2, "text8", (-22, -13)),
    (2, 3.0, "MNIST,\npaper", (14, -24)),
    (2, 9.0, "MNIST,\ncode", (10, 8)),
]  # [Graves et al. 2023; its code sets the root of beta(1)]


def beta(more=()):
    """Draw how often the noisy view names the token: over t, and at t = 1 over beta(1).

    more: further beta(1) to draw.
    """
    figure = new_figure(4.4)
    by_time, by_beta = figure.subplots(1, 2, sharey=True)
    t, betas = np.linspace(0, 1, 101), np.geomspace(1e-4, 40, 121)
    for i, K in enumerate(VOCABULARIES):
        auto, colour = bfn.auto_beta1(K), f"C{i}"
        label = f"K = {K:,}: beta(1) = {auto:.3g}"
        by_time.plot(t, accuracies(K, auto * t**2), color=colour, label=label, linewidth=1.8)
        for b in more:
            by_time.plot(t, accuracies(K, b * t**2), "--", color=colour, linewidth=1.2)
        by_beta.plot(betas, accuracies(K, betas), color=colour, linewidth=1.8)
        by_beta.plot(auto, accuracies(K, [auto])[0], "o", color=colour, markersize=6)
    for K, beta1, where, offset in PUBLISHED:
        (y,) = accuracies(K, [beta1])
        by_beta.plot(beta1, y, "*", color=ink(), markersize=9, zorder=3)
        look = dict(ha="center", fontsize=8, color=f"C{VOCABULARIES.index(K)}")
        by_beta.annotate(where, (beta1, y), xytext=offset, textcoords="offset points", **look)
    for beta1 in more:
        by_beta.axvline(beta1, color=ink(0.6), linestyle="--", linewidth=1)
    for axes in (by_time, by_beta):
        mark_level(axes, ACCURACY, f"{ACCURACY:.1%} at t = 1")
        axes.grid()
    others = f"; dashed: beta(1) = {', '.join(f'{b:g}' for b in more)}" if more else ""
    by_time.set(xlabel="t", ylabel="the evidence names the token", ylim=(0, 1.16))
    by_time.set_title(f"beta(1) = auto{others}")
    by_time.yaxis.set_major_formatter("{x:.0%}")
    name_lines(figure, by_time, "outside lower center")
    by_beta.set(xscale="log", xlabel="beta(1)", xlim=(1e-4, 40))
    by_beta.set_title("at t = 1: dots are auto, stars are published")
    return figure


def accuracies(K, betas):
    """Compute how often the evidence names the token at each beta(t) -> list."""
    return [bfn.evidence_accuracy(math.sqrt(K * b), K) for b in betas]


# ---------------------------------------------------------------- run: the course of a training

PANELS = [  # title, unit, name in metrics.jsonl
    ("training loss", "nats per token", "loss"),
    ("bound", "bits per character", "val_bits_per_char"),
    ("exact likelihood", "bits per character", "val_exact_bits_per_char"),
    ("learning rate", "", "learning_rate"),
    ("gradient norm", "", "grad_norm"),
    ("speed", "tokens per second", "tokens_per_s"),
]


def history(metrics, key):
    """Pick a figure from the lines of metrics.jsonl -> its steps and values, both lists."""
    lines = [line for line in metrics if key in line]
    return [line["step"] for line in lines], [line[key] for line in lines]


def training(histories):
    """Draw the PANELS of runs by step: {run: lines of its metrics.jsonl}."""
    legend_height = 0.19 * math.ceil(len(histories) / legend_columns(histories))  # about, in inches
    figure = new_figure(5.0 + legend_height)
    for axes, (title, unit, key) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        lines = {name: history(metrics, key) for name, metrics in histories.items()}
        draw_lines(axes, lines, title, unit)
    name_lines(figure, axes)
    return figure


def draw_lines(axes, lines, title, unit, x_label="step"):
    """Draw {label: (x, y)} from 0 on, with looks that differ."""
    for i, (label, (x, y)) in enumerate(lines.items()):
        dashes = "- -- : -.".split()[i // N_COLOURS % 4]
        look = dict(color=f"C{i % N_COLOURS}", linestyle=dashes, linewidth=1.5)
        axes.plot(x, y, marker="." if len(x) < 20 else None, label=plain(label), **look)
    axes.set(title=title, xlabel=x_label, ylabel=unit, ylim=(0, None))
    axes.grid()


def legend_columns(names):
    """Choose in how many columns a legend as wide as the figure names lines -> 1, 2 or 3."""
    longest = max(map(n_columns, names), default=0)
    return max(1, min(3, len(names), int(WIDTH / (0.6 + 0.08 * longest))))


def name_lines(figure, axes, place="outside upper center"):
    """Put one legend of the lines of `axes` above or below all panels of a figure."""
    lines = axes.get_lines()  # matplotlib's own list leaves out those named "_name"
    handles = [line for line in lines if not line.get_label().startswith("_child")]
    labels = [line.get_label() for line in handles]
    labels = [x if len(x) < 90 else f"{x[:40]} ... {x[-40:]}" for x in labels]
    figure.legend(handles, labels, loc=place, ncols=legend_columns(labels))


# ---------------------------------------------------------------- packing: examples in rows


def packing(rows, title):
    """Draw {title: segment_ids (rows, L)} as bars of segments."""
    from matplotlib.colors import ListedColormap

    colours = ListedColormap([ink(0.07), "C0", "C1", "C2"])
    figure = new_figure(4.2)
    figure.suptitle(plain(title), fontsize=10)
    for axes, (name, segment_ids) in zip(figure.subplots(1, len(rows)), rows.items(), strict=True):
        colour = np.where(segment_ids > 0, 1 + (segment_ids - 1) % 3, 0)  # neighbours differ
        axes.imshow(colour, cmap=colours, vmin=0, vmax=3, aspect="auto", interpolation="nearest")
        for row in range(1, len(segment_ids)):
            axes.axhline(row - 0.5, color=ink(0), linewidth=1.2)
        axes.set(title=name, xlabel="position", ylabel="row")
    return figure


# ---------------------------------------------------------------- sampling: a text at each call

HOLD_SECONDS, FRAME_SECONDS = 2.0, 0.17
CHARACTER_WIDTH = 0.602 * 10 / 72  # inches, of the font of fixed width in 10 points


def certainty(texts, title):
    """Draw how certain each position is at each call: [(tokens, certainty (calls, L))]."""
    longest = max(len(tokens) for tokens, _ in texts)
    width = min(max(5, 1.6 + 0.22 * longest), 16)
    figure = new_figure(0.8 + 3.0 * len(texts), width)
    all_axes = figure.subplots(len(texts), 1, squeeze=False)[:, 0]
    look = dict(vmin=0, vmax=1, aspect="auto", interpolation="nearest", cmap="viridis")
    for axes, (tokens, shares) in zip(all_axes, texts, strict=True):
        image = axes.imshow(shares, **look)
        axes.set_xticks(range(len(tokens)), list(map(plain, tokens)), rotation=90, fontsize=8)
        axes.set_yticks(range(0, len(shares), max(1, len(shares) // 8)))
        axes.set_yticklabels(1 + int(i) for i in axes.get_yticks())
        axes.set(ylabel="network call")
    all_axes[0].set_title(plain(title))
    figure.colorbar(image, ax=list(all_axes), label="probability of the likeliest token")
    return figure


def emerging(frames, title):
    """Draw texts that emerge from noise -> list of images. Uncertain tokens are pale.

    frames[i][row] = [(text of a token, certainty in [0, 1]), ...].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    lines = ["".join(text for text, _ in row) for frame in frames for row in frame]
    fonts = fonts_for({*title, *"".join(lines)}, "monospace")
    n_rows = len(frames[0])
    text_width = CHARACTER_WIDTH * max(map(n_columns, lines)) + 0.3
    size = 0.24 * n_rows + 0.5, max(text_width, 0.065 * len(title) + 1.5)
    look = dict(va="top", fontsize=8, color=ink(0.6), family=["sans-serif", *fonts[1:]])
    images = []
    for i, texts in enumerate(frames, 1):
        figure = new_figure(*size)
        figure.set_layout_engine("none")
        figure.text(0.02, 0.97, plain(f"{title}, call {i} of {len(frames)}"), **look)
        for j, row in enumerate(texts):
            draw_row(figure, row, 0.97 - (j + 1.9) / (n_rows + 1.6), fonts)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    return images


def n_columns(text):
    """Count the columns of a text in a font of fixed width: letters of East Asia take two."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def draw_row(figure, row, y, fonts):
    """Draw the tokens of one text from left to right in fonts of fixed width."""
    column = -int(row[0][0].startswith(" "))  # a line of a longer text
    width = CHARACTER_WIDTH / figure.get_size_inches()[0]  # as a share of the figure
    for text, certainty in row:
        colour = ink(0.12 + 0.88 * (1 - (1 - certainty) ** 0.7))
        look = dict(va="baseline", family=fonts, fontsize=10, color=colour)
        figure.text(0.02 + column * width, y, plain(text), **look)
        column += n_columns(text)


def save_gif(path, images, comment):
    """Join images to an animation that repeats and holds the last one."""
    milliseconds = [int(1000 * FRAME_SECONDS)] * (len(images) - 1) + [int(1000 * HOLD_SECONDS)]
    few = [image.quantize(16) for image in images]  # colours: shades of one ink
    options = dict(duration=milliseconds, loop=0, comment=comment.encode())
    few[0].save(path, "GIF", save_all=True, append_images=few[1:], **options)


# ---------------------------------------------------------------- quality: of texts, of samples

DISTANCE, DIVERSITY = "n-gram divergence (bits)", "word entropy (bits)"  # of evaluation/quality.py
MODELS = {"base": "this code", "masked": "masked diffusion"}  # variants of experiments.compare


def quality_figure(exact, results, title, by_time=(), training=()):
    """Draw exact likelihoods and figures of samples over network calls, and losses over time.

    exact: {name: (calls, nats per token, errors, bound)}. results: records of experiments.samplers,
    the first of held-out text, or []. by_time: {name: (t, loss, cross-entropy)}. training: {text:
    records of experiments.compare}; next to these, of `results` only the frontier is drawn.
    """
    panels = {}
    for text in training:
        panels[f"{text}: exact, bits per character"] = partial(draw_learning, training[text])
    if exact:
        panels["exact likelihood (nats per token)"] = partial(draw_exact, exact)
    if by_time:
        panels["loss by time (nats per token)"] = partial(draw_by_time, by_time)
    n_before = len(panels)
    names = list(results[0]["figures"]) if results else []
    for name in names if not training else ():
        panels[name] = partial(draw_by_calls, results, name)
    if len({r["temperature"] for r in results}) > 1 and DISTANCE in names:
        panels["frontier: n-gram divergence"] = partial(draw_frontier, results)
    n_columns = 2 if len(panels) == 4 else min(3, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    figure = new_figure(0.9 + 2.6 * n_rows, width=WIDTH if n_columns > 1 else 5.5)
    figure.suptitle(plain(title), fontsize=10)
    all_axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axes in all_axes[len(panels) :]:
        axes.axis("off")
    for axes, (name, draw) in zip(all_axes, panels.items(), strict=False):
        axes.set_title(plain(name))
        draw(axes)
        axes.grid()
    if n_before < len(panels):
        name_lines(figure, all_axes[n_before], "outside lower center")
    return figure


def draw_learning(records, axes):
    """Draw exact likelihoods over tokens of training, and as stars bounds of runs without these."""
    by_name = {}
    for r in sorted(records, key=lambda r: r["curve"][0][3] is None):  # stars have no colour
        by_name.setdefault(r["name"], []).append(zip(*r["curve"], strict=True))
    for i, (name, curves) in enumerate(by_name.items()):
        label = plain(MODELS.get(name, name))
        for _, n_tokens, bound, exact in curves:
            if exact[0] is None:
                axes.plot(n_tokens, bound, "*", color=ink(), markersize=9, label=label)
            else:
                axes.plot(n_tokens, exact, "o-", color=f"C{i}", markersize=3, label=label)
            label = None  # once for all runs of a name
    log_axis(axes, "tokens of training")
    axes.legend(fontsize=7)


def draw_frontier(results, axes):
    """Draw the distance of samples from text over their diversity, by sampler and calls.

    Larger points are higher temperatures. The number at a line is its network calls.
    """
    real, *points = ([r["figures"][name][0] for name in (DIVERSITY, DISTANCE)] for r in results)
    lines = {}
    for r, point in zip(results[1:], points, strict=True):
        by_calls = lines.setdefault(r["sampler"], {})
        by_calls.setdefault(r["calls"], []).append((r["temperature"], *point))
    for i, (label, by_calls) in enumerate(lines.items()):
        for calls, points in by_calls.items():
            temperatures, x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, color=f"C{i}", linewidth=1.2, label=label)
            axes.scatter(x, y, [20 * T**2 for T in temperatures], color=f"C{i}")
            axes.annotate(calls, (x[-1], y[-1]), (3, 3), textcoords="offset points", fontsize=7)
            label = None
    axes.plot(*real, "*", color=ink(), markersize=10, label="held-out text")
    axes.set(xlabel=DIVERSITY)


def draw_exact(exact, axes):
    """Draw exact likelihoods over calls, and the bounds as dashed lines, see `quality_figure`."""
    for i, (name, (calls, nats, errors, bound)) in enumerate(exact.items()):
        look = dict(fmt="o-", color=f"C{i}", markersize=4, capsize=3)
        axes.errorbar(calls, nats, errors, label=plain(f"exact, {name}"), **look)
        look = dict(color=f"C{i}", linestyle="--", linewidth=1)
        axes.axhline(bound, label=plain(f"bound, {name}"), **look)
    log_axis(axes)
    axes.legend(fontsize=8)


def draw_by_time(by_time, axes):
    """Draw losses over time, and the output's cross-entropy as dashed lines."""
    for i, (name, (t, loss, cross_entropy)) in enumerate(by_time.items()):
        axes.plot(t, loss, color=f"C{i}", label=plain(f"loss, {name}"))
        label = plain(f"cross-entropy, {name}")
        axes.plot(t, cross_entropy, color=f"C{i}", linestyle="--", label=label)
    axes.set(xlabel="t")
    axes.legend(fontsize=8)


def log_axis(axes, label="network calls"):
    """Show network calls, or what the label says, on a logarithmic axis with plain numbers."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes.set(xscale="log", xlabel=label)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_by_calls(results, figure_name, axes):
    """Draw a figure over calls with its interval, by sampler, at temperature 1."""
    held_out, *sampled = results
    points = {}
    for r in sampled:
        if r["temperature"] == 1:
            point = r["calls_per_text"], *r["figures"][figure_name]
            points.setdefault(r["sampler"], []).append(point)
    for sampler, rows in points.items():
        calls, value, low, high = zip(*sorted(rows), strict=True)
        axes.plot(calls, value, marker=".", label=sampler, linewidth=1.5)
        axes.fill_between(calls, low, high, alpha=0.15, linewidth=0)
    mark_level(axes, held_out["figures"][figure_name][0], held_out["sampler"])
    log_axis(axes)
    if figure_name.endswith("perplexity"):
        axes.set(yscale="log")
