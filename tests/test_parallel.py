"""Many processes: their number changes no result, and one that is stopped loses nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from test_train import TINY, assert_same_run
from untrained import make_run, run_command

import evaluate
import sample
import train
from common import parallel
from text import toy
from training.checkpoint import older_checkpoints, read_checkpoint

pytestmark = pytest.mark.slow  # each starts several processes

TRAIN = """
import os, sys
import train
from common import cli, parallel
real, parallel.BUCKET = train.update_weights, 1000  # several messages in a step

def update_weights(state, args):
    if (state.step, parallel.rank()) == (STEP, 1):
        os.kill(os.getpid(), SIGNAL)
    return real(state, args)

train.update_weights = update_weights
cli.run(train.main)
"""

SLOW_SAVES_AND_A_HUNG_PROCESS = """
import signal, time
from datetime import timedelta
import train
from common import cli, parallel
from training import checkpoint

real, parallel.STEP_TIMEOUT = checkpoint.save_checkpoint, timedelta(seconds=4)

def save_checkpoint(*inputs):
    time.sleep(8)
    real(*inputs)

checkpoint.save_checkpoint = save_checkpoint
update = train.update_weights

def update_weights(state, args):
    if (state.step, parallel.rank()) == (2, 1):
        # else torchrun waits 30 seconds before it kills this process
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(1000)
    return update(state, args)

train.update_weights = update_weights
cli.run(train.main)
"""

INTERRUPTED = """
import signal
import bfn, evaluate, model, sample
from common import cli, parallel
from evaluation import bounds
from sampling import generate

def interrupted(real, calls=[]):
    def run(*inputs):
        calls.append(0)
        if (len(calls), parallel.rank()) == (STOP, 1):
            signal.raise_signal(signal.SIGINT)
        return real(*inputs)

    return run
"""
EVALUATE = f"""{INTERRUPTED}
bounds.losses_at = interrupted(bounds.losses_at)
cli.run(evaluate.main)
"""
SAMPLE = f"""{INTERRUPTED}
generate.SORTED_BATCHES, model.BATCH_ELEMENTS["cpu"] = 1, 1  # batches of one text
bfn.sample = interrupted(bfn.sample)
cli.run(sample.main)
"""


def start(script, n_processes, *flags):
    """Run a script in one process, or in several by torchrun -> the finished process."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={n_processes}",
    ] * (n_processes > 1)
    environment = dict(
        OMP_NUM_THREADS="1", PYTHONPATH=str(train.__file__).removesuffix("/train.py")
    )
    command = [sys.executable, *torchrun, str(script), *flags]
    return subprocess.run(
        command,
        check=False,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def launch(tmp_path):
    """launch(run_dir, n_processes, *flags) -> the finished process. `stop` stops the second one."""
    (tmp_path / "corpus.txt").write_text(toy.corpus(300))

    def launch(run_dir, n_processes, *flags, stop=(0, -1)):
        script = tmp_path / f"train{n_processes}.py"
        script.write_text(TRAIN.replace("SIGNAL", str(int(stop[0]))).replace("STEP", str(stop[1])))
        words = [
            f"-d={tmp_path / 'corpus.txt'}",
            f"-mdir={run_dir}",
            f"--cache_dir={tmp_path / 'cache'}",
        ]
        words += [*TINY, "--tokenizer=word", *flags]
        return start(script, n_processes, *words)

    return launch


def test_a_run_stopped_on_two_processes_and_resumed_on_one_equals_a_whole_one_bit_for_bit(
    launch, tmp_path
):
    assert launch(tmp_path / "whole", 1, "-acc=2").returncode == 0
    stopped = launch(tmp_path / "parts", 2, stop=(signal.SIGTERM, 4))
    assert stopped.returncode != 0 and "Traceback" not in stopped.stdout, stopped.stderr
    assert (
        read_checkpoint(tmp_path / "parts" / "last.pt")["step"] == 5
    )  # all finished the step and one saved
    assert launch(tmp_path / "parts", 1).returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_if_one_process_is_killed_the_others_end_in_one_line_and_the_run_can_be_resumed(
    launch, tmp_path
):
    assert launch(tmp_path / "whole", 1, "-acc=2").returncode == 0
    start = time.perf_counter()
    killed = launch(tmp_path / "parts", 2, stop=(signal.SIGKILL, 6))
    assert killed.returncode != 0 and time.perf_counter() - start < 60
    assert "process 0: another process of this run has stopped" in killed.stderr
    assert "Run the same command again; training resumes" in killed.stderr
    assert launch(tmp_path / "parts", 2).returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_save_that_takes_longer_than_a_step_may_loses_no_process_but_one_that_hangs_ends_the_run(
    tmp_path,
):
    (tmp_path / "corpus.txt").write_text(toy.corpus(300))
    (tmp_path / "slow.py").write_text(SLOW_SAVES_AND_A_HUNG_PROCESS)
    flags = [
        f"-d={tmp_path / 'corpus.txt'}",
        f"-mdir={tmp_path / 'run'}",
        f"--cache_dir={tmp_path / 'cache'}",
        "--tokenizer=word",
    ]
    done = start(tmp_path / "slow.py", 2, *flags, *TINY, "-svi=2", "-vli=100", "--max_steps=9")
    assert (
        done.returncode != 0
        and "process 0: another process of this run has stopped, or does not answer" in done.stderr
    )
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2
    torchrun_kills_after = 30
    assert parallel.STEP_TIMEOUT.total_seconds() + torchrun_kills_after < 3 * 60


def test_micro_batches_that_cannot_be_shared_evenly_are_refused(launch, tmp_path):
    refused = launch(tmp_path / "run", 2, "-acc=3")
    assert refused.returncode != 0
    assert (
        "2 processes cannot share 3 micro-batches of a step evenly: give -acc=2 or a multiple"
        in refused.stderr
    )
    assert not (tmp_path / "run" / "tokenizer.model").exists()


# ---------------------------------------------------------------- evaluate.py


@pytest.fixture
def judge(tmp_path, monkeypatch, capsys):
    """judge(n_processes, *flags) -> figures of an untrained run. `stop` stops the second one."""
    run_dir = make_run(tmp_path / "run", "word", toy.corpus(60))
    (tmp_path / "text.txt").write_text(toy.corpus(40, seed=5))
    always = [
        f"-mdir={run_dir}",
        f"-d={tmp_path / 'text.txt'}",
        f"--cache_dir={tmp_path / 'cache'}",
        "--json",
        "-bsz=2",
    ]

    def judge(n_processes, *flags, stop=0):
        if n_processes == 1:
            monkeypatch.setattr(sys, "argv", ["evaluate.py", *always, *flags])
            evaluate.main()
            return json.loads(capsys.readouterr().out)
        script = tmp_path / "judge.py"
        script.write_text(EVALUATE.replace("STOP", str(stop)))
        done = start(script, n_processes, *always, *flags)
        assert done.stdout.count("\n") == 1 and (done.returncode == 0 or stop), done.stderr
        return json.loads(done.stdout)

    return judge


def test_two_processes_measure_the_figures_of_one(judge, tmp_path):
    flags = ["--draws=2", "--calls=4", "--order=left", "--samples=3"]
    flags.append(f"--corpus={tmp_path / 'text.txt'}")
    one, two = judge(1, *flags), judge(2, *flags)
    for name, values in one.pop("by_time").items():
        assert values == pytest.approx(two["by_time"].pop(name), rel=1e-5)
    assert two.pop("by_time") == {}
    assert one.pop("samples") == two.pop("samples")
    assert one == pytest.approx(two, rel=1e-5) and not two["partial"]


def test_after_an_interrupt_of_one_process_only_rows_that_all_have_read_are_counted(judge):
    """The second process stops after its second batch, the fourth of all, each of one row.

    The first one finishes its share.
    """
    stopped = judge(2, "--draws=3", stop=2)
    assert stopped["partial"] and stopped["n_draws"] == 1
    row_length = 32
    whole = judge(1, f"--max_tokens={5 * row_length}", "--draws=1")
    for name in ("n_tokens_scored", "bound_nats_per_token"):
        assert stopped[name] == pytest.approx(whole[name], rel=1e-5)


# ---------------------------------------------------------------- sample.py


def test_two_processes_print_and_write_the_texts_of_one(tmp_path, monkeypatch, capsys):
    """The last two texts are long, written in blocks.

    An interrupt comes in the second process's second text: one of each is there.
    """
    run_dir = make_run(tmp_path / "run", "word", toy.corpus(60))
    (tmp_path / "prompts.txt").write_text("___ zork the ___\nthe boat ___\nthe king\n")
    flags = [
        f"-mdir={run_dir}",
        f"--prompt_file={tmp_path / 'prompts.txt'}",
        "--num_samples=2",
        "--length=40",
        "--steps=3",
    ]
    one, warning, _ = run_command(
        sample.main, monkeypatch, capsys, *flags, f"--output={tmp_path / 'one'}"
    )
    script = tmp_path / "draw.py"
    for stop in (0, 2):
        script.write_text(SAMPLE.replace("STOP", str(stop)))
        done = start(script, 2, *flags, f"--output={tmp_path / f'two{stop}'}")
        n = 2 if stop else len(one)
        assert done.stdout.splitlines() == one[:n] and (done.returncode != 0) == bool(stop), (
            done.stderr
        )
        (written,) = tmp_path.glob(".two2.*.tmp" if stop else "two0")
        assert written.read_text().splitlines() == (tmp_path / "one").read_text().splitlines()[:n]
        assert done.stderr.count(warning) == 1 and "sample/s" not in done.stderr
    assert not (tmp_path / "two2").exists()


def test_many_processes_do_not_share_a_keyboard(tmp_path, monkeypatch, capsys):
    run_dir = make_run(tmp_path / "run", "word", toy.corpus(60))
    joined = partial(monkeypatch.setattr, parallel)
    monkeypatch.setattr(sample.parallel, "join", lambda device: joined("size", lambda: 2))
    _, error, code = run_command(
        sample.main, monkeypatch, capsys, f"-mdir={run_dir}", "--interactive"
    )
    assert code == 2 and "start it without torchrun" in error and error.count("\n") == 1


def test_more_processes_than_matrices_train_too(launch, tmp_path):
    done = launch(tmp_path / "run", 5, "-acc=5", "-nl=1", "-nex=0", "--max_steps=2")
    assert done.returncode == 0, done.stderr
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2


@pytest.mark.slow
def test_a_dry_run_of_two_processes_says_what_would_be_trained(launch, tmp_path):
    done = launch(tmp_path / "run", 2, "-acc=2", "--dry_run")
    assert done.returncode == 0 and "K = " in done.stdout, done.stderr
    assert not (tmp_path / "run").exists()


OTHER_FLAGS = """
import os, sys
import train
from common import cli

sys.argv += ["-lr=0.5"] * (os.environ["RANK"] == "1")
cli.run(train.main)
"""


def test_a_process_with_other_flags_ends_the_run(tmp_path):
    (tmp_path / "corpus.txt").write_text(toy.corpus(300))
    (tmp_path / "other.py").write_text(OTHER_FLAGS)
    flags = [f"-d={tmp_path / 'corpus.txt'}", f"-mdir={tmp_path / 'run'}", "--tokenizer=word"]
    done = start(tmp_path / "other.py", 2, *flags, f"--cache_dir={tmp_path}", *TINY)
    assert done.returncode != 0
    assert "process 1 has other code or flags than the first: start all alike" in done.stderr
    assert not (tmp_path / "run" / "last.pt").exists()


OTHER_FOLDER = """
import os, sys
import train
from common import cli
from training import run_folder

real, rank = train.plan, os.environ["RANK"]

def plan(*inputs):
    seconds = real(*inputs)
    print(rank, inputs[3].model_dir, inputs[3].max_steps, file=sys.stderr)
    return seconds

train.plan = plan
sys.argv += [f"-mdir={sys.argv.pop()}/run{rank}"]
cli.run(train.main)
"""


def test_each_process_keeps_its_own_path_of_the_folder_and_all_train_as_long(tmp_path):
    (tmp_path / "corpus.txt").write_text(toy.corpus(300))
    (tmp_path / "other.py").write_text(OTHER_FOLDER)
    (tmp_path / "run1").symlink_to("run0")  # as machines name a shared folder
    flags = [f"-d={tmp_path / 'corpus.txt'}", "--tokenizer=word", "-nex=0", *TINY]
    flags = [flag for flag in flags if "max_steps" not in flag]
    end = ["--minutes=0.02", f"--cache_dir={tmp_path}", str(tmp_path)]
    done = start(tmp_path / "other.py", 2, *flags, *end)
    found = dict(re.findall(r"^([01]) (.*/run[01] \d+)$", done.stderr, re.MULTILINE))
    steps = {value.split()[-1] for value in found.values()}
    assert len(steps) == 1 and all(f"/run{rank} " in found[rank] for rank in "01"), done.stderr


FORWARD = """
import torch
from torch.distributed.tensor import DTensor
from common import parallel
from model import BFNTransformer, Config
from training import shards

device = parallel.join("cpu")
model = BFNTransformer(Config(50, 0.1, 32, 2, 2))
shards.cut(model)
model(torch.full((1, 8, 50), 0.02), torch.zeros(1, 8))
cut = [isinstance(p, DTensor) for p in model.layer_matrices()]
print(all(cut), len(cut) > 2)
"""


def test_a_layer_in_shards_is_whole_only_while_it_computes(tmp_path):
    (tmp_path / "forward.py").write_text(FORWARD)
    done = start(tmp_path / "forward.py", 2)
    assert done.stdout.split() == ["True", "True"], done.stderr


SHARDED = "--shard", "-acc=4", "--max_steps=6"


def losses(run_dir):
    """The losses, gradient norms and bounds of a run, in order."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    keys = "loss", "grad_norm", "val_bound_nats_per_token"
    return [line[key] for line in lines for key in keys if key in line]


def test_layers_in_shards_train_as_whole_ones_and_resume_on_another_number_of_processes(
    launch, tmp_path
):
    """From two processes to one, and from one to two; each has several micro-batches."""
    assert launch(tmp_path / "whole", 1, *SHARDED).returncode == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "one")
    assert launch(tmp_path / "two", 2, *SHARDED, stop=(signal.SIGTERM, 2)).returncode != 0
    assert launch(tmp_path / "two", 1, *SHARDED).returncode == 0
    (tmp_path / "one" / "last.pt").unlink()
    shutil.copy(older_checkpoints(tmp_path / "one")[0], tmp_path / "one" / "last.pt")
    done = launch(tmp_path / "one", 2, *SHARDED, "--recompute")
    assert done.returncode == 0, done.stderr
    expected = losses(tmp_path / "whole")
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=1e-4)
    assert losses(tmp_path / "one") == pytest.approx(expected, rel=1e-4)
