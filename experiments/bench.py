"""Measure the speed and memory of training and sampling, each variant in its own process.

    python -m experiments.bench operations step

Writes results.json and results.md. A time is the median over --repetitions. Memory is
what a call needs in addition to what is there before it: weights, optimizer state and, for
"operations", gradients. Ratios are to the first variant of a case with the same sizes. The last
column compares floating-point operations per second with those of a large matrix product on the
same machine.
"""

import ctypes
import gc
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import torch
from tqdm import tqdm

import bfn
import data
import train
from common import cli, parallel
from common.noise import draw_keys
from experiments.tables import table
from model import BFNTransformer, Config
from text import cache, toy
from text.tokenizer import train_tokenizer
from training import forms, fused, speed

VOCABULARIES = (27, 1024, 8192, 32_000, 50_257)
FORMS = "plain", "plain, compiled", "fused", "fused, compiled"
GRACE_SECONDS = 60  # that a command gets to stop
COLUMNS = "case", "sizes", "variant", "seconds", "tokens/s", "speed, ratio", "memory, MB", "ratio"


# ---------------------------------------------------------------- measuring


def memory_now(device, peak=False):
    """Read the memory in use, or the most since `forget_peak`, in MB.

    On a CPU that of this process, and 0 if the system is not Linux.
    """
    if device.type == "cuda":
        read = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return read(device) / 1e6
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM" if peak else "VmRSS"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def forget_peak(device):
    """Start measuring the most memory in use from now on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def seconds_of(call, device):
    """Call once -> seconds."""
    begin = time.perf_counter()
    call()
    speed.synchronise(device)
    return time.perf_counter() - begin


def measure(call, device, n_tokens, repetitions, flops=0.0):
    """Call once to warm up, then `repetitions` times -> {figure: value}."""
    warm_up = seconds_of(call, device)
    forget_peak(device)
    before = memory_now(device)
    median = statistics.median(seconds_of(call, device) for _ in range(repetitions))
    memory = memory_now(device, peak=True) - before
    figures = dict(seconds=median, tokens_per_s=n_tokens / median, flops_per_s=flops / median)
    return figures | dict(memory_mb=memory, warm_up_s=warm_up)


def peak_of(device):
    """Measure the floating-point operations per second of products in the run's dtype."""
    return speed.peak(device, speed.fast_bf16(device))


# ---------------------------------------------------------------- cases: variant -> {figure: value}


def operations(device, repetitions, variant, K, n_tokens, width):
    """Measure only the input and the loss, forward and backward."""
    torch.manual_seed(0)
    E, W = (torch.nn.Parameter(0.02 * torch.randn(K, width, device=device)) for _ in range(2))
    bias = torch.nn.Parameter(torch.zeros(K, device=device))
    for p in (E, W, bias):
        p.grad = torch.zeros_like(p)
    ids = torch.randint(K, (1, n_tokens), device=device)
    t = torch.rand(1, n_tokens, device=device)
    scale = torch.full((1, n_tokens), 1 / n_tokens, device=device)
    predicted = torch.arange(n_tokens, device=device)
    s1, compiled = 5.9, "compiled" in variant

    def plain():
        theta = bfn.flow(ids, t, s1, K).softmax(-1)
        logits = (theta @ E) @ W.T + bias + theta.clamp(min=1e-37).log()
        return (bfn.training_loss(logits.float().log_softmax(-1), ids, t, s1) * scale).sum()

    def in_chunks():
        keys = draw_keys(1, n_tokens, device=device)
        noisy = fused.Noisy(ids, t, keys, predicted, s1, compiled)
        return fused.HiddenToLoss.apply(fused.ThetaToH.apply(E, noisy), W, bias, scale, noisy)

    call = in_chunks if "fused" in variant else plain
    if variant == "plain, compiled":
        call = torch.compile(plain, dynamic=False)

    def forward_and_backward():
        with torch.autocast(device.type, torch.bfloat16, enabled=speed.fast_bf16(device)):
            loss = call()
        loss.backward()

    return measure(forward_and_backward, device, n_tokens, repetitions, 10 * K * width * n_tokens)


def step(device, repetitions, variant, K, n_tokens, width, n_layers=8, row_length=64):
    """Measure a whole training step on packed rows."""
    B = n_tokens // row_length
    words = f"-d=none -slen={row_length} -bsz={B} -nl={n_layers} -mdim={width} --max_steps=1000"
    words += f" --fused={'on' if 'fused' in variant else 'off'}"
    words += f" --compile={'on' if 'compiled' in variant else 'off'}"
    args = train.complete(train.flags().parse_args(words.split()))
    config = train.make_config(args, K)
    state = train.build(config, args, device, None)
    torch.manual_seed(0)
    segment_ids = 1 + (torch.rand(B, row_length) < 0.05).cumsum(1)
    nothing = torch.zeros_like(segment_ids, dtype=torch.bool)
    batch = torch.randint(K, segment_ids.shape), segment_ids, nothing
    forms.choose_form(state, batch, args, device, train.accumulate_gradients)

    def call():
        train.accumulate_gradients(state.model, [batch], [0], device)
        train.update_weights(state, args)

    flops = speed.model_flops(config, row_length) * n_tokens
    return measure(call, device, n_tokens, repetitions, flops)


def text(device, repetitions, variant, n_sentences=50_000):
    """Measure tokenising a corpus, or loading batches."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, tokenizer = Path(folder) / "corpus.txt", Path(folder) / "tokenizer.model"
        corpus.write_text(toy.corpus(n_sentences) * 4)
        tokenizer.write_bytes(train_tokenizer(corpus, "bpe", 1000))
        tokens = cache.load_corpus(corpus, tokenizer, Path(folder) / "cache")
        loader = data.Loader(tokens, 64, 128, seed=0)
        numbers = count()

        def tokenise():  # each time into a new cache
            cache.load_corpus(corpus, tokenizer, Path(folder) / f"cache{next(numbers)}")

        def load():
            for _ in range(20):
                loader.batch(next(numbers))

        call, n_tokens = (tokenise, len(tokens.ids)) if variant == "tokenise" else (load, 163_840)
        return measure(call, device, n_tokens, repetitions)


def sampling(device, repetitions, variant, K, rows, length=64, width=256, n_layers=4):
    """Measure a sampler with a number of network calls, for example "pace 10"."""
    sampler, n_calls = variant.split()
    is_solver = sampler not in ("pace", "commit")  # solvers make one call more than steps
    controls = bfn.Controls(sampler, int(n_calls) - is_solver)
    config = Config(K, bfn.auto_beta1(K), width, n_layers, 8)
    model = BFNTransformer(config).to(device).eval()
    ids = torch.zeros(rows, length, dtype=torch.long, device=device)
    network = partial(model, segment_ids=torch.ones_like(ids))
    call = partial(bfn.sample, network, ids, ids.bool(), config.s1, K, controls)
    return measure(call, device, rows * length, repetitions)


CASES = {f.__name__: f for f in (operations, step, text, sampling)}


def plan(names, cuda):
    """List what to measure -> [(case, variant, {sizes})]."""
    width, tokens = (1024, 65_536) if cuda else (256, 2048)
    large = dict(K=32_000, n_tokens=tokens) if cuda else dict(K=32_000, n_tokens=4096, width=512)
    small = dict(K=27, width=768) if cuda else dict(K=27, n_layers=4)
    sizes = dict(n_tokens=tokens, width=width)
    jobs = [("operations", form, dict(K=K) | sizes) for K in VOCABULARIES for form in FORMS]
    jobs += [("step", form, sizes | more) for more in (large, small) for form in FORMS]
    growing = [dict(K=K, n_tokens=tokens * n // 2) for K in (8192, 32_000) for n in (1, 2, 4)]
    growing += [dict(K=8192, row_length=L) for L in (256, 1024)]
    sizes |= dict(n_layers=4, row_length=64)
    jobs += [("step", FORMS[-1], sizes | more) for more in growing]
    jobs += [("text", variant, {}) for variant in ("tokenise", "load")]
    samplers = [f"{name} {n_calls}" for name in ("pace", "commit", "sde2") for n_calls in (10, 50)]
    sizes = [dict(K=K, rows=rows) for K in (27, 8192) for rows in (1, 16)]
    jobs += [("sampling", sampler, size) for size in sizes for sampler in samplers]
    return [job for job in jobs if job[0] in names]


# ---------------------------------------------------------------- processes


def call(command, seconds=None, **environment):
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


def command(job, repetitions, device):
    """The command that measures one job and prints its figures -> list of words."""
    words = [f"--one={json.dumps(job)}", f"--device={device}", f"--repetitions={repetitions}"]
    return [sys.executable, "-m", "experiments.bench", *words]


def measure_in_process(job, repetitions, device, seconds=None):
    """Measure a job in a new process -> its figures, or {"failed": the reason}."""
    try:
        return json.loads(call(command(job, repetitions, device), seconds).splitlines()[-1])
    except ValueError as error:
        return dict(failed=str(error).splitlines()[-1])


def measure_all(jobs, repetitions, device, path):
    """Measure all jobs -> results. After each job, those so far are in `path`."""
    results = []
    for case, variant, sizes in tqdm(jobs, disable=None):
        figures = measure_in_process((case, variant, sizes), repetitions, device)
        results.append(dict(case=case, variant=variant, sizes=sizes, **figures))
        path.write_text(json.dumps(results, indent=1))
    return results


# ---------------------------------------------------------------- results


def summarise(results, peak):
    """Lay out results, with ratios to the first variant of a case and sizes -> Markdown lines.

    peak: floating-point operations per second of a matrix product.
    """
    rows, first = [], {}
    for r in results:
        sizes = ", ".join(f"{name} {value:,}" for name, value in r["sizes"].items())
        reference = first.setdefault((r["case"], sizes), r)
        cells = [r["failed"], *[""] * 5] if "failed" in r else figure_cells(r, reference, peak)
        rows.append([r["case"], sizes, r["variant"], *cells])
    return table([*COLUMNS, "share of matmul peak"], rows)


def figure_cells(r, reference, peak):
    """Write the figures of a result, and their ratios to those of another -> six cells."""
    faster = f"{reference['seconds'] / r['seconds']:.2f}" if "seconds" in reference else ""
    memory = reference.get("memory_mb")
    smaller = f"{r['memory_mb'] / memory:.2f}" if memory else ""
    share = f"{r['flops_per_s'] / peak:.0%}" if r["flops_per_s"] else ""
    times = [f"{r['seconds']:.3g}", f"{r['tokens_per_s']:,.0f}", faster]
    return [*times, f"{r['memory_mb']:,.0f}", smaller, share]


# ---------------------------------------------------------------- the command


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("cases", nargs="*", help=f"cases to measure: {', '.join(CASES)} (all)")
    add("--repetitions", type=cli.count, default=5, help="repetitions of each measurement (5)")
    add("--K", type=cli.several, nargs="+",
        help="vocabulary sizes, for the cases that have one (all)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (cuda if there is one)")
    add("--output", type=cli.path, default="runs/bench", help="folder for the results (runs/bench)")
    add("--one", help="measure one job, given as JSON, in this process and print its figures")
    return p


def main(argv=None):
    args = flags().parse_args(argv)
    device = parallel.find_device(args.device)
    speed.allow_tf32(device)
    if args.one:
        case, variant, sizes = json.loads(args.one)
        print(json.dumps(CASES[case](device, args.repetitions, variant, **sizes)))
        return
    if unknown := set(args.cases) - set(CASES):
        known = ", ".join(CASES)
        raise ValueError(f"there is no case {', '.join(sorted(unknown))}: choose from {known}")
    jobs = plan(args.cases or CASES, device.type == "cuda")
    jobs = [job for job in jobs if not args.K or job[2].get("K", args.K[0]) in args.K]
    if not jobs:
        raise ValueError("no case has these sizes: leave out --K")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    peak = peak_of(device)
    results = measure_all(jobs, args.repetitions, device, folder / "results.json")
    n_threads = torch.get_num_threads()
    product = f"matrix multiplication: {peak / 1e9:,.0f} GFLOP/s on {device}, {n_threads} threads"
    lines = [product, "", *summarise(results, peak)]
    (folder / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    cli.run(main)
