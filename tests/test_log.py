"""The logs of a run and the measurement of the device."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model import Config, Form
from text import cache
from training import log, speed


def test_logs_keep_every_line_that_is_whole_and_not_undone(tmp_path):
    path = tmp_path / "samples.txt"
    odd = "1\tone\u2028line\x0cwith\x85breaks\r"
    path.write_bytes(f"{odd}\n5\nno step\n2\ttwo\n3\tundone\n".encode() + b"\xff")
    log.drop_undone(path, lambda line: int(line.split(b"\t")[0]), 2)
    assert path.read_bytes() == f"{odd}\n2\ttwo\n".encode()
    nested = "[" * 100_000
    path.write_text(
        f'5\n[]\n{nested}\n{{"step": 1, "minutes": []}}\n{{"step": 1}}\n{{"step": 2, "loss": 2.5}}'
    )
    log.drop_undone(path, lambda line: log.parse_figures(line)["step"], 2)
    assert path.read_text() == '{"step": 1}\n'


def test_measuring_the_machine_draws_no_random_numbers():
    """Else the first step of a process would not be what it is in the middle of one."""
    speed.peak.cache_clear()
    torch.manual_seed(0)
    speed.peak(torch.device("cpu"), False)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


def write_metrics(folder, bounds):
    """A metrics.jsonl with a loss and a validation bound per step."""
    lines = [dict(step=i, loss=9.0 - i, minutes=0.1 * i) for i in range(1, len(bounds) + 1)]
    lines += [
        dict(step=i, val_bound_nats_per_token=bound) for i, bound in enumerate(bounds, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_overfitting_is_named_with_the_best_step_once_the_bound_has_risen_three_times_in_a_row(
    tmp_path,
):
    for bounds in ([], [3.0, 2.0, 2.1, 2.2], [3.0, 2.0, 2.1, 2.05, 2.2, 2.3]):
        write_metrics(tmp_path, bounds)
        assert log.overfitting_line(tmp_path) is None
    write_metrics(tmp_path, [3.0, 2.0, 2.1, 2.2, 2.3])
    assert "from step 2 (2.000" in log.overfitting_line(tmp_path)


def test_curves_are_drawn_from_a_runs_metrics(tmp_path):
    for bounds in ([], [3.0], [3.0, 2.0, 2.1]):
        write_metrics(tmp_path, bounds)
        log.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_text_that_the_tokenizer_or_the_training_knows_too_little_or_too_much_gets_a_line():
    offsets = np.array([0, 2, 4])
    training = cache.Tokens(np.array([1, 2, 3, 4]), offsets, 50, 100, 20, "", None)
    half_new = cache.Tokens(np.array([3, 4, 4, 4]), offsets, 50, 100, 0, "", None)
    unknown, known = log.text_warnings(training, half_new)
    assert "20.0% of the text" in unknown and known.startswith("50% of the validation examples")
    fine = cache.Tokens(np.array([1, 2, 3, 4]), offsets, 50, 100, 0, "", None)
    assert (
        log.text_warnings(fine, cache.Tokens(np.array([3, 5, 4, 4]), offsets, 50, 100, 0, "", None))
        == []
    )


def small_state():
    return SimpleNamespace(
        step=0, model=torch.nn.Linear(10, 25, bias=False), emas=[None]
    )  # 250 weights


def test_without_a_terminal_a_line_is_printed_every_half_minute(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    bar = log.Progress(small_state(), SimpleNamespace(max_steps=50, model_dir=".", keep=2))
    figures = dict(loss=3.0, tokens_per_s=1000.0, utilisation=0.5, peak_memory_gb=1.0, minutes=0.4)
    for now[0] in (110.0, 131.0, 140.0, 162.0):
        bar.show(int(now[0]) - 100, figures, 2.5)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split(",")[0] for line in lines] == [
        "step 31 of 50",
        "step 62 of 50",
    ] and "bound 2.500" in lines[0]


@pytest.mark.parametrize(
    "there, keep, n", [(0, 0, 3), (1, 0, 2), (1, 2, 4), (3, 2, 2), (4, 2, 1), (5, 0, 1)]
)
@pytest.mark.parametrize("missing, warned", [(1, 1), (0, 0)])
def test_a_disk_without_room_for_the_checkpoints_to_come_gets_one_warning(
    tmp_path, capsys, monkeypatch, there, keep, n, missing, warned
):
    """At most there are last.pt, best.pt, those of --keep, and one that is being written.

    Links count once.
    """
    (tmp_path / "older").mkdir()
    for path in [
        tmp_path / "last.pt",
        *(tmp_path / "older" / f"step-{step:010}.pt" for step in range(9)),
    ][:there]:
        path.write_text("")
    if there:
        os.link(tmp_path / "last.pt", tmp_path / "best.pt")
    monkeypatch.setattr(
        log.shutil, "disk_usage", lambda path: SimpleNamespace(free=4000 * n - missing)
    )
    bar = log.Progress(small_state(), SimpleNamespace(max_steps=50, model_dir=tmp_path, keep=keep))
    for step in (1, 2):
        bar.show(
            step,
            dict(loss=3.0, tokens_per_s=1000.0, utilisation=0.5, peak_memory_gb=1.0, minutes=0.4),
            None,
        )
    assert (
        capsys.readouterr().err.count(
            f"are free for {tmp_path}, {n} checkpoints to come take up to"
        )
        == warned
    )


def test_minutes_of_training_add_up_and_leave_out_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(speed, "peak", lambda device, bf16: 1e9)
    args = SimpleNamespace(accumulation_steps=1, batch_size=1, sequence_length=4)
    model = SimpleNamespace(
        config=Config(K=5, beta1=1.0, d_model=32, n_layers=1, n_heads=2), form=Form()
    )
    meter = log.Meter(model, args, torch.device("cpu"), minutes=2.0)
    batch = None, torch.tensor([[1, 1, 1, 0]]), None
    meter.add(1, torch.tensor(1.0), torch.tensor(1.0), [batch])
    now[0] = 30.0
    with meter.paused():
        now[0] = 90.0
    figures = meter.figures(1, 0.1)
    assert (figures["minutes"], figures["tokens_per_s"], figures["fill"]) == (2.5, 0.1, 0.75)


def test_given_tokens_cost_no_work_for_the_vocabulary():
    config = Config(K=1000, beta1=1.0, d_model=32, n_layers=1, n_heads=2)
    whole, half, none = (speed.model_flops(config, 64, share) for share in (1.0, 0.5, 0.0))
    assert whole - half == half - none == 5 * 1000 * 32
