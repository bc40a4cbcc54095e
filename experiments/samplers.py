"""Compare samplers at equal numbers of network calls, in a table and a picture.

    python -m experiments.samplers -mdir=runs/demo --infill=200
    python -m experiments.samplers -mdir=RUN_DIR -d=VALID.txt --num_samples=64 --length=128
    python -m experiments.samplers -mdir=runs/demo --calls=20 --temperatures 0.6 0.8 1.2 --top_ps 0.8 0.9

The texts of each sampler are compared with equally many held-out texts, by the figures of quality.py with bootstrap
intervals. For a model of the built-in language, their grammar is checked as well, and what it fills into gaps is compared
with the exact conditional distribution.

"pace" is the default of sample.py, with a third of the calls, at most four, used for corrections; "uncorrected" is pace
without corrections. These and "commit" make fewer calls than asked for if a text has fewer tokens. Temperatures and top-p
other than 1 trade diversity for quality: the last panel of the picture shows quality over diversity.
"""

import json
import math
import random
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import bfn
import evaluate
from common import cli, drawing, parallel
from data import pad
from evaluation import quality
from experiments.compare import Causal
from plotting import pictures
from sampling.generate import DEFAULT, Options, generate
from sampling.prompts import GAP, make_template
from text import cache, toy
from text.reading import read_part
from text.tokenizer import add_marks, decode
from training.checkpoint import load

FILLING = ["pace", "uncorrected", "commit"]  # they fill a few positions in each call
SOLVERS = [name for name in bfn.SAMPLERS if name not in FILLING]
CALLS = 5, 10, 20, 50, 100
MOST_CALLS = 500  # only of the ancestral sampler
HELD_OUT = "held-out text"
MAX_GAP = 4  # words
MAX_INFILL_CALLS = 20  # --infill leaves out jobs with more network calls


@dataclass(frozen=True)
class Job:
    """One way to sample."""

    sampler: str
    calls: int
    temperature: float = 1.0
    top_p: float = 1.0

    def options(self):
        """Make the Options with this number of network calls."""
        controls = dict(temperature=self.temperature, top_p=self.top_p)
        if self.sampler not in FILLING:
            return Options(bfn.Controls(self.sampler, self.calls - 1, **controls))
        corrections = min(DEFAULT.corrections, self.calls // 3) if self.sampler == "pace" else 0
        sampler = "pace" if self.sampler == "uncorrected" else self.sampler
        return Options(bfn.Controls(sampler, self.calls - corrections, corrections, **controls))


def plan(args):
    """List all jobs: each sampler with each number of calls at each temperature and top-p, and one long ancestral job."""
    controls = [(1.0, 1.0), *((T, 1.0) for T in args.temperatures), *((1.0, p) for p in args.top_ps)]
    jobs = [Job(sampler, calls, *control) for sampler in args.samplers for calls in args.calls for control in controls]
    jobs = list(dict.fromkeys(jobs))
    return jobs + [Job("ancestral", MOST_CALLS)] * ("ancestral" in args.samplers)


# ---------------------------------------------------------------- sampling


class Judge:
    """An autoregressive language model of `compare.py autoregressive`, which tells how likely it finds texts."""

    def __init__(self, run_dir, device):
        self.model, self.tokenizer, run = load(run_dir, device=device, network=Causal)
        self.length = run["args"]["sequence_length"]

    @torch.no_grad()
    def nats(self, texts):
        """Compute -log P of the tokens of each text, up to the trained length -> nats (n,), tokens (n,)."""
        templates = [add_marks(self.tokenizer.encode(text), self.tokenizer)[: self.length] for text in texts]
        nats, n_tokens = [], []
        for template in templates:
            ids, segment_ids = pad([template or [0]], next(self.model.parameters()).device)
            scored = (ids != self.tokenizer.bos_id()) & bool(template)
            one_hot = torch.nn.functional.one_hot(ids, self.model.config.K).float()
            log_p = self.model(one_hot, torch.ones(ids.shape, device=ids.device), segment_ids).log_softmax(-1)
            nats.append((bfn.cross_entropy(log_p, ids) * scored).sum().item())
            n_tokens.append(scored.sum().item())
        return np.array(nats), np.array(n_tokens)

    def perplexity(self, texts, seed):
        """Compute the perplexity per token of texts, and its 95 % interval from the bootstrap over texts."""
        nats, n_tokens = self.nats(texts)
        chosen = np.random.default_rng(seed).integers(len(texts), size=(quality.N_RESAMPLES, len(texts)))
        value = math.exp(nats.sum() / max(1, n_tokens.sum()))
        margin = 1.96 * np.exp(nats[chosen].sum(1) / np.maximum(1, n_tokens[chosen].sum(1))).std()
        return value, value - margin, value + margin


def share(hits):
    """Compute the share of true values and its 95 % interval -> (value, low, high)."""
    p = sum(hits) / len(hits)
    error = 1.96 * math.sqrt(p * (1 - p) / len(hits))
    return p, p - error, p + error


def measure(texts, reference, is_toy, judge, seed):
    """Compute the figures of texts, with a Judge its perplexity, for the built-in language the share of grammatical texts."""
    measured = quality.figures(texts, reference, seed)
    if judge:
        measured["judge's perplexity"] = judge.perplexity(texts, seed)
    if is_toy:
        measured = {"grammatical": share([toy.is_grammatical(text) for text in texts]), **measured}
    return measured


def sample_jobs(model, tokenizer, run, jobs, templates, reference, is_toy, judge, args):
    """Sample with each job and yield its result {the job's fields, calls_per_text, seconds, n_texts, figures}."""
    for job in tqdm(jobs, disable=None):
        begin = time.perf_counter()
        samples = list(generate(model, tokenizer, templates, args.seed, job.options()))
        seconds = time.perf_counter() - begin
        texts = [decode(tokenizer, ids) for ids, _ in samples]
        calls_per_text = sum(calls for _, calls in samples) / len(samples)
        measured = measure(texts, reference, is_toy, judge, args.seed)
        yield dict(asdict(job), calls_per_text=calls_per_text, seconds=seconds, n_texts=len(texts), figures=measured)


def table(results):
    """Lay out results -> Markdown lines."""
    columns = ["sampler", "calls", "temperature", "top-p", *results[0]["figures"], "texts/s"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for r in results:
        cells = [r["sampler"], f"{r['calls_per_text']:.4g}", f"{r['temperature']:g}", f"{r['top_p']:g}"]
        cells += [f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in r["figures"].values()]
        cells.append(f"{r['n_texts'] / r['seconds']:.1f}" if r["seconds"] else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def equal_entropy_table(results):
    """Read each sampler's perplexities off at the word entropy of the held-out text -> Markdown lines.

    Their logarithms are interpolated between the temperatures (--temperatures) on both sides of that entropy.
    """
    held_out, *sampled = results
    entropy, target, sweeps = "word entropy (bits)", held_out["figures"]["word entropy (bits)"][0], {}
    names = [name for name in held_out["figures"] if name.endswith("perplexity")]
    for r in sampled:
        if r["top_p"] == 1:
            logs = [math.log(r["figures"][name][0]) for name in names]
            sweeps.setdefault((r["sampler"], r["calls"]), []).append((r["figures"][entropy][0], r["temperature"], *logs))
    of_text = ", ".join(f"{name} {held_out['figures'][name][0]:.1f}" for name in names)
    lines = ["", f"At the word entropy of the held-out text, {target:.2f} bits ({of_text}):", ""]
    lines += [f"| sampler | calls | temperature | {' | '.join(names)} |", "|" + "---|" * (3 + len(names))]
    for (sampler, calls), points in sweeps.items():
        entropies, temperatures, *logs = zip(*sorted(points), strict=True)
        if len(points) > 1 and entropies[0] <= target <= entropies[-1]:
            values = [f"{math.exp(np.interp(target, entropies, values)):.1f}" for values in logs]
            cells = [f"{np.interp(target, entropies, temperatures):.2f}", *values]
        else:
            cells = [f"entropies {entropies[0]:.2f} to {entropies[-1]:.2f}", *[""] * len(names)]
        lines.append(f"| {sampler} | {calls} | {' | '.join(cells)} |")
    return lines


# ---------------------------------------------------------------- filling gaps


def choose_gaps(sentences, seed):
    """Choose a gap of one to four words in each sentence -> [(words, begin, end)]."""
    rng, gaps = random.Random(seed), []
    for sentence in sentences:
        words = sentence.split()
        n_words = rng.randint(1, min(MAX_GAP, len(words)))
        begin = rng.randint(0, len(words) - n_words)
        gaps.append((words, begin, begin + n_words))
    return gaps


def conditional_nats(texts, gaps):
    """Compute the share of grammatical texts, with its interval, and their mean log P(gap | rest) in nats.

        P(gap | rest) = P(text) / sum of P over all texts with the same rest

    texts: lists of words, one for each gap.
    """
    totals = [toy.probability([*words[:i], *[None] * (j - i), *words[j:]]) for words, i, j in gaps]
    p = [toy.probability(text) / total for text, total in zip(texts, totals, strict=True)]
    logs = [math.log(x) for x in p if x > 0]
    return share([x > 0 for x in p]), sum(logs) / max(1, len(logs))


def infill(model, tokenizer, gaps, options, seed):
    """Fill the gaps of `choose_gaps` -> the completed sentences, as lists of words."""
    bodies = [
        [GAP if begin <= i < end else tokenizer.encode(word)[0] for i, word in enumerate(words)]
        for words, begin, end in gaps
    ]
    templates = [add_marks(body, tokenizer) for body in bodies]
    return [decode(tokenizer, ids).split() for ids, _ in generate(model, tokenizer, templates, seed, options)]


def infill_table(model, tokenizer, run, sentences, args):
    """Fill gaps with each sampler -> Markdown lines."""
    jobs = [Job(sampler, calls) for sampler in args.samplers for calls in args.calls if calls <= MAX_INFILL_CALLS]
    gaps = choose_gaps(sentences, args.seed)
    _, true_nats = conditional_nats([words for words, _, _ in gaps], gaps)
    lines = ["", "| sampler | calls | fills grammatical | mean log P of fills | of the true words |", "|" + "---|" * 5]
    for job in jobs:
        filled = infill(model, tokenizer, gaps, job.options(), args.seed)
        (value, low, high), nats = conditional_nats(filled, gaps)
        lines.append(f"| {job.sampler} | {job.calls} | {value:.3f} [{low:.3f}, {high:.3f}] | {nats:.2f} | {true_nats:.2f} |")
    return lines


# ---------------------------------------------------------------- the command


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add, samplers = p.add_argument, [*FILLING, *SOLVERS]
    add("-mdir", "--model_dir", type=cli.path, default="runs/demo", help="run folder (runs/demo)")
    add("-d", "--data_path", type=cli.path,
        help="held-out text (the validation part of the training text)")
    add("--corpus", type=cli.path,
        help="training text that samples are compared with (the one that the model was trained on)")
    add("--judge", type=cli.path,
        help="run folder of `compare.py autoregressive`: a further column is its perplexity")
    add("--samplers", "--solvers", nargs="+", choices=samplers, default=samplers, help="samplers to compare (all)")
    add("--calls", nargs="+", type=cli.several, default=[*CALLS], help="numbers of network calls (5 10 20 50 100)")
    add("--temperatures", nargs="+", type=cli.positive, default=[], help="temperatures of the output, besides 1")
    add("--top_ps", nargs="+", type=cli.above_zero_to_one, default=[], help="top-p of the output, besides 1")
    add("--num_samples", type=cli.several, default=256, help="texts per sampler (256)")
    add("--length", type=cli.several, help="longest text, in tokens (the sequence length of the training)")
    add("--infill", type=cli.natural, default=0, help="sentences of the built-in language to fill gaps in (0)")
    add("--seed", type=cli.natural, default=0, help="seed of all random numbers (0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (cuda if there is one)")
    add("--cache_dir", type=cli.path, default=cache.default_cache_dir(),
        help="folder for tokenised corpora (%(default)s)")
    add("--output", type=cli.path, default="runs/samplers",
        help="folder for results.json, results.md and pictures (runs/samplers)")
    return p


def check_flags(args, run, is_toy):
    """Raise ValueError for flags that do not fit the run."""
    if args.infill and not is_toy:
        raise ValueError("--infill is for the built-in language, whose exact conditionals are known")
    trained = run["args"]["sequence_length"]
    if (args.length or 0) > trained:
        raise ValueError(f"--length={args.length}, but the model was trained on texts of at most {trained} tokens")


def held_out_texts(args, run, tokenizer, corpus):
    """Choose texts from -d, or from the validation part of the training text -> texts, their lengths in tokens."""
    path, part = (args.data_path, "all") if args.data_path else (corpus, "val")
    tokenizer_path, example = Path(args.model_dir) / "tokenizer.model", run["args"]["example"]
    tokens = cache.load_corpus(path, tokenizer_path, args.cache_dir, part, example)
    window = args.length or run["args"]["sequence_length"]
    return evaluate.choose_texts(tokens, tokenizer, window, args.num_samples, args.seed)


def main(argv=None):
    args = flags().parse_args(argv)
    model, tokenizer, run = load(args.model_dir, device=parallel.find_device(args.device))
    is_toy, folder = run["args"]["data_path"] is None, Path(args.output)
    check_flags(args, run, is_toy)
    corpus, part = evaluate.find_corpus(args, run)
    real, lengths = held_out_texts(args, run, tokenizer, corpus)
    reference = quality.Reference.fit(corpus, tokenizer, part, run["args"]["example"])
    judge = Judge(args.judge, parallel.find_device(args.device)) if args.judge else None
    templates = [make_template("", tokenizer, run, i, n) for i, n in enumerate(lengths)]
    measured = measure(real, reference, is_toy, judge, args.seed)
    results = [dict(asdict(Job(HELD_OUT, 0)), calls_per_text=0, seconds=0, n_texts=len(real), figures=measured)]
    folder.mkdir(parents=True, exist_ok=True)
    for result in sample_jobs(model, tokenizer, run, plan(args), templates, reference, is_toy, judge, args):
        results.append(result)
        (folder / "results.json").write_text(json.dumps(results, indent=1))  # after each job: all of them can take hours
        (folder / "results.md").write_text("\n".join(table(results)) + "\n")
    lines = table(results) + equal_entropy_table(results) * bool(args.temperatures)
    if args.infill:
        sentences = [piece.text for piece in read_part(corpus, "val")][: args.infill]
        lines += infill_table(model, tokenizer, run, sentences, args)
    (folder / "results.md").write_text("\n".join(lines) + "\n")
    drawing.try_to_save(folder / "results.png", partial(pictures.quality, {}, results, str(args.model_dir)))
    print("\n".join(lines))




# ---------------------------------------------------------------- quality: figures over network calls




if __name__ == "__main__":
    cli.run(main)
