"""The proof of a machine: all of it runs on a CPU, and what fails or is missing is reported."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from experiments import prove


@pytest.fixture
def args(tmp_path):
    """What the parts are given, with the sizes of --quick."""
    sizes, device = prove.SIZES["quick"], torch.device("cpu")
    return SimpleNamespace(
        sizes=sizes, device=device, preset="toy", deadline=time.monotonic() + 600, folder=tmp_path,
        scratch=tmp_path, quick=True, data_path=None, n_processes=1,
    )  # fmt: skip


@pytest.mark.slow
def test_the_quick_proof_writes_every_part_of_the_report(tmp_path):
    words = ["-m", "experiments.prove", "--quick", f"--output={tmp_path / 'proof'}"]
    command = [sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = (tmp_path / "proof" / "report.md").read_text()
    assert done.returncode == 0, report + done.stderr
    assert done.stdout.strip() == report.strip() and "all parts passed" in report
    parts = [part.__name__.capitalize() for part in (*prove.PARTS, prove.processes)]
    places = [report.index(f"\n## {name}\n") for name in [*parts, "Result"]]
    assert places == sorted(places)
    names = {path.name for path in (tmp_path / "proof").iterdir()}
    assert names == {"report.md", "loss.png"} and "](loss.png)" in report


def test_a_part_that_fails_is_reported_and_the_next_one_follows(args, monkeypatch):
    def broken(args):
        """Break."""
        yield "a first line"
        raise RuntimeError("something is wrong")

    def good(args):
        """Work."""
        yield "a second line"

    monkeypatch.setattr(prove, "PARTS", (broken, good))
    lines = []
    assert prove.prove(args, lines.append) == ["broken"]
    report = "\n".join(lines)
    reason = report.index("    RuntimeError: something is wrong")
    assert report.index("a first line") < reason < report.index("a second line")


def test_no_part_begins_after_the_last_minute(args):
    args.deadline, lines = time.monotonic(), []
    assert prove.prove(args, lines.append) == [part.__name__ for part in prove.PARTS]
    assert sum("no time left: give more --minutes" in line for line in lines) == len(prove.PARTS)


def test_a_form_with_other_numbers_fails_the_proof_of_equality(args, monkeypatch):
    monkeypatch.setattr(prove.forms, "wanted_form", lambda *_: prove.Form())
    monkeypatch.setattr(prove.Form, "_replace", lambda form, **_: form)  # nothing is compiled
    lines = list(prove.equality(args))
    assert len(lines) == 2 and all("loss off by" in line for line in lines)
    right = prove.fused.loss_and_gradient
    wrong = lambda *inputs: tuple(1.2 * x for x in right(*inputs))
    monkeypatch.setattr(prove.fused, "loss_and_gradient", wrong)
    with pytest.raises(ValueError, match="^wrong numbers: fused$"):
        list(prove.equality(args))


def test_the_step_trains_as_a_run_does_and_says_where_time_and_memory_go(args):
    report = "\n".join(prove.step(args))
    for words in ("tokens/s", "of the measured peak", "GB at most, estimated", "Muon", "Self CPU"):
        assert words in report


def test_the_batches_have_given_hidden_and_other_words():
    ids, segment_ids, seen = prove.make_batch(100, rows=8, row_length=64)
    assert ids.shape == segment_ids.shape == seen.shape == (8, 64) and ids.max() < 100
    assert len(seen.unique()) > 2 and (segment_ids.diff() >= 0).all()


def test_bfloat16_is_compared_with_float32_where_texts_are_sampled(args):
    lines = list(prove.sampling(args))
    assert len(lines) == 2 and "100.0% of likeliest tokens agree" in lines[0]


@pytest.mark.parametrize("n_seconds, n_trained", [(600, 3), (200, 2), (150, 2), (60, 1)])
def test_training_ends_in_time_whatever_a_run_needs_besides(
    args, monkeypatch, n_seconds, n_trained
):
    clock, others = [0.0], iter([50, 40, 40])

    def train(words):
        minutes = next(float(w.split("=")[1]) for w in words if w.startswith("--minutes="))
        clock[0] += 60 * minutes + next(others)

    logged = dict(loss=1.0, step=1, tokens_per_s=1.0, utilisation=0.5)
    validated = dict(val_bound_nats_per_token=1.0, val_bits_per_char=1.0)
    monkeypatch.setattr(prove, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(prove.train, "main", train)
    monkeypatch.setattr(prove.log, "read_metrics", lambda folder: [logged, validated])
    args.quick, args.deadline = False, n_seconds
    args.sizes = args.sizes | dict(rates=(1, 3, 1 / 3))
    report = "\n".join(prove.training(args))
    assert report.count("| 1 | 50% |") == n_trained
    assert report.count("No time left for the rate") == 3 - n_trained
    assert clock[0] <= n_seconds + 50 / 2  # the first run cannot know what it needs besides


def test_gpus_are_named(args, monkeypatch):
    properties = SimpleNamespace(total_memory=8e9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"name {i}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    args.device = SimpleNamespace(type="cuda")
    lines = prove.machine(args)
    assert [next(lines) for _ in range(3)][2] == "- GPU 1: name 1, 8.0 GB"


def test_a_folder_with_other_files_is_refused_and_an_old_report_is_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="give another --output"):
        prove.open_report(tmp_path)
    (tmp_path / "report.md").write_text(prove.TITLE + "\nold")
    prove.open_report(tmp_path).close()
    assert (tmp_path / "report.md").read_text() == ""
    assert (tmp_path / "mine.txt").read_text() == "mine"
