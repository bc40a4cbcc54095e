"""Print texts of a trained model: free, after a prompt, in gaps, from a draft, with odds of tokens.

    python sample.py -mdir=RUN_DIR --prompt "the ___ is sweet"

The same from Python:

    from sample import Sampler
    model = Sampler.load("runs/demo")
    model("the ___ sees the ___", n=4, steps=32)
"""

import json
import sys
from dataclasses import fields, replace
from functools import partial

from common import cli  # isort: skip - first, because of Ctrl-C
import numpy as np
import torch
from tqdm import tqdm

import bfn
from common import parallel
from common.files import writing
from common.noise import mix_seed, whole
from evaluation import likelihood
from evaluation.bounds import Text, Work
from sampling import guidance, odds, output, prompts, proofread, terminal
from sampling.generate import DEFAULT, FLAGS, Options, fit_lengths, generate, refuse_idle
from sampling.prompts import ANY_LABEL, FREE, GAP, Prompt
from sampling.terminal import Trace
from text.reading import ONE_LINE
from text.tokenizer import one_line
from training.checkpoint import EXPORTED_FILES, RUN_FILES, load

OPTIONS = "sampler steps corrections temperature top_p argmax until ban hint draft strength scale"
CONTROLS = [field.name for field in fields(bfn.Controls)]
SEPARATOR = "-" * 20  # printed after each text of several lines


# ---------------------------------------------------------------- the model as an object


class Sampler:
    """A trained model that writes texts.

        model = Sampler.load("runs/demo")
        model("the ___ sleeps", n=4)

    `model`, `tokenizer` and `run` are those of `checkpoint.load`. All methods raise ValueError for
    what does not fit the model. **options are fields of `Options` and `bfn.Controls`; of these, ban
    and hint are lists of texts, and draft is a text (see README).
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
        if whole(n) < 0:
            raise ValueError(f"n={n}: give a number of texts")
        return [text for text, *_ in self.stream([prompt] * n, seed, **options)]

    def stream(self, prompts, seed=0, length=None, trace=False, label=None, **options):
        """Begin to sample a text for each prompt -> iterator over (text, ids, network calls).

        length: tokens of each text, with bos and eos; drawn if None. trace: show the first text at
        each call. label: of a model of labelled texts, begins all prompts.
        """
        if isinstance(prompts, str) or not all(isinstance(text, str) for text in prompts):
            raise ValueError("give a list of prompts")
        for number in (seed, 0 if length is None else length):
            whole(number)
        if options.get("draft") is not None and (label is not None or any(prompts)):
            raise ValueError("a draft is the whole text: give neither a prompt nor a label")
        if label is not None:
            prompts = self.label(prompts, label)
        options = self.options(**options)
        read = {prompt: self.read(prompt, length, options) for prompt in set(prompts)}
        templates = [read[p].draw(mix_seed(seed, i)) for i, p in enumerate(prompts)]
        if max(map(len, templates), default=0) <= self.limit:
            odds.check(options.hints, templates, self.tokenizer.bos >= 0)
        elif options.hints or trace:
            limit = f"at most {self.limit} tokens, the trained length"
            raise ValueError(f"--hint and --trace need texts of {limit}: lower --length")
        if trace and prompts:
            trace = Trace(self.tokenizer, unknown=read[prompts[0]].unknown)
            options = replace(options, trace=trace)
        samples = generate(self.model, self.tokenizer, templates, seed, options, self.limit)
        return (
            (self.decode(ids, read[prompt].unknown), ids, calls)
            for prompt, (ids, calls) in zip(prompts, samples, strict=True)
        )

    def label(self, prompts, label):
        """Put a label of a model of labelled texts before each prompt."""
        if not self.tokenizer.labels:
            message = "the model was not trained with --labelled"
            raise ValueError(f"{message}: give a --classifier of the label")
        if any("\t" in prompt for prompt in prompts):
            raise ValueError("a prompt names a label already: leave --label out")
        return [f"{label}\t{prompt}" for prompt in prompts]

    def decode(self, ids, unknown=()):
        """Turn ids into text. unknown: the texts of what the tokenizer does not know."""
        return lay_out(self.tokenizer.decode(ids, unknown), self.run)

    def options(self, *, ban=(), hint=(), draft=None, strength=0.4, **more):
        """Turn what a user says into Options."""
        for name, texts in (("ban", ban), ("hint", hint), ("draft", [draft or ""])):
            if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{name}={texts!r}: give texts, ban and hint as lists")
        controls = {name: more.pop(name) for name in CONTROLS if name in more}
        return Options(
            controls=replace(DEFAULT, **controls),
            hints=tuple(odds.parse(text, self.tokenizer) for text in hint),
            banned=tuple(k for text in ban for k in odds.find_ids(text, self.tokenizer)),
            draft=() if draft is None else self.read_draft(draft),
            strength=strength,
            **more,
        )

    def read_draft(self, text):
        """Encode a draft with bos and eos -> ids."""
        if not text.strip():
            raise ValueError("--draft is empty: give a text")
        return tuple(self.encode(text, "--draft"))

    def encode(self, text, name="the text"):
        """Encode a whole text with bos and eos -> ids. name: what messages call it."""
        prompts.check_unicode(text)
        label, text = prompts.split_label(text, self.tokenizer)
        if label == [ANY_LABEL]:
            raise ValueError(f"{name} has no label: write label<TAB>text")
        ids = self.tokenizer.add_marks(label + self.tokenizer.encode(text))
        if len(ids) > self.limit:
            limit = f"the model was trained on at most {self.limit}"
            raise ValueError(f"{name} takes {len(ids)} tokens, {limit}: shorten it")
        return ids

    def read(self, text, length, options):
        """Read a prompt -> Prompt, of which lengths are likelier that the network finds to fit it.

        A draft has its own length, and only its bos and label are given.
        """
        if options.draft:
            given = {self.tokenizer.bos, *self.tokenizer.labels.values()}
            return Prompt([[k if k in given else FREE for k in options.draft]], [1])
        prompt = Prompt.read(text, self.tokenizer, self.run, length)
        prompt = fit_lengths(self.model, self.tokenizer, prompt)
        if options.guide is not None:
            prompt = guidance.fit_lengths(options, self.model, prompt)
        return prompt

    def log_likelihood(self, texts: list[str], calls: int | None = None) -> np.ndarray:
        """Compute log P(text | its length) under `commit` -> (n,) nats.

        It is exact for so many calls, or for one per token.
        """
        if isinstance(texts, str) or (calls is not None and calls < 1):
            raise ValueError("give a list of texts, and at least one call")
        if not len(texts):
            return np.zeros(0)
        windows = [np.array(self.encode(text)) for text in texts]
        prompts.warn_unknown(texts, self.tokenizer)  # it costs nothing here
        inputs = {"exact": partial(likelihood.exact, calls=calls)}, Work(self.device)
        return -likelihood.score(self.model, windows, self.tokenizer.bos, *inputs).nats["exact"]

    def fill(self, ids, given, seed: int = 0, **options) -> torch.Tensor:
        """Draw the tokens that are not given: ids, given (B, L) -> ids (B, L) int64.

        Only the last may become eos.
        """
        ids = torch.as_tensor(ids)
        given = torch.as_tensor(given, dtype=torch.bool)
        if ids.dim() != 2 or ids.shape != given.shape or ids.is_floating_point() or not ids.numel():
            raise ValueError("ids and given must have the same shape (B, L), and ids whole numbers")
        ids = ids.long()
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
        n_free = n // 2
        free = Prompt.read("", self.tokenizer, self.run)
        templates = [free.draw(mix_seed(seed, i)) for i in range(n_free)]
        windows = Text(tokens, self.limit, n_rows=n).windows()
        for i in range(n_free, n):
            window = windows[i % len(windows)].tolist()
            n_given = len(window) // 3
            templates.append(window[:n_given] + [FREE] * (len(window) - n_given))
        samples = generate(self.model, self.tokenizer, templates, seed, numbers=range(n))
        texts = []
        for i, (template, (ids, _)) in enumerate(zip(templates, samples, strict=True)):
            n_given = sum(k >= 0 for k in template) if i >= n_free else 0
            given = f"[{self.tokenizer.decode(ids[:n_given])}] " if i >= n_free else ""
            texts.append(given + self.tokenizer.decode(ids[n_given:]))
        return [lay_out(text, self.run) for text in texts]


def lay_out(text, run):
    """Put a text of a model of lines on one line: it may have drawn a line break by chance."""
    return one_line(text) if run["args"]["example"] in ONE_LINE else text


# ---------------------------------------------------------------- the command


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    p.add_flags("-mdir --checkpoint --device")
    add("--prompt", action="append", default=[],
        help="beginning, or text with gaps ___ or ___{N} (not a gap: \\___); repeatable")
    add("--prompt_file", type=cli.path, help="file with one prompt per line")
    add("--num_samples", type=cli.samples, default=8, help="samples per prompt (8)")
    add("--length", type=cli.count,
        help="tokens of a text without gaps, with bos and eos (drawn from the training lengths)")
    p.add_flags("--sampler --steps --corrections --temperature", FLAGS)
    add("--top_p", type=cli.above_zero_to_one, default=1.0,
        help="keep the likeliest tokens that sum to this (1)")
    add("--argmax", action="store_true", help="take the likeliest tokens instead of drawing them")
    add("--until", type=cli.non_negative, default=0.0,
        help="finish a text below this mean entropy, nats per token (0)")
    add("--ban", action="append", default=[], help="a token that is never drawn; repeatable")
    add("--hint", action="append", default=[],
        help="odds of tokens at a position, such as 3:cat=0.7,dog=0.3; repeatable")
    add("--classifier", type=cli.path, help="file of tools.classify: steer towards --label")
    add("--label", help="label that texts should have: of --classifier, or of labelled texts")
    add("--scale", type=cli.non_negative, default=Options.scale,
        help="how strongly --classifier steers (1)")
    add("--draft", help="text to edit, treated as if observed at noise level t = --strength")
    add("--strength", type=cli.share, default=0.4,
        help="noise level t of --draft: a higher value keeps more of it (0.4)")
    add("--seed", type=cli.natural, default=0,
        help="a sample depends only on the seed and its number (0)")
    add("--output", type=cli.path,
        help="also write prompt, text, ids and network calls to this file, as JSON lines")
    add("--interactive", action="store_true", help="type prompts, and change settings in between")
    add("--check", action="append", default=[],
        help="a text to proof-read: how much each token surprises; repeatable")
    add("--check_file", type=cli.path, help="file with one text to proof-read per line")
    add("--json", action="store_true", help="print what --check finds as JSON")
    add("--trace", action="store_true",
        help="show the first sample at each network call, on standard error")
    return p


NEEDS = {"scale": "classifier", "strength": "draft", "json": "check check_file"}
PROOFREADING = {"model_dir", "checkpoint", "device", "check", "check_file", "json"}


def check(args, parser):
    """Raise ValueError for flags that do not go together."""
    ignored = sorted(parser.given - PROOFREADING)
    if ignored and (args.check or args.check_file is not None):
        raise ValueError(f"--check reads texts and samples none: leave --{ignored[0]} out")
    parser.refuse_idle(args, NEEDS)
    refuse_idle(args, parser.given)
    is_given = [args.prompt, args.prompt_file, args.length, args.label and not args.classifier]
    if args.draft is not None and any(is_given):
        others = "--prompt, --prompt_file, --length and --label"
        raise ValueError(f"--draft is the whole text: use it without {others}")
    if args.classifier and args.label is None:
        raise ValueError("--classifier steers towards a label: give --label too")
    if args.interactive:
        if parallel.size() > 1:
            raise ValueError("--interactive reads one keyboard: start it without torchrun")
        unread = "prompt prompt_file output check check_file draft trace".split()
        if given := [f"--{name}" for name in unread if getattr(args, name)]:
            message = "--interactive reads prompts from standard input"
            raise ValueError(f"{message}: leave {', '.join(given)} out")


def main(argv=None):
    parser = flags()
    args = parser.parse_args(argv)
    device = parallel.join(args.device)
    check(args, parser)
    model = Sampler.load(args.model_dir, args.checkpoint, device)
    args.prompt = [prompts.read_breaks(text, model.run) for text in args.prompt]
    args.draft = args.draft and prompts.read_breaks(args.draft, model.run)
    for text in [*args.ban, *args.hint, args.draft or ""]:
        prompts.check_unicode(text)
    separator = [] if model.run["args"]["example"] in ONE_LINE else [SEPARATOR]
    steering = dict(guide=None, label=args.label)
    if args.classifier:
        steering = dict(guide=guidance.load_classifier(args.classifier, model).guide(args.label))
    if args.interactive:
        names = [name for name in OPTIONS.split() if name != "draft"]
        parse = flags().parse_args
        if n_refused := terminal.run(model, args, names, parse, separator, **steering):
            raise ValueError(f"refused lines: {n_refused}")
    elif args.check or args.check_file is not None:
        proofread.run(model, args)
    else:
        print_samples(model, args, separator, steering)


def print_samples(model, args, separator, steering):
    """Print texts as they come, and write --output."""
    chosen = args.prompt
    if args.prompt_file is not None:
        chosen += prompts.read_prompts(args.prompt_file, model.tokenizer, model.run, args.length)
    output.check(args, RUN_FILES + EXPORTED_FILES)
    chosen = [prompt for prompt in chosen or [""] for _ in range(args.num_samples)]
    options = {name: getattr(args, name) for name in OPTIONS.split()} | steering
    samples = model.stream(chosen, args.seed, args.length, args.trace, **options)
    prompts.warn_unknown([*chosen, args.draft or ""], model.tokenizer)
    hide_bar = True if args.trace or len(chosen) == 1 else None  # None: only without a terminal
    bar = tqdm(samples, total=len(chosen), unit="sample", disable=hide_bar)
    total_calls = 0
    with output.opened(args.output) as file:
        for prompt, (text, ids, calls) in zip(chosen, bar, strict=True):
            total_calls += calls
            with writing("standard output"):
                print(text, *separator, sep="\n", flush=True)
            record = dict(prompt=prompt, text=text, ids=ids, calls=calls)
            print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
    if args.until and parallel.rank() == 0:
        print(f"{total_calls / len(chosen):.1f} network calls per text", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
