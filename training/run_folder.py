"""The run folder: what is saved, how a run resumes, and how to hand a model on.

    python checkpoint.py export RUN_DIR OUT_DIR

A checkpoint is one file of plain types and tensors, the description of the run (made when training starts or resumes) and
its state:

    args, identity, config, tokenizer_hash, sizes, lengths, word_lengths             `describe_run`
    step, best, model, emas, optimizers, times, times_history, loss_by_time          `State`

last.pt is the newest, best.pt the one of the lowest validation bound, and older/ holds those that last.pt was before.

An exported folder holds the last of the emas as model.safetensors. Its config.json has what is left of the checkpoint
without model, optimizers and times, and the figures of the validation.
"""

import math
import os
import platform
import shlex
import sys
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from common import cli, parallel
from common.files import file_hash, replacing, writing
from text import cache, toy
from text.reading import ONE_LINE, Corpus, check_separator, read_pieces
from text.tokenizer import (
    count_word_lengths,
    keeps_breaks,
    label_ids,
    load_tokenizer,
    train_tokenizer,
)
from training.checkpoint import (
    IDENTITY,
    RUN_FILES,
    TOY_SENTENCES,
    new_run,
    older_checkpoints,
    read_checkpoint,
    way_back,
)
from training.log import LEAST_VAL_TOKENS, MOST_MINUTES, VAL_SHARE, VALIDATIONS


def lock(run_dir):
    """Create the run folder if it is missing, and hold it -> a context that lets go at its end.

    Raises ValueError if it is not a folder, or if another process trains there. Without locks
    (`cli.hold`) nothing is held.
    """
    if parallel.rank() > 0:  # the first process holds it
        return nullcontext()
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{run_dir} is a file: give another -mdir")
    run_dir.mkdir(parents=True, exist_ok=True)
    file = open(run_dir / "lock", "a+")
    try:
        cli.hold(file)
    except BlockingIOError:
        file.seek(0)
        found = f"another process trains in {run_dir} ({file.read().strip()})"
        raise ValueError(f"{found}: wait, or give another -mdir") from None
    with writing(run_dir / "lock"):
        file.truncate(0)
        print(f"pid {os.getpid()} on {platform.node()}", file=file, flush=True)
    return file


def open_run_folder(run_dir):
    """Read the last checkpoint of a run folder -> dict, or None for a new run.

    Raises ValueError if last.pt is damaged, or missing where there are other checkpoints, and for files of the names that a
    run writes but nothing else of a run.
    """
    if (run_dir / "last.pt").exists():
        return read_checkpoint(run_dir / "last.pt")
    if (run_dir / "model.safetensors").exists():
        way = f"give another -mdir and {shlex.quote(f'--init_from={run_dir}')}"
        raise ValueError(f"{run_dir} was exported and cannot be resumed: {way}")
    if (run_dir / "best.pt").exists() or older_checkpoints(run_dir):
        raise ValueError(f"{run_dir} has checkpoints but no last.pt: {way_back(run_dir)}")
    if not (run_dir / "tokenizer.model").exists():  # which a run writes first
        for name in ("metrics.jsonl", "samples.txt", "curves.png", "report.html", "older"):
            if (run_dir / name).is_file():
                raise ValueError(f"{run_dir} has a {name} that is of no run: give another -mdir")
    return None


def write_once(path, content):
    """Write a file of the run folder. Raises ValueError if another file has its name, so nothing of the user's is lost."""
    if path.exists() and path.read_bytes() != content:
        raise ValueError(f"{path} exists already and does not belong to this run: move it away or give another -mdir")
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def prepare_text(args, run_dir, saved):
    """Put tokenizer (and the built-in corpus) into the run folder and tokenise -> tokenizer, training and validation Tokens.

    Raises ValueError for a missing or empty text, and for a tokenizer that is not the run's.
    """
    corpus, resume = Corpus(args.data_path or str(run_dir / "corpus.txt"), args.text_field), saved or parallel.rank() > 0
    val = Corpus(args.val_path, args.text_field) if args.val_path else None
    if args.data_path is None and not resume:
        write_once(run_dir / "corpus.txt", toy.corpus(TOY_SENTENCES, args.seed).encode())
    written = {(run_dir / name).resolve() for name in set(RUN_FILES) - {"corpus.txt"}}  # written only if -d is not given
    for text in filter(None, (corpus, val)):
        if Path(text.path).resolve() == run_dir.resolve():
            raise ValueError(f"{text} is the run folder, where training writes: give another -mdir")
        for file in text.files:
            if Path(file).resolve() in written:
                raise ValueError(f"{file} is the name of a file that training writes: leave it out, or give another -mdir")
        check_separator(text, args.example)
        if next(read_pieces(text, args.example), None) is None:
            raise ValueError(f"{text} has no text")
    path = run_dir / "tokenizer.model"
    if not resume:
        write_once(path, make_tokenizer(args, corpus))
    elif args.spm_model and not args.init_from and file_hash(args.spm_model) != file_hash(path):
        raise ValueError(f"{args.spm_model} is not the tokenizer of {run_dir}: give another -mdir")
    tokenizer = load_tokenizer(path)
    read = partial(cache.load_corpus, tokenizer_path=path, cache_dir=args.cache_dir, example=args.example)
    if val:
        return tokenizer, read(corpus, part="all"), read(val, part="all")
    return tokenizer, read(corpus, part="train"), read(corpus, part="val")


def make_tokenizer(args, corpus):
    """Read the tokenizer of the flags, or train one on the corpus -> the model as bytes."""
    if args.spm_model:
        tokenizer = load_tokenizer(args.spm_model)
        if label_ids(tokenizer) and args.example != "labelled":
            raise ValueError(f"{args.spm_model} has tokens for labels: give --labelled, or another tokenizer")
        if args.example not in ONE_LINE and not keeps_breaks(tokenizer):
            raise ValueError(f"{args.spm_model} does not keep line breaks: leave -spm or --init_from out, or use --example=line")
        return Path(args.spm_model).read_bytes()
    print(f"training a {args.tokenizer} tokenizer on {corpus}", file=sys.stderr)
    return train_tokenizer(corpus, args.tokenizer, args.vocab_size, args.example)


def describe_run(args, config, tokenizer, tokens, val, run_dir):
    """Describe the run -> dict, a part of its checkpoints."""
    tokenizer_hash = file_hash(run_dir / "tokenizer.model")
    facts = {**vars(args), "corpus": tokens.key, "validation": val.key, "tokenizer_hash": tokenizer_hash}
    return dict(
        args=vars(args),
        identity={name: facts[name] for name in IDENTITY},
        config=asdict(config),
        tokenizer_hash=tokenizer_hash,
        sizes={name: text_size(text) for name, text in (("training", tokens), ("validation", val))},
        lengths=np.trim_zeros(tokens.count_lengths(args.sequence_length), "b").tolist(),
        word_lengths=count_word_lengths(tokenizer, tokens),
    )


def text_size(tokens):
    """Count what is in Tokens -> dict."""
    return dict(examples=tokens.n_documents, tokens=len(tokens.ids), characters=tokens.n_chars, bytes=tokens.n_bytes)


def check_identity(saved, now, args):
    """Refuse to resume a run with another model, text, seed or batch.

    Raises ValueError that names the difference, and for a text the command that trains on it.
    """
    for name in IDENTITY:
        if name not in now or saved[name] == now[name]:
            continue
        change, back, more = f"{name}={saved[name]}, now it is {now[name]}", "change it back", ""
        if name in ("corpus", "validation"):  # hashes, which tell a reader nothing
            change, back = f"another {name} text", "give -d and --val_path (or none) as before"
            more = f"; to start from its weights, {new_run(args)}" if args.data_path else ""
        known = f"{args.model_dir} was trained with {change}"
        raise ValueError(f"{known}: {back} or give another -mdir{more}")


# ---------------------------------------------------------------- how long, and how often


def decide_steps(args, before, step, seconds, val_seconds):
    """Decide how many steps --minutes are, how often to validate, sample and save, and how many tokens to validate on.

    before: flags of the run that resumes, or {}: it keeps what was decided. seconds, val_seconds: of a step, and of a
    validation on evaluate.VAL_TOKENS, as measured.
    """
    total = args.max_steps * seconds / (1 - VAL_SHARE) if args.max_steps else 60 * args.minutes
    val_tokens = int(VAL_TOKENS * min(1.0, VAL_SHARE * total / (VALIDATIONS * val_seconds)))
    args.val_tokens = before.get("val_tokens", VAL_TOKENS if before else max(LEAST_VAL_TOKENS, val_tokens))
    val_seconds *= args.val_tokens / VAL_TOKENS
    if not args.max_steps:
        args.max_steps = step + max(1, int(max(total - VALIDATIONS * val_seconds, total / 2) / seconds))
    often = min(math.ceil(args.max_steps / VALIDATIONS), int(60 * MOST_MINUTES / seconds))
    often = max(often, math.ceil(val_seconds / (VAL_SHARE * seconds)))
    for name in ("val_interval", "sample_interval", "save_interval"):
        setattr(args, name, getattr(args, name) or before.get(name) or often)


VAL_TOKENS = 16_384  # a validation scores at most this many tokens
