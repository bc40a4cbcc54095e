"""Measure a trained model: a bound on -log P(text) with its errors, likelihoods, samples.

    python evaluate.py -mdir=RUN_DIR -d=TEXT.txt          in part, within about a minute
    python evaluate.py -mdir=RUN_DIR -d=TEXT.txt --all    everything

`plot.py quality` draws what --json prints: the loss by time, the likelihood by --calls.
"""

import argparse
import math
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from common import cli  # isort: skip - first, because of Ctrl-C
import numpy as np
from tqdm import tqdm

from common import parallel
from common.noise import mix_seed
from evaluation import bounds, grammar, likelihood, quality
from evaluation.bounds import Text, Work, n_scorable, nothing_given
from evaluation.tables import describe, exact_figures, likelihood_figures, notes, table, to_json
from sample import Sampler
from sampling.generate import FLAGS, generate, options_of, refuse_idle
from sampling.prompts import make_template
from text import cache, toy
from text.reading import Corpus, find_files, left_out, read_pieces, reading_notes
from training.checkpoint import load
from training.run_folder import VAL_TOKENS

ERROR = 0.005  # Monte-Carlo error to reach, nats per token
SECONDS = 40  # how long the draws take if no flag says how much to score
VAL_EXACT_TOKENS = 512  # and about this many for the exact likelihood, which takes many calls
PROMISE = "finishing this batch, then the figures so far"


# ---------------------------------------------------------------- validation


def validate(model, tokens, row_length, device, max_tokens=VAL_TOKENS, n_exact=VAL_EXACT_TOKENS):
    """Measure the bound and the exact likelihood, on the same text and noise each time.

    max_tokens, n_exact: most tokens for the bound and the exact likelihood. -> figures (see
    `likelihood_figures`, `exact_figures`), loss by time: a list of 20 values, nats per token, in
    even bins.
    """
    text = Text(tokens, row_length).first_tokens(max_tokens)
    scores = bounds.score(model, text, Work(device), seed="validation")
    exact = measure_exact(model, text.first_tokens(n_exact), likelihood.COMMIT, Work(device))
    bits_per_token = exact["exact_nats_per_token"] / math.log(2)
    exact["exact_bits_per_char"] = bits_per_token * (n_scorable(tokens) / tokens.n_chars)
    _, loss_by_time, _ = scores.by_time(20)
    return likelihood_figures(scores) | exact, np.nan_to_num(loss_by_time).tolist()


def validation_seconds(model, tokens, row_length, device):
    """Estimate from a few rows how many seconds `validate` and the samples after it take."""
    text = Text(tokens, row_length).first_tokens(VAL_TOKENS)
    seconds = text.plan.n_rows * bounds.seconds_per_row(model, text, device, None, most=16)
    return 1.4 * 2 * seconds  # two draws, exact likelihood and samples


def measure_exact(model, text, functions, work, seed=0):
    """Compute the figures of `functions` (see `likelihood.figures_of`) for a Text -> dict."""
    inputs = text.windows(), text.tokens.tokenizer.bos, functions, work, seed
    return exact_figures(text, likelihood.score(model, *inputs, text.given))


def check_toy(sampler, val, bound_nats_per_token, seed, corpus):
    """Compare a model of the built-in language with the exact entropy; check 256 samples -> lines.

    val: Tokens of held-out sentences. corpus: Path of the text that the model was trained on.
    """
    n_tokens = toy.mean_length() + 1  # eos is scored too
    entropy = toy.entropy_given_length() / n_tokens / math.log(2)
    bound = bound_nats_per_token / math.log(2)
    exact = entropy + grammar.excess_nats_per_token(sampler.model, val) / math.log(2)

    hidden, by_grammar = grammar.hidden_word_nats(sampler.model, val)

    def above(bits, entropy=entropy):
        return f"{abs(bits / entropy - 1):.1%} {'above' if bits >= entropy else 'below'}"

    tokenizer = sampler.tokenizer
    templates = [make_template("", tokenizer, sampler.run, mix_seed("toy", i)) for i in range(256)]
    samples = generate(sampler.model, tokenizer, templates, seed)
    texts = [tokenizer.decode(ids) for ids, _ in samples]
    known = set(corpus.read_text().splitlines())
    grammatical = [text for text in texts if toy.is_grammatical(text)]
    new_share = sum(text not in known for text in grammatical) / max(1, len(grammatical))
    good, new = f"{len(grammatical) / len(texts):.1%} of {len(texts)}", f"{new_share:.0%}"
    compared = f"{above(bound)} the exact entropy given the length, {entropy:.3f}"
    return [
        f"bound {bound:.3f} bits per token, {compared}",
        f"exact likelihood under commit {exact:.3f} bits per token, {above(exact)}",
        f"a hidden word {hidden / math.log(2):.3f} bits, {above(hidden, by_grammar)} the grammar",
        f"{good} samples are grammatical, {new} of these are not in the corpus",
    ]


# ---------------------------------------------------------------- samples


def find_corpus(args, tokenizer, run):
    """Find the text that the model was trained on -> Corpus, which part of it was used.

    Raises ValueError if it is gone. One line on standard error says that it is another one.
    """
    flags = run["args"]
    path = args.corpus or flags["data_path"] or str(Path(args.model_dir) / "corpus.txt")
    try:
        find_files(path)
    except ValueError:
        message = f"samples are compared with the training text, which is not at {path}"
        raise ValueError(f"{message}: give it with --corpus") from None
    corpus = Corpus(path, flags["text_field"])
    part = "all" if flags["val_path"] else "train"
    key = cache.text_key(corpus, tokenizer, args.cache_dir, part, flags["example"])
    if parallel.rank() == 0 and run.get("identity", {}).get("corpus") not in (None, key):
        compared = "samples are compared with another one"
        print(f"{path} is not the text that the model was trained on: {compared}", file=sys.stderr)
    return corpus, part


def sample_quality(sampler, tokens, reference, args):
    """Compare generated texts with windows of the text, equally many and long.

    -> {name: {figure: (value, low, high)}}.
    """
    tokenizer = sampler.tokenizer
    real, lengths = quality.choose_texts(tokens, sampler.limit, args.samples, args.seed)
    templates = [make_template("", tokenizer, sampler.run, i, n) for i, n in enumerate(lengths)]
    samples = generate(sampler.model, tokenizer, templates, args.seed, options_of(args))
    bar = dict(total=len(templates), unit="sample", desc="sampling", disable=None)
    samples = list(tqdm(samples, **bar))
    generated = [tokenizer.decode(ids) for ids, _ in samples]
    calls = sum(calls for _, calls in samples) / len(samples)
    return {
        f"{len(real)} samples, {calls:.4g} calls": quality.figures(generated, reference, args.seed),
        f"{len(real)} real texts": quality.figures(real, reference, args.seed),
    }


# ---------------------------------------------------------------- the command


def parse_given(text):
    """Read "prefix:0.5" or "around:0.2" -> function: segment_ids (B, L) -> what is given (B, L)."""
    kind, _, share = text.partition(":")
    if kind not in bounds.GIVEN_PARTS:
        raise argparse.ArgumentTypeError(f"{text!r}: write prefix:SHARE or around:SHARE")
    return partial(bounds.GIVEN_PARTS[kind], cli.share(share))


def parse_orders(text):
    """Read "left,random" -> list of orders."""
    orders = text.split(",")
    if not set(orders) <= likelihood.ORDERS.keys():
        raise argparse.ArgumentTypeError(f"{text!r}: write some of {','.join(likelihood.ORDERS)}")
    return orders


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    p.add_flags("-mdir --checkpoint --seed --device --cache_dir")
    add("-d", "--data_path", type=cli.path, required=True,
        help="text as for train.py, with examples as in training")
    add("--text_field", help="field or column that holds the text (that of the training)")
    add("--ema", type=int, default=-1,
        help="which of the weight averages to measure, counted from 0 (-1: the last)")
    add("--window", type=cli.count,
        help="tokens scored together (the sequence length of the training)")
    amount = p.add_mutually_exclusive_group().add_argument
    amount("--all", action="store_true",
        help="score the whole text (as much as can be read within about a minute)")
    amount("--max_tokens", type=cli.count,
        help="score only about this many tokens, from all over the text")
    precision = p.add_mutually_exclusive_group().add_argument
    precision("--se", type=cli.positive,
        help=f"Monte-Carlo error to reach, nats per token, however long it takes ({ERROR})")
    precision("--draws", type=cli.count, help="make this many draws (as many as --se takes)")
    add("--n_steps", type=cli.steps,
        help="measure the discrete-time bound for N steps instead of the continuous one")
    add("--given", type=parse_given, default=nothing_given,
        help="score the rest, given the first share of each window (prefix:SHARE), or all but a "
        "gap (around:SHARE)")
    add("--calls", type=cli.counts, default=[],
        help="also measure the exact likelihood under commit with so many calls: 8,32,128")
    add("--order", type=parse_orders, default=[],
        help="also measure the chain rule, a call per token, in the orders sampler,left,random, "
        "its spread over random orders, and the bound over any order")
    add("--gaps", type=cli.counts, default=[],
        help="also measure the tokens of a gap in their full context, and from the left only, for "
        "gaps of so many tokens: 1,4,16; and the tokens of a random share of the text")
    add("-bsz", "--batch_size", type=cli.count,
        help="rows per network call (chosen by the size of the model)")
    add("--samples", type=cli.natural, default=0,
        help="also measure the quality of this many generated texts (0)")
    p.add_flags("--sampler --steps --corrections --temperature", FLAGS)
    add("--corpus", type=cli.path,
        help="training text that --samples are compared with (that of the model)")
    add("--json", action="store_true", help="print one JSON object instead of the tables")
    return p


@parallel.first_only
def warn_of_changes(corpus, tokenizer, example, n=1000):
    """Say on standard error what is left out, and which share of examples the tokenizer changes."""
    for line in [*left_out(corpus.path), *reading_notes(corpus, example)]:
        print(f"{corpus}: {line}", file=sys.stderr)
    texts = [piece.text for piece, _ in zip(read_pieces(corpus, example), range(n))]
    encoded = [(text, tokenizer.encode(text)) for text in texts]
    # Unknown text is accounted for.
    known = [(text, ids) for text, ids in encoded if tokenizer.unk not in ids]
    share = sum(tokenizer.decode(ids) != text for text, ids in known) / max(1, len(known))
    if share:
        what = f"{share:.1%} of the examples (spaces, letter forms)"
        meaning = "figures per character and byte are of the changed text's tokens"
        print(f"the tokenizer changes {what}: {meaning}", file=sys.stderr)


def read_text(args, tokenizer, run):
    """Read the text to measure -> Text of which as much is scored as the flags say."""
    example = run["args"]["example"]
    corpus = Corpus(args.data_path, args.text_field or run["args"]["text_field"])
    with parallel.first_alone():
        tokens = cache.load_corpus(corpus, tokenizer, args.cache_dir, example=example)
    warn_of_changes(corpus, tokenizer, example)
    longest = int(tokens.shard_lengths[:, 1].max())  # no document fills a longer window
    window = min(args.window, longest) if args.window else run["args"]["sequence_length"]
    text = Text(tokens, window, args.given)
    return text.first_tokens(args.max_tokens) if args.max_tokens else text


def measure(model, text, args, device):
    """Measure what the flags ask for -> Scores, figures, names of the exact ones, is it stopped."""
    with cli.catch_signals(["SIGINT"], PROMISE) as interrupts:
        seconds = SECONDS if args.quick else math.inf
        work = Work(device, args.batch_size, seconds, interrupts, progress=True)
        draws = dict(n_draws=args.draws, n_steps=args.n_steps, seed=args.seed)
        scores = bounds.score(model, text, work, error=args.error, **draws)
        figures = likelihood_figures(scores, args.given is not nothing_given)
        functions = likelihood.figures_of(args.calls, args.order, args.gaps)
        if parallel.total(len(interrupts)):
            functions = {}
        if functions:
            work = replace(work, seconds=math.inf if args.all or args.max_tokens else SECONDS)
            figures |= measure_exact(model, scores.text, functions, work, args.seed)
        is_stopped = parallel.total(len(interrupts)) > 0
    scores.partial |= is_stopped and bool(functions)
    return scores, figures, list(functions), is_stopped


def main(argv=None):
    """Measure a model. argv: the flags, or those of the command line.

    Ctrl-C ends it after the figures so far, as KeyboardInterrupt. Raises ValueError for bad flags.
    """
    parser = flags()
    args = parser.parse_args(argv)
    parser.refuse_idle(args, dict.fromkeys("corpus sampler steps corrections".split(), "samples"))
    refuse_idle(args, parser.given)
    args.quick = not (args.all or args.max_tokens or args.se or args.draws)  # a minute has to do
    args.error = None if args.draws else args.se or ERROR
    device = parallel.join(args.device)
    model, tokenizer, run = load(args.model_dir, args.checkpoint, device, args.ema)
    if args.samples:  # first, because this fails if the training text is missing or empty
        corpus, part = find_corpus(args, tokenizer, run)
        reference = quality.Reference.fit(corpus, tokenizer, part, run["args"]["example"])
    text = read_text(args, tokenizer, run)
    scores, figures, exact_names, is_stopped = measure(model, text, args, device)
    if not args.json:
        print(describe(args.data_path, text, figures))
        print(*table(figures, args.n_steps, exact_names), sep="\n", flush=True)
    samples = {}
    if args.samples and not is_stopped:
        with suppress(KeyboardInterrupt):
            samples = sample_quality(Sampler(model, tokenizer, run), text.tokens, reference, args)
    scores.partial |= args.samples > 0 and not samples
    if args.json:
        print(to_json(figures, scores, samples))
    elif samples:
        print(*quality.table(samples), sep="\n")
    if parallel.rank() == 0:
        for line in notes(scores, args.error, args.quick):
            print(line, file=sys.stderr)
    if scores.partial:
        raise KeyboardInterrupt


if __name__ == "__main__":
    cli.run(main)
