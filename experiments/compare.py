"""Train variants for the same minutes or tokens, and compare their validation bounds in a table and a picture.

    python -m experiments.compare --minutes=3 base no_skip adamw                      (built-in language)
    python -m experiments.compare --minutes=12 --seeds=3 base autoregressive \\
        -d=wiki8.train.txt --val_path=wiki8.valid.txt --flags="--preset=laptop --tokenizer=char -slen=128 -bsz=16"

A variant is a function that changes the network, the loss or the optimizer before training starts. Each variant and seed
runs in its own process, one after another. The learning rate falls to zero at the end of the budget. Results are added to
those already in the folder. The weights of "base" and "autoregressive" are kept there too, as run folders base-0, ...

A variant need not know about fused.py: train.py checks whether the fused form follows the change, and otherwise trains in
the plain form.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import bfn
import data
import evaluate
import model as model_file
import train
from common import cli, drawing, parallel
from common.noise import mix_seed
from evaluation import bounds, tables
from training import forms, optim
from training.checkpoint import save
from training.run_folder import describe_run, prepare_text

ROOT = Path(__file__).resolve().parent.parent




N_POINTS = 8  # validations of each run, evenly spaced over its budget
VAL_TOKENS = 32_768  # of the validation text, scored each time
EXACT_TOKENS = 2048  # and of these, for the exact likelihood


# ---------------------------------------------------------------- variants: each changes args or patches a module


def head_without_theta(self, hidden, theta):
    """Replace BFNTransformer.head: hidden (B, L, D) -> logits (B, L, K)."""
    return self.linear_out(hidden)


def give_nothing(segment_ids, rng, easy=0.0):
    """Replace data.draw_cond_mask: no position is given -> (B, L) bool."""
    return np.zeros_like(segment_ids, dtype=bool)


def base(args):
    """The defaults."""


def no_skip(args):
    """The output does not add log theta."""
    model_file.BFNTransformer.head = head_without_theta


def no_convolution(args):
    """No convolutions: only attention sees other positions."""

    def forward(self, h, segment_ids):
        return h

    model_file.Convolution.forward = forward


def adamw(args):
    """AdamW for all parameters, at 3e-3."""
    args.learning_rate = 3e-3

    def make_optimizers(model, args):
        groups = [[p for p in model.parameters() if p.requires_grad and (p.ndim >= 2) == matrix] for matrix in (True, False)]
        decays = (args.weight_decay, 0.0)
        groups = [dict(params=group, weight_decay=decay) for group, decay in zip(groups, decays, strict=True)]
        return [torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), fused=True)]

    optim.make_optimizers = make_optimizers


def segment_times(args):
    """All positions of a text always share one t."""
    args.position_times = 0.0


def position_times(args):
    """Each position always has its own t."""
    args.position_times = 1.0


def learned_times(args):
    """Times are drawn more often where the loss is large."""
    args.times = "learned"


def uniform_times(args):
    """Times are drawn independently, not spread evenly."""
    args.times = "uniform"


def no_cross_entropy(args):
    """Only the continuous-time loss."""
    bfn.CROSS_ENTROPY = 0.0


def cross_entropy_2(args):
    """Cross-entropy with weight 2."""
    bfn.CROSS_ENTROPY = 2.0


def cross_entropy_20(args):
    """Cross-entropy with weight 20."""
    bfn.CROSS_ENTROPY = 20.0


def half_batch(args):
    """Half the rows per step."""
    args.batch_size //= 2


def double_batch(args):
    """Twice the rows per step."""
    args.batch_size *= 2


def half_rate(args):
    """Half the learning rate."""
    args.learning_rate /= 2


def double_rate(args):
    """Twice the learning rate."""
    args.learning_rate *= 2


def nothing_given(args):
    """No text is partly given in training."""
    data.draw_cond_mask = give_nothing


def no_easy_start(args):
    """From the first step, no more is given than at the end."""
    data.EASY_SHARE = 0.0


def given_apart(args):
    """Given positions have time 1.5 instead of 1, which no other position has."""
    clamp_given = bfn.clamp_given

    def clamp_apart(theta, t, ids, cond_mask):
        theta, t = clamp_given(theta, t, ids, cond_mask)
        return theta, t.masked_fill(cond_mask, 1.5)

    bfn.clamp_given = clamp_apart


def self_conditioning(args):
    """The network is called twice; the second call also reads the answer of the first, without gradient."""
    network = model_file.BFNTransformer
    build, answer = network.__init__, network.forward

    def __init__(self, config):
        build(self, config)
        self.project_answer = torch.nn.Linear(config.d_model, config.d_model, bias=False)
        torch.nn.init.zeros_(self.project_answer.weight)

    def forward(self, theta, t, segment_ids):
        with torch.no_grad():
            p = answer(self, theta, t, segment_ids).softmax(-1)
        h = self.embed(theta) + self.project_answer(p @ self.embedding.weight)
        return self.head(self.body(h, t, segment_ids), theta)

    network.__init__, network.forward = __init__, forward


def first_formulation(args):
    """theta @ E, FiLM without 1 +, beta 0.005, no skip, convolution or easy start, one t per text, one loss, AdamW at 1e-3."""

    class FiLM(model_file.FiLM):
        def __init__(self, d_model, d_time):
            super().__init__(d_model, d_time)
            self.linear.reset_parameters()

        def forward(self, h, time):
            scale, shift = self.linear(time).chunk(2, -1)
            return F.rms_norm(h, h.shape[-1:]) * scale + shift

    model_file.FiLM = FiLM
    for variant in (no_skip, no_convolution, adamw, segment_times, no_cross_entropy, no_easy_start):
        variant(args)
    args.beta, args.learning_rate = 0.005, 1e-3


class Causal(model_file.BFNTransformer):
    """The same network as a causal language model: one-hots theta (B, L, K) -> logits from the tokens before each position."""

    head = head_without_theta

    def __init__(self, config):
        super().__init__(config)
        for part in self.modules():
            if isinstance(part, model_file.Convolution):
                part.offsets, part.weight = range(-4, 1), torch.nn.Parameter(part.weight[:5].detach().clone())

    def attention_mask(self, segment_ids):
        self.form, L = self.form._replace(flex=False), segment_ids.shape[1]
        return super().attention_mask(segment_ids) & torch.ones(L, L, dtype=torch.bool, device=segment_ids.device).tril()

    def forward(self, theta, t, segment_ids):
        before = F.pad(theta, (0, 0, 1, 0))[:, :-1]
        same_segment = F.pad(segment_ids, (1, 0))[:, :-1] == segment_ids
        return self.head(self.body(self.embed(before * same_segment[..., None]), torch.ones_like(t), segment_ids), theta)


def autoregressive(args):
    """The same network as a causal language model, which shows what not being autoregressive costs."""

    def predict(network, theta, t, ids, cond_mask):
        return network(F.one_hot(ids, theta.shape[-1]).float(), t).float().log_softmax(-1)

    def squared_error_loss(log_p, ids, t, s1):
        return bfn.cross_entropy(log_p, ids)

    def reconstruction_loss(network, ids, *rest):
        return torch.zeros(ids.shape, device=ids.device)

    train.BFNTransformer, bfn.predict = Causal, predict
    bfn.squared_error_loss, bfn.reconstruction_loss = squared_error_loss, reconstruction_loss
    data.draw_cond_mask = give_nothing
    bfn.CROSS_ENTROPY = 0.0


def masked(args):
    """Masked diffusion: each token is unknown with probability 1 - t or given; cross-entropy of the unknown / (1 - t)."""
    args.position_times, bfn.CROSS_ENTROPY, data.draw_cond_mask = 0.0, 0.0, give_nothing
    unknown = None

    def predict_noisy(network, ids, t, cond_mask, s1, K, eps=None):
        nonlocal unknown
        u = torch.rand(ids.shape, device=ids.device) if eps is None else torch.special.ndtr(eps[..., 0])
        unknown = (u >= t) & ~cond_mask
        theta = torch.full((*ids.shape, K), 1 / K, device=ids.device)
        return bfn.predict(network, theta, torch.zeros_like(t), ids, ~unknown)

    def squared_error_loss(log_p, ids, t, s1):
        return unknown * bfn.cross_entropy(log_p, ids) / (1 - t).clamp(min=1e-4)

    def reconstruction_loss(network, ids, *rest):
        return torch.zeros(ids.shape, device=ids.device)

    bfn.predict_noisy, bfn.squared_error_loss, bfn.reconstruction_loss = predict_noisy, squared_error_loss, reconstruction_loss


VARIANTS = {
    f.__name__: f
    for f in (
        base, no_skip, no_convolution, adamw, segment_times, position_times, learned_times, uniform_times,
        no_cross_entropy, cross_entropy_2, cross_entropy_20, half_batch, double_batch, half_rate, double_rate, nothing_given,
        no_easy_start, given_apart, self_conditioning, first_formulation, autoregressive, masked,
    )
}  # fmt: skip


# ---------------------------------------------------------------- one run


class Budget:
    """The seconds or tokens that a run may spend, and how many it has spent. Validation is not counted."""

    def __init__(self, minutes, n_tokens):
        self.seconds, self.n_tokens = minutes * 60, n_tokens
        self.spent_seconds, self.spent_tokens = 0.0, 0

    @property
    def progress(self):
        """The share of the budget that is spent."""
        return self.spent_tokens / self.n_tokens if self.n_tokens else self.spent_seconds / self.seconds


def rate_share(progress):
    """Compute the learning rate as a share of its peak: a linear warm-up over a tenth of the budget, then a straight line to 0."""
    warm_up = 0.1
    if progress < warm_up:
        return progress / warm_up
    return max(0.0, (1 - progress) / (1 - warm_up))


def spend(budget, step, measure, label):
    """Train until the budget is spent, with N_POINTS validations on the way -> curve [[minutes, tokens, figures]].

    step() trains one step and returns its number of tokens; measure() returns the figures of a validation.
    """
    curve = []
    with tqdm(total=100, desc=label, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}", disable=None) as bar:
        while budget.progress < 1:
            begin = time.perf_counter()
            budget.spent_tokens += step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            budget.spent_seconds += time.perf_counter() - begin
            bar.update(min(100.0, 100 * budget.progress) - bar.n)
            if budget.progress >= (len(curve) + 1) / N_POINTS:
                curve.append([budget.spent_seconds / 60, budget.spent_tokens, measure()])
    return curve


def measure_bound(model, text, device):
    """Estimate the bound on VAL_TOKENS of a Text, with the same noise for every model -> figures."""
    scores = bounds.score(model, text.first_tokens(VAL_TOKENS), bounds.Work(device))
    return tables.likelihood_figures(scores)


def train_variant(name, args, minutes, n_tokens, text, folder):
    """Train one variant on the text that `prepare` returned -> its record."""
    tokenizer, tokens, val = text
    VARIANTS[name](args)
    device, budget = parallel.find_device(args.device), Budget(minutes, n_tokens)
    config = train.make_config(args, len(tokenizer))
    state = train.build(config, args, device, None)
    loader = data.Loader(tokens, args.sequence_length, args.batch_size, args.seed, tokenizer.bos_id())
    trial = loader.batch(0, 0.25), args, device, train.accumulate_gradients
    forms.choose_form(state, *trial)
    forms.warm_up(state, *trial)  # compiles, before the time counts

    def learning_rate(step, args):
        return args.learning_rate * rate_share(budget.progress)

    optim.learning_rate = learning_rate

    def step():
        batch = loader.batch(state.step, budget.progress)
        seeds = [mix_seed(args.seed, state.step, 0)]
        train.accumulate_gradients(state.model, [batch], seeds, device, state.times)
        train.update_weights(state, args)
        state.step += 1
        return int((batch[1] > 0).sum())

    def measure():
        held_out = bounds.Text(val, args.sequence_length, tokenizer.bos_id())
        inputs = state.emas[-1], held_out.first_tokens(EXACT_TOKENS), device
        with evaluate.full_precision():
            figures = measure_bound(state.emas[-1], held_out, device)
            return figures | evaluate.exact_likelihood(*inputs)

    curve = spend(budget, step, measure, f"{name}, seed {args.seed}")
    result = record(name, args.seed, state.model, curve)
    if name in ("base", "autoregressive"):  # a checkpoint does not record how the network of another variant differs
        state.loss_by_time = evaluate.validate(state.emas[-1], val, tokenizer.bos_id(), args.sequence_length, device)[1]
        try:
            save_weights(state, describe_run(args, config, *text, folder), folder / f"{name}-{args.seed}")
        except OSError as error:
            print(f"could not save the weights: {error}", file=sys.stderr)
    return result


def save_weights(state, run, run_dir):
    """Save the weights as a run folder inside the comparison's folder, for sample.py and evaluate.py."""
    run_dir.mkdir(exist_ok=True)
    for name in ("tokenizer.model", "corpus.txt"):
        if (run_dir.parent / name).exists():
            shutil.copyfile(run_dir.parent / name, run_dir / name)
    save(state, run, run_dir, is_best=True)


def record(name, seed, model, curve):
    """Collect what results.json keeps of a run: the figures of its last validation, and the curve."""
    n_parameters = sum(p.numel() for p in model.parameters())
    points = [(minutes, n_tokens, figures["bits_per_char"]) for minutes, n_tokens, figures in curve]
    last = curve[-1]
    return dict(name=name, seed=seed, n_parameters=n_parameters, minutes=last[0], n_tokens=last[1], curve=points, **last[2])


# ---------------------------------------------------------------- the comparison


def table(records):
    """Lay out each variant's mean and standard error over seeds, best first -> Markdown lines."""
    groups = {}
    for r in records:
        groups.setdefault(r["name"], []).append(r)
    mean = {name: sum(r["bits_per_char"] for r in rs) / len(rs) for name, rs in groups.items()}
    lines = [
        "| variant | what | bits per character: bound | exact | L_inf + L_rec, nats per token | minutes | tokens | seeds |",
        "|" + "---|" * 8,
    ]
    for name in sorted(groups, key=mean.get):
        rs = groups[name]
        shown = " | ".join(mean_and_error([r.get(key) for r in rs]) for key in ("bits_per_char", "exact_bits_per_char"))
        L_inf, L_rec, minutes, n_tokens = (
            sum(r[k] for r in rs) / len(rs) for k in ("L_inf_nats_per_token", "L_rec_nats_per_token", "minutes", "n_tokens")
        )
        what = VARIANTS[name].__doc__.rstrip(".") if name in VARIANTS else ""
        lines.append(
            f"| {name} | {what} | {shown} | {L_inf:.3f} + {L_rec:.3f} | {minutes:.1f} | {n_tokens / 1e6:.2f} M | {len(rs)} |"
        )
    return lines


def mean_and_error(values):
    """Write the mean of a figure over seeds with its standard error; None stands for a figure that was not measured."""
    if None in values:
        return "-"
    error = f" +- {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.3f}{error}"


def prepare(args, folder):
    """Prepare the text in the folder of the comparison -> tokenizer, training Tokens, validation Tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    return prepare_text(args, folder, None)


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    p.add_argument("variants", nargs="+", choices=VARIANTS, help="variants to compare")
    p.add_argument("--minutes", type=cli.positive, default=3.0, help="minutes of training per run, without validation (3)")
    p.add_argument("--tokens", type=cli.count, help="tokens of training for each run, instead of --minutes")
    p.add_argument("--seeds", type=cli.count, default=1, help="number of runs of each variant, with seeds 0, 1, ... (1)")
    p.add_argument("-d", "--data_path", type=cli.path,
        help="text file to train on (the built-in language)")
    p.add_argument("--val_path", type=cli.path,
        help="text file for validation (a held-out part of the corpus)")
    p.add_argument("--flags", default="", help="more flags of train.py, the same for all variants")
    p.add_argument("--output", type=cli.path, default="runs/compare",
        help="folder for results and pictures (runs/compare)")
    p.add_argument("--one", type=cli.natural, help="train one variant with this seed in this process and print its record")
    return p


def main(argv=None):
    args = flags().parse_args(argv)
    torch.set_float32_matmul_precision("high")  # as in train.py
    folder, files = Path(args.output), [f"-d={args.data_path}"] * bool(args.data_path)
    files += [f"--val_path={args.val_path}"] * bool(args.val_path)
    if args.one is not None:
        seed = [f"--seed={args.one}"]
        run_flags = train.complete(train.flags().parse_args([*files, *args.flags.split(), *seed]))
        text_flags = train.complete(train.flags().parse_args([*files, *args.flags.split()]))  # the same text for all seeds
        text = prepare(text_flags, folder)
        train.fit_rows(run_flags, text[1])
        print(json.dumps(train_variant(args.variants[0], run_flags, args.minutes, args.tokens, text, folder)))
        return
    options = [f"--minutes={args.minutes}", f"--flags={args.flags}", f"--output={folder}", *files]
    options += [f"--tokens={args.tokens}"] * bool(args.tokens)
    for seed in range(args.seeds):
        for name in args.variants:
            command = [sys.executable, "-m", "experiments.compare", name, f"--one={seed}", *options]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if output.returncode:
                raise ValueError(f"variant {name}, seed {seed} failed: see above")
            add_record(json.loads(output.stdout.splitlines()[-1]), folder)
    print((folder / "results.md").read_text(), end="")


def add_record(new, folder):
    """Add a record to results.json, replacing an older one of the same name and seed; redraw table and picture."""
    path = folder / "results.json"
    records = json.loads(path.read_text()) if path.exists() else []
    records = [r for r in records if (r["name"], r["seed"]) != (new["name"], new["seed"])] + [new]
    path.write_text(json.dumps(records, indent=1))
    (folder / "results.md").write_text("\n".join(table(records)) + "\n")
    series = {f"{r['name']} {r['seed']}": tuple(zip(*((m, b) for m, _, b in r["curve"]), strict=True)) for r in records}
    drawing.lines(folder / "results.png", series, "minutes of training", "bits per character", "validation bound")


if __name__ == "__main__":
    cli.run(main)
