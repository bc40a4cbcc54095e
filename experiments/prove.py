"""Prove a machine in ten minutes: is it right, how fast, and where do time and memory go?

    python -m experiments.prove -d=TEXT.txt --minutes=9
    python -m experiments.prove --quick                    tiny sizes: does all of it work?

One process on the first GPU, or else on the CPU, so that everything is compiled once. What is worth
most comes first. Each line is in report.md in --output as soon as it is known. A part that fails is
reported with the reason, and the next one follows; the exit code is then 1.
"""

import contextlib
import gc
import io
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from unittest import mock

from common import cli  # isort: skip - first, because of Ctrl-C
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer
from tqdm import tqdm

import bfn
import data
import train
from common import drawing, files, parallel
from common.noise import draw_keys
from experiments.tables import table
from model import BFNTransformer, Config, Form
from text import toy
from training import forms, fused, log, memory, optim, speed

ROOT = Path(train.__file__).parent
TITLE = "# Proof of a machine"
LEAST_SECONDS = 10  # that a part needs
KEPT = 0.15  # of the time that is left for training, for several processes
PROFILED = 25  # operations
SIZES = {  # vocabularies: (K, tokens) of a chunk, K once odd; rates: times the preset's
    "cuda": dict(preset="base", K=32_000, row=256, rows=64, product=8192, copied=1 << 31,
        chunks=[(32_000, 2048), (8192, 8192), (50_257, 1280)], texts=32, rates=(1, 3, 1 / 3)),
    "cpu": dict(preset="laptop", K=8192, row=64, rows=16, product=1024, copied=1 << 27,
        chunks=[(8192, 128), (10_007, 128)], texts=8, rates=(1, 3, 1 / 3)),
    "quick": dict(preset="toy", K=1000, row=64, rows=4, product=64, copied=1 << 16,
        chunks=[(1000, 32), (1001, 32)], texts=2, rates=(1, 3)),
}  # fmt: skip
SMALL = "-mdim=32 -nl=1 -nh=2 -bsz=4 -slen=64 -lgi=1 -vli=4 -nex=0 --max_steps=4"  # of --quick


def seconds_of(work, n=5):
    """Repeat work -> mean seconds of a call, the least of three such means."""
    timer = Timer("work()", globals=dict(work=work), num_threads=torch.get_num_threads())
    return min(timer.timeit(n).mean for _ in range(3))  # it waits for the GPU


def left(args):
    """Seconds until the end of the --minutes."""
    return args.deadline - time.monotonic()


# ---------------------------------------------------------------- parts: each yields its lines


def machine(args):
    """Name device, versions and commit; measure the speed of large products and of a copy."""
    cpu = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name") or platform.machine()
    yield f"- CPU: {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count() if args.device.type == "cuda" else 0):
        memory_bytes = torch.cuda.get_device_properties(i).total_memory
        yield f"- GPU {i}: {torch.cuda.get_device_name(i)}, {memory_bytes / 1e9:.1f} GB"
    requirements = (ROOT / "requirements.txt").read_text().split("\n")
    names = [line.split("==")[0] for line in requirements if "==" in line]
    found = {library.name: library.version for library in distributions()}
    libraries = ", ".join(f"{name} {found.get(name, 'missing')}" for name in names)
    cuda = torch.version.cuda or torch.version.hip or "none"
    yield f"- {platform.platform()}, Python {platform.python_version()}, CUDA {cuda}, {libraries}"
    describe = ["git", "-C", str(ROOT), *"describe --always --dirty --exclude=*".split()]
    with contextlib.suppress(OSError):
        done = subprocess.run(describe, capture_output=True, text=True, check=False)
        yield f"- commit {done.stdout.strip() or 'unknown'}, {time.strftime('%Y-%m-%d %H:%M')}"
    n = args.sizes["product"]
    a = torch.randn(n, n, device=args.device)
    kinds = [("float32", a, "highest"), ("bfloat16", a.bfloat16(), "highest")]
    kinds += [("TF32", a, "high")] if args.device.type == "cuda" else []
    for name, x, precision in kinds:
        torch.set_float32_matmul_precision(precision)
        flops = 2 * n**3 / seconds_of(partial(torch.mm, x, x))
        yield f"- product of {n} x {n} in {name}: {flops / 1e12:,.3f} TFLOP/s"
    speed.allow_tf32(args.device)
    x = torch.empty(args.sizes["copied"], dtype=torch.uint8, device=args.device)
    seconds = seconds_of(partial(torch.empty_like(x).copy_, x))
    yield f"- copy: {2 * len(x) / seconds / 1e9:,.0f} GB/s read and written"


def make_batch(K, rows, row_length, seed=0, progress=0.5):
    """Make a micro-batch of random tokens in texts of about 48, seen as in the middle of a run."""
    rng = np.random.default_rng(seed)
    segment_ids = 1 + (rng.random((rows, row_length)) < 1 / 48).cumsum(1)
    seen = data.draw_seen(segment_ids, rng, progress)
    ids = rng.integers(K, size=segment_ids.shape)
    return torch.from_numpy(ids), torch.from_numpy(segment_ids), torch.from_numpy(seen)


def equality(args):
    """Compare loss and gradients of each form on this device with the plain form on the CPU."""
    K, device, cpu = 3001, args.device, torch.device("cpu")
    batch = make_batch(K, rows=8, row_length=256)
    config = Config(K, 0.01, 128, 2, 4)
    keys = draw_keys(8, 256, generator=torch.Generator().manual_seed(0))
    wanted = train.complete(train.flags().parse_args(["-slen=256", f"--preset={args.preset}"]))
    form = forms.wanted_form(wanted, config, device)
    compiled = form._replace(fused=True, compiled=True, flex=device.type == "cuda")
    found = {Form(fused=f, bf16=b) for f in (False, True) for b in (False, form.bf16)} | {compiled}
    wrong = []
    with mock.patch.object(train, "draw_keys", lambda *shape, device: keys.to(device)):
        plain = forms.Check(BFNTransformer, config, Form(), batch, cpu, train.accumulate_gradients)
        here = forms.Check(BFNTransformer, config, None, batch, device, train.accumulate_gradients)
        for form in sorted(found):
            got = {name: x.cpu() for name, x in here.step(here.network(form)).items()}
            errors = {}
            for name, x in plain.expected.items():
                errors[name] = ((got[name] - x).norm() / x.norm().clamp(min=1e-30)).item()
            name = max(errors, key=errors.get)
            yield f"- {form}: loss off by {errors['the loss']:.1e}, {name} by {errors[name]:.1e}"
            kind = "bf16" if form.bf16 else "tf32" if device.type == "cuda" else "float32"
            wrong += [str(form)] if not errors[name] <= forms.TOLERANCE[kind] else []
    if wrong:
        raise ValueError(f"wrong numbers: {', '.join(wrong)}")


def times_of_parts(state, args, batch, device):
    """Measure the parts of a step, each by itself -> a line."""
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    gradients = partial(train.accumulate_gradients, state.model, [batch], [0], device)
    parts = {
        "forward and backward": gradients,  # first: the others need gradients
        **{type(optimizer).__name__: optimizer.step for optimizer in state.optimizers},
        "clipping": partial(torch.nn.utils.clip_grad_norm_, parameters, args.gradient_clipping),
        "average": partial(optim.average_weights, state.emas[0], state.model, 0.999, 9),
    }
    figures = [f"{name} {1e3 * seconds_of(work):.1f}" for name, work in parts.items()]
    return f"- ms of the parts: {', '.join(figures)}"


def step(args):
    """Train the preset on packed rows, as a run does: time, share of the peak, memory, profile."""
    s, device = args.sizes, args.device
    words = f"--preset={args.preset} -slen={s['row']} -bsz={s['rows']} --max_steps=1000"
    wanted = train.complete(train.flags().parse_args([*words.split(), "-d=none"]))
    config = train.make_config(wanted, s["K"])
    batches = [make_batch(s["K"], s["rows"], s["row"], i) for i in range(4)]
    state = train.build(config, wanted, device)
    begin = time.perf_counter()
    accumulate = train.accumulate_gradients
    forms.choose_form(state, batches[0], wanted, device, accumulate)
    n_parameters = sum(p.numel() for p in state.model.parameters())
    yield f"- {n_parameters / 1e6:.0f} M parameters, K = {s['K']:,}: {state.model.form}"

    def whole():
        accumulate(state.model, [batches[state.step % 4]], [state.step], device)
        train.update_weights(state, wanted)
        state.step += 1

    whole()
    yield f"- checked, compiled and one step done after {time.perf_counter() - begin:.0f} s"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = seconds_of(whole)
    n_tokens = batches[0][0].numel()
    speed_now = f"{1e3 * seconds:.1f} ms, {n_tokens / seconds:,.0f} tokens/s"
    flops = speed.model_flops(config, s["row"]) * n_tokens / seconds
    share = flops / speed.peak(device, state.model.form.bf16)
    yield f"- a step of {n_tokens:,} tokens: {speed_now}"
    yield f"- {flops / 1e12:.3g} TFLOP/s of the model, {share:.0%} of the measured peak"
    estimate = memory.step_bytes(config, wanted, device) / 1e9
    yield f"- memory {speed.peak_memory(device):.1f} GB at most, estimated {estimate:.1f} GB"
    yield times_of_parts(state, wanted, batches[0], device)
    with profile() as profiler:  # of all devices that there are
        whole()
        speed.synchronise(device)
    on_gpu = device.type == "cuda" and ProfilerActivity.CUDA in profiler.activities
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    yield from ("```", profiler.key_averages().table(sort_by=by, row_limit=PROFILED), "```")


def muon(args):
    """Orthogonalise the matrices of the preset's layers: directly and by their products."""
    width, n_layers = train.PRESETS[args.preset][:2]
    for height, wide in ((width, width), (width, 3 * width), (width, 4 * width)):
        X = torch.randn(n_layers, height, wide, device=args.device)
        direct, low = optim.orthogonalise_directly, optim.orthogonalise_in_bf16
        work = {"directly": partial(direct, X), "by X X^T": partial(optim.orthogonalise_by_gram, X)}
        work["in bfloat16"] = partial(low, X)
        times = [f"{name} {1e3 * seconds_of(f):.2f}" for name, f in work.items()]
        cosine = torch.cosine_similarity(low(X).flatten(), direct(X).flatten(), 0).item()
        yield f"- {n_layers} x {height} x {wide}, ms: {', '.join(times)} (cosine {cosine:.5f})"


def chunks(args):
    """Compute chunks of the fused form for several vocabularies, one of an odd size."""
    device, width = args.device, train.PRESETS[args.preset][0]
    dtype = torch.bfloat16 if speed.fast_bf16(device) else torch.float32
    for K, n in args.sizes["chunks"]:
        keys, ids = draw_keys(n, device=device), torch.randint(K, (n,), device=device)
        t, scale = torch.rand(n, device=device), torch.full((n,), 1 / n, device=device)
        x, W = (torch.randn(k, width, device=device, dtype=dtype) for k in (n, K))
        linear, bias = x @ W.T, torch.zeros(K, device=device)
        tokens = ids, t, keys
        theta = partial(fused.compiled_theta_times_sum, *tokens, 5.9, K, dtype)
        loss = partial(fused.compiled_loss_and_gradient, linear, bias, *tokens, scale, 5.9)
        total = torch.zeros(K, width, device=device)
        add = partial(fused.add_product, total, linear.T, x)
        work = {"theta": theta, "loss": loss, "x W^T": partial(torch.mm, x, W.T), "dW": add}
        times = [f"{name} {1e3 * seconds_of(f):.3f}" for name, f in work.items()]
        yield f"- K = {K:,}, {n:,} tokens, ms: {', '.join(times)}"


def sampling(args):
    """Sample in float32 and bfloat16: time of a call, and how far the likeliest tokens agree."""
    width, n_layers, n_heads, *_ = train.PRESETS[args.preset]
    K, device = args.sizes["K"], args.device
    torch.manual_seed(0)
    model = BFNTransformer(Config(K, bfn.auto_beta1(K), width, n_layers, n_heads))
    model = model.to(device).eval()
    ids = torch.randint(K, (args.sizes["texts"], 64), device=device)
    network = partial(model, segment_ids=torch.ones_like(ids))
    nothing, t = torch.zeros_like(ids, dtype=torch.bool), torch.full(ids.shape, 0.3, device=device)
    eps = torch.randn(*ids.shape, K, device=device)
    theta = bfn.flow(ids, t, model.config.s1, K, eps).softmax(-1)
    best = None
    for name, precision, bf16 in (("float32", "highest", False), ("bfloat16", "high", True)):
        torch.set_float32_matmul_precision(precision)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            call = partial(bfn.predict, network, theta, t, ids, nothing)
            seconds, tokens = seconds_of(call, n=2), call().argmax(-1)
        best = tokens if best is None else best
        agree = (tokens == best).float().mean().item()
        yield f"- {name}: {1e3 * seconds:.1f} ms a call, {agree:.1%} of likeliest tokens agree"
    speed.allow_tf32(device)


def run_flags(args, run_dir, seconds):
    """List the flags of train.py for a run of about so many seconds."""
    words = [f"-d={args.data_path}"] if args.data_path else []
    words += [f"--preset={args.preset}", f"-mdir={run_dir}", f"--cache_dir={args.scratch}"]
    if args.quick:
        return words + SMALL.split()
    sizes = f"-slen={args.sizes['row']} -bsz={args.sizes['rows']}"  # those of `step`
    return words + [*sizes.split(), f"--minutes={seconds / 60:.3g}"]


def training(args):
    """Train at several learning rates, for the same time or what is left of it."""
    rates, kept = args.sizes["rates"], KEPT * left(args) * (args.n_processes > 1)
    series, rows, best, others = {}, [], (math.inf, ""), 0
    for i, factor in enumerate(rates):
        seconds = (left(args) - kept) / (len(rates) - i)
        seconds -= others or seconds / 2
        rate = f"{train.PRESETS[args.preset][3] * factor:.3g}"
        if rows and seconds < LEAST_SECONDS:
            yield f"No time left for the rate {rate}: give more --minutes.\n"
            continue
        run_dir, output, begin = args.scratch / "run", io.StringIO(), time.monotonic()
        shutil.rmtree(run_dir, ignore_errors=True)  # of the run before: it may take gigabytes
        with contextlib.redirect_stdout(output):
            train.main([*run_flags(args, run_dir, seconds), f"-lr={rate}"])
        others = others or time.monotonic() - begin - seconds  # tokenizer, compiling, validating
        metrics = log.read_metrics(run_dir)
        logged = [m for m in metrics if "loss" in m]
        names = "val_bound_nats_per_token", "val_bits_per_char"
        bound, bits = min([m[name] for name in names] for m in metrics if names[0] in m)
        m = logged[len(logged) // 2]
        speeds = f"{m['tokens_per_s']:,.0f}", f"{m['utilisation']:.0%}"
        rows.append([rate, f"{logged[-1]['step']:,}", *speeds, f"{bound:.3f}", f"{bits:.3f}"])
        best = min(best, (bound, output.getvalue()))
        series[rate] = [m["step"] for m in logged], [m["loss"] for m in logged]
    columns = "learning rate|steps|tokens/s|share of peak|bound (nats/token)|bits per character"
    yield from table(columns.split("|"), rows)
    axes = "step", "loss, nats per token", "learning rates"
    if drawing.lines(args.folder / "loss.png", series, *axes):
        yield "\n![loss](loss.png)"
    yield from ("", "The run of the lowest bound printed:", "")
    yield from (f"    {line}" for line in best[1].splitlines())


def processes(args):
    """Compare one process with as many as there are GPUs, on the same step."""
    speeds = {}
    for n in (1, args.n_processes):
        run_dir = args.scratch / f"processes-{n}"
        start = f"torch.distributed.run --standalone --nproc_per_node={n}".split()
        words = run_flags(args, run_dir, left(args) / (4 if n == 1 else 2))
        words += [f"-acc={args.n_processes}", "-nex=0"]
        command = [sys.executable, "-m", *start, str(ROOT / "train.py"), *words]
        streams = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        with subprocess.Popen(command, **streams) as process:
            try:
                _, errors = process.communicate(timeout=max(60, left(args)))
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun ends its processes
                _, errors = process.communicate()
        if process.returncode:
            raise ValueError(f"{shlex.join(command)}\n{errors[-2000:]}")
        logged = [m["tokens_per_s"] for m in log.read_metrics(run_dir) if "tokens_per_s" in m]
        speeds[n] = logged[len(logged) // 2]
    rows = [[f"{n}", f"{value:,.0f}", f"{value / speeds[1]:.2f}"] for n, value in speeds.items()]
    yield from table(["processes", "tokens/s", "ratio"], rows)


PARTS = machine, equality, step, muon, chunks, sampling, training  # and processes


# ---------------------------------------------------------------- the command


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("--minutes", type=cli.positive, default=9, help="minutes for everything (9)")
    add("-d", "--data_path", type=cli.path, help="text file to train on (the built-in language)")
    add("--output", type=cli.path, default="runs/prove",
        help="folder for the report and its picture (runs/prove)")
    add("--quick", action="store_true", help="tiny sizes, in about a minute: does all of it work?")
    return p


def open_report(folder):
    """Begin a new report -> the file. Raises ValueError if the folder holds something else."""
    path = folder / "report.md"
    files.check_folder(folder, path.name, lambda p: p.read_text().startswith(TITLE))
    folder.mkdir(parents=True, exist_ok=True)
    return open(path, "w", buffering=1, encoding="utf-8")


def prove(args, write):
    """Do all parts and write their lines -> names of those that failed."""
    failed, parts = [], (*PARTS, processes) if args.n_processes > 1 else PARTS
    for part in tqdm(parts, unit="part", leave=False, disable=None):
        started = time.monotonic()
        write(f"\n## {part.__name__.capitalize()}\n\n{part.__doc__}\n")
        try:
            if left(args) < LEAST_SECONDS:
                raise ValueError("no time left: give more --minutes")
            for line in part(args):
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
        gc.collect()  # the networks of this part
    return failed


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    args = flags().parse_args(words)
    if args.data_path and not os.path.isfile(args.data_path):
        raise ValueError(f"no text file at {args.data_path}")
    begin = time.monotonic()
    args.device, args.folder = parallel.find_device("auto"), Path(args.output)
    args.sizes = SIZES["quick" if args.quick else args.device.type]
    args.preset, args.deadline = args.sizes["preset"], begin + 60 * args.minutes
    args.n_processes = 2 if args.quick else torch.cuda.device_count()
    speed.allow_tf32(args.device)
    scratch = tempfile.TemporaryDirectory(prefix="proof-")
    with open_report(args.folder) as report, scratch as folder:
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
    cli.run(main)
