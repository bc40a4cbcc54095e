"""The proof of a machine: all of it runs on a CPU, and what fails or is missing is reported."""

import inspect
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from experiments import bench, prove

FORMS = "plain", "plain, compiled", "fused", "fused, compiled"
PASSED = dict(seconds=0.5, tokens_per_s=100.0, memory_mb=1.0, flops_per_s=1e9)


@pytest.fixture
def measure_in_process():
    """The true one, which `args` replaces."""
    return prove.measure_in_process


@pytest.fixture
def args(tmp_path, monkeypatch, measure_in_process):
    """What the parts are given, on a machine with GPUs; nothing is measured."""
    monkeypatch.setattr(prove, "peak_of", lambda device: 1e10)
    monkeypatch.setattr(prove, "measure_in_process", lambda *job: dict(PASSED))
    sizes, device, deadline = prove.SIZES["cuda"], torch.device("cuda"), time.monotonic() + 600
    return SimpleNamespace(
        sizes=sizes,
        device=device,
        deadline=deadline,
        folder=tmp_path,
        scratch=tmp_path,
        quick=False,
    )


@pytest.mark.slow
def test_the_quick_proof_writes_every_part_of_the_report(tmp_path):
    words = ["-m", "experiments.prove", "--quick", f"--output={tmp_path / 'proof'}"]
    command = [sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = (tmp_path / "proof" / "report.md").read_text()
    assert done.returncode == 0, report + done.stderr
    assert done.stdout.strip() == report.strip() and "all parts passed" in report
    for part in (
        "Machine",
        "Tests",
        "Speed",
        "Processes",
        "Text and samples",
        "Training",
        "Result",
    ):
        assert f"\n## {part}\n" in report
    assert report.count("| step |") == report.count("| operations | ") == 4
    names = {path.name for path in (tmp_path / "proof").iterdir()}
    assert names == {"report.md", "loss.png"} and "](loss.png)" in report


def test_a_part_that_fails_is_reported_and_the_next_one_follows(args, monkeypatch):
    def broken(args, seconds):
        """Break."""
        yield "a first line"
        raise RuntimeError("something is wrong")

    def good(args, seconds):
        """Work."""
        yield f"a second line, {seconds:.0f}"

    monkeypatch.setattr(prove, "PARTS", {broken: 1, good: 3})
    lines = []
    assert prove.prove(args, lines.append) == ["broken"]
    report = "\n".join(lines)
    assert (
        report.index("a first line")
        < report.index("    RuntimeError: something is wrong")
        < report.index("a second line, 600")
    )


def test_no_part_begins_after_the_last_minute(args):
    args.deadline, lines = time.monotonic(), []
    assert prove.prove(args, lines.append) == [part.__name__ for part in prove.PARTS]
    assert sum("no time left: give more --minutes" in line for line in lines) == len(prove.PARTS)


def test_every_measurement_is_one_that_the_benchmark_knows(args, monkeypatch):
    jobs = []
    monkeypatch.setattr(
        prove,
        "measure",
        lambda job, *_: (
            jobs.append(job) or dict(case=job[0], variant=job[1], sizes=job[2], **PASSED)
        ),
    )
    for sizes in prove.SIZES.values():
        args.sizes = sizes
        report = "\n".join([*prove.speed(args, 60), *prove.text_and_samples(args, 60)])
        assert (
            "1.00 times the tokens/s of plain" in report
            and "10% of the matrix-multiplication peak" in report
        )
    for case, variant, sizes in jobs:
        inspect.signature(bench.CASES[case]).bind(args.device, 2, variant, **sizes)
        assert case not in ("operations", "step") or variant in FORMS
    assert {case for case, _, _ in jobs} == set(bench.CASES)


def test_a_measurement_that_needs_too_much_memory_is_repeated_with_half_the_tokens(
    args, monkeypatch
):
    def measure(job, args):
        return dict(failed="error: out of memory") if job[2]["n_tokens"] > 20_000 else dict(PASSED)

    monkeypatch.setattr(prove, "measure_in_process", measure)
    result = prove.measure(
        ("step", "plain", dict(n_tokens=65_536)), args, until=time.monotonic() + 60
    )
    assert result["sizes"] == dict(n_tokens=16_384) and result["seconds"] == 0.5


def test_a_measurement_that_fails_is_in_the_table_and_fails_the_part(args, monkeypatch):
    monkeypatch.setattr(prove, "measure_in_process", lambda *job: dict(failed="no compiler"))
    lines = []
    with pytest.raises(ValueError, match="18 of 18 measurements: no compiler"):
        for line in prove.speed(args, 60):
            lines.append(line)  # noqa: PERF402 - also those before the error
    assert sum("| no compiler |" in line for line in lines) == 18


@pytest.mark.parametrize(
    "n_gpus, expected",
    [(1, []), (2, [(1, "-acc=2"), (2, "-acc=2")]), (3, [(n, "-acc=6") for n in (1, 2, 3)])],
)
def test_as_many_processes_as_gpus_share_the_same_step(args, monkeypatch, n_gpus, expected):
    started = []

    def train_once(args, seconds, *flags, n_processes):
        started.append((n_processes, flags[0]))
        return "command", "", [dict(tokens_per_s=1.0), dict(tokens_per_s=100.0 * n_processes)]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(prove, "train_once", train_once)
    lines = list(prove.processes(args, 60))
    assert started == expected
    assert lines[-1] == (
        f"| {n_gpus} | {100 * n_gpus} | {n_gpus}.00 |" if expected else prove.ONE_GPU
    )


def test_gpus_are_named_and_their_tests_run_on_them(args, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"name {i}")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=8e9)
    )
    report = "\n".join(prove.machine(args, 60))
    assert "GPU 1: name 1, 8.0 GB" in report and "10 GFLOP/s on cuda" in report
    monkeypatch.setattr(
        prove, "call", lambda command, seconds, **environment: f"{environment}\n17 skipped"
    )
    lines = prove.tests(args, 60)
    assert (
        next(lines).startswith("    BFN_TEST_CUDA=1 python -m pytest -q")
        and list(zip(range(2), lines))[1][1] == "17 skipped"
    )
    with pytest.raises(ValueError, match="no test has passed"):
        next(lines)


def test_a_command_that_fails_or_hangs_is_a_value_error_and_leaves_no_process(
    args, monkeypatch, measure_in_process
):
    with pytest.raises(ValueError, match="exit code 3: .*\nthe reason"):
        prove.call([sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)"], 60)
    begin = time.monotonic()
    with pytest.raises(ValueError, match="no result within 1 seconds"):
        prove.call([sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert time.monotonic() - begin < 30
    monkeypatch.setattr(prove, "rest", lambda args: 0.01)
    figures = measure_in_process(("step", "plain", {}), args)
    assert "no result within 0 seconds" in figures["failed"]


def test_a_folder_with_other_files_is_refused_and_an_old_report_is_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="give another --output"):
        prove.open_report(tmp_path)
    (tmp_path / "report.md").write_text(prove.TITLE + "\nold")
    prove.open_report(tmp_path).close()
    assert (tmp_path / "report.md").read_text() == "" and (
        tmp_path / "mine.txt"
    ).read_text() == "mine"


def test_a_job_is_measured_in_a_process_of_a_module_started_from_the_top(args, measure_in_process):
    args.device, args.sizes = torch.device("cpu"), prove.QUICK
    job = "text", "load", dict(n_sentences=300)
    words = prove.bench_command(job, args)
    assert words[1:3] == ["-m", "experiments.bench"]
    assert prove.shown(words).startswith("    python -m experiments.bench '[")
    assert measure_in_process(job, args)["tokens_per_s"] > 0
