"""Print text from a trained model: free, continuing a prompt, filling gaps, editing a draft, with odds for tokens.

    python sample.py -mdir=RUN_DIR --prompt "the ___ is sweet"

The same from Python:

    from sample import Sampler
    model = Sampler.load("runs/demo")
    model("the ___ sees the ___", n=4, steps=32)
"""

import json
import os
import random
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from common import cli  # isort: skip - first, because of Ctrl-C
import numpy as np
import torch
from tqdm import tqdm

import bfn
import data
from common import parallel
from common.files import writing
from common.noise import mix_seed
from evaluation import likelihood
from evaluation.bounds import Work, nothing_given
from sampling import guidance, proofread, terminal
from sampling.generate import DEFAULT, Options, fit_lengths, generate
from sampling.prompts import (
    ANY_LABEL,
    FREE,
    GAP,
    candidates,
    check_hints,
    check_unicode,
    find_ids,
    make_template,
    parse_hint,
    read_breaks,
    read_prompts,
    split_label,
    unknown_pieces,
    warn_unknown,
)
from sampling.terminal import Trace
from text.reading import ONE_LINE
from text.tokenizer import add_marks, decode, label_ids, one_line
from training.checkpoint import EXPORTED_FILES, RUN_FILES, load

OPTIONS = "sampler steps corrections temperature top_p argmax until ban hint draft strength guidance scale".split()
CONTROLS = [field.name for field in fields(bfn.Controls)]
SEPARATOR = "-" * 20  # printed after each text of several lines


# ---------------------------------------------------------------- the model as an object


class Sampler:
    """A trained model that writes texts: `model = Sampler.load("runs/demo")`, then `model("the ___ sleeps", n=4)`.

    `model`, `tokenizer` and `run` are those of `checkpoint.load`. All methods raise ValueError for what does not fit the
    model. **options are fields of `Options`; of these, ban and hint are lists of texts, and draft is a text (see README).
    """

    def __init__(self, model, tokenizer, run):
        self.model, self.tokenizer, self.run = model, tokenizer, run
        self.limit, self.device = run["args"]["sequence_length"], next(model.parameters()).device

    @classmethod
    def load(cls, run_dir: str, checkpoint: str = "best", device: str = "auto") -> "Sampler":
        """Load a run folder or an exported model."""
        return cls(*load(run_dir, checkpoint, parallel.find_device(device)))

    def __call__(self, prompt: str = "", n: int = 1, seed: int = 0, **options) -> list[str]:
        """Sample n texts that continue a prompt or fill its gaps -> list of str."""
        return [text for text, *_ in self.stream([prompt] * n, seed, **options)]

    def stream(self, prompts, seed=0, length=None, trace=False, label=None, **options):
        """Begin to sample a text for each prompt -> iterator over (text, ids, calls of the network).

        length: tokens of each text, with bos and eos; drawn if None. trace: show the first text at each call. label: of a
        model of labelled texts, begins all prompts.
        """
        if isinstance(prompts, str):
            raise ValueError("give a list of prompts")  # noqa: TRY004 - as all else that does not fit
        if options.get("draft") is not None and (label is not None or any(prompts)):
            raise ValueError("a draft is the whole text: give neither a prompt nor a label")
        if label is not None:
            if not label_ids(self.tokenizer):
                raise ValueError("the model was not trained with --labelled: give a --classifier of the label")
            if any("\t" in prompt for prompt in prompts):
                raise ValueError("a prompt names a label already: leave --label out")
            prompts = [f"{label}\t{prompt}" for prompt in prompts]
        options = self.options(**options)
        templates = self.templates(prompts, seed, length, options)
        if max(map(len, templates), default=0) <= self.limit:
            check_hints(options.hints, templates, self.tokenizer.bos_id() >= 0)
        elif options.hints or trace:
            limit = f"at most {self.limit} tokens, the trained length"
            raise ValueError(f"--hint and --trace need texts of {limit}: lower --length")
        if trace:
            trace = Trace(self.tokenizer, unknown=unknown_pieces(prompts[0], self.tokenizer))
            options = replace(options, trace=trace)
        samples = generate(self.model, self.tokenizer, templates, seed, options, self.limit)
        return (
            (self.decode(ids, prompt), ids, calls)
            for prompt, (ids, calls) in zip(prompts, samples, strict=True)
        )

    def decode(self, ids, prompt=""):
        """Turn ids into text. What the tokenizer did not know reads as in the prompt."""
        return lay_out(decode(self.tokenizer, ids, unknown_pieces(prompt, self.tokenizer)), self.run)

    def options(self, *, ban=(), hint=(), draft=None, strength=0.4, **more):
        """Turn what a user says into Options."""
        controls = {name: more.pop(name) for name in CONTROLS if name in more}
        return Options(
            controls=replace(DEFAULT, **controls),
            hints=tuple(parse_hint(text, self.tokenizer) for text in hint),
            banned=tuple(k for text in ban for k in find_ids(text, self.tokenizer)),
            draft=() if draft is None else self.read_draft(draft),
            strength=strength,
            **more,
        )

    def read_draft(self, text):
        """Encode a draft with bos and eos -> ids."""
        if not text.strip():
            raise ValueError("--draft is empty: give a text")
        return tuple(self.encode(text, "--draft"))

    def encode(self, text, name):
        """Encode a whole text with bos and eos -> ids. name: what messages call it."""
        check_unicode(text)
        label, text = split_label(text, self.tokenizer)
        if label == [ANY_LABEL]:
            raise ValueError(f"{name} has no label: write label<TAB>text")
        ids = add_marks(label + self.tokenizer.encode(text), self.tokenizer)
        if len(ids) > self.limit:
            raise ValueError(f"{name} takes {len(ids)} tokens, the model was trained on at most {self.limit}: shorten it")
        return ids

    def templates(self, prompts, seed, length, options):
        """Choose a template for each prompt: the draft's length, or one that fits the prompt."""
        if options.draft:  # only bos and the label are given
            given = {self.tokenizer.bos_id(), *label_ids(self.tokenizer).values()}
            return [[k if k in given else FREE for k in options.draft]] * len(prompts)
        fit = partial(fit_lengths, self.model, self.tokenizer)
        choices = {p: fit(*candidates(p, self.tokenizer, self.run, length)) for p in set(prompts)}
        if options.guide is not None:
            choices = {p: guidance.fit_lengths(options, self.model, *choice) for p, choice in choices.items()}
        seeds = [mix_seed(seed, i) for i in range(len(prompts))]
        return [random.Random(seed).choices(*choices[p])[0] for p, seed in zip(prompts, seeds, strict=True)]

    def log_likelihood(self, texts: list[str], calls: int | None = None) -> np.ndarray:
        """Compute log P(text | its length), exact under `commit` with so many calls, or one per token -> (n,) nats."""
        if isinstance(texts, str) or (calls is not None and calls < 1):
            raise ValueError("give a list of texts, and at least one call")
        if not len(texts):
            return np.zeros(0)
        windows = [np.array(self.encode(text, "the text")) for text in texts]
        functions = {"exact": partial(likelihood.exact, calls=calls)}
        bos_id = self.tokenizer.bos_id()
        work = Work(self.device)
        scores = likelihood.score(self.model, windows, bos_id, nothing_given, functions, work)
        return -scores.nats["exact"]

    def fill(self, ids, given, seed: int = 0, **options) -> torch.Tensor:
        """Draw the tokens that are not given: ids, given (B, L) -> ids (B, L) int64. Only the last may become eos."""
        ids, given = torch.as_tensor(ids), torch.as_tensor(given, dtype=torch.bool)
        if ids.dim() != 2 or ids.shape != given.shape or ids.is_floating_point():
            raise ValueError("ids and given must have the same shape (B, L), and ids whole numbers")
        if ((ids < 0) | (ids >= self.model.config.K))[given].any():
            raise ValueError(f"given ids must lie between 0 and {self.model.config.K - 1}")
        kinds = torch.full_like(ids, GAP).index_fill(1, torch.tensor([ids.shape[1] - 1]), FREE)
        templates = torch.where(given, ids, kinds).tolist()
        samples = generate(self.model, self.tokenizer, templates, seed, self.options(**options))
        return torch.tensor([row for row, _ in samples])

    def examples(self, tokens, n, seed=0):
        """Sample n texts to look at during training -> list of str. Only this process samples.

        Half are free. The others continue the first third, in brackets, of a window of `tokens`.
        """
        templates = [make_template("", self.tokenizer, self.run, mix_seed(seed, i)) for i in range(n // 2)]
        plan = data.plan_validation(tokens, self.limit, n)
        for i in range(n // 2, n):
            start, length = (int(x[i % len(plan.starts)]) for x in (plan.starts, plan.lengths))
            given = tokens.ids[start : start + length // 3].tolist()
            templates.append(given + [FREE] * (length - len(given)))
        samples = generate(self.model, self.tokenizer, templates, seed, numbers=range(n))
        texts = []
        for i, (template, (ids, _)) in enumerate(zip(templates, samples, strict=True)):
            n_given = sum(k >= 0 for k in template) if i >= n // 2 else 0
            given = f"[{decode(self.tokenizer, ids[:n_given])}] " if i >= n // 2 else ""
            texts.append(given + decode(self.tokenizer, ids[n_given:]))
        return [lay_out(text, self.run) for text in texts]


# ---------------------------------------------------------------- the command


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("-mdir", "--model_dir", type=cli.path, default="runs/demo", help="run folder (runs/demo)")
    add("--checkpoint", choices=["best", "last"], default="best", help="the best by validation, or the last (best)")
    prompt = "beginning of a text, or a text with gaps ___ or ___{N} (not a gap: \\___); repeatable"
    add("--prompt", action="append", default=[], help=prompt)
    add("--prompt_file", type=cli.path, help="file with one prompt per line")
    add("--num_samples", type=cli.samples, default=8, help="samples per prompt (8)")
    add("--length", type=cli.count, help="tokens per text, with bos and eos (drawn from the training lengths)")
    add("--sampler", "--solver", choices=bfn.SAMPLERS, default=DEFAULT.sampler, help="how to sample (%(default)s)")
    add("--steps", type=cli.steps, default=DEFAULT.steps, help="most calls that fill the text; the solvers make STEPS + 1 (32)")
    add("--corrections", type=cli.natural, default=DEFAULT.corrections, help="further calls of pace that redraw tokens (4)")
    add("--temperature", type=cli.positive, default=1.0, help="of the output distribution (1)")
    add("--top_p", type=cli.above_zero_to_one, default=1.0, help="keep the likeliest tokens that sum to this (1)")
    add("--argmax", action="store_true", help="take the likeliest tokens instead of drawing them")
    add("--until", type=cli.non_negative, default=0.0, help="finish a text below this mean entropy, nats per token (0)")
    add("--ban", action="append", default=[], help="a token that is never drawn; repeatable")
    add("--hint", action="append", default=[], help="odds of tokens at a position, such as 3:cat=0.7,dog=0.3; repeatable")
    add("--guidance", type=cli.non_negative, default=0.0, help="follow the prompt more closely: 1 or 2, at twice the calls (0)")
    add("--classifier", type=cli.path, help="file of classify.py: steer towards --label")
    add("--label", help="label that texts should have: of --classifier, or of a model of labelled texts")
    add("--scale", type=cli.non_negative, default=Options.scale, help="how strongly --classifier steers (1)")
    add("--draft", help="text to edit, treated as if observed at noise level t = --strength")
    add("--strength", type=cli.share, default=0.4, help="noise level t of --draft: a higher value keeps more of it (0.4)")
    add("--seed", type=cli.natural, default=0, help="a sample depends only on the seed and its number (0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (cuda if there is one)")
    add("--output", type=cli.path,
        help="also write prompt, text, ids and network calls to this file, as JSON lines")
    add("--interactive", action="store_true", help="type prompts, and change settings between them")
    add("--check", action="append", default=[], help="a text to proof-read: how much each token surprises; repeatable")
    add("--check_file", type=cli.path, help="file with one text to proof-read per line")
    add("--json", action="store_true", help="print what --check finds as JSON")
    add("--trace", action="store_true", help="show the first sample at each network call, on standard error")
    return p


def check_output(args):
    """Raise ValueError if --output would overwrite the prompts or a file of the run."""
    output = Path(args.output or os.devnull).resolve()
    if args.prompt_file and output == Path(args.prompt_file).resolve():
        raise ValueError(f"--output={args.output} is the file of prompts: give another name")
    if output.parent == Path(args.model_dir).resolve() and output.name in RUN_FILES + EXPORTED_FILES:
        raise ValueError(f"--output={args.output} is a file of the run: give another name")


def read_guide(args, model):
    """Read the classifier of the flags -> a guide, or None. Raises ValueError if there is no label."""
    if args.classifier and args.label is None:
        raise ValueError("--classifier steers towards a label: give --label too")
    return args.classifier and guidance.load_classifier(args.classifier, model).guide(args.label)


def check_interactive(args):
    """Raise ValueError if --interactive stands next to flags that it does not read, or in many processes."""
    if parallel.size() > 1:
        raise ValueError("--interactive reads one keyboard: start it without torchrun")
    unread = "prompt prompt_file output check check_file draft trace".split()
    if given := [f"--{name}" for name in unread if getattr(args, name)]:
        raise ValueError(f"--interactive reads prompts from standard input: leave {', '.join(given)} out")


def check_draft(args):
    """Raise ValueError if --draft stands next to flags that say what the text is."""
    if args.draft is not None and (args.prompt or args.prompt_file or args.length or (args.label and not args.classifier)):
        raise ValueError("--draft is the whole text: use it without --prompt, --prompt_file, --length and --label")


def main(argv=None):
    args = flags().parse_args(argv)
    model = Sampler.load(args.model_dir, args.checkpoint, parallel.join(args.device))
    args.prompt = [read_breaks(text, model.run) for text in args.prompt]
    args.draft = args.draft and read_breaks(args.draft, model.run)
    for text in [*args.ban, *args.hint, args.draft or ""]:
        check_unicode(text)
    check_draft(args)
    separator = [] if model.run["args"]["example"] in ONE_LINE else [SEPARATOR]
    steering = dict(guide=read_guide(args, model), label=None if args.classifier else args.label)
    if args.interactive:
        check_interactive(args)
        options = [name for name in OPTIONS if name != "draft"]
        parse = flags().parse_args
        if n_refused := terminal.run(model, args, options, parse, separator, **steering):
            raise ValueError(f"refused lines: {n_refused}")
        return
    if args.check or args.check_file is not None:
        proofread.run(model, args)
        return
    is_read = args.prompt_file is not None
    prompts = args.prompt + (read_prompts(args.prompt_file, model.tokenizer, model.run, args.length) if is_read else [])
    check_output(args)
    prompts = [prompt for prompt in prompts or [""] for _ in range(args.num_samples)]
    options = {name: getattr(args, name) for name in OPTIONS} | steering
    samples = model.stream(prompts, args.seed, args.length, args.trace, **options)
    warn_unknown([*prompts, args.draft or ""], model.tokenizer)
    print_samples(samples, prompts, args, separator)


def print_samples(samples, prompts, args, separator):
    """Print texts as they come, and write --output."""
    hide_bar = True if args.trace or len(prompts) == 1 else None  # None: show it only in a terminal
    total_calls, path = 0, (parallel.rank() == 0 and args.output) or os.devnull
    unfinished = path if os.path.exists(path) and not os.path.isfile(path) else f"{path}.part"  # not of a pipe
    with writing(path), open(unfinished, "w", encoding="utf-8") as output:
        bar = tqdm(samples, total=len(prompts), unit="sample", disable=hide_bar)
        for prompt, (text, ids, calls) in zip(prompts, bar, strict=True):
            total_calls += calls
            with writing("standard output"):
                print(text, *separator, sep="\n", flush=True)
            record = dict(prompt=prompt, text=text, ids=ids, calls=calls)
            print(json.dumps(record, ensure_ascii=False), file=output, flush=True)
    if unfinished != path:
        os.replace(unfinished, path)
    if args.until and parallel.rank() == 0:
        print(f"{total_calls / len(prompts):.1f} network calls per text", file=sys.stderr)


def lay_out(text, run):
    """Put a sample on one line if the model was trained on lines: it may have drawn a line break by chance."""
    return one_line(text) if run["args"]["example"] in ONE_LINE else text


if __name__ == "__main__":
    cli.run(main)
