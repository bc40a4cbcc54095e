"""Measure a model with the tasks of lm-evaluation-harness (pip install lm_eval).

    python -m tools.lm_eval RUN_DIR --tasks=agreement
    python -m tools.lm_eval RUN_DIR --tasks=blimp,lambada_openai --limit=200

agreement is a task of this repository, and needs no network: pairs of sentences of the built-in
language, one with a wrong ending. All other names are the harness's own.

    span  (ids, n): a text as tokens, of which the first n are given
"""

import os
import random
import sys
from dataclasses import replace
from itertools import chain

from common import cli  # isort: skip - first, because of Ctrl-C
import torch
from tqdm import tqdm

import bfn
from common.precision import network_of
from data import pad
from sample import Sampler
from sampling.generate import DEFAULT, Options, generate
from sampling.prompts import FREE, GAP
from text import toy

BATCH = 16  # texts
NEEDED = "tasks are read with lm-evaluation-harness"
N_PAIRS = 500


def find_span(sampler, context, continuation):
    """Encode a text of which the context is given -> span. Of a long one, the end is kept."""
    tokenizer, limit = sampler.tokenizer, sampler.limit
    before = tokenizer.add_marks(tokenizer.encode(context), end=False)
    ids = tokenizer.add_marks(tokenizer.encode(context + continuation))
    n = min(len(os.path.commonprefix([before, ids])), len(ids) - 1)
    return ids[-limit:], max(0, n - max(0, len(ids) - limit))


def cut_spans(sampler, text):
    """Cut a text into spans: the first as long as in training, each other one after half of it."""
    ids = sampler.tokenizer.add_marks(sampler.tokenizer.encode(text))
    half = -(-sampler.limit // 2)
    ends = range(sampler.limit, len(ids), sampler.limit - half)
    later = (ids[end - half : end - half + sampler.limit] for end in ends)
    return [(ids[: sampler.limit], 0), *((part, half) for part in later)]


@torch.no_grad()
def log_likelihood(sampler, spans, calls=DEFAULT.steps):
    """Compute log P(what is not given | what is, length of the text) -> list of float, in nats.

    It is exact under the sampler `commit` with so many calls, see `bfn.log_likelihood`.
    """
    model, found = sampler.model, []
    for begin in tqdm(range(0, len(spans), BATCH), "likelihood", unit="batch", disable=None):
        batch, given = zip(*spans[begin : begin + BATCH], strict=True)
        ids, segment_ids = pad(batch, sampler.device)
        place = torch.arange(ids.shape[1], device=sampler.device)
        is_given = place < torch.tensor(given, device=sampler.device)[:, None]
        cond_mask = (segment_ids == 0) | (ids == sampler.tokenizer.bos) | is_given
        network = network_of(model, segment_ids)
        inputs = network, ids, cond_mask, model.config.s1, model.config.K, calls
        found += bfn.log_likelihood(*inputs).double().sum(1).tolist()
    return found


def likeliest(sampler, spans, calls=DEFAULT.steps):
    """Fill what is not given with the likeliest tokens -> whether that gives back each text."""
    templates = [ids[:n] + [GAP] * (len(ids) - n - 1) + [FREE] for ids, n in spans]
    commit = dict(sampler="commit", corrections=0, steps=calls, argmax=True)
    options = Options(replace(DEFAULT, **commit))
    samples = generate(sampler.model, sampler.tokenizer, templates, 0, options)
    return [row == ids for (row, _), (ids, _) in zip(samples, spans, strict=True)]


def write(sampler, context, n_tokens, stops, calls=DEFAULT.steps):
    """Continue a context by n_tokens, in blocks if the text gets long, up to a stop -> str."""
    tokenizer = sampler.tokenizer
    given = tokenizer.add_marks(tokenizer.encode(context), end=False)
    inputs = sampler.model, tokenizer, [given + [FREE] * n_tokens], 0
    ids, _ = next(generate(*inputs, Options(replace(DEFAULT, steps=calls)), sampler.limit))
    text = tokenizer.decode(ids)[len(tokenizer.decode(given)) :]
    ends = [text.index(stop) for stop in filter(None, stops) if stop in text]
    return text[: min(ends, default=None)]


def make_model(harness, sampler, calls):
    """Make the harness's kind of model from a Sampler."""

    def say_unknown(spans):
        n = sum(sampler.tokenizer.unk in ids for ids, _ in spans)
        if n:
            cost = "it costs nothing here, so these figures are too good"
            print(f"{n} of {len(spans)} texts have text that is unknown: {cost}", file=sys.stderr)

    class Model(harness.api.model.LM):
        def loglikelihood(self, requests):
            spans = [find_span(sampler, *request.args) for request in requests]
            say_unknown(spans)
            found = log_likelihood(sampler, spans, calls), likeliest(sampler, spans, calls)
            return list(zip(*found, strict=True))

        def loglikelihood_rolling(self, requests):
            spans = [cut_spans(sampler, request.args[0]) for request in requests]
            say_unknown([*chain.from_iterable(spans)])
            found = iter(log_likelihood(sampler, [*chain.from_iterable(spans)], calls))
            return [sum(next(found) for _ in parts) for parts in spans]

        def generate_until(self, requests):
            texts = []
            for context, options in tqdm([r.args for r in requests], "writing", disable=None):
                stops = options.get("until", [])
                stops = [stops] if isinstance(stops, str) else stops
                n_tokens = min(options.get("max_gen_toks", sampler.limit), sampler.limit)
                texts.append(write(sampler, context, n_tokens, stops, calls))
            return texts

    return Model()


# ---------------------------------------------------------------- the task of the built-in language


def minimal_pairs(n=N_PAIRS, seed=0):
    """Draw pairs of sentences, the second with a wrong ending of a noun or verb -> list of dict."""
    partner = {}
    for kind in ("NOUN", "VERB", "ACT"):
        rules = (toy.GRAMMAR[f"{kind}-{number}"] for number in ("one", "many"))
        one, many = ([body[0] for _, body in symbol] for symbol in rules)
        partner |= dict(zip(one + many, many + one, strict=True))
    rng, pairs = random.Random(seed), []
    while len(pairs) < n:
        words = toy.sample(rng)
        i = rng.choice([i for i, word in enumerate(words) if word in partner])
        wrong = [*words[:i], partner[words[i]], *words[i + 1 :]]
        if not toy.probability(wrong):
            pairs.append(dict(good=" ".join(words), bad=" ".join(wrong)))
    return pairs


class Pairs(list):
    """Documents with the names of their fields, as the harness reads them."""

    features = dict.fromkeys(("good", "bad"))


def agreement(harness):
    """Make the task: which sentence of each pair is likelier?"""
    return harness.api.task.ConfigurableTask(
        config=dict(
            task="agreement",
            custom_dataset=lambda **_: {"test": Pairs(minimal_pairs())},
            test_split="test",
            output_type="multiple_choice",
            doc_to_text="",
            doc_to_choice="{{[good, bad]}}",
            doc_to_target=0,
            target_delimiter="",
            metric_list=[dict(metric="acc", aggregation="mean", higher_is_better=True)],
        )
    )


# ---------------------------------------------------------------- the command


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("run_dir", type=cli.path, help="run folder or exported model")
    add("--tasks", default="agreement", help="names of tasks, with commas (agreement)")
    add("--limit", type=cli.count, help="examples of each task (all)")
    add("--calls", type=cli.steps, default=DEFAULT.steps, help="network calls (%(default)d)")
    p.add_flags("--checkpoint --device")
    return p


def main(argv=None):
    args = flags().parse_args(argv)
    for part in ("evaluator", "api.model", "api.task", "utils"):
        cli.import_optional(f"lm_eval.{part}", NEEDED)
    harness = sys.modules["lm_eval"]
    sampler = Sampler.load(args.run_dir, args.checkpoint, args.device)
    tasks = [agreement(harness) if n == "agreement" else n for n in args.tasks.split(",")]
    model = make_model(harness, sampler, args.calls)
    try:
        found = harness.evaluator.simple_evaluate(model, tasks=tasks, limit=args.limit)
    except KeyError as error:
        raise ValueError(f"{error}: python -m lm_eval ls tasks lists the names") from None
    print(harness.utils.make_table(found))


if __name__ == "__main__":
    cli.run(main)
