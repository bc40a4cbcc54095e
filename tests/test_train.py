"""Training: resuming is exact, wrong flags are refused in one line, and the network learns."""

import errno
import fcntl
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partialmethod
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from exact import draw, random_joint
from untrained import WORDS, equal, record

import bfn
import evaluate
import sample
import train
from common import cli
from common.files import file_hash
from model import Form
from text import toy
from text.cache import Tokens
from text.tokenizer import train_tokenizer
from training import checkpoint, forms, log, run_folder
from training.checkpoint import read_checkpoint
from training.times import draw_evenly, segment_numbers

ROOT = Path(train.__file__).parent
TINY = "-mdim=32 -nl=2 -nh=2 -bsz=4 -slen=32 -nex=2 -lgi=1 -vli=4 -smi=100 -svi=3".split()
TINY += ["--max_steps=8", "-lr=0.003"]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    path = tmp_path / "corpus.txt"
    path.write_text(toy.corpus(300))
    return path


def command(corpus, run_dir, *more):
    """The words of a train.py command line.

    A word tokenizer is trained unless the flags name a tokenizer.
    """
    words = ["--tokenizer=word"] * (
        not any(flag.startswith(("-spm", "--init_from")) for flag in more)
    )
    return [
        "train.py",
        f"-d={corpus}",
        f"-mdir={run_dir}",
        f"--cache_dir={corpus.parent / 'cache'}",
        *TINY,
        *words,
        *more,
    ]


@pytest.fixture
def run(corpus, monkeypatch):
    """A function run(run_dir, *flags) that trains in this process."""

    def run(run_dir, *more):
        monkeypatch.setattr(sys, "argv", command(corpus, run_dir, *more))
        train.main()

    return run


def assert_same_run(one, other):
    """Compare the checkpoints of two run folders, except for their flags, and the logged losses."""
    for name in ("last.pt", "best.pt"):
        a, b = (read_checkpoint(run_dir / name) for run_dir in (one, other))
        a.pop("args"), b.pop("args")
        assert a["step"] == b["step"] and equal(a, b)
    losses = [
        {
            line["step"]: line["loss"]
            for line in map(json.loads, open(run_dir / "metrics.jsonl"))
            if "loss" in line
        }
        for run_dir in (one, other)
    ]
    assert losses[0] == losses[1]


# ---------------------------------------------------------------- resuming


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(run, tmp_path):
    dropout = "-dop=0.1", "-acc=2", "-ema=0.9,0.99"
    run(tmp_path / "whole", *dropout)
    for stop_step in (3, 5, 8):  # SIGTERM arrives while the step is computed
        real = train.update_weights

        def interrupted(state, args, real=real, stop_step=stop_step):
            if state.step == stop_step - 1 and stop_step < 8:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(state, args)

        train.update_weights = interrupted
        try:
            run(tmp_path / "parts", *dropout)
        except KeyboardInterrupt as stop:
            assert stop.args == (signal.SIGTERM,)
            assert read_checkpoint(tmp_path / "parts" / "last.pt")["step"] == stop_step
        finally:
            train.update_weights = real
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in the first save", "in a later step", "in a later save"])
def test_a_run_that_is_killed_resumes_to_the_same_result(run, corpus, tmp_path, moment):
    """The process sends itself SIGKILL at three moments.

    In each case the folder that it leaves can be resumed.
    """
    run(tmp_path / "whole", "-svi=1")
    victim = """
import os, runpy, sys
import train
from common import cli
from training import optim
real_average, real_replace, n_saves = optim.average_weights, os.replace, 0

def average_weights(ema, model, rate, step):
    if MOMENT == "in a later step" and step == 4:
        os.kill(os.getpid(), 9)
    real_average(ema, model, rate, step)

def replace(source, target):
    global n_saves
    n_saves += str(target).endswith("last.pt")
    if (MOMENT, n_saves) in (("in the first save", 1), ("in a later save", 5)):
        os.kill(os.getpid(), 9)
    real_replace(source, target)

optim.average_weights, os.replace = average_weights, replace
cli.run(train.main)
"""
    argv = [
        sys.executable,
        "-c",
        f"MOMENT = {moment!r}\n{victim}",
        *command(corpus, tmp_path / "parts", "-svi=1")[1:],
    ]
    done = subprocess.run(
        argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
    )
    assert done.returncode == -signal.SIGKILL
    if moment != "in the first save":
        assert read_checkpoint(tmp_path / "parts" / "last.pt")["step"] == 4
    run(tmp_path / "parts", "-svi=1")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_crash_after_saving_best_and_before_saving_last_changes_no_result(
    run, tmp_path, monkeypatch
):
    run(tmp_path / "whole")
    real, targets = os.replace, []

    def crash(source, target):
        targets.append(Path(target).name)
        if targets.count("last.pt") == 2:  # best.pt of the first validation is already saved
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    monkeypatch.setattr(os, "replace", real)
    run(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_resumed_run_may_change_its_weight_decay(run, tmp_path):
    run(tmp_path / "run", "--max_steps=1")
    run(tmp_path / "run", "--max_steps=2", "-wd=0.5")
    groups = [
        g
        for o in read_checkpoint(tmp_path / "run" / "last.pt")["optimizers"]
        for g in o["param_groups"]
    ]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0, 0.5]


# ---------------------------------------------------------------- older checkpoints


def older_steps(run_dir):
    """The steps of the checkpoints in older/, by their names and contents, the newest first."""
    paths = checkpoint.older_checkpoints(run_dir)
    steps = [read_checkpoint(path)["step"] for path in paths]
    assert [path.name for path in paths] == [f"step-{step:010}.pt" for step in steps]
    return steps


def save_steps(state, run_dir, keep, steps):
    """Save a state as if it were of these steps."""
    for state.step in steps:
        checkpoint.save(
            state,
            record([], args=WORDS["args"] | dict(keep=keep)),
            run_dir,
            is_best=state.step % 2 == 0,
        )


@pytest.mark.parametrize("links", [True, False])
def test_a_run_keeps_the_older_checkpoints_that_keep_says(tmp_path, monkeypatch, links):
    """A resumed run may keep another number. One that went back deletes what is newer."""
    if not links:
        monkeypatch.setattr(
            os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no links here"))
        )
    state = tiny_setup()[2]
    for keep, steps, kept in (
        (2, [3], []),
        (2, [4, 4, 4], [3]),
        (2, [6, 8, 20], [8, 6]),
        (3, [21], [20, 8, 6]),
        (1, [22], [21]),
        (0, [23], []),
        (2, [24, 25, 26], [25, 24]),
    ):
        save_steps(state, tmp_path, keep, steps)
        assert (
            older_steps(tmp_path) == kept
            and read_checkpoint(tmp_path / "last.pt")["step"] == steps[-1]
        )
    files = [
        path.stat().st_ino
        for path in (tmp_path / "last.pt", *checkpoint.older_checkpoints(tmp_path))
    ]
    assert len(set(files)) == 3  # one damaged file damages no other
    shutil.copyfile(checkpoint.older_path(tmp_path, 24), tmp_path / "last.pt")
    state.saved_step = 24
    save_steps(state, tmp_path, 2, [25])
    assert older_steps(tmp_path) == [24]


def test_keeping_older_checkpoints_writes_none_twice(tmp_path, monkeypatch):
    written, real = [], torch.save
    monkeypatch.setattr(
        torch, "save", lambda saved, path: (written.append(saved["step"]), real(saved, path))
    )
    monkeypatch.setattr(shutil, "copyfile", None)
    save_steps(tiny_setup()[2], tmp_path, 2, [3, 4, 5, 6, 8])
    assert written == [3, 4, 5, 6, 8] and older_steps(tmp_path) == [6, 5]


def test_a_save_that_fails_deletes_no_older_checkpoint(tmp_path, monkeypatch):
    state = tiny_setup()[2]
    save_steps(state, tmp_path, 2, [4, 6, 8])

    def full(*anything):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="cannot write"):
        patch.setattr(torch, "save", full)
        save_steps(state, tmp_path, 2, [9])
    assert older_steps(tmp_path) == [8, 6, 4] and read_checkpoint(tmp_path / "last.pt")["step"] == 8
    save_steps(state, tmp_path, 2, [9])
    assert older_steps(tmp_path) == [8, 6]


def test_a_run_that_goes_on_from_an_older_checkpoint_ends_with_the_same_result(run, tmp_path):
    """By the command of the error. best.pt is the same file as last.pt here: damaged too."""
    run(tmp_path / "whole", "--keep=0")
    run_dir = tmp_path / "a run"
    run(run_dir)
    assert (run_dir / "last.pt").samefile(run_dir / "best.pt") and older_steps(run_dir) == [6, 4]
    os.truncate(run_dir / "last.pt", 5000)
    with pytest.raises(ValueError, match=r"last.pt is damaged") as error:
        run_folder.open_run_folder(run_dir)
    advice = re.search(r"to go on from step 6, type: (.*)", str(error.value))[1]
    subprocess.run(advice, shell=True, check=True)
    run(run_dir)
    assert_same_run(tmp_path / "whole", run_dir)
    assert older_steps(run_dir) == [6, 4]


# ---------------------------------------------------------------- what a run does not change


@pytest.mark.parametrize("max_steps", [4, 8])
def test_samples_that_a_crash_has_prevented_are_written_by_the_next_run(
    run, tmp_path, max_steps, monkeypatch
):
    """Also those of the last step, after which there is nothing left to train."""
    flags = "-smi=4", "-svi=4", "-nex=2"
    run(tmp_path / "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            sample.Sampler, "examples", lambda *inputs: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        run(tmp_path / "parts", *flags, f"--max_steps={max_steps}")
    run(tmp_path / "parts", *flags, f"--max_steps={max_steps}")
    run(tmp_path / "parts", *flags)
    whole, parts = ((tmp_path / name / "samples.txt").read_text() for name in ("whole", "parts"))
    if max_steps == 8:
        assert parts == whole
    assert [line.split("\t")[0] for line in parts.splitlines() if "\t" in line] == [
        "4",
        "4",
        "8",
        "8",
    ]


def test_a_finished_run_says_so_and_can_be_given_more_steps(run, tmp_path, capsys):
    run(tmp_path / "run")
    capsys.readouterr()
    run(tmp_path / "run")
    assert "is finished at step 8" in capsys.readouterr().out
    run(tmp_path / "run", "--max_steps=10", "-lgi=2")
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 10


@pytest.mark.parametrize(
    "flag, values",
    [("-mdim=64", "32.*64"), ("--seed=1", "0.*1"), ("-bsz=8", "4.*8"), ("-b=0.5", "auto.*0.5")],
)
def test_resuming_with_another_width_seed_batch_or_beta_is_refused_with_both_values(
    run, tmp_path, flag, values
):
    run(tmp_path / "run", "--max_steps=1")
    with pytest.raises(ValueError, match=values):
        run(tmp_path / "run", flag)


def test_resuming_with_another_corpus_is_refused(run, corpus, tmp_path):
    run(tmp_path / "run", "--max_steps=1")
    corpus.write_text(corpus.read_text() + "hugo walks\n")
    with pytest.raises(ValueError, match="trained with another corpus text"):
        run(tmp_path / "run")


def test_a_run_whose_text_grew_names_the_command_that_trains_on_it(
    run, corpus, tmp_path, monkeypatch, capsys
):
    run_dir = tmp_path / "a run"
    run(run_dir, "--max_steps=1")
    corpus.write_text(corpus.read_text() + "hugo walks\n")
    with pytest.raises(ValueError) as error:
        run(run_dir, "--max_steps=2")
    words = shlex.split(re.search(r"python (train.py .*)", str(error.value))[1])
    del error  # it keeps the lock
    monkeypatch.setattr(sys, "argv", [*words, f"--cache_dir={tmp_path / 'cache'}", "--compile=off"])
    train.main()
    flags = train.load(tmp_path / "a run-2")[2]["args"]
    assert (flags["init_from"], flags["max_steps"]) == (str(run_dir), 2)
    assert f"{corpus}: 1 file, 301 examples, " in capsys.readouterr().out
    with pytest.raises(ValueError, match="a run-3"):
        run(run_dir)


def test_a_file_that_training_did_not_write_is_never_overwritten(run, corpus, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.model").write_text("mine")
    with pytest.raises(ValueError, match="tokenizer.model exists already"):
        run(tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.model").read_text() == "mine"
    (tmp_path / "run" / "corpus.txt").write_text("mine")
    with pytest.raises(ValueError, match="corpus.txt exists already"):
        run_folder.prepare_text(
            train.complete(train.flags().parse_args([])), tmp_path / "run", None
        )
    assert (tmp_path / "run" / "corpus.txt").read_text() == "mine"


def test_a_run_folder_with_only_best_pt_is_not_overwritten(run, tmp_path):
    run(tmp_path / "run", "--max_steps=4")
    (tmp_path / "run" / "last.pt").unlink()
    with pytest.raises(ValueError, match=r"no last.pt: to go on from step 4, .* cp \S+best.pt"):
        run(tmp_path / "run")
    shutil.copyfile(tmp_path / "run" / "best.pt", tmp_path / "run" / "last.pt")
    run(tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 8


def test_the_checkpoint_is_saved_before_samples_are_printed(run, tmp_path, monkeypatch):
    """If the output cannot be written, for example to a closed pipe, no training is lost."""

    def fail(*anything):
        raise BrokenPipeError

    monkeypatch.setattr(sample.Sampler, "examples", fail)
    with pytest.raises(BrokenPipeError):
        run(tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 8


def test_a_fine_tuned_run_resumes_after_its_source_run_is_deleted(run, tmp_path):
    run(tmp_path / "first", "--max_steps=1")
    run(tmp_path / "second", f"--init_from={tmp_path / 'first'}", "--max_steps=1")
    shutil.rmtree(tmp_path / "first")
    run(tmp_path / "second", f"--init_from={tmp_path / 'first'}", "--max_steps=2")
    assert read_checkpoint(tmp_path / "second" / "last.pt")["step"] == 2


def test_fine_tuning_starts_from_the_averaged_weights_tokenizer_and_preset_of_the_other_run(
    run, tmp_path
):
    run(tmp_path / "first", "--max_steps=3", "--preset=toy")
    source = read_checkpoint(tmp_path / "first" / "best.pt")
    run(
        tmp_path / "second",
        f"--init_from={tmp_path / 'first'}",
        "--max_steps=1",
        "-lr=1e-9",
        "-wd=0",
    )
    tuned = read_checkpoint(tmp_path / "second" / "last.pt")
    assert tuned["tokenizer_hash"] == source["tokenizer_hash"]
    assert tuned["args"]["preset"] == "toy"  # and not the one of this device
    assert tuned["args"]["warmup_steps"] == source["args"]["warmup_steps"]
    for name, value in source["emas"][-1].items():
        torch.testing.assert_close(tuned["model"][name], value, atol=1e-6, rtol=0)
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer(tmp_path / "corpus.txt", "char", 0))
    with pytest.raises(ValueError, match="not the tokenizer of"):
        run(tmp_path / "third", f"--init_from={tmp_path / 'first'}", f"-spm={other}")
    with pytest.raises(ValueError, match="model_dim=64.*has 32"):
        run(tmp_path / "third", f"--init_from={tmp_path / 'first'}", "-mdim=64")


# ---------------------------------------------------------------- one step


def tiny_setup(K=4):
    """A tiny network before its first step -> flags, Config, State."""
    torch.manual_seed(0)
    args = train.complete(train.flags().parse_args(["-d=none", *TINY]))
    config = train.make_config(args, K)
    return args, config, train.build(config, args, torch.device("cpu"))


def batch_of(ids):
    """One text per row, no position given -> ids, segment_ids, cond_mask."""
    return ids, torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)


@pytest.mark.parametrize("is_fused", [False, True])
def test_two_micro_batches_give_the_gradient_of_one_batch(monkeypatch, is_fused):
    """With the same noise, also if the micro-batches have different numbers of predicted tokens."""
    _, _, state = tiny_setup()
    torch.nn.init.normal_(state.model.linear_out.weight)

    def times(segment_ids, seen):
        return torch.full((2, *segment_ids.shape), 0.6)

    keys = train.draw_keys(1, 10)
    monkeypatch.setattr(train, "draw_keys", lambda B, L, device: keys.expand(B, L, 2))
    state.model.use(Form(fused=is_fused))
    ids, segment_ids, cond_mask = batch_of(torch.randint(4, (6, 10)))
    cond_mask[4:, 3:] = True
    cond_mask[5] = True
    gradients = []
    for splits in ([6], [2, 4], [3, 3], [5, 1]):
        batches = list(zip(*(x.split(splits) for x in (ids, segment_ids, cond_mask)), strict=True))
        train.accumulate_gradients(
            state.model, batches, range(len(splits)), torch.device("cpu"), times=times
        )
        gradients.append([p.grad.clone() for p in state.model.parameters() if p.requires_grad])
        state.model.zero_grad()
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_fused_and_plain_training_log_the_same_losses(run, tmp_path):
    """Their noise is the same, because it is a function of the step."""
    losses = []
    for form in ("off", "on"):
        run(tmp_path / form, f"--fused={form}", "--max_steps=6", "-nex=0")
        lines = map(json.loads, open(tmp_path / form / "metrics.jsonl"))
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    args, _, state = tiny_setup()
    for value in (float("nan"), float("inf")):
        before = {name: weight.clone() for name, weight in state.model.state_dict().items()}
        train.accumulate_gradients(
            state.model, [batch_of(torch.randint(4, (2, 8)))], [0], torch.device("cpu")
        )
        state.model.linear_out.weight.grad[0, 0] = value
        assert not train.update_weights(state, args).isfinite()
        assert equal(before, dict(state.model.state_dict()))
        assert all(
            v.isfinite().all()
            for o in state.optimizers
            for s in o.state.values()
            for v in s.values()
        )
    train.accumulate_gradients(
        state.model, [batch_of(torch.randint(4, (2, 8)))], [0], torch.device("cpu")
    )
    assert train.update_weights(state, args).isfinite()
    assert not equal(before, dict(state.model.state_dict()))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    run, tmp_path, monkeypatch
):
    run(tmp_path / "run", "--max_steps=3")
    monkeypatch.setattr(
        bfn, "training_loss", lambda log_p, ids, t, s1: log_p.sum(-1) * float("nan")
    )
    with pytest.raises(
        ValueError, match="not finite at step 4.*lower -lr.* go on from step 3, type: rm .* cp"
    ):
        run(tmp_path / "run", "-lgi=100")
    saved = read_checkpoint(tmp_path / "run" / "last.pt")
    assert saved["step"] == 3 and all(v.isfinite().all() for v in saved["model"].values())


def test_each_step_moves_the_average_by_its_rate():
    args, _, state = tiny_setup()
    assert train.flags().parse_args(["-ema=0.9,0.5"]).ema_rate == [0.9, 0.5]
    state.step = 10**6  # past the warm-up
    args.ema_rate = [0.9]
    weight, average = state.model.project.weight, state.emas[0].project.weight
    with torch.no_grad():
        weight.fill_(1.0), average.fill_(0.0)
    train.accumulate_gradients(
        state.model, [batch_of(torch.randint(4, (2, 8)))], [0], torch.device("cpu")
    )
    train.update_weights(state, args)
    torch.testing.assert_close(average, 0.1 * weight)


@pytest.mark.slow
def test_a_small_joint_distribution_is_learned():
    """The bound comes close to the entropy, and samples follow the distribution."""
    sequences, P = random_joint(K=4, L=3)
    args, config, state = tiny_setup(K=4)
    args.max_steps, args.learning_rate, args.warmup_steps, args.ema_rate = 400, 0.01, 20, [0.98]
    for step in range(args.max_steps):
        batch = batch_of(draw(sequences, P, 256, seed=step))
        train.accumulate_gradients(state.model, [batch], [step], torch.device("cpu"))
        train.update_weights(state, args)
        state.step += 1
    ids, segment_ids, given = batch_of(draw(sequences, P, 20_000, seed=-1))

    def network(theta, t):
        return state.emas[0](theta, t, torch.ones(theta.shape[:2], dtype=torch.long))

    with torch.no_grad():
        t = draw_evenly(segment_numbers(segment_ids))
        bound = bfn.squared_error_loss(
            bfn.predict_noisy(network, ids, t, given, config.s1, 4), ids, t, config.s1
        )
        bound = bound + bfn.reconstruction_loss(network, ids, given, config.s1, 4)
    entropy = -(P * P.log()).sum().item()
    assert entropy - 0.05 < bound.sum(-1).mean() < 1.15 * entropy
    samples = bfn.sample(
        network, torch.zeros_like(ids), given, config.s1, 4, bfn.Controls("ancestral", 30)
    )[0]
    counts = torch.bincount((samples * torch.tensor([16, 4, 1])).sum(-1), minlength=64) / len(ids)
    assert (counts - P).abs().sum() / 2 < 0.12


# ---------------------------------------------------------------- the command


@pytest.mark.slow  # it compiles a network of the usual size
def test_the_main_command_trains_a_text_with_the_forms_that_this_machine_has(tmp_path, monkeypatch):
    """No flag says how: the network is compiled, and in bfloat16 where that is fast."""
    (tmp_path / "text.txt").write_text(toy.corpus(300))
    words = [
        "train.py",
        f"-d={tmp_path / 'text.txt'}",
        f"-mdir={tmp_path / 'run'}",
        f"--cache_dir={tmp_path}",
    ]
    monkeypatch.setattr(sys, "argv", words)
    train.main()
    bounds = [bound for bound, _ in log.bounds(tmp_path / "run")]
    assert len(bounds) > 5 and bounds[-1] < 0.7 * bounds[0]


def test_a_run_whose_first_step_is_not_finite_says_what_was_tried(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        bfn, "training_loss", lambda log_p, ids, t, s1: log_p.sum(-1) * float("nan")
    )
    with pytest.raises(ValueError, match=r"not finite at step 1.*-lr=0.003, form: .*lower -lr$"):
        run(tmp_path / "run", "-lgi=100")
    assert not (tmp_path / "run" / "last.pt").exists()


def test_training_continues_uncompiled_if_the_compiler_fails(run, tmp_path, monkeypatch, capsys):
    def broken(*inputs):
        raise RuntimeError("no compiler")

    run(tmp_path / "plain")
    broken_compile = partialmethod(torch.nn.Module.compile, backend=broken)
    monkeypatch.setattr(torch.nn.Module, "compile", broken_compile)
    try:
        run(tmp_path / "compiled", "--compile=on")
    finally:
        torch._dynamo.reset()
    assert "torch.compile failed" in capsys.readouterr().err
    assert_same_run(tmp_path / "plain", tmp_path / "compiled")


def fails(argv, monkeypatch, capsys, main=train.main):
    """Run a command that must fail -> its error message, which must be a single line."""
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if "error" in line]
    assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in output.err, output.err
    return lines[0]


@pytest.mark.parametrize(
    "flag, message",
    [
        ("-dpo=0.1", "unknown flag -dpo"),
        ("-bs=12", "unknown flag -bs .did you mean -bsz"),
        ("--max_step=3", "unknown flag --max_step "),
        ("-md=x", "unknown flag -md"),
        ("-bsz=0", "at least 1"),
        ("-lr=nought", "is no number"),
        ("-bsz=4.0", "is no whole number"),
        ("-slen=1", "at least 2"),
        ("--max_steps=99999999999999999999", "at most 2147483647"),
        ("-9x", "written --flag=VALUE"),
        ("-ep=inf", "inf must be"),
        ("--device=meta", "no device 'meta'"),
        ("-dop=1.5", "dropout.*below 1"),
        ("-ema=2", "ema_rate.*below 1"),
        ("-b=-1", "beta.*above 0"),
        ("--device=tpu", "no device 'tpu'"),
        ("-mdim=30", "model_dim 30"),
        ("-spm=missing.model", "no tokenizer at missing.model"),
        ("--vocab_size=1", "at least 2"),
        ("--val_path=missing.txt", "no text file at missing.txt"),
        ("--init_from=missing", "no checkpoint at missing"),
    ],
)
def test_a_wrong_flag_is_an_error_of_one_line(corpus, tmp_path, monkeypatch, capsys, flag, message):
    assert re.search(message, fails(command(corpus, tmp_path / "run", flag), monkeypatch, capsys))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no text file"),
        (b"", "has no text"),
        (b"\n \n", "has no text"),
        (b"caf\xe9\n" * 9, "not UTF-8"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_an_error_of_one_line(
    corpus, tmp_path, monkeypatch, capsys, content, message
):
    bad = tmp_path / "bad.txt"
    if content is not None:
        bad.write_bytes(content)
    assert message in fails([*command(corpus, tmp_path / "run"), f"-d={bad}"], monkeypatch, capsys)


def test_a_truncated_checkpoint_is_an_error_of_one_line_and_is_not_overwritten(
    run, corpus, tmp_path, monkeypatch, capsys
):
    run(tmp_path / "run", "--max_steps=1")
    path = tmp_path / "run" / "last.pt"
    path.write_bytes(path.read_bytes()[:5000])
    assert "damaged" in fails(command(corpus, tmp_path / "run"), monkeypatch, capsys)
    assert path.stat().st_size == 5000


def test_a_flag_and_its_value_are_separated_by_an_equals_sign_or_a_space():
    parse = train.flags().parse_args
    assert vars(parse(["-d=a", "-bsz=3"])) == vars(parse(["-d", "a", "--batch_size", "3"]))


def test_a_corpus_smaller_than_a_batch_can_be_trained_on(corpus, run, tmp_path):
    corpus.write_text(
        "a few words in one line and no more than that, so that one batch sees them many times "
        "over\n"
    )
    run(tmp_path / "run", "--tokenizer=char", "--max_steps=2")
    assert (tmp_path / "run" / "best.pt").exists()


def test_a_tokenizer_without_bos_and_eos_can_be_used_and_is_copied_unchanged(corpus, run, tmp_path):
    (tmp_path / "plain.model").write_bytes(train_tokenizer(corpus, "char", 0))
    run(tmp_path / "run", f"-spm={tmp_path / 'plain.model'}", "--max_steps=2")
    assert file_hash(tmp_path / "run" / "tokenizer.model") == file_hash(tmp_path / "plain.model")


def test_a_run_resumes_whether_or_not_its_tokenizer_is_named(run, tmp_path):
    own = tmp_path / "trained" / "tokenizer.model"
    run(tmp_path / "trained", "--max_steps=1")
    run(tmp_path / "trained", f"-spm={own}", "--max_steps=2")
    run(tmp_path / "given", f"-spm={own}", "--max_steps=1")
    argv = [flag for flag in sys.argv if not flag.startswith(("-spm", "--max_steps"))]
    sys.argv[:] = [*argv, "--max_steps=2"]
    train.main()
    for name in ("trained", "given"):
        assert read_checkpoint(tmp_path / name / "last.pt")["step"] == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        (("-spm=TRAINED", "--tokenizer=word"), "bring a tokenizer: leave"),
        (("-spm=TRAINED", "--vocab_size=9"), "bring a tokenizer: leave"),
        (("--init_from=RUN",), "did not start from"),
        (("--tokenizer=char",), "with tokenizer=word, now it is char"),
        (("--val_path=CORPUS",), "with another corpus text: give -d and --val_path"),
    ],
)
def test_resuming_with_another_tokenizer_or_text_is_refused(
    flags, message, run, corpus, tmp_path, monkeypatch, capsys
):
    run(tmp_path / "run", "--max_steps=1")
    names = dict(TRAINED=tmp_path / "run" / "tokenizer.model", RUN=tmp_path / "run", CORPUS=corpus)
    for name, path in names.items():
        flags = [flag.replace(name, str(path)) for flag in flags]
    assert message in fails(command(corpus, tmp_path / "run", *flags), monkeypatch, capsys)


@pytest.mark.parametrize("wrong", ["-mdim=33", "--val_path=nowhere.txt", "--val_path=EMPTY"])
def test_wrong_sizes_and_missing_texts_are_refused_before_any_file_is_written(
    wrong, corpus, monkeypatch, capsys, tmp_path
):
    """If a tokenizer were left behind, the corrected command would fail."""
    (tmp_path / "empty.txt").write_text("\n")
    wrong = wrong.replace("EMPTY", str(tmp_path / "empty.txt"))
    error = fails(
        ["train.py", f"-d={corpus}", f"-mdir={tmp_path / 'run'}", wrong], monkeypatch, capsys
    )
    assert "33" in error or "nowhere" in error or "no text" in error
    assert [path.name for path in (tmp_path / "run").glob("*")] == ["training.lock"]


@pytest.mark.parametrize("broken", ["no matplotlib", "a folder has the picture's name"])
def test_training_continues_if_a_picture_cannot_be_drawn(
    broken, run, tmp_path, monkeypatch, capsys
):
    if broken == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    else:
        (tmp_path / "run" / "curves.png").mkdir(parents=True)
    run(tmp_path / "run")
    lines = [line for line in capsys.readouterr().err.splitlines() if "curves.png" in line]
    assert len(lines) == 1 and "no picture" in lines[0]
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 8


@pytest.mark.slow
def test_training_does_not_need_the_optional_packages(corpus, tmp_path):
    """It goes on without matplotlib, tensorboard and scipy."""
    missing = dict.fromkeys(["matplotlib", "tensorboard", "scipy"])
    argv = command(corpus, tmp_path / "run", "--max_steps=1")
    code = f"import sys\nsys.modules |= {missing}\nsys.argv = {argv!r}\n"
    code += "import train\ntrain.cli.run(train.main)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "best.pt").exists()


def test_few_calls_lie_between_the_training_step_and_the_loss(monkeypatch):
    """A reader passes HiddenToLoss.forward, loss_and_gradient and its weighted_sum."""
    import inspect

    _, _, state = tiny_setup()
    state.model.use(Form(fused=True))
    chains = []
    real = bfn.training_loss

    def spy(*anything):
        folders = ROOT, ROOT / "training"
        frames = [frame for frame in inspect.stack() if Path(frame.filename).parent in folders]
        chains.append([frame.function for frame in reversed(frames)])
        return real(*anything)

    monkeypatch.setattr(bfn, "training_loss", spy)
    train.accumulate_gradients(
        state.model, [batch_of(torch.randint(4, (2, 8)))], [0], torch.device("cpu")
    )
    assert chains == [["accumulate_gradients", "forward", "loss_and_gradient", "weighted_sum"]]


# ---------------------------------------------------------------- how long, how often, how large


def decided(run_dir):
    args = read_checkpoint(run_dir / "last.pt")["args"]
    return [
        args[name] for name in ("max_steps", "val_interval", "sample_interval", "save_interval")
    ]


def test_minutes_become_steps_by_the_measured_speed_and_a_resumed_run_keeps_them(
    run, tmp_path, monkeypatch
):
    """At 0.5 s per step 6 seconds are 12 steps, less 10 validations; they grow with minutes."""
    monkeypatch.setattr(forms, "warm_up", lambda *anything: 0.5)
    monkeypatch.setattr(evaluate, "validation_seconds", lambda *anything: 0.05)
    no_steps = [
        flag for flag in TINY if not flag.startswith(("--max_steps", "-vli", "-smi", "-svi"))
    ]
    monkeypatch.setattr(sys.modules[__name__], "TINY", no_steps)
    run(tmp_path / "run", "--minutes=0.1", "-nex=0")
    assert decided(tmp_path / "run") == [11, 2, 2, 2]
    monkeypatch.setattr(forms, "warm_up", lambda *anything: 0.001)
    run(tmp_path / "run", "--minutes=0.1", "-nex=0")  # finished: nothing is trained
    run(tmp_path / "run", "--minutes=0.2", "-nex=0")
    assert decided(tmp_path / "run") == [22, 2, 2, 2]


@pytest.mark.parametrize(
    "seconds, max_steps, val_seconds, often, val_tokens",
    [
        (0.1, 10_000, 1.0, 1000, 16_384),
        (2.0, 10_000, 1.0, 150, 16_384),  # every five minutes
        (0.1, 1000, 30.0, 250, 2048),  # 15 % of 118 seconds are too few for ten
        (0.1, 100_000, 60.0, 4000, 16_384),  # a validation of a minute after 6.7 minutes
    ],
)
def test_validations_happen_ten_times_a_run_or_every_five_minutes(
    seconds, max_steps, val_seconds, often, val_tokens
):
    """And take at most 15 % of the time: in a short run they see fewer tokens.

    Samples and saves happen as often.
    """
    args = train.flags().parse_args([f"--max_steps={max_steps}", "-smi=7"])
    run_folder.decide_steps(args, {}, 0, seconds, val_seconds)
    assert (args.val_interval, args.sample_interval, args.save_interval) == (often, 7, often)
    assert args.val_tokens == val_tokens
    again = train.flags().parse_args([f"--max_steps={max_steps}"])
    run_folder.decide_steps(again, vars(args), 0, 0.001, 7.0)  # another speed after a resume
    decisions = [
        (a.val_interval, a.sample_interval, a.save_interval, a.val_tokens) for a in (args, again)
    ]
    assert decisions[0] == decisions[1]


@pytest.mark.parametrize("flags", ["--epochs=3 --minutes=3", "--minutes=3 --max_steps=3"])
def test_two_flags_that_say_how_long_are_refused(flags):
    with pytest.raises(ValueError, match="give one of them"):
        train.complete(train.flags().parse_args(["-d=none", *flags.split()]))


def test_a_run_that_is_too_short_to_learn_says_so_at_its_start_and_end(run, tmp_path, capsys):
    run(tmp_path / "run", "-nex=0")
    said = [line for line in capsys.readouterr().out.splitlines() if "too few to learn" in line]
    assert len(said) == 2 and "8 steps" in said[0] and "--minutes" in said[1]


def test_the_preset_follows_the_device_and_a_resumed_run_keeps_its_sizes():
    parse = train.flags().parse_args
    for preset, width in (("base", 1024), ("laptop", 256)):
        args = train.complete(parse(["-d=none"]), preset=preset)
        assert (args.preset, args.model_dim) == (preset, width)
    saved = dict(args=dict(vars(args), init_from=None, tokenizer="bpe", vocab_size=9))
    again = train.complete(parse(["-d=none"]), saved, preset="base")
    assert (again.preset, again.model_dim) == ("laptop", 256)
    assert (
        train.complete(parse(["-d=none", "--preset=base"]), saved).model_dim == 1024
    )  # to be refused later


@pytest.mark.parametrize(
    "lengths, flags, expected",
    [
        ([5, 9, 60], [], (64, 32)),  # length of a row, rows of a batch
        ([5] * 9 + [10_000], [], (64, 32)),
        ([65] * 10, [], (128, 16)),
        ([10_000], [], (128, 16)),
        ([10_000], ["-slen=512"], (512, 4)),
        ([10_000], ["-bsz=3"], (128, 3)),
        ([10_000], ["-slen=4096"], (4096, 1)),
    ],
)
def test_rows_fit_nine_of_ten_examples_and_batches_have_equal_tokens(lengths, flags, expected):
    args = train.complete(train.flags().parse_args(["-d=none", *flags]), preset="laptop")
    train.fit_rows(args, Tokens(None, np.append(0, np.cumsum(lengths)), 1, 1, 0, "", None))
    assert (args.sequence_length, args.batch_size) == expected


@pytest.mark.slow
@pytest.mark.parametrize("named", [[], ["--preset=toy"]])
def test_a_resumed_run_keeps_rows_that_no_flag_names(run, tmp_path, monkeypatch, named):
    """Also if the preset is named, and for the built-in language, which names it."""
    sizes = ("-bsz", "-slen")
    monkeypatch.setattr(
        sys.modules[__name__], "TINY", [flag for flag in TINY if not flag.startswith(sizes)]
    )
    for max_steps in (1, 2):
        run(tmp_path / "run", *named, f"--max_steps={max_steps}")
    monkeypatch.setattr(
        sys,
        "argv",
        f"train.py -mdir={tmp_path / 'toy'} --max_steps=1 -mdim=32 -nl=1 -nh=2 -nex=0".split(),
    )
    monkeypatch.setattr(evaluate, "check_toy", lambda *inputs: [])
    for _ in range(2):
        train.main()
    for name, rows in (("run", (64, 16 if named else 32)), ("toy", (64, 16))):
        args = read_checkpoint(tmp_path / name / "last.pt")["args"]
        assert (args["sequence_length"], args["batch_size"]) == rows


def test_a_batch_of_padding_alone_is_trained_on(run, tmp_path):
    """An epoch of long documents has a row without tokens at its end."""
    text = tmp_path / "one.txt"
    text.write_text("the king sleeps " * 100)
    run(tmp_path / "run", f"-d={text}", "-bsz=1", "-slen=64", "--max_steps=40", "-vli=40")
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 40


def test_a_folder_in_which_another_process_trains_is_refused(run, tmp_path):
    """The lock ends with its process, so that a killed one leaves none behind."""
    held = run_folder.lock(tmp_path / "run")
    with pytest.raises(
        ValueError, match=rf"another process trains in .* \(pid {os.getpid()} on .+\)"
    ):
        run(tmp_path / "run", "--max_steps=1")
    held.close()
    run(tmp_path / "run", "--max_steps=1")


def test_where_nothing_can_be_locked_training_goes_on_and_says_so(
    run, tmp_path, monkeypatch, capsys
):
    no_locks = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=no_locks))
    run(tmp_path / "run", "--max_steps=1")
    error = capsys.readouterr().err
    assert f"{tmp_path / 'run'} cannot be locked (No locks available): going on" in error


def test_training_in_a_thread_of_a_notebook_ends_with_the_folder_free_for_the_next(
    corpus, tmp_path
):
    """Stopped or not, while the traceback is kept, as notebooks do."""
    words = command(corpus, tmp_path / "run", "--max_steps=1")[1:]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train.main, words).result()
    with pytest.raises(ValueError, match="trained with seed") as kept:
        train.main([*words, "--seed=3"])
    train.main(words)
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 1 and kept


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt", "curves.png", "report.html"])
def test_a_folder_with_files_of_these_names_is_left_alone(run, tmp_path, name):
    (tmp_path / name).write_text("the user's own\n")
    with pytest.raises(ValueError, match=f"has a {name} that is of no run"):
        run(tmp_path)
    assert (tmp_path / name).read_text() == "the user's own\n"


@pytest.mark.parametrize("flag", ["-d", "--val_path"])
def test_a_text_that_training_would_write_over_is_refused(run, corpus, tmp_path, flag):
    run(tmp_path / "run", "--max_steps=1")  # so that tokenizer.model exists
    text = tmp_path / "run" / "samples.txt"
    shutil.copyfile(corpus, text)
    with pytest.raises(ValueError, match="samples.txt is the name of a file that training writes"):
        run(tmp_path / "run", f"{flag}={text}")
    assert text.read_text() == corpus.read_text()


def test_a_run_on_a_folder_of_files_resumes_and_notices_a_change(run, corpus, tmp_path):
    """Also if it is given another way, with a pattern."""
    lines, folder = corpus.read_text().splitlines(), tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"body": line}) + "\n" for line in lines[:150])
    )
    (folder / "b.txt.gz").write_bytes(gzip.compress("\n".join(lines[150:]).encode()))
    run(tmp_path / "run", f"-d={folder}", "--text_field=body", "--max_steps=1")
    run(tmp_path / "run", f"-d={folder}/*", "--text_field=body", "--max_steps=2")
    saved = read_checkpoint(tmp_path / "run" / "last.pt")
    assert saved["step"] == 2 and sum(saved["lengths"]) == 293
    (folder / "c.txt").write_text("a further line\n")
    with pytest.raises(ValueError, match="trained with another corpus text"):
        run(tmp_path / "run", f"-d={folder}", "--text_field=body")
    with pytest.raises(ValueError, match="line 1 has no text in a field 'text'"):
        run(tmp_path / "run", f"-d={folder}")
    with pytest.raises(ValueError, match="run is the run folder, where training writes"):
        run(tmp_path / "run", f"-d={tmp_path / 'run'}")


def test_signals_that_are_ignored_stay_ignored():
    """As nohup does with SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with cli.catch_signals() as caught:
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.raise_signal(signal.SIGTERM)
        assert caught == [signal.SIGTERM]
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


@pytest.mark.parametrize("words", [["-mdir="], ["-spm", ""], ["--init_from="], ["-d=", "-ep=3"]])
def test_an_empty_value_is_refused(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as error:
        cli.run(train.main)
    assert (
        error.value.code == 2
        and f"{words[0].rstrip('=')} is empty: give a value" in capsys.readouterr().err
    )


def test_fine_tuning_takes_rows_and_averages_from_the_other_run(run, tmp_path, monkeypatch):
    run(tmp_path / "first", "--max_steps=1", "-ema=0.7")
    sizes = ("-bsz", "-slen", "-mdim", "-nl", "-nh")
    monkeypatch.setattr(
        sys.modules[__name__], "TINY", [flag for flag in TINY if not flag.startswith(sizes)]
    )
    run(tmp_path / "second", f"--init_from={tmp_path / 'first'}", "--max_steps=1")
    args = read_checkpoint(tmp_path / "second" / "last.pt")["args"]
    assert (args["batch_size"], args["sequence_length"], args["ema_rate"]) == (4, 32, [0.7])


def test_examples_of_several_lines_train_and_a_resumed_run_keeps_them(run, corpus, tmp_path):
    """Whether it has a token for line breaks or, after --init_from, spells them as a byte."""
    poems = corpus.with_name("poems.txt")
    poems.write_text(corpus.read_text().replace("\n", "\n\n").replace(" ", "\n"))
    for kind in ("word", "bpe"):
        flags = f"-d={poems}", f"--tokenizer={kind}", "--vocab_size=400"
        run(tmp_path / kind, *flags, "--example=paragraph", "--max_steps=4")
        run(tmp_path / kind, *flags)
        checkpoint = read_checkpoint(tmp_path / kind / "last.pt")
        assert checkpoint["step"] == 8 and checkpoint["args"]["example"] == "paragraph"
        samples = (
            (tmp_path / kind / "samples.txt").read_text().rstrip("\n").split("\n")
        )  # bytes of an untrained model may be other breaks
        assert len(samples) == 4 and r"\n" in samples[-1]
        with pytest.raises(ValueError, match="trained with example=paragraph, now it is line"):
            run(tmp_path / kind, *flags, "--example=line")
    run(tmp_path / "lines", "--tokenizer=bpe", "--vocab_size=400", "--max_steps=1")
    run(
        tmp_path / "tuned",
        f"-d={poems}",
        "--example=paragraph",
        f"--init_from={tmp_path / 'lines'}",
        "--max_steps=1",
    )


def test_a_tokenizer_that_does_not_keep_line_breaks_is_refused_before_anything_is_written(
    run, corpus, tmp_path
):
    """One that is trained on paragraphs of one line has none to keep, and is fine."""
    corpus.write_text(corpus.read_text().replace("\n", "\n\n"))
    flags = "--example=paragraph", "--max_steps=1"
    run(tmp_path / "words", "--tokenizer=word", *flags)
    with pytest.raises(
        ValueError, match="does not keep line breaks: leave -spm or --init_from out"
    ):
        run(tmp_path / "other", f"--init_from={tmp_path / 'words'}", *flags)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["training.lock"]
