"""A few rounds of crash.py, and that it sees what it looks for."""

import json
import re
import signal
import subprocess
import sys

import crash
import pytest
import torch
from untrained import record

from training.checkpoint import save_checkpoint

pytestmark = pytest.mark.slow  # each starts several processes


def test_interrupted_trainings_resume_to_the_same_result_bit_for_bit():
    """Each round is another phase and signal; `python tests/crash.py` does as many as you like."""
    argv = [sys.executable, "tests/crash.py", "--rounds=4", "--seed=4"]
    done = subprocess.run(argv, cwd=crash.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(map(int, re.findall(r"(\d+) \(0\)", done.stdout))) == 4


def test_ctrl_c_during_the_imports_ends_a_command_without_a_traceback(tmp_path):
    outcome = crash.interrupt_imports(tmp_path, 100, signal.SIGINT)
    assert (outcome.code, outcome.err) == (-signal.SIGINT, "")


@pytest.fixture
def folders(tmp_path):
    """Two folders, each with a run of step 3 in it. Both runs are the same."""
    for name in ("one", "other"):
        run_dir = tmp_path / name / "run"
        run_dir.mkdir(parents=True)
        for path in (run_dir / "last.pt", run_dir / "best.pt"):
            save_checkpoint(
                path,
                record([{"weight": torch.ones(2)}], step=3),
            )
        (run_dir / "metrics.jsonl").write_text(
            json.dumps(dict(step=3, loss=1.5, minutes=torch.rand(()).item())) + "\n"
        )
        for file in ("samples.txt", "tokenizer.model"):
            (run_dir / file).write_text("3\tthe king\n")
    return tmp_path / "one", tmp_path / "other"


def change_weight(run_dir):
    save_checkpoint(
        run_dir / "last.pt",
        record([{"weight": torch.zeros(2)}], step=3),
    )


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda run_dir: None, []),
        (change_weight, ["last.pt: emas"]),
        (lambda run_dir: (run_dir / "samples.txt").write_text("3\tthe\n"), ["samples.txt"]),
        (
            lambda run_dir: (run_dir / "metrics.jsonl").write_text('{"step": 3, "loss": 1.25}\n'),
            ["metrics.jsonl"],
        ),
        (lambda run_dir: (run_dir / "last.pt.tmp").write_text(""), ["last.pt.tmp was left"]),
    ],
)
def test_runs_that_differ_in_anything_but_their_speed_are_told_apart(folders, change, found):
    one, other = folders
    change(other / "run")
    assert crash.differences(one / "run", other / "run") == found


@pytest.mark.parametrize(
    "action, outcome, complaint",
    [
        ("kill -9", dict(code=-9), None),
        ("SIGTERM", dict(code=143, err="saved at step 3: run"), None),
        ("full disk", dict(code=2, err="train.py: error: no space left: /tmp/x\n"), None),
        ("kill -9", dict(code=-9, saved=4), "step 4 was saved, last.pt is of step 3"),
        (
            "SIGTERM",
            dict(code=143, err="saved at step 4: run"),
            "it says saved at step 4, last.pt is of step 3",
        ),
        ("SIGTERM", dict(code=1), "exit code 1 after SIGTERM"),
        ("Ctrl-C", dict(code=130, err="Traceback (most recent call last)"), "Traceback"),
        ("full disk", dict(code=2, err="train.py: error: no space left\n"), "names a file"),
        ("full disk", dict(code="hangs"), "hangs"),
    ],
)
def test_what_an_interruption_must_not_leave_is_a_complaint(folders, action, outcome, complaint):
    outcome = crash.Outcome(**{**dict(code=0, err="", reached=True, saved=3, counts={}), **outcome})
    found = crash.check_interrupted(outcome, action, folders[0])
    assert any(complaint in line for line in found) if complaint else not found


def test_a_damaged_checkpoint_is_a_complaint(folders):
    folder, outcome = folders[0], crash.Outcome(-9, "", True, 0, {})
    crash.break_checkpoint(folder / "run" / "last.pt", "empty checkpoint", None)
    assert "last.pt is damaged" in crash.check_interrupted(outcome, "kill -9", folder)[0]
