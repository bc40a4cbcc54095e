"""Measure a trained model: the bound on the likelihood of a text with its errors, and the quality of samples.

    python evaluate.py -mdir=RUN_DIR -d=TEXT.txt

The text is cut into N windows, and noise and a time are drawn for each of them R times:

    t      (R, N)  time of a window in a draw
    loss   (R, N)  nats, summed over the window's scored tokens: integrand of L_inf, or of L_n
    n      (N,)    scored tokens of a window: all but bos and what --given gives
"""

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import bfn
import cli
import data
import plot
import quality
from model import load, rows_at_once
from prompts import make_template
from sample import Options, decode, generate

MOST_DRAWS = 64
TIME_BINS = 50
FIGURES = ("t", "loss", "cross_entropy", "reconstruction", "n")
UNKNOWN_BITS = 9  # to spell a byte that the tokenizer does not know: the byte, and whether another one follows


# ---------------------------------------------------------------- draws


def nothing_given(segment_ids):
    return np.zeros_like(segment_ids, dtype=bool)


def parse_given(text):
    """ "prefix:0.5" or "around:0.2" -> function from segment_ids (B, L) to the mask of what is given (B, L).

    prefix:S gives the first share S of every window; around:S gives all but a gap of share S in the middle.
    """
    kind, _, share = text.partition(":")
    if kind not in ("prefix", "around"):
        raise argparse.ArgumentTypeError(f"{text!r}: write prefix:SHARE or around:SHARE")
    share = cli.share(share)

    def prefix(segment_ids):
        position, size = data.places(segment_ids)
        return position < np.round(share * size)

    def around(segment_ids):
        position, size = data.places(segment_ids)
        gap = np.maximum(1, np.round(share * size))
        begin = (size - gap) // 2
        return (position < begin) | (position >= begin + gap)

    return prefix if kind == "prefix" else around


@dataclass
class Scores:
    """R draws for N windows of a text."""

    t: np.ndarray  # (R, N)
    loss: np.ndarray  # (R, N)
    cross_entropy: np.ndarray  # (R, N) of the output at t, nats
    reconstruction: np.ndarray  # (R, N)
    n: np.ndarray  # (N,)
    document: np.ndarray  # (N,) which document of the text a window belongs to
    n_steps: int | None  # None for the continuous-time loss

    @property
    def nats_per_token(self):
        """L_inf (or L_n) and L_rec, nats per scored token."""
        return self.loss.mean(0).sum() / self.n.sum(), self.reconstruction.mean(0).sum() / self.n.sum()

    def by_time(self, n_bins=TIME_BINS):
        """Loss and cross-entropy per token by time -> which bin each draw is in (R, N), two curves (n_bins,).

        A curve is nan where no draw fell.
        """
        n_bins = min(n_bins, self.n_steps or n_bins)
        at = np.minimum((self.t * n_bins + 1e-4).astype(int), n_bins - 1)  # steps of L_n lie on the bins' edges
        n = np.bincount(at.ravel(), np.broadcast_to(self.n, at.shape).ravel(), n_bins)
        with np.errstate(invalid="ignore"):
            return at, *(np.bincount(at.ravel(), x.ravel(), n_bins) / n for x in (self.loss, self.cross_entropy))

    def residuals(self):
        """Losses without what the mean curve over t explains -> (R, N), factor that corrects their variance for the fit.

        Times are spread evenly, so what t alone decides is no error. Few draws get few bins.
        """
        n_draws = self.loss.size
        n_bins = int(np.clip(n_draws // 20, 1, TIME_BINS))
        at, curve, _ = self.by_time(n_bins)
        return self.loss - self.n * np.nan_to_num(curve)[at], n_draws / max(1, n_draws - len(curve))

    def monte_carlo_variance(self):
        """Variance of the text's total bound over noise and times, given the text, nats^2. nan for one draw."""
        if len(self.loss) < 2:
            return math.nan
        residual, correction = self.residuals()
        spread = correction * residual.var(0, ddof=1) + self.reconstruction.var(0, ddof=1)
        return spread.sum() / len(self.loss)

    def monte_carlo_error(self):
        """Standard error of the bound from noise and times, nats per token."""
        return math.sqrt(self.monte_carlo_variance()) / self.n.sum()

    def text_error(self):
        """Standard error from the choice of text, nats per token, by documents -> (error, number of them).

        A text of one document is taken window by window. The Monte-Carlo variance is subtracted; nan where nothing is
        left, or where there is one window.
        """
        excess = self.residuals()[0].mean(0) + self.reconstruction.mean(0) - self.n * self.nats_per_token[1]
        several = len(np.unique(self.document[self.n > 0])) > 1
        cluster = self.document if several else np.arange(len(self.n))
        excess = np.bincount(cluster, excess)[np.bincount(cluster, self.n) > 0]
        many = len(excess)
        if many < 2:
            return math.nan, many
        variance = np.square(excess).sum() * many / (many - 1) - np.nan_to_num(self.monte_carlo_variance())
        return (math.sqrt(variance) / self.n.sum() if variance > 0 else math.nan), many


def score(
    model, tokens, window, bos_id, device, *, error=None, n_draws=2, n_steps=None, given=nothing_given, seed=0,
    max_tokens=None, batch_size=None, progress=False,
):  # fmt: skip
    """Estimate the bound of a text: `n_draws` draws, or as many as an `error` in nats per token takes -> Scores.

    model is any callable (theta, t, segment_ids) -> logits whose `config` has K, s1 and d_model. Every token of the text
    is in one window; `max_tokens` looks at that many alone, in windows from all over the text. `batch_size` rows are read
    at a time, as many as `rows_at_once` says if it is None; it changes nothing but rounding.
    """
    plan = data.plan_validation(tokens, window)
    n_rows = min(plan.n_rows, -(-max_tokens // window)) if max_tokens else plan.n_rows
    n_windows = int(plan.row_starts[n_rows])
    document = np.searchsorted(tokens.offsets, plan.starts[:n_windows], side="right") - 1
    draws, wanted = [], 2 if error else n_draws
    at_once = batch_size or rows_at_once(window, model.config, device)
    batches = [range(i, min(i + at_once, n_rows)) for i in range(0, n_rows, at_once)]
    with tqdm(total=wanted * len(batches), unit="batch", desc="evaluating", disable=None if progress else True) as bar:
        while len(draws) < wanted:
            draw = {name: np.zeros(n_windows) for name in FIGURES}
            draw_seed = bfn.mix_seed(seed, "evaluate", len(draws))
            for rows in batches:
                part = score_rows(model, tokens, plan, rows, window, bos_id, device, n_steps, given, draw_seed)
                for name in FIGURES:
                    draw[name][plan.row_starts[rows[0]] : plan.row_starts[rows[-1] + 1]] = part[name]
                bar.update()
            draws.append(draw)
            stacked = {name: np.stack([draw[name] for draw in draws]) for name in FIGURES}
            n = stacked.pop("n")[0]
            if n.sum() == 0:
                raise ValueError("nothing of this text is left to score: give less of it")
            stacked["t"] /= np.maximum(1, n)
            scores = Scores(**stacked, n=n, document=document, n_steps=n_steps)
            if error and len(draws) == wanted and scores.monte_carlo_error() > error:
                more = math.ceil(wanted * (scores.monte_carlo_error() / error) ** 2)
                wanted = min(MOST_DRAWS, max(wanted + 1, more))
                bar.total = wanted * len(batches)
    if error and scores.monte_carlo_error() > error:
        print(f"the error is {scores.monte_carlo_error():.4f} after {wanted} draws, not {error}", file=sys.stderr)
    return scores


@torch.no_grad()
def score_rows(model, tokens, plan, rows, window, bos_id, device, n_steps, given, seed):
    """One draw for a range of rows -> {figure: sums over the scored tokens of each of their windows}.

    Window w takes t = frac(u + w * golden ratio), with one u for the whole text: the times of a draw are spread evenly.
    The noise of a row is its own, so what is read beside it changes nothing.
    """
    K, s1 = model.config.K, model.config.s1
    ids, segment_ids = data.gather_rows(tokens, plan, np.asarray(rows), window)
    cond_mask = ((ids == bos_id) | given(segment_ids)) & (segment_ids > 0)
    scored = (segment_ids > 0) & ~cond_mask
    first = plan.row_starts[rows[0]]
    at = plan.row_starts[np.asarray(rows)][:, None] + segment_ids - 1  # window of each position
    t = torch.from_numpy(((seed / 2**63 + at * data.GOLDEN) % 1).astype(np.float32)).to(device)
    ids, segment_ids, cond_mask = (torch.from_numpy(x).to(device) for x in (ids, segment_ids, cond_mask))
    network = partial(model, segment_ids=segment_ids)
    draws = bfn.Draws.seeded([bfn.mix_seed(seed, row) for row in rows], [window] * len(rows), device)
    if n_steps:
        i = (t * n_steps).long().clamp(max=n_steps - 1) + 1
        t = (i - 1) / n_steps
    logits = bfn.predict(network, bfn.flow(ids, t, s1, K, draws.normal(K)).softmax(-1), t, ids, cond_mask)
    if n_steps:
        loss = bfn.n_step_error(logits, ids, i, n_steps, s1, draws.normal(K))
    else:
        loss = bfn.squared_error_loss(logits, ids, t, s1)
    figures = dict(
        t=t,
        loss=loss,
        cross_entropy=bfn.cross_entropy(logits, ids),
        reconstruction=bfn.reconstruction_loss(network, ids, cond_mask, s1, K, draws.normal(K)),
        n=torch.ones_like(t),
    )
    n_windows = plan.row_starts[rows[-1] + 1] - first
    at = (at - first)[scored]
    return {name: np.bincount(at, x.cpu().double().numpy()[scored], n_windows) for name, x in figures.items()}


# ---------------------------------------------------------------- figures


def likelihood(scores, tokens, bos_id, conditional=False):
    """Figures of a scored text, units in their names -> dict. Those per character and byte are of the raw text.

    Text that the tokenizer does not know costs UNKNOWN_BITS a byte besides, taken to be spread evenly over the text. There
    are no figures per character where part of the text was given. Where not all windows were scored, tokens per character
    are those of the whole text.
    """
    diffusion, reconstruction = scores.nats_per_token
    n_scored = int(tokens.offsets[-1]) - (bos_id >= 0) * len(tokens.lengths)
    spelling = UNKNOWN_BITS * math.log(2) * tokens.n_unknown_bytes / n_scored
    bound = diffusion + reconstruction + spelling
    text_error, n_clusters = scores.text_error()
    figures = {f"L_{scores.n_steps or 'inf'}_nats_per_token": diffusion} | dict(
        L_rec_nats_per_token=reconstruction,
        unknown_nats_per_token=spelling,
        bound_nats_per_token=bound,
        bound_bits_per_token=bound / math.log(2),
        monte_carlo_error_nats_per_token=scores.monte_carlo_error(),
        text_error_nats_per_token=text_error,
        perplexity_per_token=math.exp(min(bound, 700.0)),
    )
    if not conditional:
        figures |= dict(
            bits_per_char=bound / math.log(2) * n_scored / tokens.n_chars,
            bits_per_byte=bound / math.log(2) * n_scored / tokens.n_bytes,
        )
    counts = dict(n_tokens_scored=int(scores.n.sum()), n_clusters=n_clusters, n_draws=len(scores.loss))
    return {name: float(value) for name, value in figures.items()} | counts  # checkpoints hold plain types alone


def table(figures, n_steps):
    """Likelihood figures as lines of text."""
    per = {"nats/token": 1.0, "bits/token": 1 / math.log(2)}
    if "bits_per_char" in figures:
        per["bits/char"] = figures["bits_per_char"] / figures["bound_nats_per_token"]
        per["bits/byte"] = figures["bits_per_byte"] / figures["bound_nats_per_token"]
    rows = {f"L_{n_steps or 'inf'}": f"L_{n_steps or 'inf'}_nats_per_token", "L_rec": "L_rec_nats_per_token"}
    rows |= {"unknown text": "unknown_nats_per_token"} if figures["unknown_nats_per_token"] else {}
    rows |= {"bound": "bound_nats_per_token", "  +- noise, times": "monte_carlo_error_nats_per_token"}
    rows |= {"  +- choice of text": "text_error_nats_per_token"}
    lines = [" " * 20 + "".join(f"{name:>12}" for name in per)]
    lines += [f"{row:20}" + "".join(f"{figures[name] * x:12.4f}" for x in per.values()) for row, name in rows.items()]
    return [*lines, f"perplexity per token {figures['perplexity_per_token']:.2f}"]


def write_by_time(scores, path, title):
    """Write the loss and the output's cross-entropy by time as PATH.csv and PATH.png."""
    _, loss, cross_entropy = scores.by_time()
    t = (np.arange(len(loss)) + 0.5 * (scores.n_steps is None)) / len(loss)
    t, loss, cross_entropy = (x[~np.isnan(loss)] for x in (t, loss, cross_entropy))
    lines = ["t,loss_nats_per_token,cross_entropy_nats_per_token"]
    lines += [f"{a:.4f},{b:.6f},{c:.6f}" for a, b, c in zip(t, loss, cross_entropy, strict=True)]
    Path(f"{path}.csv").write_text("\n".join(lines) + "\n")
    name = f"loss (its mean is L_{scores.n_steps or 'inf'})"
    plot.lines(
        f"{path}.png", {name: (t, loss), "cross-entropy of the output": (t, cross_entropy)}, "t", "nats per token", title
    )


def lossy_share(path, tokenizer, n_lines=1000):
    """Share of a text's first pieces that the tokenizer does not give back unchanged."""
    texts = [piece.text for piece, _ in zip(data.read_pieces(path), range(n_lines))]
    known = [text for text in texts if tokenizer.unk_id() not in tokenizer.encode(text)]
    return sum(tokenizer.decode(tokenizer.encode(text)) != text for text in known) / max(1, len(known))


# ---------------------------------------------------------------- samples


def find_corpus(args, run):
    """The training text that samples are held against, and which part of it was trained on. Raises ValueError."""
    corpus = args.corpus or run["args"]["data_path"] or Path(args.model_dir) / "corpus.txt"
    if not os.path.isfile(corpus):
        raise ValueError(
            f"samples are held against the training text, which is not at {corpus}: say where it is with --corpus"
        )
    return corpus, "all" if run["args"]["val_path"] else "train"


def choose_texts(tokens, tokenizer, window, n, seed):
    """Choose windows of a text at random -> up to n texts, their lengths in tokens."""
    plan = data.plan_validation(tokens, window)
    long_enough = np.flatnonzero(plan.lengths > 1)
    if not len(long_enough):
        raise ValueError("no window of this text has two tokens, to sample as many: give another text")
    chosen = np.random.default_rng(seed).permutation(long_enough)[:n]
    lengths = plan.lengths[chosen].tolist()
    spans = zip(plan.starts[chosen].tolist(), lengths, strict=True)
    return [decode(tokenizer, tokens.ids[start : start + m].tolist()) for start, m in spans], lengths


def sample_quality(model, tokenizer, run, tokens, reference, args):
    """Hold generated texts against windows of the text, as many and as long -> {name: {figure: (value, low, high)}}."""
    real, lengths = choose_texts(tokens, tokenizer, run["args"]["sequence_length"], args.samples, args.seed)
    templates = [make_template("", tokenizer, run, bfn.mix_seed(args.seed, i), n) for i, n in enumerate(lengths)]
    samples = generate(model, tokenizer, templates, args.seed, Options(args.solver, args.steps, args.corrections))
    samples = list(tqdm(samples, total=len(templates), unit="sample", desc="sampling", disable=None))
    generated = [decode(tokenizer, ids) for ids, _ in samples]
    calls = sum(n for _, n in samples) / len(samples)
    return {
        f"{len(real)} samples, {calls:.4g} calls": quality.figures(generated, reference, args.seed),
        f"{len(real)} real texts": quality.figures(real, reference, args.seed),
    }


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("-mdir", "--model_dir", default="runs/demo", help="run folder (runs/demo)")
    add("-d", "--data_path", required=True, help="text file, one example a line")
    add("--checkpoint", choices=["best", "last"], default="best", help="best by validation, or last (best)")
    add("--ema", type=int, default=-1, help="which of the averages to measure, counted from 0 (-1: the last)")
    add("--window", type=cli.count, help="tokens scored together (the training's sequence length)")
    add("--se", type=cli.positive, default=0.005, help="Monte-Carlo error to reach, nats per token (0.005)")
    add("--n_steps", type=cli.count, help="the discrete-time bound for N steps in place of the continuous one")
    add(
        "--given",
        type=parse_given,
        default=nothing_given,
        help="score the rest, given prefix:SHARE of each window, or all around:SHARE in its middle",
    )
    add("--max_tokens", type=cli.count, help="look at this many tokens of the text (all)")
    add("-bsz", "--batch_size", type=cli.count, help="rows at a time (by the sizes of the model)")
    add("--by_time", metavar="PATH", help="write the loss by time to PATH.csv and PATH.png")
    add("--samples", type=cli.natural, default=0, help="also judge this many generated texts (0)")
    add("--solver", choices=["commit", *bfn.SOLVERS], default=Options.solver, help=f"for --samples ({Options.solver})")
    add("--steps", type=cli.count, default=Options.steps, help=f"sampling steps for --samples ({Options.steps})")
    add("--corrections", type=cli.natural, default=Options.corrections, help=f"of commit ({Options.corrections})")
    add("--corpus", help="training text that --samples are held against (the one trained on)")
    add("--json", action="store_true", help="print one JSON object in place of the tables")
    add("--seed", type=cli.natural, default=0, help="of everything random (0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    add("--cache_dir", default=data.default_cache_dir(), help="folder for tokenised corpora (%(default)s)")
    return p


def main():
    args = flags().parse_args()
    device = cli.device(args.device)
    model, tokenizer, run = load(args.model_dir, args.checkpoint, device, args.ema)
    if args.samples:  # what is wrong with the training text shows before an hour's work
        corpus, part = find_corpus(args, run)
        reference = quality.Reference.fit(corpus, tokenizer, part)
    if args.by_time:
        Path(args.by_time).parent.mkdir(parents=True, exist_ok=True)
    tokens = data.load_corpus(args.data_path, Path(args.model_dir) / "tokenizer.model", args.cache_dir)
    if lossy := lossy_share(args.data_path, tokenizer):
        print(
            f"the tokenizer changes {lossy:.1%} of the lines (spaces, letter forms): figures per character and byte are of "
            "the changed text's tokens",
            file=sys.stderr,
        )
    window, bos_id = args.window or run["args"]["sequence_length"], tokenizer.bos_id()
    options = dict(error=args.se, n_steps=args.n_steps, given=args.given, seed=args.seed, max_tokens=args.max_tokens)
    scores = score(model, tokens, window, bos_id, device, **options, batch_size=args.batch_size, progress=True)
    figures = likelihood(scores, tokens, bos_id, conditional=args.given is not nothing_given)
    if args.by_time:
        write_by_time(scores, args.by_time, f"{args.model_dir}, step {run['step']}")
    if not args.json:
        print(
            f"{args.data_path}: {len(tokens.lengths):,} documents, {len(tokens.ids):,} tokens, {tokens.n_chars:,} characters; "
            f"{figures['n_tokens_scored']:,} tokens scored in windows of {window}, {figures['n_draws']} draws"
        )
        print("\n".join(table(figures, args.n_steps)))
    judged = sample_quality(model, tokenizer, run, tokens, reference, args) if args.samples else {}
    if args.json:
        figures = {name: None if math.isnan(value) else value for name, value in figures.items()}  # JSON knows no nan
        print(json.dumps({**figures, **({"samples": judged} if judged else {})}))
    elif judged:
        print("\n".join(quality.table(judged)))


if __name__ == "__main__":
    cli.run(main)
