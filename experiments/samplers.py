"""Compare solvers at equal numbers of network calls, in one table and one picture.

    python experiments/samplers.py -mdir=runs/demo --infill=200
    python experiments/samplers.py -mdir=RUN_DIR -d=VALID.txt --num_samples=64 --length=128
    python experiments/samplers.py -mdir=runs/demo --calls=20 --temperatures 0.6 0.8 1.2 --top_ps 0.8 0.9

Each solver's texts stand beside as many held-out ones (evaluate.py's figures, with bootstrap intervals); those of the
built-in language are checked for grammar as well, and their fills of gaps are held against the exact conditional.
"corrected" is sample.py's default, commit with corrections: a third of its calls, at most four; "commit" makes none.
Both make fewer calls than asked for where a text has fewer tokens. Temperatures and shares top-p in place of 1 trade
diversity for quality: a second picture shows the one over the other.
"""

import json
import math
import random
import sys
import time
from dataclasses import asdict, dataclass
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
from checkpoint import load
from prompts import GAP, make_template
from sample import Options, decode, generate
from text import read_part

FLOW_SAMPLERS = [name for name in bfn.SAMPLERS if name != "commit"]
CALLS = 5, 10, 20, 50, 100
MOST_CALLS = 500  # of the ancestral sampler alone
CORRECTED = "corrected"  # commit, the last of its calls corrections


@dataclass(frozen=True)
class Job:
    """One way to sample."""

    solver: str
    calls: int
    temperature: float = 1.0
    top_p: float = 1.0

    def options(self, curve):
        """Options that make so many network calls; curve is the loss by time for a learned time grid, or None."""
        controls = dict(curve=curve, temperature=self.temperature, top_p=self.top_p)
        if self.solver in FLOW_SAMPLERS:
            return Options(self.solver, self.calls - 1, **controls)
        corrections = min(Options.corrections, self.calls // 3) if self.solver == CORRECTED else 0
        return Options("commit", self.calls - corrections, corrections, **controls)


def plan(args):
    """All jobs: solvers by calls, each of these at every temperature and top-p, and the longest ancestral one."""
    controls = [(1.0, 1.0), *((T, 1.0) for T in args.temperatures), *((1.0, p) for p in args.top_ps)]
    jobs = [Job(solver, calls, *control) for solver in args.solvers for calls in args.calls for control in controls]
    jobs = list(dict.fromkeys(jobs))
    return jobs + [Job("ancestral", MOST_CALLS)] * ("ancestral" in args.solvers)


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
    """Sample by each job, yielding rows {solver, calls, temperature, top_p, made, seconds, n, figures}."""
    for job in tqdm(jobs, disable=None):
        begin = time.perf_counter()
        samples = list(generate(model, tokenizer, templates, args.seed, job.options(curve_of(run, args))))
        seconds = time.perf_counter() - begin
        texts, made = [decode(tokenizer, ids) for ids, _ in samples], sum(n for _, n in samples) / len(samples)
        figures = judge(texts, reference, is_toy, args.seed)
        yield dict(asdict(job), made=made, seconds=seconds, n=len(texts), figures=figures)


def curve_of(run, args):
    return run["loss_by_time"] if args.time_grid == "learned" else None


def table(rows):
    """Rows -> Markdown lines."""
    names = list(rows[0]["figures"])
    columns = ["solver", "calls", "temperature", "top-p", *names, "texts/s"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for r in rows:
        cells = [r["solver"], f"{r['made']:.4g}", f"{r['temperature']:g}", f"{r['top_p']:g}"]
        cells += [f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in r["figures"].values()]
        cells.append(f"{r['n'] / r['seconds']:.1f}" if r["seconds"] else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def infill_table(model, tokenizer, run, jobs, sentences, args):
    """Fill gaps by each job -> Markdown lines."""
    lines = ["", "| solver | calls | fills grammatical | mean log P of fills | of the true words |", "|" + "---|" * 5]
    for job in jobs:
        (good, nats), (_, true) = infill(model, tokenizer, sentences, job.options(curve_of(run, args)), args.seed)
        shown = f"{good[0]:.3f} [{good[1]:.3f}, {good[2]:.3f}]"
        lines.append(f"| {job.solver} | {job.calls} | {shown} | {nats:.2f} | {true:.2f} |")
    return lines


def pictures(rows, is_toy, folder, title):
    """Draw the share of grammatical texts, or n-gram perplexity, over network calls, and over the diversity of the text."""
    quality_figure = "grammatical" if is_toy else "n-gram perplexity"
    held_out, by_calls, by_diversity = rows[0]["figures"], {}, {}
    for r in rows[1:]:
        value, diversity = r["figures"][quality_figure][0], r["figures"]["distinct bigrams"][0]
        if r["temperature"] == r["top_p"] == 1:
            by_calls.setdefault(r["solver"], []).append((r["made"], value))
        for control in ("temperature", "top_p"):
            if r["temperature" if control == "top_p" else "top_p"] == 1:
                name = f"{r['solver']}, {r['calls']} calls, by {control}"
                by_diversity.setdefault(name, []).append((r[control], diversity, value))
    made = [r["made"] for r in rows[1:]]
    lines = {solver: tuple(zip(*sorted(points), strict=True)) for solver, points in by_calls.items()}
    lines["held-out text"] = ([min(made), max(made)], [held_out[quality_figure][0]] * 2)
    plot.lines(folder / "results.png", lines, "network calls", quality_figure, title, log=True)
    lines = {name: tuple(zip(*sorted(points), strict=True))[1:] for name, points in by_diversity.items() if len(points) > 1}
    if lines:
        xs, ys = ([min(v), max(v)] for v in ([x for line in lines.values() for x in line[i]] for i in (0, 1)))
        lines["diversity of held-out text"] = ([held_out["distinct bigrams"][0]] * 2, ys)
        lines["quality of held-out text"] = (xs, [held_out[quality_figure][0]] * 2)
        plot.lines(folder / "diversity.png", lines, "distinct bigrams", quality_figure, title)


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add, solvers = p.add_argument, [CORRECTED, "commit", *FLOW_SAMPLERS]
    add("-mdir", "--model_dir", default="runs/demo", help="run folder (runs/demo)")
    add("-d", "--data_path", help="held-out text (the built-in language's validation part)")
    add("--corpus", help="training text that texts are held against (the one trained on)")
    add("--solvers", nargs="+", choices=solvers, default=solvers, help="(all)")
    add("--calls", nargs="+", type=cli.several, default=[*CALLS], help="network calls (5 10 20 50 100)")
    add("--time_grid", choices=["uniform", "learned"], default="uniform", help="of the flow's solvers (uniform)")
    add("--temperatures", nargs="+", type=cli.positive, default=[], help="of the output, besides 1")
    add("--top_ps", nargs="+", type=cli.above_zero_to_one, default=[], help="shares of the output kept, besides 1")
    add("--num_samples", type=cli.several, default=256, help="texts (256)")
    add("--length", type=cli.several, help="tokens of a text (those of the held-out texts)")
    add("--infill", type=cli.natural, default=0, help="sentences of the built-in language to fill gaps in (0)")
    add("--seed", type=cli.natural, default=0, help="of everything random (0)")
    add("--device", default="auto", help="cpu, cuda, ... (cuda where there is one)")
    add("--cache_dir", default=data.default_cache_dir(), help="folder for tokenised corpora (%(default)s)")
    add("--output", default="runs/samplers", help="folder for results.json, .md and pictures (runs/samplers)")
    return p


def main():
    args = flags().parse_args()
    model, tokenizer, run = load(args.model_dir, device=cli.device(args.device))
    is_toy, folder = run["args"]["data_path"] is None, Path(args.output)
    if args.infill and not is_toy:
        raise ValueError("--infill is for the built-in language, whose exact conditionals are known")
    if args.time_grid == "learned" and not run["loss_by_time"]:
        raise ValueError("this checkpoint is from before the first validation: use --time_grid=uniform")
    trained = run["args"]["sequence_length"]
    if (args.length or 0) > trained:
        raise ValueError(f"--length={args.length}, but the model was trained on texts of at most {trained} tokens")
    corpus, part = evaluate.find_corpus(args, run)
    held_out, held_out_part = (args.data_path, "all") if args.data_path else (corpus, "val")
    tokens = data.load_corpus(held_out, Path(args.model_dir) / "tokenizer.model", args.cache_dir, held_out_part)
    reference = quality.Reference.fit(corpus, tokenizer, part)
    real, lengths = evaluate.choose_texts(tokens, tokenizer, args.length or trained, args.num_samples, args.seed)
    templates = [make_template("", tokenizer, run, i, n) for i, n in enumerate(lengths)]
    judged = judge(real, reference, is_toy, args.seed)
    rows = [dict(asdict(Job("held-out text", 0)), made=0, seconds=0, n=len(real), figures=judged)]
    folder.mkdir(parents=True, exist_ok=True)
    for row in compare(model, tokenizer, run, plan(args), templates, reference, is_toy, args):
        rows.append(row)
        (folder / "results.json").write_text(json.dumps(rows, indent=1))  # an hour's work is not lost
        (folder / "results.md").write_text("\n".join(table(rows)) + "\n")
    lines = table(rows)
    if args.infill:
        sentences = [piece.text for piece in read_part(corpus, "val")][: args.infill]
        jobs = [Job(solver, calls) for solver in args.solvers for calls in args.calls if calls <= 20]
        lines += infill_table(model, tokenizer, run, jobs, sentences, args)
    (folder / "results.md").write_text("\n".join(lines) + "\n")
    pictures(rows, is_toy, folder, str(args.model_dir))
    print("\n".join(lines))


if __name__ == "__main__":
    cli.run(main)
