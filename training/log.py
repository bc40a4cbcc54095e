"""What a run reports: metrics, curves, samples, lines for the terminal.

The figures of a log line carry their units in their names. utilisation is the share of the
floating-point operations per second that large matrix products reach on this device.
"""

import json
import math
import shlex
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

from common import cli, drawing, parallel
from common.files import write_whole, writing
from data import GIVEN
from text.cache import share_in_training
from text.reading import Corpus, list_labels, reading_notes
from training.checkpoint import count_checkpoints, parse_figures, read_metrics, way_back
from training.speed import model_flops, peak, peak_memory

BOUND = "val_bound_nats_per_token"
FEW_STEPS = 200  # fewer steps do not learn more than the frequencies of tokens
WORTH_SAYING = 0.005  # share of a text that gets a warning
PLAIN_SECONDS = 30  # between lines where there is no terminal
POSTFIX = (
    "loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s, {utilisation:.0%} of peak, "
    "{peak_memory_gb:.1f} GB"
)


def not_finite(loss, norm, step, model, args):
    """Say what was tried when a loss or a gradient norm is not finite, and what to do -> a line."""
    found = f"loss {loss:.4g}, gradient norm {norm:.4g}: not finite at step {step}"
    tried = f"-lr={args.learning_rate:g}, form: {model.form}"
    advice = f"{found}, or shortly before ({tried}): run again with a lower -lr"
    back = way_back(Path(args.model_dir))
    return f"{advice}; if that does not help, {back}" if back else advice


def drop_undone(path, step_of, step):
    """Remove the lines of a log from steps that a crash undid, and lines that are not whole."""
    kept = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            if step_of(line) <= step:
                kept.append(line + b"\n")
    write_whole(path, b"".join(kept))


def open_metrics(run_dir, step):
    """Open metrics.jsonl, and TensorBoard if there is one -> write(step, **figures), minutes."""
    if parallel.rank() > 0:
        parallel.wait()
        return lambda step, **figures: parallel.wait(), 0.0
    drop_undone(run_dir / "metrics.jsonl", lambda line: parse_figures(line)["step"], step)
    drop_undone(run_dir / "samples.txt", lambda line: int(line.split(b"\t")[0]), step)
    file = open(run_dir / "metrics.jsonl", "a", buffering=1)
    board = None
    with suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(run_dir, purge_step=step + 1)

    def write(step, **figures):
        with writing(file.name):
            file.write(json.dumps(dict(step=step, **figures)) + "\n")
        for name, value in figures.items() if board else ():
            board.add_scalar(name, value, step)
        parallel.wait()  # the disk may be slow

    parallel.wait()
    return write, max((line.get("minutes", 0.0) for line in read_metrics(run_dir)), default=0.0)


class Meter:
    """Losses, gradient norms, tokens and time since the last log line.

    After the first step, only `figures` waits for the device. minutes: time of training so far,
    without validations, samples and saves.
    """

    def __init__(self, model, args, device, minutes=0.0):
        self.model, self.args, self.device, self.minutes = model, args, device, minutes
        self.is_first = True
        self.restart()

    def restart(self):
        self.steps, self.n_tokens, self.n_predicted = [], 0, 0
        self.start = time.perf_counter()

    def add(self, step, loss, norm, batches):
        """Count a step: its loss and gradient norm, on the device, and its micro-batches.

        Raises ValueError if those of the first step are not finite.
        """
        self.steps.append(torch.stack([loss, norm]))
        for _, segment_ids, seen in batches:
            is_token = segment_ids > 0
            self.n_tokens += int(is_token.sum())
            self.n_predicted += int((is_token & (seen != GIVEN)).sum())
        if self.is_first:
            self.check(step)
            self.is_first = False

    def check(self, step):
        """Raise ValueError if a loss or norm since the last log line is not finite."""
        if self.steps:
            self.mean(step)

    def mean(self, step):
        """Average since the last log line -> loss, gradient norm. Raises ValueError if infinite."""
        loss, norm = torch.stack(self.steps).mean(0).tolist()  # waits for the device
        if not math.isfinite(loss + norm):
            raise ValueError(not_finite(loss, norm, step, self.model, self.args))
        return loss, norm

    @contextmanager
    def paused(self):
        """Do not count the time of validating, sampling and saving."""
        begin = time.perf_counter()
        yield
        self.start += time.perf_counter() - begin

    def figures(self, step, learning_rate):
        """Average since the last call and start again -> dict. Raises ValueError as `mean` does."""
        loss, norm = self.mean(step)
        args = self.args
        seconds = time.perf_counter() - self.start
        self.minutes += seconds / 60
        n_tokens = parallel.total(self.n_tokens)
        tokens_per_s = n_tokens / seconds
        n_rows = len(self.steps) * args.accumulation_steps * args.batch_size
        predicted = parallel.total(self.n_predicted) / max(1, n_tokens)
        flops = model_flops(self.model.config, args.sequence_length, predicted) * tokens_per_s
        most = peak(self.device, self.model.form.bf16) * parallel.size()
        figures = dict(
            loss=loss,
            grad_norm=norm,
            learning_rate=learning_rate,
            fill=n_tokens / (n_rows * args.sequence_length),
            tokens_per_s=tokens_per_s,
            utilisation=flops / most,
            model_tflops_per_s=flops / 1e12,
            peak_tflops_per_s=most / 1e12,
            peak_memory_gb=peak_memory(self.device),
            minutes=self.minutes,
        )
        self.restart()
        return figures


def read_so_far(run_dir):
    """Read metrics.jsonl while a run goes on: another's edit of it must not end the run -> list."""
    try:
        return read_metrics(run_dir)
    except (ValueError, OSError) as error:
        cli.warn_once(f"{error} (this run goes on)")
        return []


@parallel.first_only
def draw_curves(run_dir):
    """Draw the training loss and the validation bound over steps, as curves.png."""
    metrics = read_so_far(run_dir)
    series = {}
    for name, key in (("training loss", "loss"), ("validation bound", BOUND)):
        if points := [(m["step"], m[key]) for m in metrics if key in m]:
            series[name] = tuple(zip(*points, strict=True))
    drawing.lines(run_dir / "curves.png", series, "step", "nats per token", str(run_dir))


def bounds(run_dir):
    """List the bounds of the validations so far, and their steps -> [(nats per token, step)]."""
    return [(m[BOUND], m["step"]) for m in read_so_far(run_dir) if BOUND in m]


@parallel.first_only
def write_samples(run_dir, step, sample_texts):
    """Add sample_texts() to samples.txt, if it has none of this step -> lines to be printed."""
    path = run_dir / "samples.txt"
    before = path.read_bytes() if path.exists() else b""
    if any(line.startswith(b"%d\t" % step) for line in before.split(b"\n")):
        return []
    texts = sample_texts()
    lines = "".join(f"{step}\t" + text.replace("\n", "\\n") + "\n" for text in texts)
    write_whole(path, before + lines.encode())  # all texts of a step or none
    return ["  " + text.replace("\n", "\n  ") for text in texts]


@parallel.first_only
def overfitting_line(run_dir, n_worse=3):
    """Say that the bound has risen in the last `n_worse` validations -> a line, or None."""
    validated = bounds(run_dir)
    recent = validated[-n_worse - 1 :]
    risen = all(later[0] > earlier[0] for earlier, later in pairwise(recent))
    if len(recent) <= n_worse or not risen:
        return None
    best, step = min(validated)
    where = f"best.pt is from step {step} ({best:.3f} nats per token)"
    return f"the bound has risen {n_worse} times in a row: overfitting. {where}"


class Progress(tqdm):
    """A bar with the latest figures; without a terminal, a plain line every half minute.

    It also warns, once, when the disk has no room for the checkpoints to come: those of --keep,
    last.pt and best.pt that are not there yet, and the new one, which is written before an old one
    is deleted.
    """

    def __init__(self, state, args):
        options = dict(unit="step", smoothing=0.05, disable=None)
        super().__init__(total=args.max_steps, initial=state.step, **options)
        self.args = args
        self.printed_at = time.monotonic()
        # At most: weights, averages, and two moments of each weight, in float32.
        n_weights = sum(p.numel() for p in state.model.parameters())
        self.bytes_each = 4 * n_weights * (3 + len(state.emas))
        self.warned = False

    def show(self, step, figures, bound):
        """Show a step's figures (see `Meter.figures`) and the last bound, if there is one."""
        text = POSTFIX.format(**figures)
        if bound is not None:
            text += f", bound {bound:.3f}"
        self.set_postfix_str(text)
        if not self.warned:
            self.warn_of_full_disk()
        if self.disable and time.monotonic() - self.printed_at >= PLAIN_SECONDS:
            self.printed_at = time.monotonic()
            minutes = f"{figures['minutes']:.1f} minutes of training"
            print(f"step {step} of {self.args.max_steps}, {minutes}, {text}", flush=True)

    def warn_of_full_disk(self):
        """Compare the free space with what the checkpoints to come may take."""
        run_dir = self.args.model_dir
        n = max(1, 3 + self.args.keep - count_checkpoints(Path(run_dir)))
        free, needed = shutil.disk_usage(run_dir).free, n * self.bytes_each
        if free < needed:
            room = f"only {free / 1e9:.1f} GB are free for {run_dir}"
            message = f"{room}, {n} checkpoints to come take up to {needed / 1e9:.1f} GB"
            way = "make room, or stop and go on with a lower --keep, or a save will fail"
            self.write(f"{message}: {way}", file=sys.stderr)
            self.warned = True


def opening_lines(state, loader, val, seconds_per_step, args, device):
    """Size of the model, memory, tokens, when the run will end, and what its figures mean -> lines.

    val: Tokens of the validation text.
    """
    tokens, config = loader.tokens, state.model.config
    seconds = (args.max_steps - state.step) * seconds_per_step
    end = time.strftime("%H:%M", time.localtime(time.time() + seconds))
    n_weights = sum(p.numel() for p in state.model.parameters())
    batch = args.accumulation_steps * args.batch_size * args.sequence_length
    lines = text_lines(args, tokens, val)
    lines.append(
        f"preset {args.preset}: {n_weights:,} parameters, K = {config.K}, "
        f"beta(1) = {config.beta1:.4g}, {peak_memory(device):.1f} GB on {device}, "
        f"{len(tokens.ids):,} tokens per epoch ({loader.fill():.1%} of positions), "
        f"{batch:,} per batch, learning rate {args.learning_rate:.3g}, "
        f"step {state.step} to {args.max_steps} in about {seconds / 60:.0f} minutes, by {end}"
    )
    for path in filter(None, (args.data_path, args.val_path)):
        lines += reading_notes(Corpus(path, args.text_field), args.example)
    lines += label_lines(tokens, val) + text_warnings(tokens, val)
    if args.max_steps < FEW_STEPS:
        lines.append(few_steps(args, seconds_per_step))
    meaning = "the loss falls, then rises, as more and more of the texts is hidden"
    return [*lines, f"{meaning}; the bound, of each validation, says what is learned"]


def text_lines(args, training, val):
    """Say what was read, and what was left out. training, val: Tokens -> a line for each text."""
    corpus = Corpus.of(args.data_path or Path(args.model_dir) / "corpus.txt")
    if args.val_path:
        texts = (corpus, training), (Corpus(args.val_path), val)
        return [text.describe(tokens.n_documents, tokens.n_bytes) for text, tokens in texts]
    n_documents = training.n_documents + val.n_documents
    return [corpus.describe(n_documents, training.n_bytes + val.n_bytes)]


def label_lines(*texts):
    """List the labels of Tokens, the most frequent first -> a line, or none without labels."""
    labels, counts = texts[0].tokenizer.labels, Counter()
    after_bos = int(texts[0].tokenizer.bos >= 0)
    for tokens in texts if labels else ():
        for shard in range(tokens.n_shards):
            starts, _ = tokens.read_shard(shard)
            counts.update(tokens.ids[starts + after_bos].tolist())
    return list_labels(Counter({label: counts[k] for label, k in labels.items() if counts[k]}))


def text_warnings(training, val):
    """Say what share of Tokens is unknown, and what share of `val` was trained on -> lines."""
    unknown = training.n_unknown_bytes / training.n_bytes
    known = share_in_training(val, training)
    lines = []
    if unknown > WORTH_SAYING:
        way = "try another tokenizer or a larger --vocab_size"
        lines.append(f"the tokenizer does not know {unknown:.1%} of the text: {way}")
    if known > WORTH_SAYING:
        found = f"{known:.0%} of the validation examples are in the training text too"
        lines.append(f"{found}: for new text the bound is too low")
    return lines


def few_steps(args, seconds_per_step=None):
    """Say that a run is too short to learn from -> a line."""
    minutes = max(10, round(3 * (args.minutes or 0)))
    example = f" (about {60 * minutes / seconds_per_step:,.0f} steps)" if seconds_per_step else ""
    few = f"{args.max_steps} steps are too few to learn a language"
    return f"{few}: samples will be noise. Try --minutes={minutes}{example}"


def validation_line(figures):
    """Validation figures -> a line."""
    unknown = figures["unknown_nats_per_token"]
    spelling = f" + unknown text {unknown:.3f}" if unknown else ""
    return (
        "validation L_inf {L_inf_nats_per_token:.3f} + L_rec {L_rec_nats_per_token:.3f}{spelling} "
        "= bound {bound_nats_per_token:.3f} +- {monte_carlo_error_nats_per_token:.3f} nats per "
        "token, {bits_per_char:.3f} bits per character; exact {exact_bits_per_char:.3f}"
    ).format(**figures, spelling=spelling)


def closing_lines(args):
    """Say where a finished run lies and what to do with it -> lines."""
    again = "more --minutes or --max_steps train on"
    if args.data_path is None:
        again = "python train.py -d=CORPUS.txt -mdir=runs/mine --minutes=10"
    elif args.max_steps < FEW_STEPS:
        return few_steps(args)
    folder = shlex.quote(args.model_dir)
    return (
        f"in {args.model_dir}: best.pt (weights of the lowest bound), last.pt (to resume), "
        f"samples.txt, curves.png, metrics.jsonl\nnext: python sample.py -mdir={folder}\n"
        f"      python plot.py report {folder}\n      {again}"
    )
