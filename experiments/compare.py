"""Train variants for the same minutes or tokens, and compare their validation bounds.

    python -m experiments.compare base no_skip adamw --minutes=3
    python -m experiments.compare base learning_rate=3e-3 "masked weight_decay=0 batch_size=8"
    python -m experiments.compare base autoregressive --minutes=12 --seeds=3 -d=wiki8.train.txt \\
        --val_path=wiki8.valid.txt --flags="--preset=laptop --tokenizer=char -slen=128 -bsz=16"

A variant is flags of train.py without their dashes, functions in this file, or both. A function
changes the network, the loss or the optimizer before training starts. It need not know the fused
form: train.py checks whether that follows the change, and otherwise trains in the plain form.

Each variant and seed runs in its own process, one after another. The learning rate falls to zero at
the end of the budget. With several budgets (--tokens=1000000,3000000), each variant is trained once
for each, and the picture shows the last exact likelihoods over them. Results are added to those
already in the folder. The weights of "base" and "autoregressive" are kept there too, as run folders
base-0, ..., those of the last budget.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from itertools import product
from operator import itemgetter
from pathlib import Path

from common import cli  # isort: skip - first, because of Ctrl-C
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import bfn
import data
import evaluate
import model as model_file
import train
from common import drawing, files, parallel
from common.noise import mix_seed
from evaluation import bounds, likelihood, tables
from experiments.tables import table
from training import forms, optim, speed
from training.checkpoint import save
from training.run_folder import describe_run, prepare_text

N_POINTS = 8  # validations of each run, evenly spaced over its budget
VAL_TOKENS = 32_768  # of the validation text, scored each time
EXACT_TOKENS = 2048  # and of these, for the exact likelihood
MEANS = "L_inf_nats_per_token", "L_rec_nats_per_token", "minutes", "n_tokens"
WARM_UP = 0.1  # share of the budget
SAME = "data_path val_path text_field example tokenizer vocab_size spm_model init_from seed".split()
UNUSED = "epochs minutes max_steps warmup_steps accumulation_steps".split()  # see `train_variant`
BITS = {
    "bits per character: bound": "bits_per_char",
    "lowest bound on the way": "lowest_bits_per_char",
    "exact": "exact_bits_per_char",
}
GAPS = 1, 4, 16  # tokens; each in its full context, and from the left
COLUMNS = "variant", "what", *BITS, "L_inf + L_rec, nats per token", "minutes", "tokens", "seeds"
GAP_COLUMNS = list(likelihood.figures_of(gaps=GAPS))


# ---------------------------------------------------------------- variants


def head_without_theta(self, hidden, theta):
    """Replace BFNTransformer.head: hidden (B, L, D) -> logits (B, L, K)."""
    return self.linear_out(hidden)


def train_only(squared_error_loss):
    """Train with this loss only, instead of bfn's; the tokens of a text share their time."""
    data.draw_seen = lambda segment_ids, *rest: np.full_like(segment_ids, data.SHARED, np.int8)
    bfn.CROSS_ENTROPY = 0.0
    bfn.squared_error_loss = squared_error_loss
    bfn.reconstruction_loss = lambda network, ids, *rest: torch.zeros(ids.shape, device=ids.device)


def base(args):
    """The defaults."""


def no_skip(args):
    """The output does not add log theta."""
    model_file.BFNTransformer.head = head_without_theta


def no_convolution(args):
    """No convolutions: only attention sees other positions."""
    model_file.Convolution.forward = lambda self, h, segment_ids: h


def adamw(args):
    """AdamW for all parameters, at 3e-3."""
    args.learning_rate = 3e-3
    optim.make_optimizers = lambda model, args: [optim.make_adamw(model.parameters(), args)]


def no_cross_entropy(args):
    """Only the continuous-time loss."""
    bfn.CROSS_ENTROPY = 0.0


def no_easy_start(args):
    """From the first step, no more is given than at the end."""
    data.EASY_SHARE = 0.0


def even(args):
    """All that is not given of a text shares its time, and is never hidden."""
    data.HIDDEN_SHARE = data.OWN_SHARE = 0.0


def no_hidden_texts(args):
    """What is not given of a text is never hidden."""
    data.HIDDEN_SHARE = 0.0


class Causal(model_file.BFNTransformer):
    """The same network as a causal language model: one-hots theta (B, L, K) -> logits (B, L, K).

    Those of a position follow from the tokens before it.
    """

    head = head_without_theta

    def __init__(self, config):
        super().__init__(config)
        for part in self.modules():
            if isinstance(part, model_file.Convolution):
                part.offsets = range(-4, 1)
                part.weight = torch.nn.Parameter(part.weight[:5].detach().clone())

    def attention_mask(self, segment_ids):
        self.form = self.form._replace(flex=False)
        L = segment_ids.shape[1]
        before = torch.ones(L, L, dtype=torch.bool, device=segment_ids.device).tril()
        return super().attention_mask(segment_ids) & before

    def forward(self, theta, t, segment_ids):
        before = F.pad(theta, (0, 0, 1, 0))[:, :-1]
        same_segment = F.pad(segment_ids, (1, 0))[:, :-1] == segment_ids
        h = self.embed(before * same_segment[..., None])
        return self.head(self.body(h, torch.ones_like(t), segment_ids), theta)


def autoregressive(args):
    """The same network as a causal language model, which shows what not being one costs."""

    def predict(network, theta, t, ids, cond_mask):
        return network(F.one_hot(ids, theta.shape[-1]).float(), t).float().log_softmax(-1)

    train.BFNTransformer = Causal
    bfn.predict = predict
    train_only(lambda log_p, ids, t, s1: bfn.cross_entropy(log_p, ids))


def masked(args):
    """Masked diffusion: a token is unknown with probability 1 - t; cross-entropy / (1 - t)."""
    unknown = None

    def predict_noisy(network, ids, t, cond_mask, s1, K, eps=None):
        nonlocal unknown
        eps = torch.randn(*ids.shape, 1, device=ids.device) if eps is None else eps
        u = torch.special.ndtr(eps[..., 0])  # uniform in (0, 1)
        unknown = (u >= t) & ~cond_mask
        theta = torch.full((*ids.shape, K), 1 / K, device=ids.device)
        return bfn.predict(network, theta, torch.zeros_like(t), ids, ~unknown)

    def squared_error_loss(log_p, ids, t, s1):
        return unknown * bfn.cross_entropy(log_p, ids) / (1 - t).clamp(min=1e-4)

    bfn.predict_noisy = predict_noisy
    train_only(squared_error_loss)


VARIANTS = {
    f.__name__: f
    for f in (
        base, no_skip, no_convolution, adamw, no_cross_entropy, no_easy_start, even,
        no_hidden_texts, autoregressive, masked,
    )
}  # fmt: skip


def variant(text):
    """Check the words of a variant: functions, and flags of train.py such as batch_size=8."""
    for word in text.split() or [text]:
        if word not in VARIANTS and "=" not in word:
            known = f"choose from {', '.join(VARIANTS)}, or FLAG=VALUE"
            raise argparse.ArgumentTypeError(f"{word} is no variant: {known}")
        if word.split("=")[0] in SAME:
            same = "text and seeds are the same for all variants"
            raise argparse.ArgumentTypeError(f"{word} is no variant, {same}: give it to --flags")
    if {"autoregressive", "masked"} <= {*text.split()}:
        raise argparse.ArgumentTypeError(f"{text} is two models: give one")
    return text


def change(name, args):
    """Call the functions that the name of a variant has. Its flags count more than theirs."""
    named = [word.split("=")[0] for word in name.split() if "=" in word]
    kept = {flag: getattr(args, flag) for flag in named}
    for word in name.split():
        VARIANTS.get(word, base)(args)
    vars(args).update(kept)


# ---------------------------------------------------------------- one run


def spend(minutes, n_tokens, step, measure, label):
    """Train for n_tokens, or else for so many minutes, with N_POINTS validations on the way.

    step(share of these that is spent) trains one step and returns its number of tokens; measure()
    returns the figures of a validation, whose time is not counted. -> curve [[minutes, tokens,
    figures]]
    """
    curve = []
    spent_minutes = spent_tokens = progress = 0
    bar_format = "{l_bar}{bar}| {elapsed}<{remaining}"
    with tqdm(total=100, desc=label, unit="%", bar_format=bar_format, disable=None) as bar:
        while progress < 1:
            begin = time.perf_counter()
            spent_tokens += step(progress)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent_minutes += (time.perf_counter() - begin) / 60
            progress = spent_tokens / n_tokens if n_tokens else spent_minutes / minutes
            bar.update(min(100.0, 100 * progress) - bar.n)
            if progress >= (len(curve) + 1) / N_POINTS:
                curve.append([spent_minutes, spent_tokens, measure()])
    return curve


def measure_gaps(name, model, text, device):
    """Measure gaps on VAL_TOKENS of a Text, shares of unknown tokens on EXACT_TOKENS -> figures.

    Causal models see only what is left of a gap.
    """
    functions = likelihood.figures_of(gaps=GAPS)
    if "autoregressive" in name.split():
        functions = {key: f for key, f in functions.items() if key.endswith("from the left")}
    figures = {}
    for key, function in functions.items():
        some = text.first_tokens(EXACT_TOKENS if "unknown" in key else VAL_TOKENS)
        figures |= evaluate.measure_exact(model, some, {key: function}, bounds.Work(device))
    return figures


def build(args, tokens, device):
    """Build a network and compile its training, before the time counts -> State, Loader."""
    speed.allow_tf32(device)
    state = train.build(train.make_config(args, len(tokens.tokenizer)), args, device)
    loader = train.make_loader(args, tokens)
    trial = loader.batch(0, 0.25), args, device, train.accumulate_gradients
    forms.choose_form(state, *trial)
    forms.warm_up(state, *trial)
    return state, loader


def train_variant(name, seed, comparison, folder):
    """Train one variant in this process -> its record. comparison: the flags of this command."""
    args = run_flags(comparison, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokens, val = prepare_text(run_flags(comparison), folder, None)  # the same for all
    train.fit_rows(args, tokens)
    change(name, args)
    device = parallel.find_device(args.device)
    state, loader = build(args, tokens, device)
    L, progress = args.sequence_length, 0.0

    def learning_rate(step, args):
        up, down = progress / WARM_UP, (1 - progress) / (1 - WARM_UP)
        return args.learning_rate * min(up, down)  # a straight line from 0, then one to 0

    def step(spent):
        nonlocal progress
        progress = spent
        batch = loader.batch(state.step, progress)
        seeds = [mix_seed(args.seed, state.step, 0)]
        train.accumulate_gradients(state.model, [batch], seeds, device)
        train.update_weights(state, args)
        state.step += 1
        return int((batch[1] > 0).sum())

    def measure():
        inputs = state.emas[-1], val, L, device, VAL_TOKENS, EXACT_TOKENS
        figures, state.loss_by_time = evaluate.validate(*inputs)
        return figures

    optim.learning_rate = learning_rate
    budget = comparison.tokens[0] if comparison.tokens else None
    curve = spend(comparison.minutes, budget, step, measure, f"{name}, seed {seed}")
    curve[-1][-1] = measure_gaps(name, state.emas[-1], bounds.Text(val, L), device) | curve[-1][-1]
    if name in ("base", "autoregressive"):  # a checkpoint does not say how others differ
        run = describe_run(args, state.model.config, tokens, val)
        save_weights(state, run, folder / f"{name}-{seed}")
    return settings(comparison) | record(name, seed, budget, state.model, curve)


def save_weights(state, run, run_dir):
    """Save the weights as a run folder inside the comparison's folder, or say why not."""
    try:
        run_dir.mkdir(exist_ok=True)
        for name in ("tokenizer.model", "corpus.txt"):
            if (run_dir.parent / name).exists():
                shutil.copyfile(run_dir.parent / name, run_dir / name)
        save(state, run, run_dir, is_best=True)
    except OSError as error:
        print(f"could not save the weights: {error}", file=sys.stderr)


def record(name, seed, budget, model, curve):
    """Collect what results.json keeps of a run: its last figures, and the curve.

    A point of the curve has minutes, tokens, bound and exact likelihood in bits per character.
    """
    bits = "bits_per_char", "exact_bits_per_char"
    points = [(*spent, *(figures[key] for key in bits)) for *spent, figures in curve]
    minutes, n_tokens, figures = curve[-1]
    identity = dict(name=name, seed=seed, budget=budget)
    identity |= dict(n_parameters=sum(p.numel() for p in model.parameters()))
    lowest = min(bound for *_, bound, _ in points)
    spent = dict(minutes=minutes, n_tokens=n_tokens, curve=points, lowest_bits_per_char=lowest)
    return identity | spent | figures


# ---------------------------------------------------------------- the comparison


def summarise(records):
    """Lay out each variant's mean and standard error over seeds, best first -> Markdown lines.

    Each budget has its own row.
    """
    groups = {}
    for r in records:
        groups.setdefault((r["name"], r["budget"]), []).append(r)
    rows = {}
    for (name, budget), rs in groups.items():
        mean = {key: statistics.fmean(r[key] for r in rs) for key in MEANS}
        what = " ".join(VARIANTS[name].__doc__.split()).rstrip(".") if name in VARIANTS else ""
        bits = [mean_and_error(rs, key) for key in BITS.values()]
        nats = "{L_inf_nats_per_token:.3f} + {L_rec_nats_per_token:.3f}".format(**mean)
        spent = [f"{mean['minutes']:.1f}", f"{mean['n_tokens'] / 1e6:.2f} M"]
        rows[name, budget] = [name, what, *bits, nats, *spent, str(len(rs))]
    order = sorted(rows, key=lambda group: float(rows[group][2].split()[0]))
    keys = [f"{tables.to_key(name)}_nats_per_token" for name in GAP_COLUMNS]
    gaps = [
        [rows[group][0], rows[group][-2], *(mean_and_error(groups[group], key) for key in keys)]
        for group in order
    ]
    hidden = table(["variant", "tokens", *GAP_COLUMNS], gaps)
    return [*table(COLUMNS, map(rows.get, order)), "", "Nats per hidden token:", "", *hidden]


def mean_and_error(records, key):
    """Write the mean of a figure over seeds with its standard error, "-" if a record lacks it."""
    values = [r.get(key) for r in records]
    if None in values:
        return "-"
    error = f" +- {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{error}"


def is_results(path):
    """Tell whether a file is a results.json of this command."""
    records = json.loads(path.read_text())
    return all({"name", "seed", "budget", "curve", "flags"} <= record.keys() for record in records)


def settings(args):
    """List what all runs of a folder have in common."""
    names = "data_path", "val_path", "flags"
    budget = dict(minutes_given=None if args.tokens else args.minutes)
    return {name: getattr(args, name) for name in names} | budget


run_of = itemgetter("name", "seed", "budget")  # what run a record is of


def add_record(new, folder):
    """Add a record to results.json, replacing an older one of the same run; redraw all."""
    path = folder / "results.json"
    records = json.loads(path.read_text())
    records = [r for r in records if run_of(r) != run_of(new)] + [new]
    files.write_whole(path, json.dumps(records, indent=1).encode())
    files.write_whole(folder / "results.md", ("\n".join(summarise(records)) + "\n").encode())
    draw(folder / "results.png", records)


def draw(path, records):
    """Draw the curves of all runs, or with several budgets the exact likelihoods over these."""
    groups = {}
    for r in sorted(records, key=itemgetter("n_tokens")):
        groups.setdefault(f"{r['name']} {r['seed']}", []).append(r)
    if len({r["budget"] for r in records}) > 1:
        series = {
            label: ([r["n_tokens"] for r in rs], [r["exact_bits_per_char"] for r in rs])
            for label, rs in groups.items()
        }
        axes = "tokens of training", "bits per character", "exact likelihood", "log"
    else:
        curves = {label: zip(*rs[0]["curve"], strict=True) for label, rs in groups.items()}
        series = {label: (minutes, bound) for label, (minutes, _, bound, *_) in curves.items()}
        axes = "minutes of training", "bits per character", "validation bound"
    drawing.lines(path, series, *axes)


def run_flags(args, name="base", seed=0):
    """Complete the flags of train.py for one run. Raises ValueError for flags without a use."""
    words = [f"-d={args.data_path}"] if args.data_path else []
    words += [f"--val_path={args.val_path}"] if args.val_path else []
    words += args.flags.split()
    words += [f"--{word}" for word in name.split() if "=" in word]
    parsed = train.flags().parse_args([*words, f"--seed={seed}"])
    for flag in UNUSED:
        if getattr(parsed, flag) is not None:
            length = "the length is that of --tokens or --minutes of this command"
            raise ValueError(f"--{flag} has no use here: {length}, a step has one micro-batch")
    preset = train.DEFAULT_PRESET[parallel.find_device(parsed.device).type]
    return train.complete(parsed, preset=preset)


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("variants", nargs="+", type=variant,
        help=f"variants to compare: {', '.join(VARIANTS)}, or FLAG=VALUE of train.py")
    add("--seeds", type=cli.count, default=1,
        help="number of runs of each variant, with seeds 0, 1, ... (1)")
    add("--one", nargs=2, metavar=("VARIANT", "SEED"),
        help="train one variant in this process and print its record")
    add("-d", "--data_path", type=cli.path, help="text file to train on (the built-in language)")
    add("--val_path", type=cli.path,
        help="text file for validation (a held-out part of the corpus)")
    add("--minutes", type=cli.positive, default=3.0,
        help="minutes of training for each run, without validation (%(default)g)")
    add("--tokens", type=cli.counts, default=[],
        help="tokens of training for each run, instead of --minutes; several with commas")
    add("--flags", default="", help="more flags of train.py, the same for all runs")
    add("--output", type=cli.path, default="runs/compare",
        help="folder for results and pictures (runs/compare)")
    return p


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    args = flags().parse_args(words)
    folder = Path(args.output)
    if args.one:
        name, seed = args.one
        print(json.dumps(train_variant(name, int(seed), args, folder)))
        return
    for name in args.variants:
        run_flags(args, name)  # an error in a flag is found before the first run
    files.check_folder(folder, "results.json", is_results)
    path = folder / "results.json"
    if not path.exists():
        files.write_whole(path, b"[]")
    for there in json.loads(path.read_text()):
        if not settings(args).items() <= there.items():
            raise ValueError(f"{path} is of other flags, texts or minutes: give another --output")
    budgets = [[f"--tokens={n_tokens}"] for n_tokens in args.tokens] or [[]]
    for seed, budget, name in product(range(args.seeds), budgets, args.variants):
        one = ["--one", name, str(seed), *budget]
        command = [sys.executable, "-m", "experiments.compare", *words, *one]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if output.returncode:
            raise ValueError(f"variant {name}, seed {seed} failed: see above")
        add_record(json.loads(output.stdout.splitlines()[-1]), folder)
    print((folder / "results.md").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    cli.run(main)
