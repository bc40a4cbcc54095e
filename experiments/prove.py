"""Prove a machine: tests, speed, processes, text, sampling and a short training, in one report.

    python -m experiments.prove --minutes=20
    python -m experiments.prove --quick

Uses the GPUs that it finds, or else the CPU; CUDA_VISIBLE_DEVICES chooses. Writes report.md and
pictures into --output, line by line, so that an interruption keeps what is done. A part that fails
is reported with the reason, and the next one follows; the exit code is then 1. The minutes are
shared out over the parts, and training, the last, gets what the others leave.

The cases of experiments/bench.py are measured each in its own process. Ratios are to the first
variant of a case with the same sizes. The last column compares floating-point operations per second
with those of a large matrix product on the same machine.
"""

import json
import math
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

import train
from common import cli, drawing, parallel
from experiments import bench
from experiments.tables import row, table
from text import toy
from training import log
from training.speed import allow_tf32, fast_bf16, peak

ROOT = Path(train.__file__).parent
TITLE = "# Proof of a machine"
TRAINING_SHARE = 0.5  # of a run's time; the rest is for starting and compiling
LEAST_SECONDS = 60  # that a command gets when the time is used up
GRACE_SECONDS = 60  # that a command gets to stop
ONE_GPU = "Not measured: two processes need two GPUs, and there is one."
SPEEDS = "case|sizes|variant|seconds|tokens/s|speed, ratio|memory, MB|ratio|share of matmul peak"
RUNS = "learning rate|steps|minutes|tokens/s|share of matmul peak|memory (GB)"
RUNS += "|bound (nats per token)|bits per character"
FULL = dict(
    forms=("plain", "fused, compiled", "plain, compiled"), vocabularies=(32_000, 8192, 27),
    n_sentences=50_000, rates=(1 / 3, 1, 3),  # times the preset's learning rate
)  # fmt: skip
GPU = dict(
    tests="test_cuda.py", repetitions=5, train="--preset=base",
    step=dict(n_tokens=65_536, width=1024, n_layers=8),
    sampling=dict(K=32_000, rows=64, width=1024, n_layers=8),
)  # fmt: skip
CPU = dict(
    tests="test_noise.py test_times.py test_optim.py test_model.py", repetitions=2,
    train="--preset=toy -lgi=5", step=dict(n_tokens=1024, width=256, n_layers=4),
    sampling=dict(K=8192, rows=16, width=256, n_layers=4),
)  # fmt: skip
QUICK = dict(
    forms=("plain", "fused"), vocabularies=(1000, 27), n_sentences=500, rates=(1, 3),
    tests="test_times.py", repetitions=2,
    train="--preset=toy -mdim=32 -nl=1 -nh=2 -bsz=4 -slen=64 -lgi=1 -vli=4 -nex=0 --max_steps=4",
    step=dict(n_tokens=128, width=32, n_layers=1),
    sampling=dict(K=100, rows=2, width=32, n_layers=1),
)  # fmt: skip
SIZES = {"cuda": FULL | GPU, "cpu": FULL | CPU, "quick": QUICK}


# ---------------------------------------------------------------- commands


def rest(args):
    """Seconds that a command may take at most."""
    return max(LEAST_SECONDS, args.deadline - time.monotonic())


def shown(command, **environment):
    """Write a command as one types it in the repository, as Markdown."""
    names = [f"{name}={value}" for name, value in environment.items()]
    words = shlex.join([*names, "python", *command[1:]])
    return f"    {words.replace(f'{ROOT}/', '')}"


def call(command, seconds, **environment):
    """Run a command for at most so many seconds -> what it printed.

    Raises ValueError if it fails; the last line says why.
    """
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    words = shlex.join(command)
    with subprocess.Popen(command, env=os.environ | environment, **streams) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise ValueError(f"{words}\nno result within {seconds:.0f} seconds") from None
        finally:
            if process.poll() is None:  # too late, or interrupted
                process.terminate()  # torchrun then stops its processes; a kill would leave them
                with suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=GRACE_SECONDS)
                process.kill()
    if process.returncode:
        last = output.splitlines()[-15:] + errors.splitlines()[-30:]
        raise ValueError("\n".join([f"exit code {process.returncode}: {words}", *last]))
    return output


def train_once(args, seconds, *flags, n_processes=1):
    """Train for about so many seconds -> command, what it printed, lines of metrics.jsonl.

    The first run trains the tokenizer of all.
    """
    run_dir, tokenizer = args.scratch / "run", args.scratch / "tokenizer.model"
    words = [f"-d={args.data_path}"] if args.data_path else []
    words += [f"-spm={tokenizer}"] if args.data_path and tokenizer.exists() else []
    words += [f"-mdir={run_dir}", f"--cache_dir={args.scratch / 'cache'}"]
    words += [f"--minutes={TRAINING_SHARE * seconds / 60:.3g}", *flags]
    command = [sys.executable, str(ROOT / "train.py"), *args.sizes["train"].split(), *words]
    if n_processes > 1:
        torchrun = "-m torch.distributed.run --standalone".split()
        command[1:1] = [*torchrun, f"--nproc_per_node={n_processes}"]
    threads = dict(OMP_NUM_THREADS=str(max(1, torch.get_num_threads() // n_processes)))
    shutil.rmtree(run_dir, ignore_errors=True)  # of the run before: it may take gigabytes
    output = call(command, rest(args), **threads)
    shutil.copy(run_dir / "tokenizer.model", tokenizer)
    return shown(command, **threads), output, log.read_metrics(run_dir)


def typical(metrics, name):
    """Take the median of a figure over the log lines of a run, without the first: it warms up."""
    values = [line[name] for line in metrics if name in line]
    return statistics.median(values[1:] or values)


# ---------------------------------------------------------------- measurements


def peak_of(device):
    """Measure the floating-point operations per second of products in the run's dtype."""
    return peak(device, fast_bf16(device))


def bench_command(job, args):
    """List the words of the command that measures a job of bench.py."""
    words = [json.dumps(job), str(args.sizes["repetitions"]), str(args.device)]
    return [sys.executable, "-m", "experiments.bench", *words]


def measure_in_process(job, args):
    """Measure a job of bench.py in a new process -> its figures, or {"failed": the reason}."""
    try:
        return json.loads(call(bench_command(job, args), rest(args)).splitlines()[-1])
    except ValueError as error:
        return dict(failed=str(error).splitlines()[-1])


def measure(job, args, until):
    """Measure a job of bench.py -> its case, variant, sizes and figures.

    Where the memory is too small, half as many tokens are tried.
    """
    case, variant, sizes = job
    figures = dict(failed="no time left: give more --minutes")
    while time.monotonic() < until:
        if args.quick:  # starting a process would take longer than measuring
            n = args.sizes["repetitions"]
            figures = bench.CASES[case](args.device, n, variant, **sizes)
        else:
            figures = measure_in_process((case, variant, sizes), args)
        if "out of memory" not in figures.get("failed", "") or sizes.get("n_tokens", 0) < 2048:
            break
        sizes = sizes | dict(n_tokens=sizes["n_tokens"] // 2)
    return dict(case=case, variant=variant, sizes=sizes, **figures)


def measure_all(jobs, args, seconds):
    """Measure jobs; none begins after so many seconds -> results, lines with their table."""
    until = time.monotonic() + seconds
    results = [measure(job, args, until) for job in tqdm(jobs, leave=False, disable=None)]
    first = shown(bench_command(jobs[0], args))
    lines = summarise(results, peak_of(args.device))
    return results, ["One command a line; the first:", "", first, "", *lines, ""]


def summarise(results, most):
    """Lay out results, with ratios to the first variant of a case and sizes -> Markdown lines.

    most: floating-point operations per second of a matrix product.
    """
    rows, first = [], {}
    for r in results:
        sizes = ", ".join(f"{name} {value:,}" for name, value in r["sizes"].items())
        reference = first.setdefault((r["case"], sizes), r)
        cells = [r["failed"], *[""] * 5] if "failed" in r else figure_cells(r, reference, most)
        rows.append([r["case"], sizes, r["variant"], *cells])
    return table(SPEEDS.split("|"), rows)


def figure_cells(r, reference, most):
    """Write the figures of a result, and their ratios to those of another -> six cells."""
    faster = f"{reference['seconds'] / r['seconds']:.2f}" if "seconds" in reference else ""
    memory = reference.get("memory_mb")
    smaller = f"{r['memory_mb'] / memory:.2f}" if memory else ""
    share = f"{r['flops_per_s'] / most:.0%}" if r["flops_per_s"] else ""
    times = [f"{r['seconds']:.3g}", f"{r['tokens_per_s']:,.0f}", faster]
    return [*times, f"{r['memory_mb']:,.0f}", smaller, share]


def check(results):
    """Raise ValueError if a measurement has failed."""
    reasons = Counter(r["failed"] for r in results if "failed" in r)
    if reasons:
        of_all = f"of {len(results)} measurements"
        raise ValueError("\n".join(f"{n} {of_all}: {why}" for why, n in reasons.items()))


# ---------------------------------------------------------------- parts: each yields its lines


def machine(args, _seconds):
    """Name device, versions and commit, and measure large matrix products."""
    cpu = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name") or platform.machine()
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield f"- CPU: {cpu}, {threads}; {platform.platform()}"
    for i in range(torch.cuda.device_count() if args.device.type == "cuda" else 0):
        memory = torch.cuda.get_device_properties(i).total_memory
        yield f"- GPU {i}: {torch.cuda.get_device_name(i)}, {memory / 1e9:.1f} GB"
    requirements = (ROOT / "requirements.txt").read_text().split("\n")
    names = [line.split("==")[0] for line in requirements if "==" in line]
    libraries = ", ".join(f"{name} {version(name)}" for name in names)
    cuda = torch.version.cuda or torch.version.hip or "none"
    yield f"- Python {platform.python_version()}, CUDA {cuda}, {libraries}"
    commit = ""
    if shutil.which("git") and (ROOT / ".git").exists():
        words = ["git", "-C", str(ROOT), *"describe --always --dirty --exclude=*".split()]
        commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    yield f"- commit {commit or 'unknown'}, {time.strftime('%Y-%m-%d %H:%M')}"
    yield f"- matrix multiplication: {peak_of(args.device) / 1e9:,.0f} GFLOP/s on {args.device}"


def tests(args, _seconds):
    """Run the tests for this device."""
    environment = dict(BFN_TEST_CUDA="1") if args.device.type == "cuda" else {}
    files = [str(ROOT / "tests" / name) for name in args.sizes["tests"].split()]
    command = [sys.executable, *"-m pytest -q -p no:cacheprovider".split(), *files]
    yield from (shown(command, **environment), "")
    summary = call(command, rest(args), **environment).splitlines()[-1]
    yield summary
    if "passed" not in summary:
        raise ValueError("no test has passed")


def speed(args, seconds):
    """Measure a step, and its input and loss only, for each vocabulary."""
    sizes, measured = args.sizes, []
    share = seconds / len(sizes["vocabularies"])
    for K in sizes["vocabularies"]:
        step = sizes["step"] | dict(K=K)
        operations = {name: size for name, size in step.items() if name != "n_layers"}
        jobs = [("step", form, step) for form in sizes["forms"]]
        jobs += [("operations", form, operations) for form in sizes["forms"]]
        results, lines = measure_all(jobs, args, share)
        yield from (f"### K = {K:,}", "", *lines)
        plain, best = results[:2]
        if not measured and "failed" not in plain | best:
            faster = best["tokens_per_s"] / plain["tokens_per_s"]
            share_of_peak = best["flops_per_s"] / peak_of(args.device)
            yield f"A step, {best['variant']}: {faster:.2f} times the tokens/s of plain,"
            yield f"{share_of_peak:.0%} of the matrix-multiplication peak.\n"
        measured += results
    check(measured)


def processes(args, seconds):
    """Compare one process with many that share the micro-batches of a step."""
    n_gpus = torch.cuda.device_count() if args.device.type == "cuda" else 2
    if n_gpus < 2:
        yield ONE_GPU
        return
    counts, speeds = sorted({1, 2, n_gpus}), {}
    for n in counts:
        flags = f"-acc={math.lcm(*counts)}", "-nex=0"
        words, _, metrics = train_once(args, seconds / len(counts), *flags, n_processes=n)
        speeds[n] = typical(metrics, "tokens_per_s")
        yield words
    rows = [[f"{n}", f"{value:,.0f}", f"{value / speeds[1]:.2f}"] for n, value in speeds.items()]
    yield from ("", *table(["processes", "tokens/s", "ratio"], rows))


def text_and_samples(args, seconds):
    """Measure tokenising and loading the built-in language, and sampling without training."""
    n, sizes = args.sizes["n_sentences"], args.sizes["sampling"]
    jobs = [("text", variant, dict(n_sentences=n)) for variant in ("tokenise", "load")]
    jobs += [("sampling", sampler, sizes) for sampler in ("pace 10", "pace 32")]
    results, lines = measure_all(jobs, args, seconds)
    yield from lines
    check(results)
    lines_per_s = 4 * n / results[0]["seconds"]  # bench.text repeats the sentences four times
    mb_per_s = lines_per_s * len(toy.corpus(1000)) / 1e9
    yield f"- tokenised per second: {lines_per_s:,.0f} lines, {mb_per_s:.1f} MB"
    for r in results[2:]:
        yield f"- {r['variant']} calls: {sizes['rows'] / r['seconds']:,.1f} samples per second"


def training(args, seconds):
    """Train at several learning rates, as many steps each."""
    preset = args.sizes["train"].split()[0].removeprefix("--preset=")
    share = seconds / len(args.sizes["rates"])
    n_steps, series, best = [], {}, (math.inf, "")
    for factor in args.sizes["rates"]:
        rate = f"{train.PRESETS[preset][3] * factor:.3g}"
        words, output, metrics = train_once(args, share, f"-lr={rate}", *n_steps)
        if not series:
            yield from (words, "", *table(RUNS.split("|"), []))
        logged = [m for m in metrics if "loss" in m]
        validated = [m for m in metrics if "val_bits_per_char" in m]
        last, lowest = logged[-1], min(validated, key=lambda m: m["val_bound_nats_per_token"])
        bound, bits = lowest["val_bound_nats_per_token"], lowest["val_bits_per_char"]
        speed, share_of_peak = (typical(logged, name) for name in ("tokens_per_s", "utilisation"))
        cells = [rate, f"{last['step']:,}", f"{last['minutes']:.2f}", f"{speed:,.0f}"]
        cells += [f"{share_of_peak:.0%}", f"{last['peak_memory_gb']:.1f}"]
        yield row([*cells, f"{bound:.3f}", f"{bits:.3f}"])
        best = min(best, (bound, output))
        n_steps = [f"--max_steps={last['step']}"]
        series[rate] = [m["step"] for m in logged], [m["loss"] for m in logged]
    axes = "step", "loss, nats per token", "learning rates"
    if drawing.lines(args.folder / "loss.png", series, *axes):
        yield "\n![loss](loss.png)"
    yield from ("", "The run of the lowest bound printed:", "")
    yield from (f"    {line}" for line in best[1].splitlines())


# and their share of the time
PARTS = {machine: 0.1, tests: 2, speed: 12, processes: 2, text_and_samples: 2, training: 4}


# ---------------------------------------------------------------- the command


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("--minutes", type=cli.positive, default=20, help="minutes for everything (20)")
    add("-d", "--data_path", type=cli.path, help="text file to train on (the built-in language)")
    add("--output", type=cli.path, default="runs/prove",
        help="folder for the report and its pictures (runs/prove)")
    add("--quick", action="store_true", help="tiny sizes, in about a minute: does all of it work?")
    return p


def open_report(folder):
    """Begin a new report -> the file. Raises ValueError if the folder holds something else."""
    path = folder / "report.md"
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (path.exists() and path.read_text().startswith(TITLE)):
        message = f"{folder} holds other files than a report of this command"
        raise ValueError(f"{message}: give another --output")
    return open(path, "w", buffering=1, encoding="utf-8")


def prove(args, write):
    """Do all parts and write their lines -> names of those that failed."""
    failed, todo = [], dict(PARTS)
    for part, share in tqdm(PARTS.items(), unit="part", leave=False, disable=None):
        started = time.monotonic()
        seconds = (args.deadline - started) * share / sum(todo.values())
        write(f"\n## {part.__name__.capitalize().replace('_', ' ')}\n\n{part.__doc__}\n")
        try:
            if seconds <= 0:
                raise ValueError("no time left: give more --minutes")
            for line in part(args, seconds):
                write(line)
        except KeyboardInterrupt:
            write("\n**Interrupted.**")
            raise
        except Exception as error:  # noqa: BLE001 - the other parts must follow
            failed.append(part.__name__)
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            reason = [f"    {line}" for line in f"{kind}{error}".splitlines()]
            write("\n".join(["", "**Failed:**", "", *reason]))
        write(f"\n({time.monotonic() - started:.0f} seconds)")
        del todo[part]
    return failed


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    args = flags().parse_args(words)
    if args.data_path and not os.path.isfile(args.data_path):
        raise ValueError(f"no text file at {args.data_path}")
    begin = time.monotonic()
    args.device, args.folder = parallel.find_device("auto"), Path(args.output)
    allow_tf32(args.device)
    args.sizes = SIZES["quick" if args.quick else args.device.type]
    args.deadline = begin + 60 * args.minutes
    report = open_report(args.folder)
    scratch = tempfile.TemporaryDirectory(dir=args.folder, prefix="runs-")
    with report, scratch as folder:
        args.scratch = Path(folder)
        if args.quick and not args.data_path:  # judging the built-in language takes more time
            args.data_path = args.scratch / "corpus.txt"
            args.data_path.write_text(toy.corpus(500))

        def write(line):
            print(line, file=report)
            tqdm.write(line)

        write(f"{TITLE}\n\n    {shlex.join(['python', '-m', 'experiments.prove', *words])}")
        failed = prove(args, write)
        result = f"failed: {', '.join(failed)}" if failed else "all parts passed"
        write(f"\n## Result\n\n{result}, {(time.monotonic() - begin) / 60:.1f} minutes")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it stops other processes too
    cli.run(main)
