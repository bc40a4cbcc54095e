"""The logs of a run and the measurement of the device."""

import json

import torch

import log


def test_logs_keep_every_line_that_is_whole_and_not_undone(tmp_path):
    path = tmp_path / "samples.txt"
    odd = "1\tone\u2028line\x0cwith\x85breaks\r"
    path.write_bytes(f"{odd}\n5\nno step\n2\ttwo\n3\tundone\n".encode() + b"\xff")
    log.drop_undone(path, lambda line: int(line.split(b"\t")[0]), 2)
    assert path.read_bytes() == f"{odd}\n2\ttwo\n".encode()
    path.write_text('5\n[]\n{"step": 1}\n{"step": 2')
    log.drop_undone(path, lambda line: json.loads(line)["step"], 2)
    assert path.read_text() == '{"step": 1}\n'


def test_measuring_the_machine_draws_no_random_numbers():
    """Else the first step of a process would not be what it is in the middle of one."""
    log.matmul_peak.cache_clear()
    torch.manual_seed(0)
    log.peak(torch.device("cpu"))
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))
