"""Pictures, as PNG or SVG, light or dark: of the flow, of runs, of sampling; and a page of a run.

    python plot.py simplex                            the flow on three tokens; a network's pull
    python plot.py beta --beta 0.005                  how often the evidence names the token
    python plot.py run RUN_DIR [MORE ...] --watch     losses, bound, speed; while it trains
    python plot.py packing -d=TEXT -spm=TOKENIZER     rows before and after packing
    python plot.py sampling RUN_DIR [--gif]           certainty of each position at each call
    python plot.py quality RESULTS.json [MORE ...]    likelihoods and figures of samples by calls
    python plot.py compare RUN_DIR RUN_DIR ...        a table of what differs between runs
    python plot.py report RUN_DIR                     a page: data, figures, curves, texts
"""

import argparse
import json
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

from common import cli  # isort: skip - first, because of Ctrl-C
import numpy as np
from tqdm import tqdm

import data
from common import drawing, parallel
from common.drawing import MARK, check_output, save
from common.files import replacing
from common.noise import mix_seed
from plotting import pictures, report
from sample import Sampler
from sampling import generate
from sampling.generate import DEFAULT, Options, sample_batch
from sampling.prompts import read_breaks
from text import cache
from text.reading import Corpus
from text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from training.checkpoint import load, read_checkpoint, read_figures, read_metrics, without_folders

WATCH_SECONDS = 5
N_TEXTS = 5  # of the page of a run; fewer where rows are long
MOST_TOKENS = 512  # of them
N_ALTERNATIVES = 6  # at each network call
LEAST = 5  # per mille: less likely alternatives are left out
LINE_COLUMNS = 90  # of a text in an animation
PACKED_ROWS = 32  # that are drawn
SAMPLES = "sampler calls temperature calls_per_text figures".split()  # of experiments.samplers


# Each function returns what makes its figure, or saves what is no figure itself.


def draw_simplex(args):
    """Draw the flow on three tokens, and what a network adds."""
    return partial(pictures.simplex, args.seed)


def draw_beta(args):
    """Draw how often the evidence names the token, over t."""
    return partial(pictures.beta, args.beta)


# ---------------------------------------------------------------- run and compare


def short_names(paths):
    """Name each path by its last part, or whole where names of different paths agree -> list."""
    names = [path.resolve().name.removesuffix(".json") for path in paths]
    agree = len({path.resolve() for path in paths}) > len(set(names))
    return [str(path) for path in paths] if agree else names


def read_histories(run_dirs):
    """Read metrics.jsonl of each run -> {name of the folder, or path if names agree: lines}."""
    names = short_names([Path(run_dir) for run_dir in run_dirs])
    return {name: read_metrics(run_dir) for name, run_dir in zip(names, run_dirs, strict=True)}


def draw_run(args):
    """Draw the curves of runs: losses, bound, likelihood, speed; with --watch again and again."""
    if not args.watch:
        return partial(pictures.training, read_histories(args.run_dirs))
    print(f"{args.output}: drawn every {WATCH_SECONDS} seconds; Ctrl-C ends this", flush=True)
    with suppress(KeyboardInterrupt):
        while True:
            save(args.output, partial(pictures.training, read_histories(args.run_dirs)), args.dark)
            time.sleep(WATCH_SECONDS)
    return None


def print_comparison(args):
    """Print what differs between two or more runs, and what they reached."""
    run_dirs = list(dict.fromkeys(args.run_dirs))
    if len(run_dirs) < 2:
        raise ValueError("compare needs two or more run folders")
    histories = read_histories(run_dirs)
    checkpoints = [read_checkpoint(Path(run_dir) / "last.pt") for run_dir in run_dirs]
    table = [["", *histories], *difference(checkpoints), *results(histories)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())


def difference(checkpoints):
    """Yield the flags that differ between runs, and K and beta(1), as rows of cells."""
    facts = [{"K": c["config"]["K"], "beta(1)": c["config"]["beta1"]} for c in checkpoints]
    facts = [fact | checkpoint["args"] for fact, checkpoint in zip(facts, checkpoints, strict=True)]
    for name in dict.fromkeys(name for fact in facts for name in fact):
        values = [fact.get(name) for fact in facts]
        if name != "model_dir" and any(value != values[0] for value in values):
            yield [name, *map(to_cell, values)]


def results(histories):
    """Yield what runs reached as rows of cells, the figure's name first."""
    last = itemgetter(-1)
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
        values = [pictures.history(metrics, key)[1] for metrics in histories.values()]
        yield [name, *(to_cell(choose(v)) if v else "" for v in values)]


def to_cell(value):
    """Write a value into a cell of a table."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"


# ---------------------------------------------------------------- packing


def draw_packing(args):
    """Draw rows before and after packing."""
    if not args.data_path:
        raise ValueError("packing reads a text: give -d")
    path, row_length = args.data_path, args.sequence_length
    corpus = Corpus(path, args.text_field)
    if args.spm_model:
        tokenizer = load_tokenizer(args.spm_model)
    else:
        tokenizer = Tokenizer(train_tokenizer(corpus, "bpe", example=args.example))
    tokens = cache.load_corpus(corpus, tokenizer, args.cache_dir, example=args.example)
    title = f"{Path(path).name}: {tokens.n_documents:,} examples in rows of {row_length} tokens"
    return partial(pictures.packing, packed_rows(tokens, row_length), title)


def packed_rows(tokens, row_length):
    """Lay out rows of one window each, and those of the first epoch -> {title: segment_ids}."""
    plan = data.plan_validation(tokens, row_length, PACKED_ROWS)
    order = np.argsort(plan.starts)  # as in the text
    single = data.Plan(plan.starts[order], plan.lengths[order], np.arange(len(order) + 1))
    packed = data.plan_epoch(tokens, row_length, seed=0, epoch=0)
    rows = {}
    for name, plan in (("one example a row", single), ("packed", packed)):
        title = f"{name}: {plan.fill(row_length):.1%} filled, {plan.n_rows:,} rows"
        numbers = np.arange(min(PACKED_ROWS, plan.n_rows))
        rows[title] = data.gather_rows(tokens, plan, numbers, row_length)[1]
    return rows


# ---------------------------------------------------------------- sampling


def record(sampler, prompts, controls, bar, n=1, seed=0, length=None):
    """Sample a text for each prompt -> [(ids, calls)], without bos. bar: counts network calls.

    calls: of each network call the n likeliest ids and their probabilities, 1 for a given token,
    both (L, n).
    """
    recorded = []

    def watch(t, p, given):
        """See bfn.Controls: p (B, L, K), given (B, L)."""
        share, ids = p.topk(min(n, p.shape[-1]))
        share = share.masked_fill(given[..., None], 1.0)
        recorded.append((ids.cpu().numpy(), share.cpu().numpy()))
        bar.update()

    options = Options(replace(controls, watch=watch))
    read = {prompt: sampler.read(prompt, length, options) for prompt in prompts}
    seeds = [mix_seed(seed, i) for i in range(len(prompts))]
    templates = [read[prompt].draw(s) for prompt, s in zip(prompts, seeds, strict=True)]
    samples = sample_batch(sampler.model, sampler.tokenizer, templates, seeds, options)
    texts = []
    for row, (ids, n_calls) in enumerate(samples):
        part = slice(int(ids[0] == sampler.tokenizer.bos), len(ids))
        calls = [(k[row, part], share[row, part]) for k, share in recorded[:n_calls]]
        texts.append((ids[part], calls))
    return texts


def draw_sampling(args):
    """Draw how certain each position is at each network call, or the texts as they emerge."""
    sampler = Sampler.load(args.run_dir, args.checkpoint, args.device)
    if (args.length or 0) > sampler.limit:
        raise ValueError(f"--length={args.length}: the model draws up to {sampler.limit} tokens")
    n = args.num_samples or (6 if args.gif else 1)
    prompts = [read_breaks(text, sampler.run) for text in args.prompt or [""] for _ in range(n)]
    controls = generate.options_of(args).controls
    no_bar = tqdm(disable=True)
    texts = record(sampler, prompts, controls, no_bar, seed=args.seed, length=args.length)
    title = f"{args.sampler}, {args.run_dir}, step {sampler.run['step']:,}"
    if args.gif:
        with drawing.style(args.dark):
            images = pictures.emerging(to_frames(texts, sampler.tokenizer), title)
        with replacing(args.output) as temporary:
            pictures.save_gif(temporary, images, MARK)
        return None
    shown = []
    for ids, calls in texts:
        labels = [piece or "(end)" for piece in to_pieces(ids, sampler.tokenizer)]
        shown.append((labels, np.stack([share[:, 0] for _, share in calls])))
    return partial(pictures.certainty, shown, title)


def to_piece(k, tokenizer, end=""):
    """Write a token with the space before it, eos as `end`."""
    return end if k == tokenizer.eos else tokenizer.piece_text(k)


def to_pieces(ids, tokenizer):
    """Write tokens for one line: an arrow for a line break, eos as nothing."""
    return [to_piece(k, tokenizer).replace("\n", "\u21b5") for k in ids]


def to_frames(texts, tokenizer):
    """List what texts of `record` show at each call -> frames[i][line] = [(piece, certainty)].

    A text that is done stays as it is. What is drawn in its last call counts as certain.
    """
    frames = [[] for _ in range(max(len(calls) for _, calls in texts))]
    for ids, calls in texts:
        lines = wrap(to_pieces(ids, tokenizer))
        for i, frame in enumerate(frames):
            k, share = ids, np.ones(len(ids))
            if i + 1 < len(calls):
                k, share = (x[:, 0] for x in calls[i])
            shown = list(zip(to_pieces(k, tokenizer), share, strict=True))
            frame += [shown[line] for line in lines]
    return frames


def wrap(pieces):
    """Split the pieces of a text into lines of about LINE_COLUMNS, at words -> list of slices."""
    begins, n = [0], 0
    for i, piece in enumerate(pieces):
        if n + len(piece) > LINE_COLUMNS and piece.startswith(" "):
            begins, n = [*begins, i], 0
        n += len(piece)
    return [slice(*ends) for ends in pairwise([*begins, len(pieces)])]


# ---------------------------------------------------------------- quality


def draw_quality(args):
    """Draw what evaluate.py --json and experiments.samplers write: by network calls, by time.

    With results.json of experiments.compare, named by their folders, it is one page: the exact
    likelihoods of training, and the frontier of the samples.
    """
    exact, by_time, training, results = {}, {}, {}, []
    paths = [Path(path) for path in args.files]
    named = zip(args.files, short_names(paths), short_names([p.parent for p in paths]), strict=True)
    for path, name, folder in named:
        content = read_json(path)
        if is_records(content, "name", "curve") and all(has_curve(r) for r in content):
            training.setdefault(folder, []).extend(content)
            continue
        if is_records(content, *SAMPLES) and not results:
            results = content
            continue
        is_evaluation = isinstance(content, dict) and "bound_nats_per_token" in content
        curve = exact_by_calls(content) if is_evaluation else None
        if curve:
            exact[name] = curve
        if is_evaluation and "by_time" in content:
            by_time[name] = list(content["by_time"].values())
        elif not curve:
            known = "outputs of evaluate.py --json, results.json of experiments.compare, and one of"
            raise ValueError(f"{path} is not one of the files to give: {known} samplers")
    title = "" if training else ", ".join(Path(path).name for path in args.files)
    return partial(pictures.quality_figure, exact, results, title, by_time, training)


def read_json(path):
    """Read a JSON file. Raises ValueError if it is missing or is none."""
    if not os.path.isfile(path):
        raise ValueError(f"no file at {path}")
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError:
        raise ValueError(f"{path} is not JSON") from None


def is_records(content, *needed):
    """Tell whether this is a list of dictionaries with these keys."""
    is_list = isinstance(content, list) and bool(content)
    return is_list and all(isinstance(x, dict) and {*needed} <= x.keys() for x in content)


def has_curve(record):
    """Tell whether the curve of a record is a list of (minutes, tokens, bound, exact)."""
    curve = record["curve"]
    return isinstance(curve, list) and bool(curve) and all(np.shape(x) == (4,) for x in curve)


def exact_by_calls(content):
    """Find the exact likelihoods in what evaluate.py --json prints.

    -> (calls, nats per token, errors, bound), or None if there are none.
    """
    points = []
    for name, nats in content.items():
        if match := re.fullmatch(r"exact_(\d+)_calls?_nats_per_token", name):
            error = content[name.replace("nats", "text_error_nats")] or 0.0
            points.append((int(match[1]), nats, error))
    if not points:
        return None
    calls, nats, errors = zip(*sorted(points), strict=True)
    return calls, nats, errors, content["bound_nats_per_token"]


# ---------------------------------------------------------------- report


def draw_report(args):
    """Write the page of a run: data, figures, curves, samples, texts at each network call."""
    content = run_page(Path(args.run_dir), parallel.find_device(args.device))
    with replacing(args.output) as temporary:  # names of files may not be UTF-8
        temporary.write_text(content, encoding="utf-8", errors="backslashreplace")


def run_page(run_dir, device):
    """Describe what there is of a run folder, or an exported one -> HTML.

    Raises ValueError if there is nothing to show, or if a file is damaged.
    """
    if not run_dir.is_dir():
        raise ValueError(f"no folder at {run_dir}: give a run folder")
    metrics = read_metrics(run_dir) if (run_dir / "metrics.jsonl").is_file() else []
    best = "best.pt", "model.safetensors", "config.json"
    has_best = any((run_dir / name).is_file() for name in best)
    which = "best" if has_best else "last" if (run_dir / "last.pt").is_file() else None
    if not which and not metrics:
        missing = "no checkpoint and no metrics; train, or give another folder"
        raise ValueError(f"{run_dir} has nothing to show yet: {missing}")
    sampler = found = texts = None
    if which:
        sampler = Sampler(*load(run_dir, which, device))
        run = sampler.run
        run["args"] = without_folders(run["args"])
        found = read_figures(run_dir, run["step"]) or run.get("figures", {})
        texts = sample_texts(sampler)
    samples = report.read_samples(run_dir)
    return report.page(run_dir.resolve().name, metrics, samples, sampler, found, texts)


def sample_texts(sampler):
    """Sample the texts that sample.py prints first -> dict: texts, and the pieces of their ids.

    Each text has its ids, and calls[i][position] = [id, per mille, id, ...].
    """
    n_texts = min(N_TEXTS, max(1, MOST_TOKENS // sampler.limit))
    n_calls = DEFAULT.steps + DEFAULT.corrections
    with tqdm(total=n_calls, desc="sampling", unit="call", disable=None) as bar:
        recorded = record(sampler, [""] * n_texts, DEFAULT, bar, N_ALTERNATIVES)
    texts, used = [], set()
    for ids, calls in recorded:
        calls = [[likely(*pair) for pair in zip(*call, strict=True)] for call in calls]
        texts.append(dict(ids=ids, calls=calls))
        used.update(ids, *(position[::2] for call in calls for position in call))
    pieces = {k: to_piece(k, sampler.tokenizer, " (end)") for k in sorted(used)}
    return dict(texts=texts, pieces=pieces)


def likely(ids, share):
    """Keep the first token and those that are likely enough: (n,) -> [id, per mille, id, ...]."""
    per_mille = (1000 * share).round().astype(int)
    n = max(1, (per_mille >= LEAST).sum())
    return np.stack([ids, per_mille], -1)[:n].flatten().tolist()


# ---------------------------------------------------------------- the command

FLAGS = {
    "run_dir": dict(type=cli.path, metavar="RUN_DIR",
        help="run folder, also of a run that still trains; for the report an exported one too"),
    "run_dirs": dict(nargs="+", type=cli.path, metavar="RUN_DIR", help="run folders"),
    "files": dict(nargs="+", type=cli.path, metavar="FILE.json",
        help="results.json of experiments.samplers and .compare, outputs of evaluate.py --json"),
    "--watch": dict(action="store_true",
        help=f"draw again every {WATCH_SECONDS} seconds until Ctrl-C"),
    "--beta": dict(nargs="+", type=cli.positive, default=[],
        help="further values of beta(1) to draw"),
    "-d --data_path": dict(type=cli.path, help="text file"),
    "-spm --spm_model": dict(type=cli.path,
        help="SentencePiece model (a bpe is trained on the text)"),
    "-slen --sequence_length": dict(type=cli.row_length, default=128, help="tokens of a row (128)"),
    "--prompt": dict(action="append", default=[], help="as in sample.py; repeatable"),
    "--num_samples": dict(type=cli.count, help="texts per prompt (1, with --gif 6)"),
    "--length": dict(type=cli.several,
        help="tokens per text, with bos and eos (drawn from the training lengths)"),
    "--gif": dict(action="store_true",
        help="an animation of the texts that emerge, pale where they are uncertain"),
    "--output": dict(type=cli.path, help="file to write (PICTURE.png, RUN_DIR/report.html)"),
    "--dark": dict(action="store_true", help="dark colours"),
} | cli.FLAGS | generate.FLAGS
RUN = "run_dir --device"
SAMPLING = "--prompt --num_samples --length --sampler --steps --corrections --temperature"
PICTURES = {  # what draws it, and its flags
    "simplex": (draw_simplex, "--seed --output --dark"),
    "beta": (draw_beta, "--beta --output --dark"),
    "run": (draw_run, "run_dirs --watch --output --dark"),
    "packing": (draw_packing, "-d -spm --text_field --example -slen --cache_dir --output --dark"),
    "sampling": (draw_sampling, f"{RUN} --checkpoint {SAMPLING} --gif --seed --output --dark"),
    "quality": (draw_quality, "files --output --dark"),
    "compare": (print_comparison, "run_dirs"),
    "report": (draw_report, f"{RUN} --output"),  # its colours follow the reader's settings
}


def flags(picture):
    """Make the parser of one picture."""
    draw, chosen = PICTURES[picture]
    p = cli.Parser(draw.__doc__)
    p.prog = f"python plot.py {picture}"
    p.add_flags(chosen, FLAGS)
    return p


def main(argv=None):
    p = cli.Parser(__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("picture", choices=PICTURES, help="plot.py PICTURE --help lists its flags")
    words = sys.argv[1:] if argv is None else argv
    picture = p.parse_args(words[:1]).picture
    args = flags(picture).parse_args(words[1:])
    draw, _ = PICTURES[picture]
    if picture == "compare":
        return draw(args)
    endings, folder = [".png", ".svg"], ""
    if picture == "report":
        endings, folder = [".html"], args.run_dir
    elif getattr(args, "gif", False):
        endings = [".gif"]
    args.output = Path(args.output or os.path.join(folder, picture + endings[0]))
    check_output(args.output, endings)
    if make_figure := draw(args):
        save(args.output, make_figure, args.dark)
    print(f"{args.output}: {os.path.getsize(args.output) / 1000:.0f} KB")


if __name__ == "__main__":
    cli.run(main)
