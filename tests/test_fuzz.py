"""Random corpora, flags, prompts and damaged files: a command ends with a result or one line.

It never hangs. Ten times as many examples, others each time, take about five minutes:

    FUZZ=10 python -m pytest tests/test_fuzz.py
"""

import io
import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from untrained import make_run

import evaluate
import plot
import sample
import train
from common import cli
from text import cache, toy
from text.reading import read_part
from text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from training import log
from training.checkpoint import load

pytest.importorskip("hypothesis")

FUZZ = int(os.environ.get("FUZZ", "1"))  # how many times as many examples
SECONDS = 60  # what takes longer hangs
KINDS = "bpe", "unigram", "char", "word"
EXAMPLES = "line", "paragraph", "file"
ODD = [
    "\n",
    "\r\n",
    "\r",
    "\n\n",
    " \n",
    "\0",
    "\x0b",
    "\x1c",
    "\x85",
    "\u2028",
    "\ufeff",
    "\u2581",
    "\u2040",
    "\u2424",
    "\t",
    " ",
    "  ",
]


def examples(n):
    """Settings of a test with n examples, the same ones each time unless FUZZ says otherwise."""
    return settings(
        max_examples=n * FUZZ,
        derandomize=FUZZ == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Hang(BaseException):
    """What takes too long. No command may catch it."""


@contextmanager
def time_limit():
    """Raise Hang in the block after SECONDS."""

    def stop(_number, _frame):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ends_well(main, *argv):
    """Run a command, which must end with a result, or with one line and exit code 2.

    Return what it prints, or None.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    before, code, sys.argv = sys.argv, 0, [f"{main.__module__}.py", *argv]
    try:
        with time_limit(), redirect_stdout(out), redirect_stderr(err):
            cli.run(main)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    printed, errors = (stream.buffer.getvalue().decode() for stream in (out, err))
    assert "Traceback" not in errors
    if code:
        assert code == 2 and sum(": error: " in line for line in errors.splitlines()) == 1, (
            code,
            errors,
        )
        return None
    return printed


@pytest.fixture(scope="module", params=KINDS)
def run_dir(request, tmp_path_factory):
    """A run folder with an untrained network."""
    return make_run(tmp_path_factory.mktemp("runs") / request.param, request.param, toy.corpus(300))


# ---------------------------------------------------------------- texts

fragments = st.one_of(
    st.sampled_from(ODD),
    st.text(max_size=8),
    st.sampled_from(["the king sleeps", "a", "é", "😀", "-", "\u0301"]),
)
texts = st.builds(
    lambda parts, n: "".join(parts) * n,
    st.lists(fragments, max_size=12),
    st.sampled_from([1, 1, 1, 3, 200, 5000]),
)
corpora = st.one_of(texts.map(str.encode), texts.map(str.encode), st.binary(max_size=40))


@examples(60)
@given(corpora, st.sampled_from(KINDS), st.sampled_from(EXAMPLES), st.sampled_from([2, 3, 30, 300]))
@example("é".encode(), "char", "line", 30)
@example("😀".encode(), "bpe", "file", 300)
def test_any_corpus_is_tokenised_without_loss_or_refused_in_one_line(
    tmp_path_factory, corpus, kind, of, vocab_size
):
    folder = tmp_path_factory.mktemp("corpus")
    path, model = folder / "corpus.txt", folder / "tokenizer.model"
    path.write_bytes(corpus)
    with suppress(ValueError), time_limit():
        model.write_bytes(train_tokenizer(path, kind, vocab_size, of))
        tokenizer = load_tokenizer(model)
        whole, *parts = (
            cache.load_corpus(path, tokenizer, folder / "cache", part, of)
            for part in ("all", "train", "val")
        )
        assert whole.offsets[-1] == len(whole.ids) and (np.diff(whole.offsets) > 0).all()
        assert sum(part.n_bytes for part in parts) <= whole.n_bytes
        assert whole.n_bytes <= len(corpus) or corpus[:2] in (b"\xff\xfe", b"\xfe\xff")  # UTF-16
        if (
            kind in ("bpe", "unigram") and "\u2581".encode() not in corpus
        ):  # SentencePiece's own sign for a space
            for piece in read_part(path, "all", of):
                assert tokenizer.decode(tokenizer.encode(piece.text)) == piece.text
    shutil.rmtree(folder)


@examples(4)
@given(corpora, st.sampled_from(KINDS), st.sampled_from(EXAMPLES), st.integers(0, 3))
def test_any_corpus_can_be_trained_on_or_is_refused_in_one_line(
    tmp_path_factory, corpus, kind, of, seed
):
    folder = tmp_path_factory.mktemp("train")
    (folder / "corpus.txt").write_bytes(corpus)
    tiny = "-mdim=16 -nl=1 -nh=2 -bsz=2 -slen=16 -nex=2 --max_steps=1 --vocab_size=300".split()
    names = (
        f"-d={folder / 'corpus.txt'}",
        f"-mdir={folder / 'run'}",
        f"--cache_dir={folder / 'cache'}",
    )
    ends_well(train.main, *names, *tiny, f"--tokenizer={kind}", f"--example={of}", f"--seed={seed}")
    shutil.rmtree(folder)


# ---------------------------------------------------------------- flags

values = st.one_of(
    st.sampled_from(
        "0 1 2 3 -1 64 2147483647 99999999999999999999 1e-300 1e300 0.5 0.999 nan inf "
        "-inf auto on x 1_0 ٣ , 1,2 0.9,".split()
    ),
    st.text(st.characters(exclude_characters="\0"), max_size=6),
    st.floats().map(str),
    st.integers().map(str),
)


@examples(200)
@given(st.data(), st.sampled_from([train, sample, evaluate]))
def test_any_values_of_flags_are_accepted_or_refused_in_one_line(data, command):
    p = command.flags()
    known = [action for action in p._actions if action.dest != "help"]
    words = []
    for action in data.draw(st.lists(st.sampled_from(known), max_size=6)):
        flag = data.draw(st.sampled_from(action.option_strings))
        value = (
            st.one_of(values, st.sampled_from(sorted(action.choices))) if action.choices else values
        )
        words += [flag] if action.nargs == 0 else [f"{flag}={data.draw(value)}"]

    def parse():
        args = p.parse_args()
        if command is train:
            train.make_config(train.complete(args), 300)

    assume(
        not any(word.startswith(("-spm", "--init_from", "--spm_model")) for word in words)
    )  # files, which are missing
    parse.__module__ = command.__name__
    ends_well(parse, *words)


# ---------------------------------------------------------------- sampling and measuring

gaps = st.sampled_from(
    [
        "___",
        "___{3}",
        "___{1-4}",
        "___{0}",
        "___{9-2}",
        "___{0-0}",
        "____",
        "___{",
        "___{" + "9" * 5000 + "}",
        "___{٣}",
    ]
)
prompts = st.lists(
    st.one_of(gaps, st.sampled_from(["the", " ", "king", ", ", "\\n", "-"]), fragments), max_size=8
).map("".join)
arguments = prompts.map(lambda text: text.replace("\0", ""))  # no argument of a process has a NUL
hints = st.one_of(
    arguments,
    st.builds(
        "{}:{}={}".format, st.integers(-1, 40), st.sampled_from(["the", "king", "a"]), values
    ),
)


@examples(40)
@given(st.data())
def test_any_prompt_draft_hint_and_ban_gives_a_text_or_one_line(run_dir, data):
    words = [f"-mdir={run_dir}", "--num_samples=1", f"--steps={data.draw(st.integers(1, 4))}"]
    for flag, value, most in (
        ("prompt", arguments, 2),
        ("draft", arguments, 1),
        ("hint", hints, 1),
        ("ban", arguments, 1),
    ):
        if flag != "draft" or data.draw(st.booleans()):
            words += [f"--{flag}={text}" for text in data.draw(st.lists(value, max_size=most))]
    words += data.draw(
        st.lists(
            st.sampled_from(
                ["--trace", "--argmax", "--sampler=ode2", "--length=70", "--length=3", "--until=9"]
            ),
            max_size=2,
        )
    )
    words += data.draw(
        st.lists(
            st.sampled_from(
                ["--temperature=1e-300", "--top_p=1e-300", "--strength=0", "--corrections=9"]
            ),
            max_size=1,
        )
    )
    ends_well(sample.main, *words)


@examples(8)
@given(st.data(), texts)
def test_any_text_is_measured_or_refused_in_one_line(tmp_path_factory, run_dir, data, text):
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "text.txt").write_bytes(text.encode()[:3000])
    some = "--window=1000000 --window=1 --se=1e-300 --n_steps=3 --given=prefix:0.5 "
    some += "--given=around:0.99 --calls=1,2 --order=left,random --json"
    words = data.draw(st.lists(st.sampled_from(some.split()), max_size=2, unique=True))
    words += (
        ["--draws=1"] if not any(word.startswith("--se") for word in words) else ["--max_tokens=20"]
    )
    printed = ends_well(
        evaluate.main,
        f"-mdir={run_dir}",
        f"-d={folder / 'text.txt'}",
        f"--cache_dir={folder}",
        *words,
    )
    if printed and "--json" in words:
        json.loads(printed)
    shutil.rmtree(folder)


# ---------------------------------------------------------------- damaged files


def damage(data, path):
    """Damage a file: cut it, flip bits of it, put something else into it, or remove it."""
    raw = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "flip", "replace", "remove"]))
    if kind == "cut":
        del raw[data.draw(st.integers(0, max(0, len(raw) - 1))) :]
    elif kind == "flip":
        for i in data.draw(st.lists(st.integers(0, max(0, len(raw) - 1)), min_size=1, max_size=3)):
            raw[i] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "replace":
        raw = data.draw(
            st.one_of(
                st.binary(max_size=40),
                st.sampled_from([b"[" * 100_000, b"{}", b"null", b'{"dtype": 3}']),
            )
        )
    path.unlink()
    if kind != "remove":
        path.write_bytes(raw)


@examples(40)
@given(st.data())
def test_a_damaged_cache_is_made_again(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cache")
    (folder / "corpus.txt").write_text(toy.corpus(20))
    tokenizer = Tokenizer(train_tokenizer(folder / "corpus.txt", "word", 300))
    inputs = folder / "corpus.txt", tokenizer, folder / "cache"
    before = cache.load_corpus(*inputs)
    ids = np.array(before.ids)
    for name in data.draw(st.sets(st.sampled_from([*cache.ARRAYS, "meta.json"]), min_size=1)):
        damage(data, folder / "cache" / before.key / name)
    with time_limit():
        after = cache.load_corpus(*inputs)
    assert (after.ids == ids).all() and after.n_bytes == before.n_bytes and after.key == before.key
    shutil.rmtree(folder)


@examples(60)
@given(st.data(), st.sampled_from(["best.pt", "tokenizer.model"]))
def test_a_damaged_run_folder_loads_unchanged_or_is_refused_in_one_line(
    tmp_path_factory, run_dir, data, name
):
    folder = tmp_path_factory.mktemp("run") / "copy"
    shutil.copytree(run_dir, folder)
    damage(data, folder / name)
    with suppress(ValueError), time_limit():
        model, _, _ = load(folder)
        weights, whole = model.state_dict(), load(run_dir)[0].state_dict()
        assert all((weights[key] == whole[key]).all() for key in whole)
    shutil.rmtree(folder.parent)


LINE = b'{"step": 1, "loss": 2.5, "val_bound_nats_per_token": 3.0, "minutes": 0.1}\n'


@examples(100)
@given(
    st.lists(
        st.one_of(
            st.just(LINE),
            st.binary(max_size=20),
            st.sampled_from([b"[" * 100_000, LINE[:-9], b'{"step": 1, "minutes": []}\n']),
        ),
        max_size=5,
    )
)
@example([LINE, b"[" * 100_000 + b"\n"])
@example([LINE, LINE[:30]])
def test_damaged_lines_of_a_log_are_dropped_and_whole_ones_kept(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("log")
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))
    log.open_metrics(folder, step=1)
    whole = b"".join(lines).split(b"\n")[:-1].count(LINE[:-1])
    assert log.bounds(folder).count((3.0, 1)) >= whole  # a space before one does no harm
    log.draw_curves(folder) if FUZZ > 1 else None
    shutil.rmtree(folder)


JUNK = [None, True, -1, 0, 2**70, float("nan"), 1e308, "x", "\x1b[31m", [], {}, [{}], ["x"], ...]


def places(value):
    """List the places in nested dicts of plain types -> tuples of keys."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (key,)
        yield from ((key, *rest) for rest in places(inner) if key not in ("emas", "model"))


@pytest.mark.parametrize("run_dir", ["word"], indirect=True)
@examples(25)
@given(data=st.data())
def test_any_damage_of_a_record_ends_with_texts_or_one_line(run_dir, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copy(run_dir / "tokenizer.model", folder)
    saved = torch.load(run_dir / "best.pt", weights_only=True)
    *outer, key = data.draw(st.sampled_from(sorted(places(saved), key=str)))
    inner = saved
    for name in outer:
        inner = inner[name]
    inner[key] = data.draw(st.sampled_from(JUNK))
    if inner[key] is ...:
        del inner[key]
    torch.save(saved, folder / "best.pt")
    ends_well(sample.main, f"-mdir={folder}", "--num_samples=1", "--steps=1")


@examples(25)
@given(lines=st.lists(st.sampled_from([b"[" * 5000, b'{"step": 1, "loss": "x"}', b"7", b"\xff",
    b'{"step": 2, "loss": 1.5, "val_bound_nats_per_token": null}', b'{"step": 3, "loss": 2}']),
    max_size=3))  # fmt: skip
def test_any_figures_of_a_run_become_a_picture_or_one_line(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("figures")
    (folder / "metrics.jsonl").write_bytes(b"\n".join([*lines, b""]))
    ends_well(plot.main, "run", str(folder), f"--output={folder / 'x.png'}")
