"""Compare solvers at equal numbers of network calls, in one table and one picture.

    python experiments/samplers.py -mdir=runs/demo --infill=200
    python experiments/samplers.py -mdir=RUN_DIR -d=VALID.txt --num_samples=64 --length=128

Each solver's texts stand beside as many held-out ones (evaluate.py's figures, with bootstrap intervals); those of the
built-in language are checked for grammar as well, and their fills of gaps are held against the exact conditional.
"""

import json
import math
import random
import sys
import time
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bfn
import cli
import data
import evaluate
import plot
import quality
import toy
from model import load
from prompts import GAP, make_template
from sample import Options, decode, generate

CALLS = 5, 10, 20, 50, 100
MOST_CALLS = 500  # of the ancestral sampler alone


def options_of(solver, calls, run, grid):
    """Options that make so many network calls."""
    steps = calls if solver == "commit" else calls - 1
    return Options(solver, steps, run["loss_by_time"] if grid == "learned" else None)


def share(hits):
    """Share of true values and its 95 % interval -> (value, low, high)."""
    p = sum(hits) / len(hits)
    error = 1.96 * math.sqrt(p * (1 - p) / len(hits))
    return p, p - error, p + error


def judge(texts, reference, is_toy, seed):
    """Figures of texts; for the built-in language the share of grammatical ones as well."""
    figures = quality.figures(texts, reference, seed)
    if is_toy:
        figures = {"grammatical": share([toy.is_grammatical(text) for text in texts]), **figures}
    return figures


def infill(model, tokenizer, sentences, options, seed):
    """Fill a gap of one to four words in each sentence -> share grammatical, mean log P(words | surroundings) in nats.

    Of the fills that are grammatical; that of the true words is `sentences` filled with themselves.
    """
    rng, gaps = random.Random(seed), []
    for sentence in sentences:
        words = sentence.split()
        n = rng.randint(1, min(4, len(words)))
        begin = rng.randint(0, len(words) - n)
        gaps.append((words, begin, begin + n))
    bos, eos = [tokenizer.bos_id()], [tokenizer.eos_id()]
    templates = [
        bos + [GAP if i <= k < j else tokenizer.encode(word)[0] for k, word in enumerate(words)] + eos
        for words, i, j in gaps
    ]
    filled = [decode(tokenizer, ids).split() for ids, _ in generate(model, tokenizer, templates, seed, options)]
    total = [toy.probability([*words[:i], *[None] * (j - i), *words[j:]]) for words, i, j in gaps]

    def nats(texts):
        p = [toy.probability(text) / z for text, z in zip(texts, total, strict=True)]
        return share([x > 0 for x in p]), sum(math.log(x) for x in p if x > 0) / max(1, sum(x > 0 for x in p))

    return nats(filled), nats([words for words, _, _ in gaps])


def compare(model, tokenizer, run, jobs, templates, reference, is_toy, args):
    """Sample with each (solver, calls) -> rows {solver, calls, seconds, n, figures}."""
    rows = []
    for solver, calls in tqdm(jobs, disable=None):
        begin, options = time.perf_counter(), options_of(solver, calls, run, args.time_grid)
        samples = list(generate(model, tokenizer, templates, args.seed, options))
        seconds = time.perf_counter() - begin
        texts, made = [decode(tokenizer, ids) for ids, _ in samples], sum(n for _, n in samples) / len(samples)
        figures = judge(texts, reference, is_toy, args.seed)
        rows.append(dict(solver=solver, calls=calls, made=made, seconds=seconds, n=len(texts), figures=figures))
    return rows


def table(rows):
    """Rows -> Markdown lines."""
    names = list(rows[0]["figures"])
    lines = ["| solver | calls | " + " | ".join(names) + " | texts/s |", "|" + "---|" * (len(names) + 3)]
    for r in rows:
        cells = [f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in r["figures"].values()]
        speed = f"{r['n'] / r['seconds']:.1f}" if r["seconds"] else ""
        lines.append(f"| {r['solver']} | {r['made']:.4g} | " + " | ".join(cells) + f" | {speed} |")
    return lines


def infill_table(model, tokenizer, run, jobs, sentences, args):
    """Fill gaps with each (solver, calls) -> Markdown lines."""
    lines = ["", "| solver | calls | fills grammatical | mean log P of fills | of the true words |", "|" + "---|" * 5]
    for solver, calls in jobs:
        options = options_of(solver, calls, run, args.time_grid)
        (good, nats), (_, true) = infill(model, tokenizer, sentences, options, args.seed)
        lines.append(f"| {solver} | {calls} | {good[0]:.3f} [{good[1]:.3f}, {good[2]:.3f}] | {nats:.2f} | {true:.2f} |")
    return lines


def picture(rows, solvers, calls, is_toy, path, title):
    """Draw the share of grammatical texts, or n-gram perplexity, over network calls."""
    figure = "grammatical" if is_toy else "n-gram perplexity"
    series = {}
    for solver in solvers:
        series[solver] = tuple(
            zip(*((r["made"], r["figures"][figure][0]) for r in rows if r["solver"] == solver), strict=True)
        )
    value = rows[0]["figures"][figure][0]
    series["held-out text"] = ([min(calls), max(calls)], [value, value])
    plot.lines(path, series, "network calls", figure, title, log=True)


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add, solvers = p.add_argument, ["commit", *bfn.SOLVERS]
    add("-mdir", "--model_dir", default="runs/demo", help="run folder (runs/demo)")
    add("-d", "--data_path", help="held-out text (the built-in language's validation part)")
    add("--corpus", help="training text that texts are held against (the one trained on)")
    add("--solvers", nargs="+", choices=solvers, default=solvers, help="(all)")
    add("--calls", nargs="+", type=cli.several, default=[*CALLS], help="network calls (5 10 20 50 100)")
    add("--time_grid", choices=["uniform", "learned"], default="uniform", help="of the flow's solvers (uniform)")
    add("--num_samples", type=cli.several, default=256, help="texts (256)")
    add("--length", type=cli.several, help="tokens of a text (those of the held-out texts)")
    add("--infill", type=cli.natural, default=0, help="sentences of the built-in language to fill gaps in (0)")
    add("--seed", type=cli.natural, default=0, help="of everything random (0)")
    add("--device", default="auto", help="cpu, cuda, ... (cuda where there is one)")
    add("--cache_dir", default=data.default_cache_dir(), help="folder for tokenised corpora (%(default)s)")
    add("--output", default="runs/samplers", help="folder for results.json, .md and .png (runs/samplers)")
    return p


def main():
    args = flags().parse_args()
    model, tokenizer, run = load(args.model_dir, device=cli.device(args.device))
    is_toy, folder = run["args"]["data_path"] is None, Path(args.output)
    if args.infill and not is_toy:
        raise ValueError("--infill is for the built-in language, whose exact conditionals are known")
    corpus, part = evaluate.find_corpus(args, run)
    held_out, held_out_part = (args.data_path, "all") if args.data_path else (corpus, "val")
    tokens = data.load_corpus(held_out, Path(args.model_dir) / "tokenizer.model", args.cache_dir, held_out_part)
    reference = quality.Reference.fit(corpus, tokenizer, part)
    window = args.length or run["args"]["sequence_length"]
    real, lengths = evaluate.choose_texts(tokens, tokenizer, window, args.num_samples, args.seed)
    templates = [make_template("", tokenizer, run, i, n) for i, n in enumerate(lengths)]
    jobs = [(solver, calls) for solver in args.solvers for calls in args.calls]
    rows = [
        dict(
            solver="held-out text",
            calls=0,
            made=0,
            seconds=0,
            n=len(real),
            figures=judge(real, reference, is_toy, args.seed),
        )
    ]
    most = [("ancestral", MOST_CALLS)] * ("ancestral" in args.solvers)
    rows += compare(model, tokenizer, run, jobs + most, templates, reference, is_toy, args)
    lines = table(rows)
    if args.infill:
        sentences = [piece.text for piece in data.read_part(corpus, "val")][: args.infill]
        lines += infill_table(model, tokenizer, run, [job for job in jobs if job[1] <= 20], sentences, args)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(rows, indent=1))
    (folder / "results.md").write_text("\n".join(lines) + "\n")
    picture(rows, args.solvers, args.calls, is_toy, folder / "results.png", str(args.model_dir))
    print("\n".join(lines))


if __name__ == "__main__":
    cli.run(main)
