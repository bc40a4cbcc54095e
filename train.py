"""Train a Bayesian flow language model on a text file.

    python train.py -d=CORPUS.txt -spm=TOKENIZER.model -mdir=RUN_DIR

Run the same command again to resume. Without -d it trains on a built-in language.
"""

import copy
import math
import signal
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from common import cli  # isort: skip - first, because of Ctrl-C
import numpy as np
import torch

import bfn
import data
import evaluate
from common import hub, parallel
from common.files import file_hash
from common.noise import draw_keys, mix_seed, noise
from model import BFNTransformer, Config
from sample import Sampler
from training import forms, fused, log, memory, optim, run_folder, shards, speed
from training.checkpoint import EXPORTED_FILES, State, load, restore, save
from training.times import draw_times

PRESET_FLAGS = "model_dim num_layers num_heads learning_rate warmup_steps ema_rate".split()
PRESETS = {
    #          dim  layers  heads   rate  warm-up  average   longest row  tokens (see `fit_rows`)
    "base":   (1024,   8,     8,    1e-3,  1000,  [0.9999],     256,        16_384),
    "small":  ( 512,   8,     8,    1e-3,   500,  [0.999],      256,         8_192),
    "laptop": ( 256,   4,     4,    6e-3,   200,  [0.999],      128,         2_048),
    "toy":    ( 128,   4,     4,  1.5e-2,   100,  [0.998],       64,         1_024),
}  # fmt: skip
DEFAULT_PRESET = {"cpu": "laptop", "cuda": "base"}
SHORTEST_ROW = 64
TOY_STEPS = 2_000


# ---------------------------------------------------------------- flags


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add, on_off = p.add_argument, ["auto", "on", "off"]
    add("-d", "--data_path", type=cli.path,
        help="text file, folder, 'pattern*.txt', or several with commas (the built-in language)")
    add("--labelled", dest="example", action="store_const", const="labelled",
        help="lines are label<TAB>text")
    add("-spm", "--spm_model", type=cli.path, help="SentencePiece model (trained on the corpus)")
    p.add_flags("-mdir --text_field --example --seed --device --cache_dir")
    p.set_defaults(example=None)  # that of the run, or a line
    add("--val_path", type=cli.path,
        help="text for validation, as for -d (a held-out part of the corpus)")
    add("--preset", choices=PRESETS, help="defaults of flags with * (GPU: base, CPU: laptop)")
    add("--init_from", type=cli.path, help="run to take weights, tokenizer and model size from")
    add("--tokenizer", choices=["bpe", "unigram", "char", "word"],
        help="kind of tokenizer to train (bpe)")
    add("--vocab_size", type=cli.several,
        help="tokens of the tokenizer to train (512 to 8192, or room for all characters)")
    add("-ep", "--epochs", type=cli.positive, help="passes over the corpus (10)")
    add("--minutes", type=cli.positive, help="minutes, instead of --epochs; measured first")
    add("--max_steps", type=cli.count, help="steps, instead of --epochs or --minutes")
    add("-bsz", "--batch_size", type=cli.count, help="rows of a micro-batch (by preset and -slen)")
    add("-acc", "--accumulation_steps", type=cli.micro_batches,
        help="micro-batches per step, shared by all processes (one each)")
    add("-slen", "--sequence_length", type=cli.several,
        help="tokens of a row (64 or more: nine of ten examples fit)")
    add("-mdim", "--model_dim", type=cli.count, help="width *")
    add("-nl", "--num_layers", type=cli.layers, help="layers *")
    add("-nh", "--num_heads", type=cli.count, help="attention heads *")
    add("-dop", "--dropout_prob", type=cli.share, default=0.0, help="dropout (0)")
    add("-b", "--beta", type=cli.auto_or_positive, default="auto",
        help="beta(1), or auto: from the vocabulary size (auto)")
    add("-lr", "--learning_rate", type=cli.positive, help="peak learning rate *")
    add("-wus", "--warmup_steps", type=cli.natural, help="linear warm-up, at most a fifth *")
    add("-wd", "--weight_decay", type=cli.non_negative, default=0.01, help="of matrices (0.01)")
    add("-gc", "--gradient_clipping", type=cli.positive, default=1.0, help="largest norm (1)")
    add("-ema", "--ema_rate", type=cli.shares,
        help="rates of the weight averages, comma-separated; the last is validated and sampled *")
    add("-lgi", "--log_interval", type=cli.count, default=20, help="steps between log lines (20)")
    ten_times = "(ten times a run, or every 5 minutes)"
    add("-svi", "--save_interval", type=cli.count, help=f"steps between checkpoints {ten_times}")
    add("--keep", type=cli.natural, default=2, help="checkpoints besides last.pt and best.pt (2)")
    add("-vli", "--val_interval", type=cli.count, help=f"steps between validations {ten_times}")
    add("-smi", "--sample_interval", type=cli.count, help=f"steps between samples {ten_times}")
    add("-nex", "--num_examples", type=cli.natural, default=4,
        help="samples each time, half of them from prompts (4)")
    add("--compile", choices=on_off, default="auto", help="torch.compile (CUDA, or width 256)")
    add("--fused", choices=on_off, default="auto",
        help="no (tokens, K) tensors (auto: from 1000 tokens of vocabulary)")
    add("--dry_run", action="store_true", help="say what would be trained, and for how long")
    add("--shard", action="store_true", help="share out the layers' matrices over processes")
    add("--recompute", action="store_true",
        help="keep no activations in the layers: less memory, a third more time")
    return p


def complete(args, saved=None, preset="base"):
    """Fill in the flags that were not given: from the run, then from the preset -> args.

    saved: checkpoint of a run that resumes. preset: the one to use if none is named. Raises
    ValueError for flags that do not go together.
    """
    lengths = [name for name in ("epochs", "minutes", "max_steps") if getattr(args, name)]
    if len(lengths) > 1:
        both = f"--{lengths[0]} and --{lengths[1]}"
        raise ValueError(f"{both} both say how long to train: give one of them")
    if args.data_path is None:
        use_built_in_language(args)
    args.epochs = args.epochs or 10
    before = saved["args"] if saved else {}
    if args.minutes and not args.max_steps and before.get("minutes"):  # as fast as at the start
        args.max_steps = round(before["max_steps"] * args.minutes / before["minutes"])
    choose_source(args, saved)
    inherited = before if args.preset in (None, before.get("preset")) else {}
    args.preset = args.preset or inherited.get("preset") or preset
    for name, value in zip(PRESET_FLAGS, PRESETS[args.preset], strict=False):
        if getattr(args, name) is None:
            setattr(args, name, inherited.get(name, value))
    for name in ("sequence_length", "batch_size", "accumulation_steps"):  # else see `fit_rows`
        setattr(args, name, getattr(args, name) or before.get(name))
    args.accumulation_steps = parallel.micro_batches(args.accumulation_steps)
    return args


def fit_rows(args, tokens):
    """Choose rows in which nine of ten examples fit, and batches of the preset's size in tokens."""
    *_, longest, n_tokens = PRESETS[args.preset]
    counts = tokens.count_lengths(longest).cumsum()
    needed = 2 ** math.ceil(math.log2(np.searchsorted(counts, 0.9 * counts[-1])))
    args.sequence_length = args.sequence_length or min(max(needed, SHORTEST_ROW), longest)
    args.batch_size = args.batch_size or max(1, n_tokens // args.sequence_length)


def use_built_in_language(args):
    """Set the flags of the built-in language. Raises ValueError for flags that need a corpus."""
    needy = "spm_model tokenizer vocab_size example val_path init_from".split()
    if any(getattr(args, name) for name in needy):
        names = "-spm, --tokenizer, --vocab_size, --example, --val_path and --init_from"
        raise ValueError(f"{names} need a corpus: give -d")
    args.preset = args.preset or "toy"
    args.tokenizer = "word"
    if not (args.epochs or args.minutes):
        args.max_steps = args.max_steps or TOY_STEPS


def choose_source(args, saved):
    """Settle where weights and tokenizer come from.

    Raises ValueError for flags that contradict the run or each other.
    """
    before = saved["args"] if saved else vars(args)
    theirs = before["init_from"]
    if args.init_from and (not theirs or Path(args.init_from).resolve() != Path(theirs).resolve()):
        started = f"{args.model_dir} did not start from {args.init_from}"
        raise ValueError(f"{started}: give another -mdir")
    args.init_from = theirs
    has_tokenizer = args.spm_model or args.init_from or (saved and before["tokenizer"] is None)
    if has_tokenizer and (args.tokenizer or args.vocab_size):
        needless = "leave --tokenizer and --vocab_size out"
        raise ValueError(f"-spm and --init_from bring a tokenizer: {needless}")
    if args.init_from:
        start_from(args, saved or load(args.init_from)[2])
    elif saved:
        args.tokenizer = args.tokenizer or before["tokenizer"]
        args.vocab_size = args.vocab_size or before["vocab_size"]
    elif not args.spm_model:
        args.tokenizer = args.tokenizer or "bpe"
    args.example = args.example or before["example"] or "line"


def start_from(args, source):
    """Take model size, preset, tokenizer, beta, rows and averages from the run of --init_from.

    Raises ValueError if a flag says otherwise of the model size or the tokenizer.
    """
    folder, theirs = args.init_from, source["args"]
    for name in ("model_dim", "num_layers", "num_heads"):
        ours = getattr(args, name)
        if ours not in (None, theirs[name]):
            raise ValueError(f"--{name}={ours}, {folder} has {theirs[name]}: leave the flag out")
        setattr(args, name, theirs[name])
    if args.spm_model and file_hash(args.spm_model) != source["tokenizer_hash"]:
        raise ValueError(f"{args.spm_model} is not the tokenizer of {folder}: leave -spm out")
    local = hub.local_folder(folder, EXPORTED_FILES)
    args.spm_model, args.vocab_size = str(Path(local) / "tokenizer.model"), None
    args.beta = theirs["beta"] if args.beta == "auto" else args.beta
    for name in ("preset", "batch_size", "sequence_length", "ema_rate", "example"):
        setattr(args, name, getattr(args, name) or theirs[name])


def make_config(args, K):
    """Flags and vocabulary size -> Config. Raises ValueError for sizes that do not fit."""
    beta1 = bfn.auto_beta1(K) if args.beta == "auto" else args.beta
    return Config(K, beta1, args.model_dim, args.num_layers, args.num_heads, args.dropout_prob)


# ---------------------------------------------------------------- one step


def accumulate_gradients(model, batches, seeds, device, total=int, times=draw_times):
    """Add the gradient of a step's mean training loss -> the loss, in nats per predicted token.

    batches: micro-batches (ids, segment_ids, seen), each (B, L) on the CPU; each has its own
    seed. total: adds up the number of predicted tokens over all processes that share the step; the
    loss, a scalar on the device, and its gradient are this one's part. times: see `draw_times`.
    """
    # What is predicted.
    masks = [(segment_ids > 0) & (seen != data.GIVEN) for _, segment_ids, seen in batches]
    n_tokens = max(1, total(sum(int(mask.sum()) for mask in masks)))
    sum_of_losses = torch.zeros((), device=device)
    K, s1 = model.config.K, model.config.s1
    for batch, mask, seed in zip(batches, masks, seeds, strict=True):
        torch.manual_seed(seed)
        predicted = mask.flatten().nonzero().squeeze(1)  # on the CPU: nothing waits for the device
        on_device = (to_device(x, device) for x in (*batch, mask, predicted))
        ids, segment_ids, seen, mask, predicted = on_device
        cond_mask = seen == data.GIVEN
        t, weight = times(segment_ids, seen)
        keys = draw_keys(*ids.shape, device=device)
        scale = weight * mask / n_tokens
        with torch.autocast(device.type, torch.bfloat16, enabled=model.form.bf16):
            if model.form.fused:
                noisy = fused.Noisy(ids, t, keys, predicted, s1, model.form.compiled)
                h = model.project(fused.ThetaToH.apply(model.embedding.weight, noisy))
                hidden = model.body(h, t.masked_fill(cond_mask, 1.0), segment_ids)
                weights = model.linear_out.parameters()
                loss = fused.HiddenToLoss.apply(hidden, *weights, scale, noisy)
            else:
                network = partial(model, segment_ids=segment_ids)
                log_p = bfn.predict_noisy(network, ids, t, cond_mask, s1, K, noise(keys, K))
                loss = (scale * bfn.training_loss(log_p, ids, t, s1).view_as(scale)).sum()
        loss.backward()
        sum_of_losses += loss.detach()
    return sum_of_losses


def to_device(x, device):
    """Copy a tensor to the device without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def update_weights(state, args):
    """Clip, step, average -> gradient norm. If it is not finite, weights and moments stay."""
    norm = shards.clip_gradients(state.model, args.gradient_clipping)
    for optimizer in state.optimizers:
        optimizer.found_inf = (~norm.isfinite()).float()  # on the device: nothing waits for it
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate(state.step, args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for ema, rate in zip(state.emas, args.ema_rate, strict=True):
        optim.average_weights(ema, state.model, rate, state.step)
    return norm


# ---------------------------------------------------------------- before the first step


def open_run(args, device, run_dir):
    """Complete the flags and read the texts -> checkpoint or None; training and val Tokens."""
    saved = run_folder.open_run_folder(run_dir)
    args.by_memory = [] if saved or args.init_from else memory.not_named(args)
    complete(args, saved, preset=DEFAULT_PRESET[device.type])
    if saved:
        run_folder.check_identity(saved["identity"], vars(args), args)
    memory.check(make_config(args, 2), args, device)  # before a tokenizer is trained
    return saved, run_folder.prepare_text(args, run_dir, saved)


def make_loader(args, tokens):
    """Make the Loader of the training batches, and choose the steps unless --minutes does."""
    marks = tokens.tokenizer.bos, tokens.tokenizer.labels.values()
    loader = data.Loader(tokens, args.sequence_length, args.batch_size, args.seed, *marks)
    if not args.minutes:
        args.max_steps = args.max_steps or loader.count_steps(args.epochs, args.accumulation_steps)
    return loader


def build(config, args, device, saved=None):
    """Make a State: new, or from a checkpoint, or from the averaged weights of --init_from."""
    torch.manual_seed(args.seed)
    model = BFNTransformer(config).to(device)
    if args.init_from and not saved:
        model.load_state_dict(load(args.init_from, device=device)[0].state_dict())
    emas = [copy.deepcopy(model).requires_grad_(False).eval() for _ in args.ema_rate]
    if args.shard:
        shards.cut(model)
    state = State(model, optim.make_optimizers(model, args), emas)
    if saved:
        restore(state, saved)
    return state


def plan(state, loader, val_inputs, args, device, before):
    """Choose the form of the computation, then the steps by its speed -> seconds per step.

    val_inputs: for `evaluate.validate`, after the network. before: flags of the run, see
    `decide_steps`.
    """
    trial = loader.batch(0, 0.25), args, device, accumulate_gradients  # as in the first half
    forms.choose_form(state, *trial)
    memory.fit(state.model, args, device)
    seconds = forms.warm_up(state, *trial)
    val_seconds = evaluate.validation_seconds(state.emas[-1], *val_inputs)
    seconds, val_seconds = parallel.from_first((seconds, val_seconds))  # speeds differ
    parallel.limit_waiting(seconds, val_seconds)
    run_folder.decide_steps(args, before, state.step, seconds, val_seconds)
    return seconds


# ---------------------------------------------------------------- the run


def main(argv=None):
    """Train. argv: flags, such as ["-d=text.txt", "-mdir=runs/a"], or those of the command line.

    Ctrl-C and other signals end it after a save: it raises KeyboardInterrupt(number of the signal).
    The earlier handlers are back at its end. In a thread, it catches no signals. Raises ValueError
    for bad flags or texts.
    """
    args = flags().parse_args(argv)
    with ExitStack() as until_end:
        device = parallel.join(args.device)
        if args.dry_run:
            args.model_dir = parallel.from_first(until_end.enter_context(TemporaryDirectory()))
        train(args, device, until_end)


def train(args, device, until_end):
    """Train as the flags say. until_end: holds the run folder and the handlers of signals."""
    speed.allow_tf32(device)
    parallel.check_same(run_folder.code_and_flags(args), "code or flags")
    run_dir = Path(args.model_dir)
    if args.model_dir.startswith(hub.HUB):
        raise ValueError(f"{args.model_dir} is only read: give --init_from={args.model_dir}")

    # The text, and what has been trained on it.
    with parallel.first_alone():
        until_end.enter_context(run_folder.lock(run_dir))
        saved, (tokens, val) = open_run(args, device, run_dir)
    fit_rows(args, tokens)
    config = make_config(args, len(tokens.tokenizer))
    memory.grow_batch(config, args, device, len(tokens.ids))
    until_end.enter_context(memory.explained(memory.check(config, args, device)))
    loader = make_loader(args, tokens)
    run = run_folder.describe_run(args, config, tokens, val)
    before = saved["args"] if saved else {}
    if saved:
        run_folder.check_identity(saved["identity"], run["identity"], args)

    # The network, and how fast it is.
    speed.peak(device, speed.fast_bf16(device))  # measured before the memory is needed
    state = build(config, args, device, saved)
    del saved  # it holds a second copy of everything
    sampler = Sampler(state.emas[-1], tokens.tokenizer, run)
    examples = partial(sampler.examples, val, args.num_examples, args.seed)
    if state.step >= (args.max_steps or math.inf):
        print(f"{run_dir} is finished at step {state.step}")
        return finish(state, sampler, examples, val, args)
    val_inputs = val, args.sequence_length, device
    seconds = plan(state, loader, val_inputs, args, device, before)
    print(*log.opening_lines(state, loader, val, seconds, args, device), sep="\n")
    if args.dry_run:
        return parallel.wait()  # until all have read the first one's temporary folder

    # The loop.
    write, minutes = log.open_metrics(run_dir, state.step)
    meter = log.Meter(state.model, args, device, minutes)
    bound = None
    caught = until_end.enter_context(cli.catch_signals())
    accumulation = args.accumulation_steps
    n_batches = args.max_steps * accumulation
    numbers = parallel.share(range(state.step * accumulation, n_batches))
    batches = parallel.prefetch(lambda n: loader.batch(n, n / n_batches), numbers)
    gradients = parallel.GradientSum(shards.not_cut(state.model), accumulation // parallel.size())
    bar = log.Progress(state, args)
    if state.step and state.step % args.sample_interval == 0:  # stopped before the samples?
        log.write_samples(run_dir, state.step, examples)
    while not (stop := parallel.total(len(caught))) and state.step < args.max_steps:
        seeds = [mix_seed(args.seed, state.step, m) for m in parallel.share(range(accumulation))]
        micro_batches = [next(batches) for _ in seeds]
        loss = accumulate_gradients(state.model, micro_batches, seeds, device, parallel.total)
        gradients.finish(loss)
        norm = update_weights(state, args)
        state.step += 1
        meter.add(state.step, loss, norm, micro_batches)
        bar.update()
        step, is_last = state.step, state.step == args.max_steps
        if step % args.log_interval == 0 or is_last:
            recent = meter.figures(step, optim.learning_rate(step - 1, args))
            write(step, **recent)
            bar.show(step, recent, bound)
        with meter.paused():
            is_best, news = False, []
            if step % args.val_interval == 0 or is_last:
                validated = evaluate.validate(state.emas[-1], *val_inputs, args.val_tokens)
                figures, state.loss_by_time = validated
                write(step, **{f"val_{name}": value for name, value in figures.items()})
                news += [log.validation_line(figures), log.overfitting_line(run_dir)]
                log.draw_curves(run_dir)
                bound = figures["bound_nats_per_token"]
                is_best, state.best = bound < state.best, min(state.best, bound)
            if step % args.save_interval == 0 or is_best or is_last:
                meter.check(step)  # no save after what is not finite
                save(state, run, run_dir, is_best)
            if step % args.sample_interval == 0 or is_last:
                news += log.write_samples(run_dir, state.step, examples) or []
            for line in filter(None, news):  # after the save, which must not fail with the terminal
                bar.write(line)
    bar.close()
    if stop:
        meter.check(state.step)
        save(state, run, run_dir)
        print(f"saved at step {state.step}: run the same command again to resume", file=sys.stderr)
        raise KeyboardInterrupt(*caught or [signal.SIGTERM])  # another process may have caught it
    finish(state, sampler, examples, val, args)


def finish(state, sampler, examples, val, args):
    """Write the last samples, unless the run did; judge the built-in language; say what is next."""
    run_dir = Path(args.model_dir)
    log.write_samples(run_dir, state.step, examples)
    validated = log.bounds(run_dir)
    if args.data_path is None and validated:
        (bound, _), corpus = validated[-1], run_dir / "corpus.txt"
        print(*evaluate.check_toy(sampler, val, bound, args.seed, corpus), sep="\n")
    print(log.closing_lines(args))


if __name__ == "__main__":
    cli.run(main)
