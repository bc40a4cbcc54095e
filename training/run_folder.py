"""The run folder: who holds it, what its files must be, and what is decided when a run starts."""

import math
import os
import platform
import shlex
import sys
from contextlib import nullcontext
from dataclasses import asdict
from itertools import count
from pathlib import Path

import numpy as np

from common import cli, parallel
from common.files import file_hash, remove_leftovers, write_whole, writing
from text import cache, toy
from text.reading import ONE_LINE, Corpus, check_separator, read_pieces
from text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from training import checkpoint

# What a run is: these must not change when it is resumed, everything else may.
IDENTITY = (
    "seed model_dim num_layers num_heads dropout_prob beta sequence_length batch_size "
    "accumulation_steps ema_rate tokenizer vocab_size tokenizer_hash example corpus validation"
).split()
VALIDATIONS = 10  # of a run, and at least one every MOST_MINUTES
MOST_MINUTES = 5
VAL_SHARE = 0.15  # of the time, at most
VAL_TOKENS = 16_384  # scored by a validation, at most
LEAST_VAL_TOKENS = 2048


def lock(run_dir):
    """Create the run folder if it is missing, and hold it -> a context that lets go at its end.

    Raises ValueError if it is not a folder, if another process trains there, and for files with the
    names that a run writes but nothing else of a run. Without locks (`cli.hold`) nothing is held.
    """
    if parallel.rank() > 0:  # the first process holds it
        return nullcontext()
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{run_dir} is a file: give another -mdir")
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "training.lock"
    check_folder(run_dir, path)
    file = open(path, "a+")
    file.seek(0)
    holder = file.read(200).strip()
    try:
        cli.hold(file)
    except BlockingIOError:
        found = f"another process trains in {run_dir} ({holder})"
        raise ValueError(f"{found}: wait, or give another -mdir") from None
    with writing(path):
        file.truncate(0)
        print(f"pid {os.getpid()} on {platform.node()}", file=file, flush=True)
    for folder in (run_dir, run_dir / "older"):
        remove_leftovers(folder, [*checkpoint.RUN_FILES, "step-"])
    return file


def check_folder(run_dir, lock_path):
    """Raise ValueError for files that have the names of a run's, but are of no run."""
    names = [name for name in (*checkpoint.RUN_FILES, "older") if os.path.lexists(run_dir / name)]
    files = [name for name in names if name != "older" and (run_dir / name).is_file()]
    # A picture that cannot be drawn stops no run.
    folders = [name for name in ("older", "curves.png") if (run_dir / name).is_dir()]
    odd = [name for name in names if name not in files + folders]
    is_lock = lock_path.is_file() and not lock_path.is_symlink()
    is_lock = is_lock and lock_path.read_bytes()[:4] in (b"", b"pid ")
    if lock_path.name in names and not is_lock:
        odd.append(lock_path.name)
    has_checkpoint = "last.pt" in names or "best.pt" in names
    if not (is_lock or has_checkpoint or checkpoint.older_checkpoints(run_dir)):
        ours = "tokenizer.model", "corpus.txt"  # whose content is compared
        odd += [name for name in files if name not in ours]
    if odd:
        raise ValueError(f"{run_dir} has a {odd[0]} that is of no run: give another -mdir")


def open_run_folder(run_dir):
    """Read the last checkpoint of a run folder -> dict, or None for a new run.

    Raises ValueError if last.pt is damaged, or missing where there are other checkpoints.
    """
    if (run_dir / "last.pt").exists():
        saved = checkpoint.read_checkpoint(run_dir / "last.pt")
        kinds = checkpoint.RESUMED | dict(identity=dict.fromkeys(IDENTITY, object))
        if wrong := checkpoint.fault(saved, kinds):
            message = f"{wrong} is missing or of another type in {run_dir / 'last.pt'}"
            raise ValueError(f"{message}: {checkpoint.way_back(run_dir) or 'start another run'}")
        return saved
    if (run_dir / "model.safetensors").exists():
        way = f"give another -mdir and {shlex.quote(f'--init_from={run_dir}')}"
        raise ValueError(f"{run_dir} was exported and cannot be resumed: {way}")
    if (run_dir / "best.pt").exists() or checkpoint.older_checkpoints(run_dir):
        way = checkpoint.way_back(run_dir) or "none can be read, give another -mdir"
        raise ValueError(f"{run_dir} has checkpoints but no last.pt: {way}")
    return None


def check_own(path, content):
    """Raise ValueError if a file of the user's has the name of a file of the run."""
    if path.exists() and path.read_bytes() != content:
        there = f"{path} exists already and does not belong to this run"
        raise ValueError(f"{there}: move it away or give another -mdir")


def prepare_text(args, run_dir, saved):
    """Write tokenizer and built-in corpus, and tokenise -> training and val Tokens.

    Raises ValueError for a missing or empty text, and for a tokenizer that is not the run's.
    """
    resume = saved or parallel.rank() > 0
    corpus = Corpus(args.data_path or str(run_dir / "corpus.txt"), args.text_field)
    val = Corpus(args.val_path, args.text_field) if args.val_path else None
    if args.data_path is None and not resume:
        sentences = toy.corpus(checkpoint.TOY_SENTENCES, args.seed).encode()
        check_own(run_dir / "corpus.txt", sentences)
        write_whole(run_dir / "corpus.txt", sentences)
    for text in filter(None, (corpus, val)):
        check_text(text, run_dir, args.example)
    path = run_dir / "tokenizer.model"
    content = path.read_bytes() if resume else make_tokenizer(args, corpus)
    check_own(path, content)
    given = args.spm_model if resume and not args.init_from else None
    if given and file_hash(given) != file_hash(path):
        raise ValueError(f"{args.spm_model} is not the tokenizer of {run_dir}: give another -mdir")
    options = load_tokenizer(path) if resume else Tokenizer(content), args.cache_dir
    parts = [(corpus, "all"), (val, "all")] if val else [(corpus, "train"), (corpus, "val")]
    tokens = [cache.load_corpus(text, *options, part, args.example) for text, part in parts]
    if not resume:
        write_whole(path, content)  # last: a text that is too short leaves none
    return tokens


def check_text(text, run_dir, example):
    """Raise ValueError if a Corpus has no examples, or files that training writes."""
    if Path(text.path).resolve() == run_dir.resolve():
        raise ValueError(f"{text} is the run folder, where training writes: give another -mdir")
    written = {(run_dir / name).resolve() for name in checkpoint.RUN_FILES if name != "corpus.txt"}
    for file in text.files:
        if Path(file).resolve() in written:
            name = f"{file} is the name of a file that training writes"
            raise ValueError(f"{name}: leave it out, or give another -mdir")
    check_separator(text, example)
    if next(read_pieces(text, example), None) is None:
        raise ValueError(f"{text} has no text")


def make_tokenizer(args, corpus):
    """Read the tokenizer of the flags, or train one on the corpus -> the model as bytes."""
    if args.spm_model:
        name = args.spm_model
        tokenizer = load_tokenizer(name)
        if tokenizer.labels and args.example != "labelled":
            way = "give --labelled, or another tokenizer"
            raise ValueError(f"{name} has tokens for labels: {way}")
        if args.example not in ONE_LINE and not tokenizer.keeps_breaks():
            way = "leave -spm or --init_from out, or use --example=line"
            raise ValueError(f"{name} does not keep line breaks: {way}")
        return Path(name).read_bytes()
    print(f"training a {args.tokenizer} tokenizer on {corpus}", file=sys.stderr)
    return train_tokenizer(corpus, args.tokenizer, args.vocab_size, args.example)


def code_and_flags(args):
    """Compute what all processes of a run must have alike: its sources and flags -> str."""
    sources = sorted(cli.ROOT.glob("*.py")) + sorted(cli.ROOT.glob("*/*.py"))
    folders = "device", "model_dir", "cache_dir"  # may differ between machines
    flags = {name: value for name, value in vars(args).items() if name not in folders}
    return f"{list(map(file_hash, sources))} {flags}"


def describe_run(args, config, tokens, val):
    """Describe the run -> dict, a part of its checkpoints."""
    facts = dict(vars(args), corpus=tokens.key, validation=val.key)
    facts["tokenizer_hash"] = tokens.tokenizer.hash
    return dict(
        args=vars(args),
        identity={name: facts[name] for name in IDENTITY},
        config=asdict(config),
        tokenizer_hash=tokens.tokenizer.hash,
        sizes=dict(training=text_size(tokens), validation=text_size(val)),
        lengths=np.trim_zeros(tokens.count_lengths(args.sequence_length), "b").tolist(),
        word_lengths=tokens.count_word_lengths(),
    )


def text_size(tokens):
    """Count what is in Tokens -> dict."""
    sizes = dict(examples=tokens.n_documents, tokens=len(tokens.ids))
    return sizes | dict(characters=tokens.n_chars, bytes=tokens.n_bytes)


def check_identity(saved, now, args):
    """Refuse to resume a run with another model, text, seed or batch.

    Raises ValueError that names the difference, and for a text the command that trains on it.
    """
    for name in IDENTITY:
        if name not in now or saved[name] == now[name]:
            continue
        change = f"{name}={saved[name]}, now it is {now[name]}"
        back = "change it back"
        more = ""
        if name in ("corpus", "validation"):  # hashes, which tell a reader nothing
            change = f"another {name} text"
            back = "give -d and --val_path (or none) as before"
            more = f"; to start from its weights, {new_run(args)}" if args.data_path else ""
        known = f"{args.model_dir} was trained with {change}"
        raise ValueError(f"{known}: {back} or give another -mdir{more}")


def new_run(args):
    """Write the command that starts a new run on the text of `args` from the weights of its run."""
    run_dir = Path(args.model_dir)
    number = next(n for n in count(2) if not os.path.exists(f"{run_dir}-{n}"))
    words = [f"-d={args.data_path}", f"--init_from={run_dir}", f"-mdir={run_dir}-{number}"]
    more = "val_path", "text_field", "preset", "minutes" if args.minutes else "max_steps"
    words += [f"--{name}={getattr(args, name)}" for name in more if getattr(args, name)]
    return shlex.join(["python", "train.py", *words])


def decide_steps(args, before, step, seconds, val_seconds):
    """Decide the steps of --minutes, and how often, and on how many tokens, to validate.

    before: flags of the run that resumes, or {}: it keeps what was decided. seconds, val_seconds:
    of a step, and of a validation on VAL_TOKENS, as measured.
    """
    total = args.max_steps * seconds / (1 - VAL_SHARE) if args.max_steps else 60 * args.minutes
    affordable = VAL_TOKENS * min(1.0, VAL_SHARE * total / (VALIDATIONS * val_seconds))
    new = VAL_TOKENS if before else max(LEAST_VAL_TOKENS, int(affordable))
    args.val_tokens = before.get("val_tokens", new)
    val_seconds *= args.val_tokens / VAL_TOKENS
    if not args.max_steps:
        training = max(total - VALIDATIONS * val_seconds, total / 2)
        args.max_steps = step + max(1, int(training / seconds))
    often = min(math.ceil(args.max_steps / VALIDATIONS), int(60 * MOST_MINUTES / seconds))
    often = max(often, math.ceil(val_seconds / (VAL_SHARE * seconds)))
    for name in ("val_interval", "sample_interval", "save_interval"):
        setattr(args, name, getattr(args, name) or before.get(name) or often)
