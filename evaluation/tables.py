"""The figures of evaluate.py, with units in their names, as a table, as JSON and in words."""

import json
import math
import re

import numpy as np

from evaluation import bounds
from evaluation.bounds import clustered_error, n_scorable, unknown_nats_per_token

# ---------------------------------------------------------------- figures


def likelihood_figures(scores, conditional=False):
    """Compute the figures of a scored text, with units in their names -> dict of floats and ints.

    Characters and bytes are those of the raw text; `conditional` leaves out the figures per
    character and byte, which have no meaning if part of the text was given. Unknown text costs
    `bounds.UNKNOWN_BITS` per byte. This, and the tokens per character, are averages over the whole
    text, even if only some windows were scored.
    """
    diffusion, reconstruction = scores.nats_per_token
    tokens = scores.text.tokens
    unknown = unknown_nats_per_token(tokens)
    bound = diffusion + reconstruction + unknown
    bits = bound / math.log(2)
    text_error, n_clusters = scores.text_error()
    figures = {f"L_{scores.n_steps or 'inf'}_nats_per_token": diffusion} | dict(
        L_rec_nats_per_token=reconstruction,
        unknown_nats_per_token=unknown,
        bound_nats_per_token=bound,
        bound_bits_per_token=bits,
        monte_carlo_error_nats_per_token=scores.monte_carlo_error(),
        text_error_nats_per_token=text_error,
        perplexity_per_token=math.exp(min(bound, 700.0)),  # exp(710) overflows
    )
    if not conditional:
        n = n_scorable(tokens)
        figures |= dict(
            bits_per_char=bits * n / tokens.n_chars, bits_per_byte=bits * n / tokens.n_bytes
        )
    figures = {name: float(value) for name, value in figures.items()}  # for checkpoints and JSON
    return figures | dict(
        n_tokens_scored=int(scores.n_scored.sum()), n_clusters=n_clusters, n_draws=len(scores.loss)
    )


def to_key(name):
    """Turn the name of a figure into a key: "exact, 8 calls" -> "exact_8_calls"."""
    return re.sub(r"\W+", "_", name).strip("_")


def exact_figures(text, scores):
    """Compute the figures of `likelihood.score`, in the same units as the bound -> dict of floats.

    text: the Text whose first windows were scored. Names are such as exact_8_calls_nats_per_token.
    """
    document = text.document[: len(scores.n_scored)]
    unknown = unknown_nats_per_token(text.tokens)
    figures = dict(exact_n_tokens_scored=int(scores.n_scored.sum()))
    for name, nats in scores.nats.items():
        mean = float(nats.sum() / scores.n_scored.sum())
        error, _ = clustered_error(nats - mean * scores.n_scored, scores.n_scored, document)
        figures[f"{to_key(name)}_nats_per_token"] = mean + unknown * (not name.startswith("spread"))
        figures[f"{to_key(name)}_text_error_nats_per_token"] = error
    return figures


def describe(path, text, figures):
    """Say in one line how large a text is, and how much of it was scored."""
    tokens = text.tokens
    size = f"{tokens.n_documents:,} documents, {len(tokens.ids):,} tokens"
    scored = f"{figures['n_tokens_scored']:,} tokens scored in windows of {text.row_length}"
    line = f"{path}: {size}, {tokens.n_chars:,} characters; {scored}, {figures['n_draws']} draws"
    if "exact_n_tokens_scored" in figures:
        line += f"; exact likelihoods of {figures['exact_n_tokens_scored']:,} of these"
    return line


def to_json(figures, scores, samples):
    """Write all figures as one JSON object, in which null stands for nan.

    by_time: the mean loss and cross-entropy at each time, nats per token.
    """
    figures = {name: None if math.isnan(value) else value for name, value in figures.items()}
    figures |= dict(share_of_text=scores.share, partial=scores.partial, by_time=by_time(scores))
    return json.dumps(figures | ({"samples": samples} if samples else {}))


def by_time(scores):
    """List the loss and the output's cross-entropy by time -> dict of lists.

    A time is the middle of a bin, or where a step of L_n starts.
    """
    _, *curves = scores.by_time()
    n_bins = len(curves[0])
    t = (np.arange(n_bins) + (0.0 if scores.n_steps else 0.5)) / n_bins
    known = ~np.isnan(curves[0])
    names = "t", "loss_nats_per_token", "cross_entropy_nats_per_token"
    return {name: x[known].tolist() for name, x in zip(names, (t, *curves), strict=True)}


def table(figures, n_steps, exact_names=()):
    """Lay out `likelihood_figures`, and those of `exact_figures` that are named -> lines."""
    units = {"nats/token": 1.0, "bits/token": 1 / math.log(2)}
    if "bits_per_char" in figures:
        bound = figures["bound_nats_per_token"] or math.nan
        units["bits/char"] = figures["bits_per_char"] / bound
        units["bits/byte"] = figures["bits_per_byte"] / bound
    L = f"L_{n_steps or 'inf'}"
    entries = [(L, L), ("L_rec", "L_rec")]
    if figures["unknown_nats_per_token"] > 0:
        entries.append(("unknown text", "unknown"))
    entries += [("bound", "bound"), ("  +- noise, times", "monte_carlo_error")]
    entries.append(("  +- choice of text", "text_error"))
    for name in exact_names:
        key = to_key(name)
        entries += [(name, key), ("  +- choice of text", f"{key}_text_error")]
    lines = [" " * 24 + "".join(f"{unit:>12}" for unit in units)]
    for label, name in entries:
        values = (figures[f"{name}_nats_per_token"] * x for x in units.values())
        lines.append(f"{label:24}" + "".join(f"{value:12.4f}" for value in values))
    return [*lines, f"perplexity per token {figures['perplexity_per_token']:.2f}"]


def notes(scores, error, quick):
    """Say how much was scored, how to repeat the figures, how to lower the error -> lines.

    error: the Monte-Carlo error to reach, nats per token, or None. quick: the time has limited what
    was scored.
    """
    n_draws, noise, choice = len(scores.loss), scores.monte_carlo_error(), scores.text_error()[0]
    lines = ["stopped before the end: these figures are partial"] if scores.partial else []
    if quick or scores.partial:
        errors = {"from noise and times": noise, "from the choice of text": choice}
        known = [f"{x:.4f} {source}" for source, x in errors.items() if not math.isnan(x)]
        everything = ": --all looks at everything" if scores.share < 1 else ""
        lines.append(f"looked at {100 * scores.share:.3g} % of the text{everything}")
        lines.append(f"error in nats per token: {', '.join(known) or 'not known yet'}")
        n_tokens = scores.text.plan.n_rows * scores.text.row_length
        lines.append(f"the same figures again: --max_tokens={n_tokens} --draws={n_draws}")
    if error and noise > error and not scores.partial:
        if scores.share < 1:
            advice = "more text lowers it (--all, or a larger --max_tokens)"
        elif n_draws < bounds.MAX_DRAWS:
            advice = "more draws lower it (--all)"
        else:
            advice = f"no more draws are made (MAX_DRAWS in bounds.py is {bounds.MAX_DRAWS})"
        lines.append(f"the error is {noise:.4f} after {n_draws} draws, not {error}: {advice}")
    return lines
