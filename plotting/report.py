"""One HTML page about a run, in one file: data, figures, curves, samples, texts at each call.

    calls  list of n_calls, each a list of L   likely tokens there: [id, per mille, id, ...]
    ids    list of L                           the tokens that were drawn
"""

import base64
import hashlib
import io
import json
import math
import re
from collections import defaultdict
from contextlib import suppress
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from common import drawing
from plotting import pictures

MOST_POINTS, MOST_STEPS = 400, 40  # of a curve, and of the samples; more are thinned out


# ---------------------------------------------------------------- what a run folder has


def read_samples(run_dir):
    """Read samples.txt -> {step: texts}, at most MOST_STEPS steps, evenly spaced."""
    path, samples = run_dir / "samples.txt", defaultdict(list)
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:
        step, _, text = line.decode(errors="replace").partition("\t")
        with suppress(ValueError):
            samples[int(step)].append(text.replace("\\n", "\n"))
    return {step: samples[step] for step in thin(sorted(samples), MOST_STEPS)}


def thin(values, most):
    """Choose at most `most` of some values, evenly spaced, with the first and the last -> list."""
    indices = np.linspace(0, len(values) - 1, min(len(values), most)).round().astype(int)
    return [values[i] for i in indices]


# ---------------------------------------------------------------- parts of the page


def table(rows, header=(), kind=""):
    """Write rows of cells as a table; the first cell of each names the row -> HTML."""
    head = "".join(f"<th scope=col>{escape(str(cell))}</th>" for cell in header)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    body = ""
    for name, *cells in rows:
        values = "".join(f"<td>{escape(str(cell))}</td>" for cell in cells)
        body += f"<tr><th scope=row>{escape(str(name))}</th>{values}</tr>"
    return f'<table class="{kind}">{head}<tbody>{body}</tbody></table>'


def note(text):
    """Write a line -> HTML."""
    return f"<p class=note>{escape(text)}</p>"


def describe(sampler, metrics):
    """Say what was trained on what -> HTML."""
    model, run = sampler.model, sampler.run
    args, config = run["args"], model.config
    step = max([run["step"], *(line["step"] for line in metrics)])
    progress = f"step {step:,} of {max(step, args.get('max_steps') or 0):,}"
    for minutes in [line["minutes"] for line in metrics if "minutes" in line][-1:]:
        progress += f", {minutes:.1f} minutes"
    source = args.get("spm_model") or f"{args.get('tokenizer') or 'no name'}, trained on the text"
    n_parameters = sum(p.numel() for p in model.parameters())
    layers = f"{config.n_layers} layers of width {config.d_model}"
    facts = [
        ("text", args["data_path"] or "the built-in language"),
        ("validation text", args.get("val_path") or "a held-out part"),
        ("tokenizer", f"{len(sampler.tokenizer):,} tokens ({source})"),
        ("model", f"{n_parameters:,} parameters: {layers}"),
        ("rows", f"{args['sequence_length']:,} tokens"),
        ("beta(1)", f"{config.beta1:.4g}"),
        ("training", progress),
        ("weights shown", f"of step {run['step']:,}"),
    ]
    sizes = run.get("sizes", {})
    units = dict.fromkeys(unit for size in sizes.values() for unit in size)
    counts = [(unit, *(f"{size[unit]:,}" for size in sizes.values())) for unit in units]
    amounts = f"<div class=wide>{table(counts, ['', *sizes], 'numbers')}</div>" if sizes else ""
    flags = []
    for name, value in sorted(args.items()):
        flags.append((f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else value))
    details = f"<details><summary>All flags</summary>{table(flags, kind='facts')}</details>"
    return table(facts, kind="facts") + amounts + details


def show_figures(found, step):
    """Lay out the figures of a validation at a step with their errors in each unit -> HTML."""
    rows = []
    for name, prefix in (("bound", ""), ("exact", "exact_")):
        nats = found.get(f"{name}_nats_per_token")
        noise = None if prefix else found.get("monte_carlo_error_nats_per_token")
        errors = noise, found.get(f"{prefix}text_error_nats_per_token")
        units = {"nats per token": nats, "bits per token": nats and nats / math.log(2)}
        units["bits per character"] = found.get(f"{prefix}bits_per_char")
        for unit, value in units.items():
            if nats and value:  # errors are a constant factor away in each unit
                cells = [value, *(error and error * value / nats for error in errors)]
                cells = ["" if cell is None else f"{cell:.4f}" for cell in cells]
                rows.append((f"{name}, {unit}", *cells))
    if not rows:
        return note(f"Nothing was validated at step {step:,} yet, so there are no figures.")
    names = "n_tokens_scored", "exact_n_tokens_scored"
    scored = " and ".join(f"{found[name]:,}" for name in names if name in found)
    scored = f" ({scored} tokens were scored)" if scored else ""
    laid_out = table(rows, ["", "value", "± noise", "± text"], "numbers")
    return f"<div class=wide>{laid_out}</div>" + note(
        f"-log P of the validation text, given the lengths, at step {step:,}: an upper bound, and "
        f"exact for the sampler commit{scored}. Errors are standard errors: from the noise that "
        "was drawn, and from the choice of text."
    )


def to_svg(figure, title):
    """Write a figure of the light style as SVG whose colours follow the page."""
    file = io.StringIO()
    unnamed = dict.fromkeys(["Creator", "Date", "Format", "Type"])
    figure.savefig(file, format="svg", metadata=unnamed)
    svg = file.getvalue()
    for name, colour in colours(drawing.LIGHT).items():
        svg = svg.replace(colour, f"var(--{name})")
    return f'<svg role="img" aria-label="{escape(title)}" ' + svg[svg.index("<svg ") + 5 :]


def draw_curves(metrics, loss_by_time):
    """Draw the panels of `plot.py run` and the loss by time, each as a small figure -> HTML."""
    import matplotlib

    panels = [(*pictures.history(metrics, key), *names, "step") for *names, key in pictures.PANELS]
    if loss_by_time:
        n = len(loss_by_time)
        t = (np.arange(n) + 0.5) / n
        panels.append((t, loss_by_time, "loss by time", "nats per token", "t"))
    drawn = ""
    with drawing.style(), matplotlib.rc_context({"svg.fonttype": "none"}):
        for x, y, title, unit, x_label in panels:
            if len(x):
                figure = drawing.new_figure(2.7, width=4.2)
                line = {"": (thin(x, MOST_POINTS), thin(y, MOST_POINTS))}
                pictures.draw_lines(figure.subplots(), line, title, unit, x_label)
                drawn += to_svg(figure, f"{title} over {x_label}")
    return f"<div class=curves>{drawn}</div>" if drawn else note("Nothing is logged yet.")


def show_samples(samples):
    """Lay out samples by step -> HTML."""
    if not samples:
        return note("There is no samples.txt, or nothing in it yet.")
    rows = ""
    for step, texts in samples.items():
        rows += f"<dt>{step:,}</dt>" + "".join(f"<dd>{escape(text)}</dd>" for text in texts)
    return f'<dl class=samples tabindex=0 aria-label="samples by step">{rows}</dl>'


def colours(style):
    """Name the colours of drawing.LIGHT or DARK -> {name: colour}."""
    names = {name: style[name] for name in ("background", "ink", "pale")}
    return names | {f"c{i}": colour for i, colour in enumerate(style["colours"].split())}


def to_css(style):
    """Write the colours of a style as CSS variables."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours(style).items())


def page(name, metrics, samples, sampler=None, found=None, texts=None):
    """Describe a run -> HTML.

    metrics, samples: of the run folder. sampler: a `Sampler`, if there is a checkpoint; found: the
    figures of its validation; texts: what it writes, as `plot.sample_texts` returns it.
    """
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    body, emerging_part, script = re.split(r"<!-- next part: .* -->\n", template)
    about = values = emerging = note("There is no checkpoint yet.")
    loss_by_time = None
    if sampler:
        loss_by_time = sampler.run["loss_by_time"]
        about = describe(sampler, metrics)
        values = show_figures(found, sampler.run["step"])
        texts = json.dumps(texts, ensure_ascii=False, separators=(",", ":"))
        texts = texts.replace("<", "\\u003c")  # no text can end the script element
        emerging = Template(emerging_part).substitute(data=texts)
    return Template(body).substitute(
        mark=drawing.MARK,
        name=escape(name),
        hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        light=to_css(drawing.LIGHT),
        dark=to_css(drawing.DARK),
        about=about,
        values=values,
        curves=draw_curves(metrics, loss_by_time),
        emerging=emerging,
        samples=show_samples(samples),
        script=f"<script>{script}</script>" if sampler else "",
    )
