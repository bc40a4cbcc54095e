"""Prove a machine: tests, speed, many processes, text, sampling and a short training, in one report.

    python -m experiments.prove --minutes=20
    python -m experiments.prove --quick

Uses the GPUs that it finds, or else the CPU; CUDA_VISIBLE_DEVICES chooses. Writes report.md and pictures into --output, line
by line, so that an interruption keeps what is done. A part that fails is reported with the reason, and the next one follows;
the exit code is then 1. The minutes are shared out over the parts, and training, the last, gets what the others leave.
"""

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
from text import toy
from training import log, speed

ROOT = Path(__file__).resolve().parent.parent




TITLE = "# Proof of a machine"
TRAINING_SHARE = 0.5  # of a run's time; the rest is for starting and compiling
LEAST_SECONDS, GRACE_SECONDS = 60, 60  # that a command gets when the time is used up; that it gets to stop
ONE_GPU = "Not measured: two processes need two GPUs, and there is one."
FULL = dict(
    forms=("plain", "fused, compiled", "plain, compiled"), baselines=bench.BASELINES, vocabularies=(32_000, 8192, 27),
    n_sentences=50_000, rates=(1 / 3, 1, 3),  # times the preset's learning rate
)  # fmt: skip
SIZES = {
    "cuda": FULL | dict(
        tests="test_cuda.py", repetitions=5, train="--preset=base",
        step=dict(n_tokens=65_536, width=1024, n_layers=8), sampling=dict(K=32_000, rows=64, width=1024, n_layers=8),
    ),
    "cpu": FULL | dict(
        tests="test_noise.py test_times.py test_optim.py test_model.py", repetitions=2, train="--preset=toy -lgi=5",
        step=dict(n_tokens=1024, width=256, n_layers=4), sampling=dict(K=8192, rows=16, width=256, n_layers=4),
    ),
    "quick": dict(
        forms=("plain", "fused"), baselines=bench.BASELINES[:1], vocabularies=(1000, 27), n_sentences=500, rates=(1, 3),
        tests="test_times.py", repetitions=2,
        train="--preset=toy -mdim=32 -nl=1 -nh=2 -bsz=4 -slen=64 -lgi=1 -vli=4 -nex=0 --max_steps=4",
        step=dict(n_tokens=128, width=32, n_layers=1), sampling=dict(K=100, rows=2, width=32, n_layers=1),
    ),
}  # fmt: skip


# ---------------------------------------------------------------- commands


def peak_of(device):
    """Measure the floating-point operations per second of products in the run's dtype."""
    return speed.peak(device, speed.fast_bf16(device))


def rest(args):
    """Seconds that a command may take at most."""
    return max(LEAST_SECONDS, args.deadline - time.monotonic())


def shown(command, **environment):
    """Write a command as one types it in the repository, as Markdown."""
    words = shlex.join([*(f"{name}={value}" for name, value in environment.items()), "python", *command[1:]])
    return f"    {words.replace(f'{ROOT}/', '')}"


def call(command, seconds, **environment):
    """Run a command for at most so many seconds -> what it printed. Raises ValueError with its last lines if it fails."""
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=os.environ | environment, **streams) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise ValueError(f"no result within {seconds:.0f} seconds: {shlex.join(command)}") from None
        finally:
            if process.poll() is None:  # too late, or interrupted
                process.terminate()  # torchrun then stops its processes, which a kill would leave behind
                with suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=GRACE_SECONDS)
                process.kill()
    if process.returncode:
        last = output.splitlines()[-15:] + errors.splitlines()[-30:]
        raise ValueError("\n".join([f"exit code {process.returncode}: {shlex.join(command)}", *last]))
    return output


def measure(job, args, until):
    """Measure a job of bench.py, with half as many tokens where the memory is too small -> one of its results."""
    case, variant, sizes = job
    while time.monotonic() < until:
        if args.quick:  # starting a process would take longer than measuring
            figures = bench.CASES[case](args.device, args.sizes["repetitions"], variant, **sizes)
        else:
            figures = bench.measure_in_process((case, variant, sizes), args.sizes["repetitions"], args.device, rest(args))
        if "out of memory" not in figures.get("failed", "") or sizes.get("n_tokens", 0) < 2048:
            return dict(case=case, variant=variant, sizes=sizes, **figures)
        sizes = sizes | dict(n_tokens=sizes["n_tokens"] // 2)
    return dict(case=case, variant=variant, sizes=sizes, failed="no time left: give more --minutes")


def measure_all(jobs, args, seconds):
    """Measure jobs; none is begun after so many seconds -> results, and lines with their command and table."""
    until = time.monotonic() + seconds
    results = [measure(job, args, until) for job in tqdm(jobs, leave=False, disable=None)]
    first = shown(bench.command(jobs[0], args.sizes["repetitions"], args.device))
    return results, ["One command a line; the first:", "", first, "", *bench.table(results, peak_of(args.device)), ""]


def check(results):
    """Raise ValueError if a measurement has failed."""
    reasons = Counter(r["failed"] for r in results if "failed" in r)
    if reasons:
        raise ValueError("\n".join(f"{n} of {len(results)} measurements: {reason}" for reason, n in reasons.items()))


def train_once(args, seconds, *flags, n_processes=1):
    """Train for about so many seconds -> the command, what it printed, the lines of metrics.jsonl.

    The first run trains the tokenizer of all.
    """
    run_dir, tokenizer = args.scratch / "run", args.scratch / "tokenizer.model"
    words = [f"-d={args.data_path}", *[f"-spm={tokenizer}"] * tokenizer.exists()] if args.data_path else []
    words += [f"-mdir={run_dir}", f"--cache_dir={args.scratch / 'cache'}", f"--minutes={TRAINING_SHARE * seconds / 60:.3g}"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"] * (n_processes > 1)
    command = [sys.executable, *torchrun, str(ROOT / "train.py"), *args.sizes["train"].split(), *words, *flags]
    threads = dict(OMP_NUM_THREADS=str(max(1, torch.get_num_threads() // n_processes)))
    shutil.rmtree(run_dir, ignore_errors=True)  # of the run before: a large preset takes gigabytes
    output = call(command, rest(args), **threads)
    shutil.copy(run_dir / "tokenizer.model", tokenizer)
    return shown(command, **threads), output, log.read_metrics(run_dir)


def typical(metrics, name):
    """Take the median of a figure over the log lines of a run, without the first, in which it gets going."""
    values = [line[name] for line in metrics if name in line]
    return statistics.median(values[1:] or values)


# ---------------------------------------------------------------- parts: each yields the lines of its section


def machine(args, _seconds):
    """Name device, versions and commit, and measure large matrix products."""
    cpu = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name") or platform.machine()
    yield f"- CPU: {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {platform.platform()}"
    for i in range(torch.cuda.device_count() if args.device.type == "cuda" else 0):
        yield f"- GPU {i}: {torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 1e9:.1f} GB"
    names = [line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().split("\n") if "==" in line]
    software = torch.version.cuda or torch.version.hip or "none"
    yield f"- Python {platform.python_version()}, CUDA {software}, {', '.join(f'{name} {version(name)}' for name in names)}"
    commit = ""
    if shutil.which("git") and (ROOT / ".git").exists():
        words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    yield f"- commit {commit or 'unknown'}, {time.strftime('%Y-%m-%d %H:%M')}"
    yield f"- matrix multiplication: {peak_of(args.device) / 1e9:,.0f} GFLOP/s on {args.device}"


def tests(args, _seconds):
    """Run the tests for this device."""
    environment = dict(BFN_TEST_CUDA="1") if args.device.type == "cuda" else {}
    files = [str(ROOT / "tests" / name) for name in args.sizes["tests"].split()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    yield from (shown(command, **environment), "")
    yield (summary := call(command, rest(args), **environment).splitlines()[-1])
    if "passed" not in summary:
        raise ValueError("no test has passed")


def steps(args, seconds):
    """Measure a step, and its input and loss next to torch's cross-entropy, for each vocabulary."""
    sizes, measured, until = args.sizes, [], time.monotonic() + seconds
    baselines = sizes["baselines"] if hasattr(torch.nn, "LinearCrossEntropyOptions") else ()
    for i, K in enumerate(sizes["vocabularies"]):
        step = sizes["step"] | dict(K=K)
        operations = {name: size for name, size in step.items() if name != "n_layers"}
        jobs = [("step", form, step) for form in sizes["forms"]]
        jobs += [("operations", form, operations) for form in (*sizes["forms"], *baselines)]
        results, lines = measure_all(jobs, args, (until - time.monotonic()) / (len(sizes["vocabularies"]) - i))
        yield from (f"### K = {K:,}", "", *lines)
        plain, best = results[:2]
        if i == 0 and "failed" not in plain | best:
            faster, share = best["tokens_per_s"] / plain["tokens_per_s"], best["flops_per_s"] / peak_of(args.device)
            yield f"A step, {best['variant']}: {faster:.2f} times the tokens/s of plain,"
            yield f"{share:.0%} of the matrix-multiplication peak.\n"
        measured += results
    if not baselines:
        yield f"{' and '.join(sizes['baselines'])}: not in this torch\n"
    bench.draw_pictures(measured, args.folder)
    yield from (f"![{path.stem}]({path.name})" for path in sorted(args.folder.glob("operations_K_*.png")))
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
        command, _, metrics = train_once(args, seconds / len(counts), *flags, n_processes=n)
        speeds[n] = typical(metrics, "tokens_per_s")
        yield command
    yield from ("", "| processes | tokens/s | ratio |", "|---|---|---|")
    yield from (f"| {n} | {tokens_per_s:,.0f} | {tokens_per_s / speeds[1]:.2f} |" for n, tokens_per_s in speeds.items())


def text_and_samples(args, seconds):
    """Measure tokenising and loading the built-in language, and sampling from a network of random weights."""
    n, sizes = args.sizes["n_sentences"], args.sizes["sampling"]
    jobs = [("text", form, dict(n_sentences=n)) for form in ("tokenise", "load")]
    jobs += [("sampling", sampler, sizes) for sampler in ("pace 10", "pace 32")]
    results, lines = measure_all(jobs, args, seconds)
    yield from lines
    check(results)
    lines_per_s = 4 * n / results[0]["seconds"]  # bench.text repeats the sentences four times
    yield f"- tokenised per second: {lines_per_s:,.0f} lines, {lines_per_s * len(toy.corpus(1000)) / 1e9:.1f} MB"
    yield from (f"- {r['variant']} calls: {sizes['rows'] / r['seconds']:,.1f} samples per second" for r in results[2:])


def training(args, seconds):
    """Train at several learning rates, as many steps each."""
    preset, columns = args.sizes["train"].split()[0].split("=")[1], "learning rate, steps, minutes, tokens/s, share of matmul peak"
    columns = f"{columns}, memory (GB), bound (nats per token), bits per character".split(", ")
    n_steps, series, best = [], {}, (math.inf, "")
    for factor in args.sizes["rates"]:
        rate = f"{train.PRESETS[preset][3] * factor:.3g}"
        command, output, metrics = train_once(args, seconds / len(args.sizes["rates"]), f"-lr={rate}", *n_steps)
        if not series:
            yield from (command, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|")
        logged = [m for m in metrics if "loss" in m]
        bound, bits = min((m["val_bound_nats_per_token"], m["val_bits_per_char"]) for m in metrics if "val_bits_per_char" in m)
        last, best, n_steps = logged[-1], min(best, (bound, output)), [f"--max_steps={logged[-1]['step']}"]
        cells = [rate, f"{last['step']:,}", f"{last['minutes']:.2f}", f"{typical(logged, 'tokens_per_s'):,.0f}"]
        cells += [f"{typical(logged, 'utilisation'):.0%}", f"{last['peak_memory_gb']:.1f}", f"{bound:.3f}", f"{bits:.3f}"]
        yield f"| {' | '.join(cells)} |"
        series[rate] = [m["step"] for m in logged], [m["loss"] for m in logged]
        has_picture = drawing.lines(args.folder / "loss.png", series, "step", "loss, nats per token", "learning rates")
    yield from ("", *["![loss](loss.png)\n"] * has_picture, "The run of the lowest bound printed:", "")
    yield from (f"    {line}" for line in best[1].splitlines())


PARTS = {machine: 0.1, tests: 2, steps: 12, processes: 2, text_and_samples: 2, training: 4}  # and their share of the time


# ---------------------------------------------------------------- the command


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    p.add_argument("--minutes", type=cli.positive, default=20, help="minutes for everything (20)")
    p.add_argument("-d", "--data_path", type=cli.path,
        help="text file to train on (the built-in language)")
    p.add_argument("--output", type=cli.path, default="runs/prove",
        help="folder for the report and its pictures (runs/prove)")
    p.add_argument("--quick", action="store_true", help="tiny sizes, in about a minute: does all of it work?")
    return p


def open_report(folder):
    """Begin a new report -> the file. Raises ValueError if the folder holds something else."""
    path = folder / "report.md"
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (path.exists() and path.read_text().startswith(TITLE)):
        raise ValueError(f"{folder} holds other files than a report of this command: give another --output")
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
        except Exception as error:  # noqa: BLE001 - whatever goes wrong in a part, the others must follow
            failed.append(part.__name__)
            reason = f"{type(error).__name__}: " * (not isinstance(error, ValueError)) + str(error)
            write("\n".join(["", "**Failed:**", "", *(f"    {line}" for line in reason.splitlines())]))
        write(f"\n({time.monotonic() - started:.0f} seconds)")
        del todo[part]
    return failed


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    args = flags().parse_args(words)
    if args.data_path and not os.path.isfile(args.data_path):
        raise ValueError(f"no text file at {args.data_path}")
    torch.set_float32_matmul_precision("high")
    args.device, args.folder, begin = parallel.find_device("auto"), Path(args.output), time.monotonic()
    args.sizes, args.deadline = SIZES["quick" if args.quick else args.device.type], begin + 60 * args.minutes
    with open_report(args.folder) as report, tempfile.TemporaryDirectory(dir=args.folder, prefix="runs-") as scratch:
        args.scratch = Path(scratch)
        if args.quick and not args.data_path:  # train.py takes more time to judge the built-in language
            args.data_path = args.scratch / "corpus.txt"
            args.data_path.write_text(toy.corpus(500))

        def write(line):
            print(line, file=report)
            tqdm.write(line)

        write(f"{TITLE}\n\n    {shlex.join(['python', 'benchmarks/prove.py', *words])}")
        failed = prove(args, write)
        result = f"failed: {', '.join(failed)}" if failed else "all parts passed"
        write(f"\n## Result\n\n{result}, {(time.monotonic() - begin) / 60:.1f} minutes")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it stops other processes too
    cli.run(main)
