"""Measure the speed and memory of training and sampling, each variant in its own process.

    python -m experiments.bench --quick
    python -m experiments.bench operations step --output=runs/bench

Writes results.json, results.md and pictures. A time is the median over --repetitions, and over --rounds through all
variants, for machines whose speed changes. Memory is what a call needs in addition to what is there before it: weights,
optimizer state and, for "operations", gradients. Ratios are to the first variant of a case with the same sizes. The last
column compares floating-point operations per second with those of a large matrix product on the same machine.
"""

import ctypes
import gc
import json
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
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tqdm import tqdm

import bfn
import data
import train
from common import cli, drawing, parallel
from common.noise import draw_keys
from model import BFNTransformer, Config
from text import cache, toy
from text.tokenizer import train_tokenizer
from training import forms, fused, speed

VOCABULARIES = (27, 1024, 8192, 32_000, 50_257)
BASELINES = "cross-entropy, chunked", "cross-entropy, compiled"  # torch's, for `operations`


# ---------------------------------------------------------------- measuring


def memory_now(device, peak=False):
    """Read the memory in use, or the most since `forget_peak`, in MB: on a CPU that of this process on Linux, else 0."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device) / 1e6
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


def measure(call, device, n_tokens, repetitions, flops=0.0):
    """Call once to warm up, then `repetitions` times -> {figure: value}."""
    begin = time.perf_counter()
    call()
    speed.synchronise(device)
    warm_up = time.perf_counter() - begin
    forget_peak(device)
    before, seconds = memory_now(device), []
    for _ in range(repetitions):
        begin = time.perf_counter()
        call()
        speed.synchronise(device)
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds)
    return dict(
        seconds=median,
        tokens_per_s=n_tokens / median,
        memory_mb=memory_now(device, peak=True) - before,
        flops_per_s=flops / median,
        warm_up_s=warm_up,
    )


# ---------------------------------------------------------------- cases: each measures one variant -> {figure: value}


def operations(device, repetitions, variant, K, n_tokens, width):
    """Measure only the input and the loss, forward and backward.

    The BASELINES are what they cost without noise: embeddings are looked up, and torch computes a cross-entropy.
    """
    torch.manual_seed(0)
    E, W = (torch.nn.Parameter(0.02 * torch.randn(K, width, device=device)) for _ in range(2))
    bias = torch.nn.Parameter(torch.zeros(K, device=device))
    for p in (E, W, bias):
        p.grad = torch.zeros_like(p)
    ids, t = torch.randint(K, (1, n_tokens), device=device), torch.rand(1, n_tokens, device=device)
    s1, scale = 5.9, torch.full((1, n_tokens), 1 / n_tokens, device=device)
    predicted, compiled = torch.arange(n_tokens, device=device), "compiled" in variant

    def plain():
        theta = bfn.flow(ids, t, s1, K).softmax(-1)
        logits = (theta @ E) @ W.T + bias + theta.clamp(min=1e-37).log()
        return (bfn.training_loss(logits.float().log_softmax(-1), ids, t, s1) * scale).sum()

    def in_chunks():
        noisy = fused.Noisy(ids, t, draw_keys(1, n_tokens, device=device), predicted, s1, compiled)
        return fused.HiddenToLoss.apply(fused.ThetaToH.apply(E, noisy), W, bias, scale, noisy)[0]

    def without_noise():
        dtype = torch.bfloat16 if speed.fast_bf16(device) else torch.float32
        options = None if compiled else torch.nn.LinearCrossEntropyOptions()
        h, weight, b = (x.to(dtype) for x in (F.embedding(ids[0], E), W, bias))
        with torch.autocast(device.type, enabled=False):  # the chunked form chooses its own dtypes
            return F.linear_cross_entropy(h, weight, ids[0], linear_bias=b, options=options)

    call = in_chunks if "fused" in variant else without_noise if variant in BASELINES else plain
    if compiled and call is not in_chunks:
        call = torch.compile(call, dynamic=False)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=speed.fast_bf16(device)):
            loss = call()
        loss.backward()

    return measure(step, device, n_tokens, repetitions, (6 if variant in BASELINES else 10) * K * width * n_tokens)


def step(device, repetitions, variant, K, n_tokens, width, n_layers=8, row_length=64):
    """Measure a whole training step on packed rows."""
    flags = ["-d=none", f"-slen={row_length}", f"-bsz={n_tokens // row_length}", f"-nl={n_layers}", f"-mdim={width}"]
    flags += ["--max_steps=1000", f"--fused={'on' if 'fused' in variant else 'off'}"]
    flags += [f"--compile={'on' if 'compiled' in variant else 'off'}"]
    args = train.complete(train.flags().parse_args(flags))
    config = train.make_config(args, K)
    state = train.build(config, args, device, None)
    torch.manual_seed(0)
    segment_ids = 1 + (torch.rand(n_tokens // row_length, row_length) < 0.05).cumsum(1)
    batch = torch.randint(K, segment_ids.shape), segment_ids, torch.zeros_like(segment_ids, dtype=torch.bool)
    forms.choose_form(state, batch, args, device, train.accumulate_gradients)

    def call():
        train.accumulate_gradients(state.model, [batch], [0], device, state.times)
        train.update_weights(state, args)

    return measure(call, device, n_tokens, repetitions, speed.model_flops(config, row_length) * n_tokens)


def attention(device, repetitions, variant, row_length, n_tokens=8192, n_heads=8, width=64):
    """Measure attention over packed rows, forward and backward (on a CPU only forward: flex has no backward there)."""
    B, dtype = n_tokens // row_length, torch.bfloat16 if speed.fast_bf16(device) else torch.float32
    q, k, v = (torch.randn(B, n_heads, row_length, width, device=device, dtype=dtype) for _ in range(3))
    segments = (1 + (torch.rand(B, row_length) < 0.05).cumsum(1)).to(device)
    with_backward = device.type == "cuda"
    q.requires_grad_(with_backward)
    flex = torch.compile(flex_attention, dynamic=False)
    make_mask = torch.compile(create_block_mask, dynamic=False) if with_backward else create_block_mask

    def same_segment(b, h, i, j):
        return segments[b, i] == segments[b, j]

    def call():
        with torch.set_grad_enabled(with_backward):
            if variant == "flex":
                out = flex(q, k, v, block_mask=make_mask(same_segment, B, None, row_length, row_length, device))
            else:
                mask = (segments[:, None, :, None] == segments[:, None, None]) if variant == "boolean mask" else None
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            if with_backward:
                out.sum().backward()

    return measure(call, device, n_tokens, repetitions)


def text(device, repetitions, variant, n_sentences=50_000):
    """Measure tokenising a corpus, or loading batches."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, tokenizer = Path(folder) / "corpus.txt", Path(folder) / "tokenizer.model"
        corpus.write_text(toy.corpus(n_sentences) * 4)
        tokenizer.write_bytes(train_tokenizer(corpus, "bpe", 1000))
        tokens = cache.load_corpus(corpus, tokenizer, Path(folder) / "cache")
        if variant == "tokenise":
            caches = (Path(folder) / f"cache{i}" for i in count())  # a new one each time: nothing is read from a cache
            return measure(lambda: cache.load_corpus(corpus, tokenizer, next(caches)), device, len(tokens.ids), repetitions)
        loader, steps = data.Loader(tokens, 64, 128, seed=0), count()
        return measure(lambda: [loader.batch(next(steps)) for _ in range(20)], device, 20 * 128 * 64, repetitions)


def sampling(device, repetitions, variant, K, rows, length=64, width=256, n_layers=4):
    """Measure sampling. `variant` is a sampler and a number of network calls, for example "pace 10"."""
    sampler, n_calls = variant.split()
    controls = bfn.Controls(sampler, int(n_calls) - (sampler not in ("pace", "commit")))  # solvers make STEPS + 1
    model = BFNTransformer(Config(K, bfn.auto_beta1(K), width, n_layers, 8)).to(device).eval()
    ids = torch.zeros(rows, length, dtype=torch.long, device=device)
    network = partial(model, segment_ids=torch.ones_like(ids))
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    call = partial(bfn.sample, network, ids, nothing, model.config.s1, K, controls)
    return measure(call, device, rows * length, repetitions)


CASES = {f.__name__: f for f in (operations, step, attention, text, sampling)}
FORMS = "plain", "plain, compiled", "fused", "fused, compiled"


def plan(names, quick, cuda):
    """List what to measure -> [(case, variant, {sizes})]."""
    width, tokens = (1024, 65_536) if cuda else (256, 2048)
    large = dict(K=32_000, n_tokens=65_536, width=1024) if cuda else dict(K=32_000, n_tokens=4096, width=512)
    small = dict(K=27, n_tokens=65_536, width=768) if cuda else dict(K=27, n_tokens=2048, width=256, n_layers=4)
    jobs = [("operations", form, dict(K=K, n_tokens=tokens, width=width)) for K in VOCABULARIES for form in FORMS]
    jobs += [("step", form, sizes) for sizes in (large, small) for form in FORMS]
    growing = [dict(K=K, n_tokens=tokens * n // 2) for K in (8192, 32_000) for n in (1, 2, 4)]
    growing += [dict(K=8192, n_tokens=tokens, row_length=L) for L in (256, 1024)]
    jobs += [("step", FORMS[3], dict(width=width, n_layers=4, row_length=64) | sizes) for sizes in growing]
    jobs += [
        ("attention", form, dict(row_length=n)) for n in (64, 256, 1024) for form in ("boolean mask", "no mask", "flex")
    ]
    jobs += [("text", form, {}) for form in ("tokenise", "load")]
    samplers = [f"{name} {n_calls}" for name in ("pace", "commit", "sde2") for n_calls in (10, 50)]
    jobs += [("sampling", sampler, dict(K=K, rows=rows)) for K in (27, 8192) for rows in (1, 16) for sampler in samplers]
    if quick:
        jobs = [
            ("operations", form, dict(K=K, n_tokens=1024, width=256)) for K in (27, 8192) for form in (FORMS[0], FORMS[3])
        ]
        jobs += [("step", form, dict(K=8192, n_tokens=1024, width=256, n_layers=2)) for form in (FORMS[0], FORMS[3])]
    return [job for job in jobs if job[0] in names]


# ---------------------------------------------------------------- results


def median_figures(rounds):
    """Combine a variant's figures of several rounds -> the median of each, or the failure of a round that failed."""
    failed = [figures for figures in rounds if "failed" in figures]
    return failed[0] if failed else {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}


def table(results, peak):
    """Lay out results, with ratios to the first variant of the same case and sizes -> Markdown lines.

    peak: floating-point operations per second of a matrix product.
    """
    lines = [
        "| case | sizes | variant | seconds | tokens/s | speed, ratio | memory, MB | ratio | share of matmul peak |",
        "|" + "---|" * 9,
    ]
    first = {}
    for r in results:
        sizes = ", ".join(f"{name} {value:,}" for name, value in r["sizes"].items())
        reference = first.setdefault((r["case"], sizes), r)
        cells = [r["case"], sizes, r["variant"]]
        if "failed" in r:
            cells += [r["failed"], *[""] * 5]
        else:
            faster = f"{reference['seconds'] / r['seconds']:.2f}" if "seconds" in reference else ""
            smaller = f"{r['memory_mb'] / reference['memory_mb']:.2f}" if reference.get("memory_mb") else ""
            share = f"{r['flops_per_s'] / peak:.0%}" if r["flops_per_s"] else ""
            cells += [f"{r['seconds']:.3g}", f"{r['tokens_per_s']:,.0f}", faster, f"{r['memory_mb']:,.0f}", smaller, share]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw_pictures(results, folder):
    """Draw speed and memory over the vocabulary size, the tokens of a batch and the length of rows."""
    for case, size in (("operations", "K"), ("step", "n_tokens"), ("step", "row_length")):
        series = {figure: {} for figure in ("tokens_per_s", "memory_mb")}
        for r in (r for r in results if r["case"] == case and size in r["sizes"] and "failed" not in r):
            name = ", ".join([r["variant"], *(f"{other} {n:,}" for other, n in r["sizes"].items() if other != size)])
            for figure, lines in series.items():
                xs, ys = lines.setdefault(name, ([], []))
                xs.append(r["sizes"][size]), ys.append(r[figure])
        for figure, lines in series.items():
            if lines := {name: line for name, line in lines.items() if len(line[0]) > 1}:
                drawing.lines(
                    folder / f"{case}_{size}_{figure}.png", lines, size, figure, f"{figure} over {size}", log="xy" * (size == "K")
                )


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    p.add_argument("cases", nargs="*", help=f"cases to measure: {', '.join(CASES)} (all)")
    p.add_argument("--quick", action="store_true", help="measure only a few small cases, in less than two minutes")
    p.add_argument("--repetitions", type=cli.count, default=5, help="repetitions of each measurement (5)")
    p.add_argument("--K", type=cli.several, nargs="+", help="vocabulary sizes, for the cases that have one (all)")
    p.add_argument("--rounds", type=cli.count, default=1, help="number of times that all variants are measured (1)")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (cuda if there is one)")
    p.add_argument("--output", type=cli.path, default="runs/bench",
        help="folder for results and pictures (runs/bench)")
    p.add_argument("--one", help="measure one job, given as JSON, in this process and print its figures")
    return p


def command(job, repetitions, device):
    """The command that measures one job and prints its figures -> list of words."""
    return [sys.executable, "-m", "experiments.bench", f"--one={json.dumps(job)}", f"--device={device}", f"--repetitions={repetitions}"]


def measure_in_process(job, repetitions, device, timeout=None):
    """Measure a job in a new process, for at most `timeout` seconds -> its figures, or {"failed": the reason}."""
    words = command(job, repetitions, device)
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        return dict(failed=f"no result within {timeout:.0f} seconds")
    if done.returncode:
        return dict(failed=(done.stderr.strip().splitlines() or [f"exit code {done.returncode}, no message"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def measure_all(jobs, args, device, path):
    """Measure all jobs in each round, and write the results so far to `path` after each job -> results."""
    measured = [[] for _ in jobs]
    for i in tqdm(list(range(len(jobs))) * args.rounds, disable=None):
        measured[i].append(measure_in_process(jobs[i], args.repetitions, device))
        results = [
            dict(case=case, variant=variant, sizes=sizes, **median_figures(rounds))
            for (case, variant, sizes), rounds in zip(jobs, measured, strict=True)
            if rounds
        ]
        path.write_text(json.dumps(results, indent=1))
    return results


def main(argv=None):
    args = flags().parse_args(argv)
    device = parallel.find_device(args.device)
    torch.set_float32_matmul_precision("high")
    if args.one:
        case, variant, sizes = json.loads(args.one)
        print(json.dumps(CASES[case](device, args.repetitions, variant, **sizes)))
        return
    if unknown := set(args.cases) - set(CASES):
        raise ValueError(f"there is no case {', '.join(sorted(unknown))}: choose from {', '.join(CASES)}")
    jobs = plan(args.cases or CASES, args.quick, device.type == "cuda")
    jobs = [job for job in jobs if not args.K or job[2].get("K", args.K[0]) in args.K]
    if not jobs:
        raise ValueError("no case has these sizes: leave out --quick or --K")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    peak = speed.peak(device, speed.fast_bf16(device))
    results = measure_all(jobs, args, device, folder / "results.json")
    lines = [f"matrix multiplication: {peak / 1e9:,.0f} GFLOP/s on {device}, {torch.get_num_threads()} threads", ""]
    lines += table(results, peak)
    (folder / "results.md").write_text("\n".join(lines) + "\n")
    draw_pictures(results, folder)
    print("\n".join(lines))


if __name__ == "__main__":
    cli.run(main)
