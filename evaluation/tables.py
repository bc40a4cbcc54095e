"""Measure a trained model: a bound on -log P(text) with its errors, exact likelihoods, and the quality of samples.

    python evaluate.py -mdir=RUN_DIR -d=TEXT.txt          a large text in part, within about a minute
    python evaluate.py -mdir=RUN_DIR -d=TEXT.txt --all    everything
"""

import json
import math
import re

from evaluation import bounds
from evaluation.bounds import clustered_error, n_scorable, unknown_nats_per_token

# ---------------------------------------------------------------- figures


def likelihood_figures(scores, conditional=False):
    """Compute the figures of a scored text, with units in their names -> dict of floats and ints.

    Characters and bytes are those of the raw text; `conditional` leaves out the figures per character and byte, which have
    no meaning if part of the text was given. Text that the tokenizer does not know costs `bounds.UNKNOWN_BITS` per byte. This, and
    the tokens per character, are averages over the whole text, even if only some windows were scored.
    """
    diffusion, reconstruction = scores.nats_per_token
    tokens, bos_id = scores.text.tokens, scores.text.bos_id
    n_scored, unknown = n_scorable(tokens, bos_id), unknown_nats_per_token(tokens, bos_id)
    bound = diffusion + reconstruction + unknown
    text_error, n_clusters = scores.text_error()
    figures = {f"L_{scores.n_steps or 'inf'}_nats_per_token": diffusion} | dict(
        L_rec_nats_per_token=reconstruction,
        unknown_nats_per_token=unknown,
        bound_nats_per_token=bound,
        bound_bits_per_token=bound / math.log(2),
        monte_carlo_error_nats_per_token=scores.monte_carlo_error(),
        text_error_nats_per_token=text_error,
        perplexity_per_token=math.exp(min(bound, 700.0)),  # exp(710) overflows
    )
    if not conditional:
        figures |= dict(
            bits_per_char=bound / math.log(2) * n_scored / tokens.n_chars,
            bits_per_byte=bound / math.log(2) * n_scored / tokens.n_bytes,
        )
    counts = dict(n_tokens_scored=int(scores.n_scored.sum()), n_clusters=n_clusters, n_draws=len(scores.loss))
    return {name: float(value) for name, value in figures.items()} | counts  # plain types, for checkpoints and JSON


def to_key(name):
    """Turn the name of a figure into a key: "exact, 8 calls" -> "exact_8_calls"."""
    return re.sub(r"\W+", "_", name).strip("_")


def exact_figures(text, scores):
    """Compute the figures of `likelihood.score`, in the same units as the bound -> dict of floats.

    text: the Text whose first windows were scored. Names are such as exact_8_calls_nats_per_token.
    """
    n, unknown = len(scores.n_scored), unknown_nats_per_token(text.tokens, text.bos_id)
    figures = dict(exact_n_tokens_scored=int(scores.n_scored.sum()))
    for name, mean in scores.nats_per_token.items():
        figures[f"{to_key(name)}_nats_per_token"] = mean + unknown
        excess = scores.nats[name] - mean * scores.n_scored
        figures[f"{to_key(name)}_text_error_nats_per_token"] = clustered_error(excess, scores.n_scored, text.document[:n])[0]
    return figures


def describe(path, tokens, window, figures):
    """Say in one line how large a text is, and how much of it was scored."""
    return (
        f"{path}: {tokens.n_documents:,} documents, {len(tokens.ids):,} tokens, {tokens.n_chars:,} characters; "
        f"{figures['n_tokens_scored']:,} tokens scored in windows of {window}, {figures['n_draws']} draws"
        + (f"; exact likelihoods of {figures['exact_n_tokens_scored']:,} of these" if "exact_n_tokens_scored" in figures else "")
    )


def to_json(figures, scores, samples):
    """Write all figures as one JSON object, in which null stands for nan."""
    figures = {name: None if math.isnan(value) else value for name, value in figures.items()}
    figures |= dict(share_of_text=scores.share, partial=scores.partial) | ({"samples": samples} if samples else {})
    return json.dumps(figures)


def table(figures, n_steps, exact_names=()):
    """Lay out the figures of `likelihood_figures`, and those of `exact_figures` that are named -> lines of text."""
    units = {"nats/token": 1.0, "bits/token": 1 / math.log(2)}
    if "bits_per_char" in figures:
        bound = figures["bound_nats_per_token"] or math.nan
        units["bits/char"], units["bits/byte"] = figures["bits_per_char"] / bound, figures["bits_per_byte"] / bound
    L = f"L_{n_steps or 'inf'}"
    entries = [(L, L), ("L_rec", "L_rec"), *[("unknown text", "unknown")] * (figures["unknown_nats_per_token"] > 0)]
    entries += [("bound", "bound"), ("  +- noise, times", "monte_carlo_error"), ("  +- choice of text", "text_error")]
    for name in exact_names:
        entries += [(name, to_key(name)), ("  +- choice of text", f"{to_key(name)}_text_error")]
    lines = [" " * 24 + "".join(f"{unit:>12}" for unit in units)]
    for label, name in entries:
        values = (figures[f"{name}_nats_per_token"] * x for x in units.values())
        lines.append(f"{label:24}" + "".join(f"{value:12.4f}" for value in values))
    return [*lines, f"perplexity per token {figures['perplexity_per_token']:.2f}"]


def notes(scores, error, quick):
    """Say which share of the text was scored, how to repeat the figures, how to lower the error -> lines of text.

    error: the Monte-Carlo error to reach, nats per token, or None. quick: the time has limited what was scored.
    """
    n_draws, noise, choice = len(scores.loss), scores.monte_carlo_error(), scores.text_error()[0]
    lines = ["stopped before the end: these figures are partial"] if scores.partial else []
    if quick or scores.partial:
        errors = {"from noise and times": noise, "from the choice of text": choice}
        known = [f"{value:.4f} {source}" for source, value in errors.items() if not math.isnan(value)]
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
