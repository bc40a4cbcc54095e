"""Measure a trained model: a bound on -log P(text) with its errors, exact likelihoods, and the quality of samples.

    python evaluate.py -mdir=RUN_DIR -d=TEXT.txt          a large text in part, within about a minute
    python evaluate.py -mdir=RUN_DIR -d=TEXT.txt --all    everything
"""

import argparse
import math
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from common import cli  # isort: skip - first, because of Ctrl-C
import numpy as np
import torch
from tqdm import tqdm

import bfn
import data
import model as model_file
from common import drawing, parallel
from common.files import writing
from common.noise import mix_seed
from evaluation import bounds, likelihood, quality
from evaluation.bounds import Text, Work, n_scorable, nothing_given
from evaluation.tables import (
    describe,
    exact_figures,
    likelihood_figures,
    notes,
    table,
    to_json,
    to_key,
)
from model import rows_at_once
from sample import Sampler
from sampling.generate import DEFAULT, Options, generate
from sampling.prompts import make_template
from text import cache, toy
from text.reading import Corpus, left_out, read_pieces
from text.tokenizer import decode
from training.checkpoint import load
from training.run_folder import VAL_TOKENS

ERROR = 0.005  # Monte-Carlo error to reach, nats per token
SECONDS = 40  # how long the draws take if no flag says how much to score
BY_TIME_HEADER = "t,loss_nats_per_token,cross_entropy_nats_per_token"
BY_CALLS_HEADER = "calls,exact_nats_per_token,error_nats_per_token"
VAL_EXACT_TOKENS = 512  # and about this many for the exact likelihood, which takes many calls
COMMIT = {"exact": partial(likelihood.exact, calls=DEFAULT.steps)}
INTERRUPT = ["SIGINT"]
PROMISE = "finishing this batch, then the figures so far"


def check_table(path, header, flag):
    """Raise ValueError if PATH.csv or PATH.png exists and is not an earlier result of the flag, which has this header."""
    table = Path(f"{path}.csv")
    with suppress(OSError), open(table, encoding="utf-8", errors="replace") as file:
        if file.readline().strip() == header:
            return
    for file in (table, Path(f"{path}.png")):
        if file.exists():
            raise ValueError(f"{file} exists already: give {flag} another name")


def check_tables(args):
    """Raise ValueError if --by_time or --by_calls would overwrite what they should not, or have nothing to show."""
    if args.by_calls and not args.calls:
        raise ValueError("--by_calls draws what --calls measures: give --calls=8,32,128, for example")
    if args.by_time and args.by_time == args.by_calls:
        raise ValueError(f"--by_time and --by_calls would both write {args.by_time}.csv: give them different names")
    for path, header, flag in ((args.by_time, BY_TIME_HEADER, "--by_time"), (args.by_calls, BY_CALLS_HEADER, "--by_calls")):
        if path:
            check_table(path, header, flag)
            Path(path).parent.mkdir(parents=True, exist_ok=True)


def write_table(path, header, rows):
    """Write PATH.csv."""
    with writing(f"{path}.csv"):
        Path(f"{path}.csv").write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")


@parallel.first_only
def write_by_time(scores, path, title):
    """Write the loss and the output's cross-entropy by time to PATH.csv and PATH.png."""
    _, loss, cross_entropy = scores.by_time()
    t = (np.arange(len(loss)) + 0.5 * (scores.n_steps is None)) / len(loss)  # bins' middles, or where steps start
    t, loss, cross_entropy = (x[~np.isnan(loss)] for x in (t, loss, cross_entropy))
    rows = zip(t, loss, cross_entropy, strict=True)
    write_table(path, BY_TIME_HEADER, ((f"{a:.4f}", f"{b:.6f}", f"{c:.6f}") for a, b, c in rows))
    label = f"loss (its mean is L_{scores.n_steps or 'inf'})"
    series = {label: (t, loss), "cross-entropy of the output": (t, cross_entropy)}
    drawing.lines(f"{path}.png", series, "t", "nats per token", title)


@parallel.first_only
def write_by_calls(figures, calls, path, title):
    """Write the exact likelihood by the number of calls, and the bound for comparison, to PATH.csv and PATH.png."""
    names = {n: to_key(next(iter(likelihood.figures_of([n])))) for n in sorted(set(calls))}
    nats = [figures[f"{name}_nats_per_token"] for name in names.values()]
    errors = [figures[f"{name}_text_error_nats_per_token"] for name in names.values()]
    rows = zip(names, nats, errors, strict=True)
    write_table(path, BY_CALLS_HEADER, ((f"{n}", f"{a:.6f}", f"{b:.6f}") for n, a, b in rows))
    ends = [min(names), max(names)]
    series = {"exact, under commit": (list(names), nats), "bound of the flow": (ends, [figures["bound_nats_per_token"]] * 2)}
    drawing.lines(f"{path}.png", series, "network calls", "nats per token", title, log="x")


# ---------------------------------------------------------------- validation


@contextmanager
def full_precision():
    """Multiply float32 matrices in float32 and not in TF32, which is accurate enough to train but not to measure."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def validate(model, tokens, bos_id, row_length, device, max_tokens=VAL_TOKENS):
    """Measure the bound, and the exact likelihood under commit, on the same text and noise each time.

    -> figures (see `likelihood_figures`, `exact_figures`), loss by time: a list of 20 values, nats
    per token, in even bins.
    """
    text = Text(tokens, row_length, bos_id).first_tokens(max_tokens)
    with full_precision():
        scores = bounds.score(model, text, Work(device), seed="validation")
        exact = exact_likelihood(model, text.first_tokens(VAL_EXACT_TOKENS), device)
    _, loss_by_time, _ = scores.by_time(20)
    return likelihood_figures(scores) | exact, np.nan_to_num(loss_by_time).tolist()


def validation_seconds(model, tokens, bos_id, row_length, device):
    """Estimate from a few rows how long `validate` takes on VAL_TOKENS -> seconds, with those of the samples after it."""
    text = Text(tokens, row_length, bos_id).first_tokens(VAL_TOKENS)
    few = text.first_rows(min(16, rows_at_once(row_length, model.config, device)))
    seconds = text.plan.n_rows * bounds.seconds_per_row(model, few, device, None)
    return 1.4 * 2 * seconds  # two draws, exact likelihood and samples


def exact_likelihood(model, text, device):
    """Measure the exact likelihood of a Text under commit -> figures."""
    tokens, bos_id = text.tokens, text.bos_id
    scores = likelihood.score(model, text.windows(), bos_id, text.given, COMMIT, Work(device))
    figures = exact_figures(text, scores)
    bits_per_token = figures["exact_nats_per_token"] / math.log(2)
    tokens_per_char = n_scorable(tokens, bos_id) / tokens.n_chars
    return figures | dict(exact_bits_per_char=bits_per_token * tokens_per_char)


def check_toy(sampler, val, bound_nats_per_token, seed, corpus):
    """Compare a model of the built-in language with the exact entropy, and check 256 samples -> three lines of text.

    val: Tokens of held-out sentences. corpus: Path of the text that the model was trained on.
    """
    n_tokens = toy.mean_length() + 1  # eos is scored too
    entropy = toy.entropy_given_length() / n_tokens / math.log(2)
    bound = bound_nats_per_token / math.log(2)
    exact = entropy + excess_nats_per_token(sampler.model, sampler.tokenizer, val) / math.log(2)

    def above(bits):
        return f"{abs(bits / entropy - 1):.1%} {'above' if bits >= entropy else 'below'}"

    tokenizer = sampler.tokenizer
    templates = [make_template("", tokenizer, sampler.run, mix_seed("toy", i)) for i in range(256)]
    samples = generate(sampler.model, tokenizer, templates, seed)
    texts = [decode(tokenizer, ids) for ids, _ in samples]
    known = set(corpus.read_text().splitlines())
    grammatical = [text for text in texts if toy.is_grammatical(text)]
    new_share = sum(text not in known for text in grammatical) / max(1, len(grammatical))
    good, new = f"{len(grammatical) / len(texts):.1%} of {len(texts)}", f"{new_share:.0%}"
    return [
        f"bound {bound:.3f} bits per token, {above(bound)} the exact entropy given the length, {entropy:.3f}",
        f"exact likelihood under commit {exact:.3f} bits per token, {above(exact)}",
        f"{good} samples are grammatical, {new} of these are not in the corpus",
    ]


def excess_nats_per_token(model, tokenizer, val, n=400):
    """Compute what up to n sentences of the built-in language cost under commit more than the grammar.

    -> nats per token. Both are exact likelihoods given the length, so the choice of sentences hardly matters.
    """
    sentences = [val.ids[begin:end] for begin, end in pairwise(val.offsets[: n + 1])]
    device = next(model.parameters()).device
    bos_id = tokenizer.bos_id()
    scores = likelihood.score(model, sentences, bos_id, nothing_given, COMMIT, Work(device))
    words = [tokenizer.decode(ids.tolist()).split() for ids in sentences]
    truth = sum(math.log(toy.lengths()[len(w)] / toy.probability(w)) for w in words)
    return (scores.nats["exact"].sum() - truth) / scores.n_scored.sum()


# ---------------------------------------------------------------- samples


def find_corpus(args, run):
    """Find the text that the model was trained on -> Corpus, which part of it was used. Raises ValueError if it is gone."""
    path = args.corpus or run["args"]["data_path"] or str(Path(args.model_dir) / "corpus.txt")
    message = "samples are compared with the training text, which is not at {}: give it with --corpus"
    corpus, part = Corpus.find(path, run["args"]["text_field"], message), "all" if run["args"]["val_path"] else "train"
    tokenizer, trained_on = Path(args.model_dir) / "tokenizer.model", run.get("identity", {}).get("corpus")
    if trained_on not in (None, cache.text_key(corpus, tokenizer, args.cache_dir, part, run["args"]["example"])):
        print(f"{path} is not the text that the model was trained on: samples are compared with another one", file=sys.stderr)
    return corpus, part


def choose_texts(tokens, tokenizer, window, n, seed):
    """Choose random windows of a text -> up to n texts, their lengths in tokens. Raises ValueError if all are too short."""
    plan = data.plan_validation(tokens, window, n)
    long_enough = np.flatnonzero(plan.lengths > 1)
    if not len(long_enough):
        raise ValueError("every window of this text is a single token, too short to compare with samples: give another text")
    chosen = np.random.default_rng(seed).permutation(long_enough)[:n]
    starts, lengths = plan.starts[chosen].tolist(), plan.lengths[chosen].tolist()
    windows = [tokens.ids[start : start + length].tolist() for start, length in zip(starts, lengths, strict=True)]
    return [decode(tokenizer, ids) for ids in windows], lengths


def sample_quality(sampler, tokens, reference, args):
    """Compare generated texts with windows of the text, equally many and long -> {name: {figure: (value, low, high)}}."""
    tokenizer, run = sampler.tokenizer, sampler.run
    real, lengths = choose_texts(tokens, tokenizer, sampler.limit, args.samples, args.seed)
    seeds = [mix_seed(args.seed, i) for i in range(len(lengths))]
    templates = [make_template("", tokenizer, run, *pair) for pair in zip(seeds, lengths, strict=True)]
    options = Options(bfn.Controls(args.sampler, args.steps, args.corrections))
    samples = generate(sampler.model, tokenizer, templates, args.seed, options)
    samples = list(tqdm(samples, total=len(templates), unit="sample", desc="sampling", disable=None))
    generated = [decode(tokenizer, ids) for ids, _ in samples]
    calls_per_sample = sum(calls for _, calls in samples) / len(samples)
    return {
        f"{len(real)} samples, {calls_per_sample:.4g} calls": quality.figures(generated, reference, args.seed),
        f"{len(real)} real texts": quality.figures(real, reference, args.seed),
    }


# ---------------------------------------------------------------- the command


def parse_given(text):
    """Read "prefix:0.5" or "around:0.2" -> function from segment_ids (B, L) to the mask of what is given (B, L).

    prefix:S gives the first share S of each window; around:S gives everything but a gap of share S in the middle.
    """
    kind, _, share = text.partition(":")
    if kind not in ("prefix", "around"):
        raise argparse.ArgumentTypeError(f"{text!r}: write prefix:SHARE or around:SHARE")
    share = cli.share(share)

    def given(segment_ids):
        before, after = model_file.segment_positions(segment_ids)
        size = (before + after + 1).double()
        if kind == "prefix":
            return before < (share * size).round()
        gap = (share * size).round().clamp(min=1)
        start = (size - gap) // 2
        return (before < start) | (before >= start + gap)

    return given


def parse_orders(text):
    """Read "left,random" -> list of orders."""
    orders = text.split(",")
    if not set(orders) <= likelihood.ORDERS.keys():
        raise argparse.ArgumentTypeError(f"{text!r}: write some of {','.join(likelihood.ORDERS)}")
    return orders


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("-mdir", "--model_dir", type=cli.path, default="runs/demo", help="run folder (runs/demo)")
    add("-d", "--data_path", type=cli.path, required=True,
        help="text as for train.py, with examples as in training")
    add("--text_field", help="field of .jsonl files that holds the text (that of the training)")
    add("--checkpoint", choices=["best", "last"], default="best", help="best by validation, or last (best)")
    add("--ema", type=int, default=-1, help="which of the weight averages to measure, counted from 0 (-1: the last)")
    add("--window", type=cli.count, help="tokens scored together (the sequence length of the training)")
    amount = p.add_mutually_exclusive_group().add_argument
    amount("--all", action="store_true", help="score the whole text (as much as can be read within about a minute)")
    amount("--max_tokens", type=cli.count, help="score only about this many tokens, from all over the text")
    precision = p.add_mutually_exclusive_group().add_argument
    precision("--se", type=cli.positive, help=f"Monte-Carlo error to reach, nats per token, however long it takes ({ERROR})")
    precision("--draws", type=cli.count, help="make this many draws (as many as --se takes)")
    add("--n_steps", type=cli.steps, help="measure the discrete-time bound for N steps instead of the continuous one")
    add(
        "--given",
        type=parse_given,
        default=nothing_given,
        help="score only the rest, given the first share of each window (prefix:SHARE), or all but a gap (around:SHARE)",
    )
    exact = "also measure the exact likelihood under commit with so many calls, for example 8,32,128"
    add("--calls", type=cli.counts, default=[], help=exact)
    orders = "also measure the chain rule, a call per token, in the orders sampler,left,random, and the bound over any order"
    add("--order", type=parse_orders, default=[], help=orders)
    add("-bsz", "--batch_size", type=cli.count, help="rows per network call (chosen by the size of the model)")
    add("--by_time", type=cli.path, metavar="PATH",
        help="write the loss by time to PATH.csv and PATH.png")
    add("--by_calls", type=cli.path, metavar="PATH",
        help="write the exact likelihood by --calls to PATH.csv and PATH.png")
    add("--samples", type=cli.natural, default=0, help="also measure the quality of this many generated texts (0)")
    add("--sampler", "--solver", choices=bfn.SAMPLERS, default=DEFAULT.sampler,
        help=f"for --samples ({DEFAULT.sampler})")
    add("--steps", type=cli.steps, default=DEFAULT.steps,
        help=f"sampling steps for --samples ({DEFAULT.steps})")
    add("--corrections", type=cli.natural, default=DEFAULT.corrections,
        help=f"further calls of pace that redraw tokens ({DEFAULT.corrections})")
    add("--corpus", type=cli.path,
        help="training text that --samples are compared with (that of the model)")
    add("--json", action="store_true", help="print one JSON object instead of the tables")
    add("--seed", type=cli.natural, default=0, help="seed of all random numbers (0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (cuda if there is one)")
    add("--cache_dir", type=cli.path, default=cache.default_cache_dir(),
        help="folder for tokenised corpora (%(default)s)")
    return p


@parallel.first_only
def warn_of_changes(corpus, tokenizer, example, n=1000):
    """Say on standard error which share of a text's first examples the tokenizer does not give back unchanged."""
    texts = [piece.text for piece, _ in zip(read_pieces(corpus, example), range(n))]
    encoded = [(text, tokenizer.encode(text)) for text in texts]
    known = [(text, ids) for text, ids in encoded if tokenizer.unk_id() not in ids]  # unknown text is accounted for
    share = sum(tokenizer.decode(ids) != text for text, ids in known) / max(1, len(known))
    if share:
        print(
            f"the tokenizer changes {share:.1%} of the examples (spaces, letter forms): figures per character and byte are of "
            "the changed text's tokens",
            file=sys.stderr,
        )


def measure_exact(model, text, functions, work, seed):
    """Compute the figures of the `functions` (see `likelihood.figures_of`) for a Text -> figures."""
    inputs = text.windows(), text.bos_id, text.given
    return exact_figures(text, likelihood.score(model, *inputs, functions, work, seed))


def write_tables(args, scores, figures, title):
    """Write what --by_time and --by_calls ask for. figures: of the exact likelihood, {} if it was not computed."""
    if args.by_time:
        write_by_time(scores, args.by_time, title)
    if args.by_calls and figures:
        write_by_calls(figures, args.calls, args.by_calls, title)


def main(argv=None):
    """Measure a model. argv: the flags, or those of the command line.

    Ctrl-C ends it after the figures so far, as KeyboardInterrupt. Raises ValueError for bad flags.
    """
    args = flags().parse_args(argv)
    check_tables(args)
    device = parallel.join(args.device)
    model, tokenizer, run = load(args.model_dir, args.checkpoint, device, args.ema)
    if args.samples:  # before the work of an hour, not after: this fails if the training text is missing or empty
        corpus, part = find_corpus(args, run)
        reference = quality.Reference.fit(corpus, tokenizer, part, run["args"]["example"])
    example = run["args"]["example"]
    text = Corpus(args.data_path, args.text_field or run["args"]["text_field"])
    with parallel.first_alone():
        tokens = cache.load_corpus(text, Path(args.model_dir) / "tokenizer.model", args.cache_dir, example=example)
    warn_of_changes(text, tokenizer, example)
    for line in left_out(text.path):
        print(f"{text}: {line}", file=sys.stderr)
    longest = args.window and min(args.window, int(tokens.shard_lengths[:, 1].max()))  # no document fills a longer window
    window, bos_id = longest or run["args"]["sequence_length"], tokenizer.bos_id()
    to_score = Text(tokens, window, bos_id, args.given)
    if args.max_tokens:
        to_score = to_score.first_tokens(args.max_tokens)
    quick = not (args.all or args.max_tokens or args.se or args.draws)  # a minute has to do
    error = None if args.draws else args.se or ERROR
    draws = dict(n_draws=args.draws, error=error, n_steps=args.n_steps, seed=args.seed)
    with cli.catch_signals(INTERRUPT, PROMISE) as interrupts:
        work = Work(device, args.batch_size, SECONDS if quick else math.inf, interrupts, progress=True)
        scores = bounds.score(model, to_score, work, **draws)
        conditional = args.given is not nothing_given
        figures = likelihood_figures(scores, conditional)
        functions = {} if parallel.total(len(interrupts)) else likelihood.figures_of(args.calls, args.order)
        if functions:
            seconds = math.inf if args.all or args.max_tokens else SECONDS
            work = replace(work, seconds=seconds)
            figures |= measure_exact(model, scores.text, functions, work, args.seed)
        stopped = parallel.total(len(interrupts)) > 0
    scores.partial |= stopped and bool(functions)
    write_tables(args, scores, figures if functions else {}, f"{args.model_dir}, step {run['step']}")
    if not args.json:
        print(describe(args.data_path, tokens, window, figures), *table(figures, args.n_steps, functions), sep="\n", flush=True)
    samples = {}
    if args.samples and not stopped:
        with suppress(KeyboardInterrupt):
            samples = sample_quality(Sampler(model, tokenizer, run), tokens, reference, args)
    scores.partial |= args.samples > 0 and not samples
    if args.json:
        print(to_json(figures, scores, samples))
    elif samples:
        print("\n".join(quality.table(samples)))
    for line in notes(scores, error, quick) if parallel.rank() == 0 else ():
        print(line, file=sys.stderr)
    if scores.partial:
        raise KeyboardInterrupt


if __name__ == "__main__":
    cli.run(main)
