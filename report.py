"""One HTML page about a run, in one file: its data, figures, curves, samples, and texts at each network call.

    python plot.py report RUN_DIR

    calls  list of n_calls, each a list of L   what the network says of each position in a call: [id, per mille, id, ...]
    ids    list of L                           the tokens that were drawn
"""

import base64
import hashlib
import io
import json
import math
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from html import escape
from string import Template

import numpy as np
import torch
from tqdm import tqdm

import card
import figures
import plot
from checkpoint import load, read_metrics, without_folders
from generation import DEFAULT, Options, sample_batch
from noise import mix_seed
from sample import Sampler
from text import piece_text

N_TEXTS, MOST_TOKENS, N_ALTERNATIVES = 5, 512, 6  # at each network call; fewer texts where rows are long
LEAST = 5  # per mille: less likely alternatives are left out
MOST_POINTS, MOST_STEPS = 400, 40  # of a curve, and of the samples; more are thinned out

# ---------------------------------------------------------------- what a run folder has


def read(run_dir, device):
    """Read what there is of a run -> metrics (list), (model, tokenizer, run) or None.

    Raises ValueError if there is nothing to show, or if a file is damaged.
    """
    if not run_dir.is_dir():
        raise ValueError(f"no folder at {run_dir}: give a run folder")
    metrics = read_metrics(run_dir) if (run_dir / "metrics.jsonl").is_file() else []
    has_best = any((run_dir / name).is_file() for name in ("best.pt", "model.safetensors", "config.json"))
    which = "best" if has_best else "last" if (run_dir / "last.pt").is_file() else None
    if not which and not metrics:
        raise ValueError(f"{run_dir} has nothing to show yet: no checkpoint and no metrics; train, or give another folder")
    return metrics, load(run_dir, which, device) if which else None


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
    return [values[i] for i in np.linspace(0, len(values) - 1, min(len(values), most)).round().astype(int)]


# ---------------------------------------------------------------- texts at each network call


class Alternatives:
    """Keep the likeliest tokens of one batch in each network call. bar: shows the calls."""

    def __init__(self, bar):
        self.calls, self.bar = [], bar

    def __call__(self, t, p, given):
        """See `watch` in bfn.Controls: p (B, L, K)."""
        share, ids = p.topk(min(N_ALTERNATIVES, p.shape[-1]))
        self.calls.append(torch.stack([ids, (1000 * share).round().long()], -1).cpu().numpy())  # (B, L, n, 2)
        self.bar.update()

    def of_text(self, row, begin, ids, n_calls):
        """Look up the course of one text from position `begin` on -> dict of ids and calls, see above."""
        calls = [[likely(pairs) for pairs in call[row, begin : len(ids)]] for call in self.calls[:n_calls]]
        return dict(ids=ids[begin:], calls=calls)


def likely(pairs):
    """Keep the first token and those that are likely enough: (n, 2) of id and falling per mille -> [id, per mille, id, ...]."""
    return pairs[: max(1, (pairs[:, 1] >= LEAST).sum())].flatten().tolist()


def sample_texts(model, tokenizer, run):
    """Sample the texts that sample.py prints first -> dict: texts as of `Alternatives.of_text`, pieces of all their ids."""
    n_texts = min(N_TEXTS, max(1, MOST_TOKENS // run["args"]["sequence_length"]))
    seeds = [mix_seed(0, i) for i in range(n_texts)]
    templates = Sampler(model, tokenizer, run).templates([""] * n_texts, 0, None, Options())
    with tqdm(total=DEFAULT.steps + DEFAULT.corrections, desc="sampling", unit="call", disable=None) as bar:
        alternatives = Alternatives(bar)
        options = Options(replace(DEFAULT, watch=alternatives))
        samples = sample_batch(model, tokenizer, templates, seeds, options)
    begin = int(tokenizer.bos_id() >= 0)
    texts = [alternatives.of_text(row, begin, ids, calls) for row, (ids, calls) in enumerate(samples)]
    used = {k for text in texts for call in text["calls"] for position in call for k in position[::2]}
    used = used.union(*(text["ids"] for text in texts))
    return dict(texts=texts, pieces={k: to_text(k, tokenizer) for k in sorted(used)})


def to_text(k, tokenizer):
    """Write a token as it reads within a text -> str."""
    if k == tokenizer.eos_id():
        return " (end)"
    return piece_text(k, tokenizer)


# ---------------------------------------------------------------- parts of the page


def table(rows, header=(), kind=""):
    """Write rows of cells as a table; the first cell of each names the row -> HTML."""
    head = "".join(f"<th scope=col>{escape(str(cell))}</th>" for cell in header)
    body = "".join(
        f"<tr><th scope=row>{escape(str(name))}</th>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>"
        for name, *cells in rows
    )
    return f'<table class="{kind}">' + (f"<thead><tr>{head}</tr></thead>" if head else "") + f"<tbody>{body}</tbody></table>"


def note(text):
    """Write a line -> HTML."""
    return f"<p class=note>{escape(text)}</p>"


def describe(model, tokenizer, run, metrics):
    """Say what was trained on what -> HTML."""
    args, config = without_folders(run["args"]), model.config
    step = max([run["step"], *(line["step"] for line in metrics)])
    minutes = [line["minutes"] for line in metrics if "minutes" in line][-1:]
    progress = [f"step {step:,} of {max(step, args.get('max_steps') or 0):,}", *(f"{value:.1f} minutes" for value in minutes)]
    source = args.get("spm_model") or f"{args.get('tokenizer') or 'no name'}, trained on the text"
    facts = [
        ("text", args["data_path"] or "the built-in language (toy.py)"),
        ("validation text", args.get("val_path") or "a held-out part"),
        ("tokenizer", f"{len(tokenizer):,} tokens ({source})"),
        ("model", f"{sum(p.numel() for p in model.parameters()):,} parameters: {config.n_layers} layers of width {config.d_model}"),
        ("rows", f"{args['sequence_length']:,} tokens"),
        ("beta(1)", f"{config.beta1:.4g}"),
        ("training", ", ".join(progress)),
        ("weights shown", f"of step {run['step']:,}"),
    ]
    sizes = run.get("sizes", {})
    units = list(dict.fromkeys(unit for size in sizes.values() for unit in size))
    counts = [(unit, *(f"{size[unit]:,}" for size in sizes.values())) for unit in units]
    flags = [(f"--{name}", ",".join(map(str, v)) if isinstance(v, list) else v) for name, v in sorted(args.items())]
    amounts = f"<div class=wide>{table(counts, ['', *sizes], 'numbers')}</div>" if sizes else ""
    details = f"<details><summary>All flags</summary>{table(flags, kind='facts')}</details>"
    return table(facts, kind="facts") + amounts + details


def show_figures(found, step):
    """Lay out the figures of a validation at a step with their errors in each unit -> HTML."""
    rows = []
    for label, prefix, noise in (("bound", "", "monte_carlo_error_nats_per_token"), ("exact", "exact_", None)):
        nats = found.get("exact_nats_per_token" if prefix else "bound_nats_per_token")
        errors = [found.get(noise), found.get(f"{prefix}text_error_nats_per_token")]
        per_char = found.get(f"{prefix}bits_per_char")
        for unit, value in (("nats per token", nats), ("bits per token", nats and nats / math.log(2)), ("bits per character", per_char)):
            if nats and value:  # errors are a constant factor away in each unit
                cells = [value, *(error and error * value / nats for error in errors)]
                rows.append((f"{label}, {unit}", *("" if cell is None else f"{cell:.4f}" for cell in cells)))
    if not rows:
        return note(f"Nothing was validated at step {step:,} yet, so there are no figures.")
    scored = [f"{found[key]:,}" for key in ("n_tokens_scored", "exact_n_tokens_scored") if key in found]
    return f"<div class=wide>{table(rows, ['', 'value', '± noise', '± text'], 'numbers')}</div>" + note(
        f"-log P of the validation text, given the lengths, at step {step:,}: an upper bound, and exact for the sampler commit"
        + (f" ({' and '.join(scored)} tokens were scored)" if scored else "")
        + ". Errors are standard errors: from the noise that was drawn, and from the choice of text."
    )


def to_svg(figure, title):
    """Write a figure of the light style as SVG whose colours follow the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
    svg = file.getvalue()
    for name, colour in colours(figures.LIGHT).items():
        svg = svg.replace(colour, f"var(--{name})")
    return f'<svg role="img" aria-label="{escape(title)}" ' + svg[svg.index("<svg ") + 5 :]


def draw_curves(metrics, loss_by_time):
    """Draw the panels of `plot.py run` that have points, and the loss by time, each as a small figure -> HTML."""
    import matplotlib

    panels = [(title, unit, "step", *figures.history(metrics, key)) for title, unit, key in figures.PANELS]
    if loss_by_time:
        panels.append(("loss by time", "nats per token", "t", (np.arange(len(loss_by_time)) + 0.5) / len(loss_by_time), loss_by_time))
    drawn = []
    with figures.style(), matplotlib.rc_context({"svg.fonttype": "none"}):
        for title, unit, x_label, x, y in panels:
            if len(x):
                figure = figures.panel(thin(x, MOST_POINTS), thin(y, MOST_POINTS), title, unit, x_label)
                drawn.append(to_svg(figure, f"{title} over {x_label}"))
    return f"<div class=curves>{''.join(drawn)}</div>" if drawn else note("Nothing is logged yet.")


def show_samples(samples):
    """Lay out samples by step -> HTML."""
    if not samples:
        return note("There is no samples.txt, or nothing in it yet.")
    rows = (f"<dt>{step:,}</dt>" + "".join(f"<dd>{escape(text)}</dd>" for text in texts) for step, texts in samples.items())
    return f'<dl class=samples tabindex=0 aria-label="samples by step">{"".join(rows)}</dl>'


def colours(style):
    """Name the colours of figures.LIGHT or DARK -> {name: colour}."""
    names = {name: style[name] for name in ("background", "ink", "pale")}
    return names | {f"c{i}": colour for i, colour in enumerate(style["colours"].split())}


def to_css(style):
    """Write the colours of a style as CSS variables."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours(style).items())


def to_json(data):
    """Write data as JSON that no text in it can end the script element of."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def page(run_dir, device):
    """Describe a run folder or an exported one -> HTML. Raises ValueError if there is nothing to show."""
    metrics, loaded = read(run_dir, device)
    about = values = emerging = note("There is no checkpoint yet.")
    script, loss_by_time = "", None
    if loaded:
        model, tokenizer, run = loaded
        step, loss_by_time = run["step"], run["loss_by_time"]
        about = describe(model, tokenizer, run, metrics)
        values = show_figures(card.read_figures(run_dir, step) or run.get("figures", {}), step)
        data = to_json(sample_texts(model, tokenizer, run))
        emerging, script = EMERGING.substitute(data=data), f"<script>{SCRIPT}</script>"
    return PAGE.substitute(
        mark=plot.MARK,
        name=escape(run_dir.resolve().name),
        hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
        style=Template(STYLE).substitute(light=to_css(figures.LIGHT), dark=to_css(figures.DARK)),
        about=about,
        values=values,
        curves=draw_curves(metrics, loss_by_time),
        emerging=emerging,
        samples=show_samples(read_samples(run_dir)),
        script=script,
    )


# ---------------------------------------------------------------- templates

# The policy lets nothing be loaded, and no script run but the one of this page.
PAGE = Template("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-$hash'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="$mark">
<title>$name</title>
<style>$style</style>
<h1>$name</h1>
<section><h2>Texts at each network call</h2>$emerging</section>
<section><h2>Figures</h2>$values</section>
<section><h2>Training</h2>$about</section>
<section><h2>Curves</h2>$curves</section>
<section><h2>Samples over training</h2>$samples</section>
$script
</html>
""")

EMERGING = Template("""
<div class="controls"><button id="play" type="button">Play</button>
<input id="call" type="range" min="1" value="1" aria-label="network call"><output id="count" for="call"></output></div>
<div id="texts"></div>
<noscript><p class="note">The texts are shown by JavaScript, which is switched off.</p></noscript>
<p class="note"><span class="scale" aria-hidden="true"></span> The more colour a token has, the more certain the network is of it.
Point at a token, or reach it with Tab and the arrow keys, to see what else it may become.</p>
<div id="alternatives" role="tooltip" hidden></div>
<script type="application/json" id="data">$data</script>
""")

STYLE = """
:root { color-scheme: light dark; $light }
@media (prefers-color-scheme: dark) { :root { $dark } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1rem; color: var(--ink); background: var(--background);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0.5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 0.6rem; padding-bottom: 0.2rem; border-bottom: 1px solid var(--pale); }
.note { font-size: 0.875rem; color: color-mix(in srgb, var(--ink) 75%, var(--background)); margin: 0.5rem 0; max-width: 48rem; }
table { border-collapse: collapse; font-size: 0.9375rem; }
th { font-weight: normal; text-align: left; }
th, td { padding: 0.2rem 1.2rem 0.2rem 0; vertical-align: top; border-bottom: 1px solid var(--pale); }
.facts th { white-space: nowrap; color: color-mix(in srgb, var(--ink) 75%, var(--background)); }
.numbers { font-variant-numeric: tabular-nums; margin: 0.8rem 0; overflow-wrap: normal; }
.numbers td, .numbers thead th { text-align: right; white-space: nowrap; padding: 0.2rem 0 0.2rem 1.2rem; }
.numbers th[scope=row] { padding-right: 0; }
.wide { overflow-x: auto; }
summary { cursor: pointer; margin: 0.6rem 0; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; }
.samples { max-height: 26rem; overflow-y: auto; margin: 0; padding: 0.6rem; border: 1px solid var(--pale); border-radius: 0.3rem;
  display: grid; grid-template-columns: max-content 1fr; gap: 0 0.8rem; }
.samples dt { grid-column: 1; font-variant-numeric: tabular-nums; text-align: right; }
.samples dt:not(:first-child), .samples dt:not(:first-child) + dd { margin-top: 0.6rem; }
.samples dd { grid-column: 2; margin: 0; white-space: pre-wrap; }
.controls { display: flex; align-items: center; gap: 0.8rem; flex-wrap: wrap; }
.controls input { flex: 1 1 6rem; min-width: 0; accent-color: var(--c0); }
.controls output { font-variant-numeric: tabular-nums; }
button { font: inherit; color: inherit; background: none; border: 1px solid var(--pale); border-radius: 0.3rem; padding: 0.15rem 0;
  width: 4.2rem; cursor: pointer; }
.text { margin: 0.6rem 0; white-space: pre-wrap; line-height: 1.9; }
.text span { --shade: calc(4% + 36% * var(--certainty)); background: color-mix(in srgb, var(--c0) var(--shade), var(--background));
  color: color-mix(in srgb, var(--ink) calc(72% + 28% * var(--certainty)), var(--background)); padding: 0.15rem 0.15rem;
  border-radius: 0.2rem; margin-right: 1px; cursor: default; }
.text span:hover, .text span:focus { outline: 2px solid var(--c1); }
.scale { display: inline-block; width: 5rem; height: 0.7rem; border-radius: 0.2rem; background: linear-gradient(to right,
  color-mix(in srgb, var(--c0) 4%, var(--background)), color-mix(in srgb, var(--c0) 40%, var(--background))); }
#alternatives { position: absolute; z-index: 1; background: var(--background); border: 1px solid var(--pale); border-radius: 0.3rem;
  padding: 0.4rem 0.6rem; font-size: 0.875rem; box-shadow: 0 2px 8px #0004; max-width: calc(100vw - 16px); pointer-events: none; }
#alternatives td { border: 0; padding: 0 1rem 0 0; white-space: pre-wrap; font-variant-numeric: tabular-nums; }
#alternatives td + td { text-align: right; padding: 0; }
#alternatives .shown { font-weight: bold; }
"""

SCRIPT = """
const element = name => document.getElementById(name);
const data = JSON.parse(element("data").textContent);
const slider = element("call"), tip = element("alternatives"), last = Math.max(...data.texts.map(text => text.calls.length));
const rows = data.texts.map(text => {
  const row = document.createElement("p");
  row.className = "text";
  for (const i of text.ids.keys()) row.append("", document.createElement("span"));  // a space, and its token
  [...row.children].forEach((token, i) => { token.tabIndex = i ? -1 : 0; });
  element("texts").append(row);
  return {...text, tokens: [...row.children]};
});
let timer = null;

function show(call) {
  call = Math.min(Math.max(call, 1), last);
  slider.value = call;
  element("count").textContent = "call " + call + " of " + last;
  for (const {ids, calls, tokens} of rows) {
    const now = calls[Math.min(call, calls.length) - 1], done = call >= calls.length;
    tokens.forEach((token, i) => {  // after its last call, a text is what was drawn
      token.shown = done ? ids[i] : now[i][0];
      token.alternatives = now[i];
      const piece = data.pieces[token.shown], rest = piece.replace(/^ /, "");
      const starts_line = !i || tokens[i - 1].textContent.endsWith("\\n");
      token.previousSibling.data = rest !== piece && !starts_line ? " " : "";
      token.textContent = mark(rest);
      token.style.setProperty("--certainty", done ? 1 : now[i][1] / 1000);
    });
  }
  if (!tip.hidden) tell(tip.token);
}

function mark(piece) {  // what cannot be seen otherwise
  return piece.trim() ? piece : piece.includes("\\n") ? "\u21b5" + piece : "\u2423";
}

function tell(token) {
  const list = document.createElement("table");
  let rest = 1000;
  function add(name, share, shown) {
    const line = list.insertRow();
    line.className = shown ? "shown" : "";
    line.insertCell().textContent = name;
    line.insertCell().textContent = (share / 10).toFixed(1) + "%";
    rest -= share;
  }
  for (let i = 0; i < token.alternatives.length; i += 2) {
    const [id, share] = token.alternatives.slice(i, i + 2);
    add(mark(data.pieces[id]).trim(), share, id === token.shown);
  }
  if (rest > 0) add("others", rest, false);
  tip.replaceChildren(list);
  tip.token = token;
  tip.hidden = false;
  token.setAttribute("aria-describedby", "alternatives");
  const box = token.getBoundingClientRect(), room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = Math.max(8, Math.min(box.left, room)) + scrollX + "px";
  tip.style.top = box.bottom + scrollY + 6 + "px";
}

function hide() {
  tip.hidden = true;
}

function pause() {
  clearInterval(timer);
  timer = null;
  element("play").textContent = "Play";
}

function play() {
  if (timer) return pause();
  if (+slider.value === last) show(1);
  element("play").textContent = "Pause";
  timer = setInterval(() => +slider.value < last ? show(+slider.value + 1) : pause(), 250);
}

function move(event) {
  const step = {ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling"}[event.key];
  if (event.key === "Escape") hide();
  if (!step || !event.target[step]) return;
  event.target.tabIndex = -1;
  event.target[step].tabIndex = 0;
  event.target[step].focus();
  event.preventDefault();
}

function follow() {  // a link to a call ends in #call=3
  const found = /call=([0-9]+)/.exec(location.hash);
  show(found ? +found[1] : +slider.value);
}

slider.max = last;
slider.addEventListener("input", () => show(+slider.value));
element("play").addEventListener("click", play);
for (const event of ["pointerover", "focusin"]) element("texts").addEventListener(event, e => e.target.alternatives && tell(e.target));
for (const event of ["pointerout", "focusout"]) element("texts").addEventListener(event, hide);
element("texts").addEventListener("keydown", move);
addEventListener("hashchange", follow);
follow();
"""
