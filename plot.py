"""Pictures, as PNG or SVG, light or dark: of the flow, of a run, of packing, of sampling, of experiments; and a page of a run.

    python plot.py simplex                                  the flow on three tokens, and what a network adds
    python plot.py beta --beta 0.005                        how often the evidence names the token, over t
    python plot.py run RUN_DIR [MORE ...] --watch           losses, bound, likelihood, speed; again and again while it trains
    python plot.py times RUN_DIR                            losses by time, and the density of learned times
    python plot.py packing -d=CORPUS.txt -spm=TOKENIZER     rows before and after packing
    python plot.py sampling RUN_DIR [--gif]                 certainty of each position over the network calls
    python plot.py quality RESULTS.json [MORE ...]          exact likelihoods and figures of samples over the network calls
    python plot.py compare RUN_DIR RUN_DIR ...              a table of what differs between runs: flags, figures
    python plot.py report RUN_DIR                           a page, HTML in one file: data, figures, curves, samples, texts

What they look like is in figures.py. Other files draw lines with `lines`.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from common import cli  # isort: skip - first, because of Ctrl-C
import numpy as np
import torch
from tqdm import tqdm

import bfn
import data
from common import drawing, parallel
from common.drawing import MARK, check_output, save
from common.files import replacing
from common.noise import mix_seed
from evaluation import bounds
from plotting import pictures, report
from sample import Sampler
from sampling.generate import DEFAULT, Options, sample_batch
from sampling.prompts import read_breaks
from text import cache
from text.reading import EXAMPLE_HELP
from text.tokenizer import load_tokenizer, piece_text, train_tokenizer
from training.checkpoint import load, read_checkpoint, read_figures, read_metrics, without_folders
from training.times import Times

WATCH_SECONDS = 5
DENSITY_BINS, DENSITY_DRAWS = 20, 8  # of losses by time
N_TEXTS = 5  # of the page of a run; fewer where rows are long
MOST_TOKENS = 512  # of them
N_ALTERNATIVES = 6  # at each network call
LEAST = 5  # per mille: less likely alternatives are left out
PACKED_ROWS = 32  # that are drawn


# ---------------------------------------------------------------- run and compare


def read_histories(run_dirs):
    """Read metrics.jsonl of each run -> {name: lines}. Names are those of the folders if these differ, else their paths."""
    names = [Path(run_dir).resolve().name for run_dir in run_dirs]
    names = names if len(set(names)) == len(names) else map(str, run_dirs)
    return {name: read_metrics(run_dir) for name, run_dir in zip(names, run_dirs, strict=True)}


def draw_run(args):
    """Draw the curves of runs, with --watch again and again."""
    draw = partial(save, args.output, dark=args.dark)
    draw(lambda: pictures.training(read_histories(args.run_dirs)))
    if args.watch:
        print(f"{args.output}: drawn again every {WATCH_SECONDS} seconds; Ctrl-C ends this", flush=True)
    with suppress(KeyboardInterrupt):
        while args.watch:
            time.sleep(WATCH_SECONDS)
            draw(lambda: pictures.training(read_histories(args.run_dirs)))


def print_comparison(args):
    """Print what differs between runs, and what they reached."""
    run_dirs = list(dict.fromkeys(args.run_dirs))
    if len(run_dirs) < 2:
        raise ValueError("compare needs two or more run folders")
    histories = read_histories(run_dirs)
    checkpoints = [read_checkpoint(Path(run_dir) / "last.pt") for run_dir in run_dirs]
    table = [["", *histories], *difference(checkpoints), *results(histories)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def difference(checkpoints):
    """List the flags that differ between runs, the folder left out, and K and beta(1) -> rows of cells, the flag first."""
    facts = [{"K": c["config"]["K"], "beta(1)": c["config"]["beta1"], **c["args"]} for c in checkpoints]
    names = [name for name in dict.fromkeys(name for f in facts for name in f) if name != "model_dir"]
    rows = [[name, *(f.get(name) for f in facts)] for name in names]
    return [[name, *map(to_cell, values)] for name, *values in rows if any(value != values[0] for value in values)]


def results(histories):
    """List what runs reached -> rows of cells, the figure's name first."""
    rows = []
    for name, key, choose in [
        ("steps", "step", max),
        ("minutes of training", "minutes", max),
        ("training loss at the end", "loss", last),
        ("best bound, bits per character", "val_bits_per_char", min),
        ("bound at the end", "val_bits_per_char", last),
        ("exact at the end", "val_exact_bits_per_char", last),
        ("tokens per second, median", "tokens_per_s", np.median),
        ("peak memory, GB", "peak_memory_gb", max),
    ]:
        values = [[line[key] for line in metrics if key in line] for metrics in histories.values()]
        rows.append([name, *(to_cell(choose(v)) if v else "" for v in values)])
    return rows


def last(values):
    """The last of some values."""
    return values[-1]


def to_cell(value):
    """Write a value into a cell of a table."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"


# ---------------------------------------------------------------- times


def draw_times(args):
    """Draw the losses of best.pt and last.pt by time, and the densities that were fitted to them at each validation."""
    device, found = parallel.find_device(args.device), {}
    for which in ("best", "last"):
        if which == "last" or Path(args.run_dir, "best.pt").exists():
            model, tokenizer, run = load(args.run_dir, which, device)
            found[run["step"]] = which, model, tokenizer, run
    history = [(step, density_of(torch.tensor(curve))) for step, curve in found[max(found)][3].get("times_history", [])]
    measured = [measure_times(*found[step], args, device) for step in sorted(found)]
    save(args.output, partial(pictures.times, measured, history), args.dark)


def measure_times(which, model, tokenizer, run, args, device):
    """Measure loss and cross-entropy by time on the validation text -> figures.ByTime."""
    flags, run_dir = run["args"], Path(args.run_dir)
    path = args.data_path or flags["val_path"] or flags["data_path"] or run_dir / "corpus.txt"
    part = "all" if args.data_path or flags["val_path"] else "val"
    corpus = cache.Corpus.find(path, flags["text_field"], "the losses are measured on the validation text, which is not at {}: give -d")
    tokens = cache.load_corpus(
        corpus, run_dir / "tokenizer.model", args.cache_dir, part, flags["example"]
    )
    text = bounds.Text(tokens, flags["sequence_length"], tokenizer.bos_id())
    work = bounds.Work(device, progress=True)
    scores = bounds.score(model, text.first_tokens(args.max_tokens), work, n_draws=DENSITY_DRAWS)
    _, loss, cross_entropy = scores.by_time(DENSITY_BINS)
    t = (np.arange(DENSITY_BINS) + 0.5) / DENSITY_BINS
    return pictures.ByTime(f"{which}.pt, step {run['step']:,}", t, loss, cross_entropy, density_of(run["times"]))


def density_of(curve):
    """Compute the density of learned times that belongs to a curve of `Times` -> (N_BINS,) array."""
    fit = Times("learned", 0.0)
    fit.curve = curve
    return fit.density().numpy()


# ---------------------------------------------------------------- packing


def draw_packing(args):
    """Draw rows before and after packing."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_path = args.spm_model
        if not tokenizer_path:
            tokenizer_path = Path(folder) / "tokenizer.model"
            model = train_tokenizer(args.data_path, "bpe", example=args.example)
            tokenizer_path.write_bytes(model)
        load_tokenizer(tokenizer_path)  # raises if it is none
        tokens = cache.load_corpus(args.data_path, tokenizer_path, args.cache_dir, example=args.example)
    plans = packing_plans(tokens, args.sequence_length)
    title = f"{Path(args.data_path).name}: {tokens.n_documents:,} examples in rows of {args.sequence_length} tokens"
    save(args.output, partial(pictures.packing, tokens, plans, args.sequence_length, PACKED_ROWS, title), args.dark)


def packing_plans(tokens, row_length):
    """Plan rows of one window each, and those of the first epoch of training -> {name: data.Plan}."""
    plan = data.plan_validation(tokens, row_length, PACKED_ROWS)
    order = np.argsort(plan.starts)  # as in the text
    alone = data.Plan(plan.starts[order], plan.lengths[order], np.arange(len(order) + 1))
    return {"one example a row": alone, "packed": data.plan_epoch(tokens, row_length, seed=0, epoch=0)}


# ---------------------------------------------------------------- sampling


class Recorder:
    """Keep what the network answers in each call for one batch: the likeliest tokens and how certain they are."""

    def __init__(self):
        self.ids, self.certainty = [], []

    def __call__(self, t, p, given):
        """See `watch` in bfn.Controls: p (B, L, K), given (B, L)."""
        certainty, ids = p.max(-1)
        self.ids.append(ids.cpu())
        self.certainty.append(certainty.masked_fill(given, 1.0).cpu())

    def of_text(self, row, ids, n_calls, tokenizer):
        """Look up the course of one text -> its tokens at the end, at each call (n_calls lists), certainty (n_calls, L).

        ids: the text, which counts as certain in the last call. bos is left out.
        """
        begin = int(ids[0] == tokenizer.bos_id())
        at_calls = [k[row, begin : len(ids)].tolist() for k in self.ids[: n_calls - 1]] + [ids[begin:]]
        certainty = torch.stack(self.certainty[:n_calls])[:, row, begin : len(ids)].numpy()
        return to_pieces(ids[begin:], tokenizer), [to_pieces(k, tokenizer) for k in at_calls], certainty


def to_pieces(ids, tokenizer):
    """Write each token, with the space before it; eos as nothing -> list of str."""
    return ["" if k == tokenizer.eos_id() else piece_text(k, tokenizer).replace("\n", "\u21b5") for k in ids]


def draw_sampling(args):
    """Draw how certain each position is at each network call, or the texts as they emerge."""
    sampler = Sampler.load(args.run_dir, args.checkpoint, args.device)
    n, recorder = args.num_samples or (6 if args.gif else 1), Recorder()
    prompts = [read_breaks(prompt, sampler.run) for prompt in args.prompt or [""] for _ in range(n)]
    options = Options(bfn.Controls(args.sampler, args.steps, args.corrections, watch=recorder))
    templates = sampler.templates(prompts, args.seed, args.length, options)
    seeds = [mix_seed(args.seed, i) for i in range(len(prompts))]
    samples = sample_batch(sampler.model, sampler.tokenizer, templates, seeds, options)
    texts = [recorder.of_text(row, ids, calls, sampler.tokenizer) for row, (ids, calls) in enumerate(samples)]
    title = f"{args.sampler}, {args.run_dir}, step {sampler.run['step']:,}"
    if args.gif:
        save_animation(args.output, texts, title, args.dark)
    else:
        shown = [([piece or "(end)" for piece in pieces], certainty) for pieces, _, certainty in texts]
        save(args.output, partial(pictures.certainty, shown, title), args.dark)


def save_animation(path, texts, title, dark):
    """Save the texts of `Recorder.of_text` as a GIF in which they emerge. A text that is done stays as it is."""
    n_calls = max(len(at_calls) for _, at_calls, _ in texts)
    frames = []
    for i in range(n_calls):
        frames.append([])
        for pieces, at_calls, certainty in texts:
            is_done = i >= len(at_calls) - 1  # the tokens of the last call are drawn
            row = zip(pieces, [1.0] * len(pieces), strict=True) if is_done else zip(at_calls[i], certainty[i], strict=True)
            frames[-1].append(list(row))
    with drawing.style(dark):
        content = pictures.to_gif(pictures.emerging(frames, title), MARK)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


# ---------------------------------------------------------------- report


def draw_quality(args):
    """Draw likelihoods and figures of samples over the network calls."""
    exact, results = {}, []
    for path in args.files:
        content = read_json(path)
        if is_comparison(content) and not results:
            results = content
        elif isinstance(content, dict) and "bound_nats_per_token" in content and (curve := exact_by_calls(content)):
            exact[Path(path).stem] = curve
        else:
            known = "one results.json of experiments/samplers.py at most, and outputs of evaluate.py --json --calls=8,32"
            raise ValueError(f"{path} is not one of the files to give: {known}")
    title = ", ".join(Path(path).name for path in args.files)
    save(args.output, partial(pictures.quality_figure, exact, results, title), args.dark)


def read_json(path):
    """Read a JSON file. Raises ValueError if it is missing or is none."""
    if not os.path.isfile(path):
        raise ValueError(f"no file at {path}")
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError:
        raise ValueError(f"{path} is not JSON") from None


def is_comparison(content):
    """Tell whether this is what experiments/samplers.py writes: a list of records, the first of held-out text."""
    needed = {"sampler", "calls", "temperature", "top_p", "calls_per_text", "figures"}
    is_list = isinstance(content, list) and len(content) > 1
    return is_list and all(isinstance(record, dict) and needed <= record.keys() for record in content)


def exact_by_calls(content):
    """Find the exact likelihoods in the output of evaluate.py --json -> (calls, nats per token, errors, bound), or None."""
    found = {int(m[1]): m[0] for name in content if (m := re.fullmatch(r"exact_(\d+)_calls?_nats_per_token", name))}
    names = [found[calls] for calls in sorted(found)]
    errors = [content[name.replace("nats", "text_error_nats")] or 0.0 for name in names]
    return (sorted(found), [content[name] for name in names], errors, content["bound_nats_per_token"]) if found else None


def draw_report(args):
    """Write the page of a run."""
    content = run_page(Path(args.run_dir), parallel.find_device(args.device))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.output) as temporary:  # names of files may not be UTF-8
        temporary.write_text(content, encoding="utf-8", errors="backslashreplace")


def run_page(run_dir, device):
    """Describe a run folder or an exported one -> HTML. Raises ValueError if there is nothing to show."""
    metrics, loaded = read_run_so_far(run_dir, device)
    found = texts = None
    if loaded:
        model, tokenizer, run = loaded
        run = run | dict(args=without_folders(run["args"]))
        loaded = model, tokenizer, run
        found = read_figures(run_dir, run["step"]) or run.get("figures", {})
        texts = sample_texts(*loaded)
    name, samples = run_dir.resolve().name, report.read_samples(run_dir)
    return report.page(name, metrics, samples, loaded, found, texts)


def read_run_so_far(run_dir, device):
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


# ---------------------------------------------------------------- the command


def draw_simplex(args):
    """Draw the flow on three tokens."""
    save(args.output, partial(pictures.simplex, args.seed), args.dark)


def draw_beta(args):
    """Draw how often the evidence names the token."""
    save(args.output, partial(pictures.beta, args.beta), args.dark)


def add_run_flags(add):
    add("run_dirs", nargs="+", type=cli.path, metavar="RUN_DIR",
        help="run folders; several are drawn over each other")
    add("--watch", action="store_true", help=f"draw again every {WATCH_SECONDS} seconds until Ctrl-C")


def add_times_flags(add):
    add("run_dir", type=cli.path, metavar="RUN_DIR", help="run folder")
    add("-d", "--data_path", type=cli.path,
        help="text to measure the losses on (the validation text of the training)")
    add("--max_tokens", type=cli.count, default=16_384, help="tokens to measure them on, at most (16384)")
    add_device(add)
    add_cache(add)


def add_packing_flags(add):
    add("-d", "--data_path", type=cli.path, required=True, help="text file")
    add("-spm", "--spm_model", type=cli.path,
        help="SentencePiece model (a bpe is trained on the text)")
    add("--example", default="line", help=EXAMPLE_HELP)
    add("-slen", "--sequence_length", type=cli.several, default=128, help="tokens of a row (128)")
    add_cache(add)


def add_sampling_flags(add):
    add("run_dir", type=cli.path, metavar="RUN_DIR", help="run folder")
    add("--checkpoint", choices=["best", "last"], default="best", help="the best by validation, or the last (best)")
    add("--prompt", action="append", default=[], help="as in sample.py; repeatable")
    add("--num_samples", type=cli.count, help="texts per prompt (1, with --gif 6)")
    add("--length", type=cli.several, help="tokens per text, with bos and eos (drawn from the training lengths)")
    add("--sampler", "--solver", choices=bfn.SAMPLERS, default=DEFAULT.sampler, help="how to sample (%(default)s)")
    add("--steps", type=cli.steps, default=DEFAULT.steps, help="as in sample.py (%(default)s)")
    add("--corrections", type=cli.natural, default=DEFAULT.corrections, help="as in sample.py (%(default)s)")
    add("--gif", action="store_true", help="an animation of the texts that emerge, pale where they are uncertain")
    add_seed(add)
    add_device(add)


def add_compare_flags(add):
    add("run_dirs", nargs="+", type=cli.path, metavar="RUN_DIR", help="run folders, two or more")


def add_report_flags(add):
    add("run_dir", type=cli.path, metavar="RUN_DIR",
        help="run folder, also of a run that still trains, or exported folder")
    add_device(add)


def add_beta_flags(add):
    add("--beta", nargs="+", type=cli.positive, default=[], help="further values of beta(1) to draw")


def add_seed(add):
    add("--seed", type=cli.natural, default=0, help="seed of all random numbers (0)")


def add_device(add):
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (cuda if there is one)")


def add_cache(add):
    add("--cache_dir", type=cli.path, default=cache.default_cache_dir(),
        help="folder for tokenised corpora (%(default)s)")


def add_quality_flags(add):
    sources = "results.json of experiments/samplers.py, outputs of evaluate.py --json --calls=8,32"
    add("files", nargs="+", type=cli.path, metavar="FILE.json", help=sources)


PICTURES = {  # flags, and what draws the picture from them
    "simplex": (add_seed, draw_simplex),
    "beta": (add_beta_flags, draw_beta),
    "run": (add_run_flags, draw_run),
    "times": (add_times_flags, draw_times),
    "packing": (add_packing_flags, draw_packing),
    "sampling": (add_sampling_flags, draw_sampling),
    "quality": (add_quality_flags, draw_quality),
    "compare": (add_compare_flags, print_comparison),
    "report": (add_report_flags, draw_report),
}


def flags(picture):
    """Make the parser of one picture."""
    p = cli.Parser(next(line for line in __doc__.splitlines() if line.startswith(f"    python plot.py {picture} ")).strip())
    p.prog = f"plot.py {picture}"
    PICTURES[picture][0](p.add_argument)
    if picture == "report":  # its colours follow the reader's settings
        p.add_argument("--output", type=cli.path, help="page to write, .html (RUN_DIR/report.html)")
    elif picture != "compare":  # which is printed
        p.add_argument("--output", type=cli.path,
            help=f"picture to write, .png or .svg ({picture}.png)")
        p.add_argument("--dark", action="store_true", help="dark colours")
    return p


def endings(picture, args):
    """List the endings that --output may have, the default first."""
    if picture == "report":
        return [".html"]
    return [".gif"] if getattr(args, "gif", False) else [".png", ".svg"]


def main(argv=None):
    p = cli.Parser(__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("picture", choices=PICTURES, help="plot.py PICTURE --help lists its flags")
    words = sys.argv[1:] if argv is None else argv
    picture = p.parse_args(words[:1]).picture
    args = flags(picture).parse_args(words[1:])
    if picture == "compare":
        return print_comparison(args)
    allowed = endings(picture, args)
    folder = args.run_dir if picture == "report" else ""
    args.output = Path(args.output or os.path.join(folder, picture + allowed[0]))
    check_output(args.output, allowed)
    PICTURES[picture][1](args)
    print(f"{args.output}: {os.path.getsize(args.output) / 1000:.0f} KB")


if __name__ == "__main__":
    cli.run(main)
