"""Train a Bayesian flow language model on a text file, one example a line.

    python train.py -d=CORPUS.txt -spm=TOKENIZER.model -mdir=RUN_DIR

Run the same command again to resume. Without -d it trains on the built-in language of toy.py.
"""

import copy
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import bfn
import cli
import data
import evaluate
import kernels
import plot
import speed
import toy
from model import BFNTransformer, Config, load, read_checkpoint, save_checkpoint
from muon import Muon
from prompts import FREE, make_template
from sample import decode, generate
from times import N_BINS, Times

PRESET_FLAGS = "model_dim num_layers num_heads sequence_length batch_size learning_rate warmup_steps ema_rate".split()
PRESETS = {
    #          dim  layers  heads  length  batch   rate  warm-up  average
    "base":   (1024,   8,     8,     64,    256,   1e-3,  1000,  [0.9999]),
    "small":  ( 512,   8,     8,     64,    128,   1e-3,   500,  [0.999]),
    "laptop": ( 256,   4,     4,     64,     32,   6e-3,   200,  [0.999]),
    "toy":    ( 128,   4,     4,     64,     16, 1.5e-2,   100,  [0.998]),
}  # fmt: skip
CROSS_ENTROPY = 5.0  # weight of the cross-entropy beside the continuous-time loss
FUSED_FROM = 1000  # tokens of the vocabulary: below, the plain operations are as fast
COMPILED_FROM = 256  # width, on a CPU: below, compiling gains nothing
FLEX_FROM = 256  # length of rows: below, the mask is small
TOY_SENTENCES, TOY_STEPS = 60_000, 1_500
POSTFIX = "loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s, {utilisation:.0%} of peak, {peak_memory_gb:.1f} GB"
VAL_TOKENS = 16_384  # a validation looks at this many tokens at the most

# What a run is: on resume these must be what they were, everything else may change.
IDENTITY = (
    "seed model_dim num_layers num_heads dropout_prob beta sequence_length batch_size accumulation_steps ema_rate "
    "tokenizer vocab_size tokenizer_hash corpus validation"
).split()


# ---------------------------------------------------------------- flags


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("-d", "--data_path", help="text file, one example a line (the built-in language)")
    add("-spm", "--spm_model", help="SentencePiece model (one is trained on the corpus)")
    add("-mdir", "--model_dir", default="runs/demo", help="run folder (runs/demo)")
    add("--val_path", help="text file for validation (a held-out part of the corpus)")
    add("--preset", choices=PRESETS, help="defaults for the flags marked * (base; toy for the built-in language)")
    add("--init_from", help="run folder whose weights, tokenizer and model size to start from")
    add("--tokenizer", choices=["bpe", "unigram", "char", "word"], help="kind to train (bpe)")
    add("--vocab_size", type=cli.several, help="of the tokenizer to train; char takes all characters (8192)")
    add("--cache_dir", default=data.default_cache_dir(), help="folder for tokenised corpora (%(default)s)")
    add("-ep", "--epochs", type=cli.positive, help="passes over the corpus (10)")
    add("--max_steps", type=cli.count, help="steps, in place of --epochs")
    add("-bsz", "--batch_size", type=cli.count, help="rows of a micro-batch *")
    add("-acc", "--accumulation_steps", type=cli.count, default=1, help="micro-batches of a step (1)")
    add("-slen", "--sequence_length", type=cli.several, help="tokens of a row *")
    add("-mdim", "--model_dim", type=cli.count, help="width *")
    add("-nl", "--num_layers", type=cli.count, help="layers *")
    add("-nh", "--num_heads", type=cli.count, help="attention heads *")
    add("-dop", "--dropout_prob", type=cli.share, default=0.0, help="dropout (0)")
    add("-b", "--beta", type=cli.auto_or_positive, default="auto", help="beta(1), or auto: from the vocabulary size (auto)")
    add("-lr", "--learning_rate", type=cli.positive, help="peak learning rate *")
    kinds = ["uniform", "stratified", "learned"]
    add("--times", choices=kinds, default="stratified", help="how training times are drawn (stratified)")
    add(
        "--position_times",
        type=cli.zero_to_one,
        default=0.5,
        help="share of texts in which each position has its own t, near 0 or 1 more often (0.5)",
    )
    add("-wus", "--warmup_steps", type=cli.natural, help="steps of linear warm-up, at most a fifth of all *")
    add("-wd", "--weight_decay", type=cli.non_negative, default=0.01, help="decay of the matrices (0.01)")
    add("-gc", "--gradient_clipping", type=cli.positive, default=1.0, help="largest gradient norm (1)")
    add(
        "-ema",
        "--ema_rate",
        type=cli.shares,
        help="rates of the weight averages, comma-separated; the last is validated and sampled *",
    )
    add("-lgi", "--log_interval", type=cli.count, default=20, help="steps between log lines (20)")
    add("-svi", "--save_interval", type=cli.count, default=1000, help="steps between checkpoints (1000)")
    add("-vli", "--val_interval", type=cli.count, default=1000, help="steps between validations (1000)")
    add("-smi", "--sample_interval", type=cli.count, default=2000, help="steps between samples (2000)")
    add("-nex", "--num_examples", type=cli.natural, default=4, help="samples each time, half of them from prompts (4)")
    add("--seed", type=cli.natural, default=0, help="of everything random (0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    choices = ["auto", "on", "off"]
    add("--compile", choices=choices, default="auto", help="torch.compile (auto: on CUDA, and from width 256)")
    add("--fused", choices=choices, default="auto", help="no (tokens, K) tensors (auto: from 1000 tokens of vocabulary)")
    add("--recompute", action="store_true", help="keep no activations within layers: less memory, a third more time")
    return p


def complete(args, saved=None):
    """Fill in what the flags leave open: from --init_from (or the checkpoint), then from the preset. Raises ValueError."""
    if args.data_path is None:
        if args.spm_model or args.val_path or args.init_from or args.tokenizer or args.vocab_size:
            raise ValueError("-spm, --tokenizer, --vocab_size, --val_path and --init_from go with a corpus: give -d")
        args.preset, args.tokenizer = args.preset or "toy", "word"
        args.max_steps = args.max_steps or (None if args.epochs else TOY_STEPS)
    before = saved["args"] if saved else vars(args)
    if args.init_from and (not before["init_from"] or Path(args.init_from) != Path(before["init_from"])):
        raise ValueError(f"{args.model_dir} is a run that did not start from {args.init_from}: give another -mdir")
    args.init_from = before["init_from"]
    brings_tokenizer = args.spm_model or args.init_from or (saved and before["tokenizer"] is None)
    if brings_tokenizer and (args.tokenizer or args.vocab_size):
        raise ValueError("-spm and --init_from bring a tokenizer: leave --tokenizer and --vocab_size out")
    args.epochs = args.epochs or 10
    if args.init_from:
        start_from(args, saved or load(args.init_from)[2])
    elif saved:
        args.tokenizer, args.vocab_size = args.tokenizer or before["tokenizer"], args.vocab_size or before["vocab_size"]
    elif not args.spm_model:
        args.tokenizer, args.vocab_size = args.tokenizer or "bpe", args.vocab_size or 8192
    for name, value in zip(PRESET_FLAGS, PRESETS[args.preset or "base"], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def start_from(args, source):
    """Take model size, tokenizer and beta from the run of --init_from. Raises ValueError where a flag disagrees."""
    for name in ("model_dim", "num_layers", "num_heads"):
        theirs = source["args"][name]
        if getattr(args, name) not in (None, theirs):
            raise ValueError(f"--{name}={getattr(args, name)}, but {args.init_from} has {theirs}: leave the flag out")
        setattr(args, name, theirs)
    if args.spm_model and data.file_hash(args.spm_model) != source["tokenizer_hash"]:
        raise ValueError(f"{args.spm_model} is not the tokenizer of {args.init_from}: leave -spm out")
    args.spm_model = str(Path(args.init_from) / "tokenizer.model")
    args.vocab_size = None
    args.beta = source["args"]["beta"] if args.beta == "auto" else args.beta


def make_config(args, K):
    """Flags and vocabulary size -> Config. Raises ValueError for sizes that do not go together."""
    beta1 = bfn.auto_beta1(K) if args.beta == "auto" else args.beta
    return Config(K, beta1, args.model_dim, args.num_layers, args.num_heads, args.dropout_prob)


# ---------------------------------------------------------------- the run folder


def prepare_text(args, run_dir, resume):
    """Put tokenizer (and the built-in corpus) into the run folder, tokenise -> tokenizer, training and validation Tokens."""
    corpus = Path(args.data_path or run_dir / "corpus.txt")
    if args.data_path is None and not resume:
        put(corpus, toy.corpus(TOY_SENTENCES, args.seed).encode())
    for text in filter(None, (corpus, args.val_path)):
        if not os.path.isfile(text):
            raise ValueError(f"no text file at {text}")
        if next(data.read_pieces(text), None) is None:
            raise ValueError(f"{text} has no text")
    path = run_dir / "tokenizer.model"
    if resume and args.spm_model and not args.init_from and data.file_hash(args.spm_model) != data.file_hash(path):
        raise ValueError(f"{args.spm_model} is not the tokenizer of {run_dir}: give another -mdir")
    if not resume:
        if args.spm_model:
            data.load_tokenizer(args.spm_model)
            put(path, Path(args.spm_model).read_bytes())
        else:
            print(f"training a {args.tokenizer} tokenizer on {corpus}", file=sys.stderr)
            put(path, data.train_tokenizer(corpus, args.tokenizer, args.vocab_size))
    tokenizer = data.load_tokenizer(path)
    read = partial(data.load_corpus, tokenizer_path=path, cache_dir=args.cache_dir)
    if args.val_path:
        return tokenizer, read(corpus, part="all"), read(args.val_path, part="all")
    return tokenizer, read(corpus, part="train"), read(corpus, part="val")


def find_checkpoint(run_dir):
    """Make the run folder -> its last checkpoint, or None. Raises ValueError where it is a file or has only best.pt."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{run_dir} is a file: give another -mdir")
    run_dir.mkdir(parents=True, exist_ok=True)
    if (run_dir / "last.pt").exists():
        return read_checkpoint(run_dir / "last.pt")
    if (run_dir / "best.pt").exists():
        raise ValueError(f"{run_dir} has best.pt but no last.pt: rename it to last.pt to go on, or give another -mdir")
    return None


def put(path, content):
    """Write a file of the run folder. Raises ValueError where another one has its name: nothing of the user's is lost."""
    if path.exists() and path.read_bytes() != content:
        raise ValueError(f"{path} is there already, and is not of this run: move it away or give another -mdir")
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def check_identity(saved, now, run_dir):
    """Refuse to resume a run with another model, data, seed or batch. Raises ValueError that names the difference."""
    for name in IDENTITY:
        if name in now and saved[name] != now[name]:
            change, back = f"{name}={saved[name]}, now it is {now[name]}", "change it back"
            if name in ("corpus", "validation"):  # values that tell a reader nothing
                change, back = f"another {name} text", "give -d and --val_path (or none) as before"
            raise ValueError(f"{run_dir} was trained with {change}: {back} or give another -mdir")


def word_lengths(tokenizer, tokens, longest=16):
    """Histogram of tokens in a word, up to `longest`, over the first million tokens -> list of counts by length."""
    spaced = np.array([tokenizer.id_to_piece(i).startswith("\u2581") for i in range(len(tokenizer))])
    begins = np.flatnonzero(spaced[tokens.ids[:1_000_000]])
    document = np.searchsorted(tokens.offsets, begins, side="right")
    lengths = np.diff(begins)[document[1:] == document[:-1]]  # not across line ends
    counts = np.bincount(lengths[lengths <= longest], minlength=2)
    return counts.tolist() if counts.any() else [0, 1]


# ---------------------------------------------------------------- one step


def make_optimizers(model, args):
    """Muon for the matrices of the layers, AdamW for the rest, decaying matrices only; both obey `found_inf`."""
    matrices = model.layer_matrices()
    taken = set(map(id, matrices))
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    groups = [
        dict(params=[p for p in rest if p.ndim >= 2], weight_decay=args.weight_decay),
        dict(params=[p for p in rest if p.ndim < 2], weight_decay=0.0),
    ]
    adamw = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), fused=True)
    return [adamw, Muon(matrices, lr=args.learning_rate, weight_decay=args.weight_decay)]


def learning_rate(step, args):
    """Linear warm-up, then a cosine that reaches zero after the last step."""
    warmup = min(args.warmup_steps, args.max_steps // 5)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / (args.max_steps - warmup))
    return args.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def loss_mask(segment_ids, cond_mask):
    """Positions that are predicted: neither padding nor given."""
    return (segment_ids > 0) & ~cond_mask


def micro_batch_loss(network, batch, rows, n_tokens, times, fused):
    """Share of a micro-batch in the step's mean loss over its n_tokens predicted tokens, in nats.

    The continuous-time loss, plus the cross-entropy at the same t: the former vanishes as t -> 0, where the context
    alone decides, and the latter teaches it there. rows (n,) are the predicted positions, counted through the batch.
    """
    ids, segment_ids, cond_mask = batch
    mask = loss_mask(segment_ids, cond_mask)
    t, weight = times.draw(segment_ids)
    keys = kernels.draw_keys(*ids.shape, device=ids.device)
    scale = weight * mask / n_tokens
    if fused:
        loss, losses = network.fused_loss(ids, t, cond_mask, segment_ids, rows, keys, scale, CROSS_ENTROPY)
    else:
        K, s1 = network.config.K, network.config.s1
        theta = bfn.flow(ids, t, s1, K, kernels.noise(keys, K)).softmax(-1)
        logits = bfn.predict(partial(network, segment_ids=segment_ids), theta, t, ids, cond_mask)
        losses = bfn.squared_error_loss(logits, ids, t, s1) + CROSS_ENTROPY * bfn.cross_entropy(logits, ids)
        loss = (scale * losses).sum()
    times.learn(t, losses.detach(), mask)
    return loss


def accumulate_gradients(network, batches, seeds, device, times, fused=False):
    """Backpropagate the mean loss of a step's micro-batches, each under its own seed -> loss, a device scalar."""
    rows = [loss_mask(*batch[1:]).flatten().nonzero().squeeze(1) for batch in batches]  # still on the host
    n_tokens = max(1, sum(map(len, rows)))
    total = torch.zeros((), device=device)
    for batch, predicted, seed in zip(batches, rows, seeds, strict=True):
        torch.manual_seed(seed)
        if device.type == "cuda":
            *batch, predicted = (x.pin_memory().to(device, non_blocking=True) for x in (*batch, predicted))
        with torch.autocast(device.type, torch.bfloat16, enabled=speed.fast_bf16(device)):
            loss = micro_batch_loss(network, batch, predicted, n_tokens, times, fused)
        loss.backward()
        total += loss.detach()
    times.fold()
    return total


def update_weights(state, args):
    """Clip, step, average -> gradient norm. A norm that is not finite leaves weights and moments as they are."""
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), args.gradient_clipping)
    for optimizer in state.optimizers:
        optimizer.found_inf = (~norm.isfinite()).float()  # held back on the device: nothing waits for it
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step, args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for ema, rate in zip(state.emas, args.ema_rate, strict=True):
        average_weights(ema, state.model, rate, state.step)
    return norm


def average_weights(ema, model, rate, step):
    """Move the averaged weights towards the model's; early averages forget the initial weights sooner."""
    rate = min(rate, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - rate)


# ---------------------------------------------------------------- validation and samples


@contextmanager
def full_precision():
    """Multiply float32 matrices as such and not as TF32, which trains as well but measures less exactly."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def validate(model, tokens, bos_id, args, device):
    """Bound on at most VAL_TOKENS of the validation text, on the same noise each time -> dict of figures, loss by time."""
    with full_precision():
        length = args.sequence_length
        scores = evaluate.score(model, tokens, length, bos_id, device, seed="validation", max_tokens=VAL_TOKENS)
    return evaluate.likelihood(scores, tokens, bos_id), np.nan_to_num(scores.by_time(20)[1]).tolist()


def sample_texts(model, tokenizer, val, args, run):
    """--num_examples lines: half free, half continuing the first third, in brackets, of a validation window."""
    lines, plan = [], data.plan_validation(val, args.sequence_length)
    for i in range(args.num_examples):
        template, shown = make_template("", tokenizer, run, bfn.mix_seed(args.seed, i)), ""
        if i >= args.num_examples // 2:
            window = val.ids[plan.starts[i % len(plan.starts)] :][: plan.lengths[i % len(plan.starts)]].tolist()
            given = window[: len(window) // 3]
            template, shown = given + [FREE] * (len(window) - len(given)), f"[{decode(tokenizer, given)}] "
        ((ids, _),) = generate(model, tokenizer, [template], args.seed, numbers=[i])
        lines.append(shown + decode(tokenizer, ids[len(given) if shown else 0 :]))
    return lines


def describe_toy(model, tokenizer, figures, args, run, corpus):
    """Hold the built-in language's bound against its exact entropy, and check 256 samples -> lines of text."""
    entropy = toy.entropy_given_length() / (toy.mean_length() + 1) / math.log(2)  # eos is scored too
    bound = figures["bound_nats_per_token"] / math.log(2)
    templates = [make_template("", tokenizer, run, bfn.mix_seed("toy", i)) for i in range(256)]
    texts = [decode(tokenizer, ids) for ids, _ in generate(model, tokenizer, templates, args.seed)]
    seen = set(corpus.read_text().splitlines())
    grammatical = [text for text in texts if toy.is_grammatical(text)]
    new = sum(text not in seen for text in grammatical) / max(1, len(grammatical))
    return [
        f"bound {bound:.3f} bits per token, exact entropy given the length {entropy:.3f}: {bound / entropy - 1:+.1%}",
        f"{len(grammatical) / len(texts):.1%} of {len(texts)} samples are grammatical, {new:.0%} of these not in the corpus",
    ]


# ---------------------------------------------------------------- the run


@dataclass
class State:
    """What training changes; with the run's description, this is a checkpoint."""

    model: BFNTransformer
    optimizers: list
    emas: list  # of copies of the model, one a rate
    times: Times
    step: int = 0
    best: float = math.inf  # lowest validation bound so far, nats per token
    loss_by_time: list | None = None  # of the last validation, in even bins


def describe_run(args, config, tokenizer, tokens, val, run_dir):
    """The part of a checkpoint that does not change during training."""
    tokenizer_hash = data.file_hash(run_dir / "tokenizer.model")
    more = dict(corpus=tokens.key, validation=val.key, tokenizer_hash=tokenizer_hash)
    return dict(
        args=vars(args),
        identity={name: {**vars(args), **more}[name] for name in IDENTITY},
        config=asdict(config),
        tokenizer_hash=tokenizer_hash,
        lengths=np.bincount(np.minimum(tokens.lengths, args.sequence_length)).tolist(),
        word_lengths=word_lengths(tokenizer, tokens),
    )


def build(config, args, device, saved):
    """A new state, or one restored from a checkpoint or from the averaged weights of --init_from."""
    torch.manual_seed(args.seed)
    model = BFNTransformer(config).to(device)
    if args.init_from and not saved:
        model.load_state_dict(load(args.init_from, device=device)[0].state_dict())
    emas = [copy.deepcopy(model).requires_grad_(False).eval() for _ in args.ema_rate]
    state = State(model, make_optimizers(model, args), emas, Times(args.times, args.position_times, device))
    if saved:
        model.load_state_dict(saved["model"])
        for optimizer, moments in zip(state.optimizers, saved["optimizers"], strict=True):
            now = optimizer.state_dict()["param_groups"]  # a new weight decay counts
            optimizer.load_state_dict({**moments, "param_groups": now})
        for ema, weights in zip(emas, saved["emas"], strict=True):
            ema.load_state_dict(weights)
        state.step, state.best, state.loss_by_time = saved["step"], saved["best"], saved["loss_by_time"]
        state.times.curve.copy_(saved["times"])
    return state


def save(state, run, run_dir, is_best=False):
    """Write last.pt; where it is the best so far, write best.pt first and let last.pt be the same file.

    A crash between the two leaves the older last.pt: the run repeats its last steps and writes best.pt again.
    """
    path = run_dir / ("best.pt" if is_best else "last.pt")
    moments = [optimizer.state_dict() for optimizer in state.optimizers]
    averages = [ema.state_dict() for ema in state.emas]
    changing = dict(step=state.step, best=state.best, times=state.times.curve, emas=averages, optimizers=moments)
    changing |= dict(model=state.model.state_dict(), loss_by_time=state.loss_by_time)
    save_checkpoint(path, {**run, **changing})
    if is_best:
        temporary = run_dir / "last.pt.tmp"
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)  # checkpoints are only ever replaced, never changed
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)
        os.replace(temporary, run_dir / "last.pt")


def prepare_network(model, args, device):
    """Choose compilation, attention and fused operations by the flags, the device and the sizes -> whether to fuse.

    Raises ValueError for --fused=on with a beta that it cannot take.
    """
    can_fuse, fused = model.config.s1 < kernels.LARGEST_S, args.fused == "on"
    if fused and not can_fuse:
        raise ValueError(
            f"--fused=on takes sqrt(K beta) under {kernels.LARGEST_S}, here it is {model.config.s1:.1f}: lower -b"
        )
    if args.fused == "auto":
        fused = can_fuse and model.config.K >= FUSED_FROM
    model.recompute = args.recompute
    if args.compile == "auto":
        args.compile = "on" if device.type == "cuda" or args.model_dim >= COMPILED_FROM else "off"
    if args.compile == "on":
        wide_heads = args.model_dim // args.num_heads >= 16  # flex attention takes no narrower ones
        model.flex = device.type == "cuda" and args.sequence_length >= FLEX_FROM and wide_heads
        for part in (model.convolution, *model.blocks):
            part.compile()  # one program for all layers: a fraction of the time that the whole model takes to compile
        if fused:
            kernels.compile_chunks()
    return fused


def probe(model, loader, args, device, fused):
    """Do a step's work without its update -> seconds a step. Where the compiler fails, go on without it."""
    times = Times(args.times, args.position_times, device)  # nothing is learned here
    batch = loader.batch(0)
    for _ in range(3):
        begin = time.perf_counter()
        try:
            accumulate_gradients(model, [batch], [0], device, times, fused).item()
        except Exception as error:  # the compiler raises many kinds
            if args.compile == "off" or isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
                raise
            reason = (str(error).strip().splitlines() or [""])[0]
            print(f"torch.compile failed ({type(error).__name__}: {reason}): going on without it", file=sys.stderr)
            torch.compiler.set_stance("force_eager")
            kernels.compiled.clear()
            args.compile, model.flex = "off", False
        model.zero_grad(set_to_none=True)
    return (time.perf_counter() - begin) * args.accumulation_steps


def drop_undone(path, step_of, step):
    """Remove the lines of a log that belong to steps which a crash undid; lines that are not whole go as well."""
    kept = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError):
            kept += [line + b"\n"] * (step_of(line) <= step)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, path)


def open_metrics(run_dir, step):
    """Open metrics.jsonl, and TensorBoard where it is installed -> write(step, **figures)."""
    drop_undone(run_dir / "metrics.jsonl", lambda line: json.loads(line)["step"], step)
    drop_undone(run_dir / "samples.txt", lambda line: int(line.split(b"\t")[0]), step)
    file = open(run_dir / "metrics.jsonl", "a", buffering=1)
    board = None
    with suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(run_dir, purge_step=step + 1)

    def write(step, **figures):
        file.write(json.dumps(dict(step=step, **figures)) + "\n")
        for name, value in figures.items() if board else ():
            board.add_scalar(name, value, step)

    return write


def recent_figures(log, n_tokens, clock, state, args, device):
    """Figures of the steps since `clock`, of which log holds losses and gradient norms, on the device -> dict.

    Raises ValueError where these are not finite.
    """
    loss, norm = torch.stack(log).mean(0).tolist()  # the only wait for the device
    if not math.isfinite(loss + norm):
        raise ValueError(
            f"loss {loss}, gradient norm {norm}: not finite near step {state.step}: run again with a lower -lr; "
            "if that is no better, start from best.pt, where there is one, renamed to last.pt"
        )
    tokens_per_s = n_tokens / (time.perf_counter() - clock)
    return dict(
        loss=loss,
        grad_norm=norm,
        learning_rate=learning_rate(state.step - 1, args),
        fill=n_tokens / (len(log) * args.accumulation_steps * args.batch_size * args.sequence_length),
        tokens_per_s=tokens_per_s,
        utilisation=tokens_per_s * speed.model_flops(state.model.config, args.sequence_length) / speed.peak(device),
        peak_memory_gb=speed.peak_memory(device),
    )


def plot_times(times, path):
    """Draw what is known of the loss by time, and the density that times are drawn from."""
    t = (np.arange(N_BINS) + 0.5) / N_BINS
    density = times.density().tolist() if times.kind == "learned" else [1.0] * N_BINS
    series = {"root mean square of the loss, nats": (t, times.curve.sqrt().tolist()), "density of t": (t, density)}
    plot.lines(path, series, "t", "", "training loss by time")


def catch_signals():
    """Note Ctrl-C, SIGTERM and SIGHUP in the returned list; a second one leaves at once."""
    caught = []

    def note(number, _frame):
        if caught:
            os._exit(128 + number)
        caught.append(number)
        os.write(2, b"\nfinishing this step, then saving (again to leave at once)\n")  # print is not safe in a handler

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # the last, of a closed terminal, is not on Windows
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), note)
    return caught


def opening_line(state, loader, config, seconds_per_step, args, device):
    """Size of the model, memory, tokens, and when the run will end -> a line."""
    seconds = (args.max_steps - state.step) * seconds_per_step
    return (
        f"{sum(p.numel() for p in state.model.parameters()):,} parameters, K = {config.K}, beta(1) = {config.beta1:.4g}, "
        f"{speed.peak_memory(device):.1f} GB on {device}, {len(loader.tokens.ids):,} tokens an epoch "
        f"({loader.plan(0).fill(args.sequence_length):.1%} of positions), step {state.step} to {args.max_steps} "
        f"in about {seconds / 60:.0f} minutes, by {time.strftime('%H:%M', time.localtime(time.time() + seconds))}"
    )


def next_commands(args):
    """What to do with a finished run -> a line or two."""
    again = (
        "python train.py -d=CORPUS.txt --preset=laptop -mdir=runs/mine"
        if args.data_path is None
        else "a larger --max_steps trains on"
    )
    return f"next: python sample.py -mdir={args.model_dir}\n      {again}"


def describe(figures):
    """Validation figures -> a line."""
    names = "L_inf", "L_rec", "bound", "monte_carlo_error"
    L_inf, L_rec, bound, error = (figures[f"{name}_nats_per_token"] for name in names)
    unknown = figures["unknown_nats_per_token"]
    spelled = f" + unknown text {unknown:.3f}" if unknown else ""
    return (
        f"validation L_inf {L_inf:.3f} + L_rec {L_rec:.3f}{spelled} = {bound:.3f} +- {error:.3f} nats per token, "
        f"{figures['bits_per_char']:.3f} bits per character"
    )


def main():
    args = flags().parse_args()
    device = cli.device(args.device)
    torch.set_float32_matmul_precision("high")
    run_dir = Path(args.model_dir)
    saved = find_checkpoint(run_dir)
    args = complete(args, saved)
    if saved:
        check_identity(saved["identity"], vars(args), run_dir)
    make_config(args, 2)  # sizes that do not go together show before a tokenizer is trained
    tokenizer, tokens, val = prepare_text(args, run_dir, saved)
    config = make_config(args, len(tokenizer))
    loader = data.Loader(tokens, args.sequence_length, args.batch_size, args.seed, tokenizer.bos_id())
    accumulation = args.accumulation_steps
    args.max_steps = args.max_steps or math.ceil(args.epochs * loader.rows_per_epoch / args.batch_size / accumulation)
    run = describe_run(args, config, tokenizer, tokens, val, run_dir)
    if saved:
        check_identity(saved["identity"], run["identity"], run_dir)
    speed.peak(device)  # measured before the memory is needed
    state = build(config, args, device, saved)
    del saved  # it holds a second copy of everything
    if state.step >= args.max_steps:
        print(f"{run_dir} is finished at step {state.step}; {next_commands(args)}")
        return
    fused = prepare_network(state.model, args, device)
    seconds_per_step = probe(state.model, loader, args, device, fused)
    print(opening_line(state, loader, config, seconds_per_step, args, device))

    write = open_metrics(run_dir, state.step)
    caught = catch_signals()
    batches = data.ahead(loader.batch, range(state.step * accumulation, args.max_steps * accumulation))
    bar = tqdm(total=args.max_steps, initial=state.step, unit="step", smoothing=0.05, disable=None)
    log, n_tokens, clock, saved_at = [], 0, time.perf_counter(), None
    while state.step < args.max_steps and not caught:
        micro_batches = [next(batches) for _ in range(accumulation)]
        seeds = [bfn.mix_seed(args.seed, state.step, m) for m in range(accumulation)]
        loss = accumulate_gradients(state.model, micro_batches, seeds, device, state.times, fused)
        norm = update_weights(state, args)
        log.append(torch.stack([loss, norm]))
        n_tokens += sum(int((segment_ids > 0).sum()) for _, segment_ids, _ in micro_batches)
        state.step += 1
        bar.update()

        step, last = state.step, state.step == args.max_steps
        if step % args.log_interval == 0 or last:
            recent = recent_figures(log, n_tokens, clock, state, args, device)
            write(step, **recent)
            bar.set_postfix_str(POSTFIX.format(**recent))
            log, n_tokens, clock = [], 0, time.perf_counter()

        pause, news, is_best = time.perf_counter(), [], False
        if step % args.val_interval == 0 or last:
            figures, state.loss_by_time = validate(state.emas[-1], val, tokenizer.bos_id(), args, device)
            write(step, **{f"val_{name}": value for name, value in figures.items()})
            news.append(f"step {step}: {describe(figures)}")
            plot_times(state.times, run_dir / "times.png")
            is_best = figures["bound_nats_per_token"] < state.best
            state.best = min(state.best, figures["bound_nats_per_token"])
        if step % args.save_interval == 0 or is_best or last or caught:
            save(state, run, run_dir, is_best)
            saved_at = step
        if step % args.sample_interval == 0 or last:
            lines = sample_texts(state.emas[-1], tokenizer, val, args, run)
            with open(run_dir / "samples.txt", "a", encoding="utf-8") as file:
                file.write("".join(f"{step}\t{line}\n" for line in lines))
            news += ["  " + line for line in lines]
        for line in news:
            bar.write(line)
        clock += time.perf_counter() - pause
    bar.close()
    if caught:
        if saved_at != state.step:  # the signal came after the step's save was due
            save(state, run, run_dir)
        print(f"saved at step {state.step}: run the same command again to go on", file=sys.stderr)
        sys.exit(128 + caught[0])
    if args.data_path is None:
        print("\n".join(describe_toy(state.emas[-1], tokenizer, figures, args, run, run_dir / "corpus.txt")))
    print(next_commands(args))


if __name__ == "__main__":
    cli.run(main)
