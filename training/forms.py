"""How a step computes its numbers: compiled, fused, in bfloat16, with flex attention.

A form is used only after a check that it gives the loss and the gradients of the plain form.
`accumulate` is train.accumulate_gradients(model, batches, seeds, device) throughout.
"""

import os
import re
import statistics
import sys
import time
from dataclasses import replace
from functools import cached_property
from itertools import combinations

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from common import parallel
from model import Form
from training import fused, optim, shards, speed

FUSED_FROM = 1000  # tokens of vocabulary; below, the plain form is as fast
COMPILED_FROM = 256  # width, on a CPU; below, compiling gains nothing
FLEX_FROM = 256  # length of rows; below, the mask is small
LEAST_FLEX_HEAD = 16  # flex attention takes no narrower heads
CHECKED_LAYERS = 2  # all layers are one program
TOLERANCE = {"float32": 1e-3, "tf32": 0.02, "bf16": 0.05}  # of a tensor's norm


# ---------------------------------------------------------------- which form


def wanted_form(args, config, device):
    """Choose a form by the flags, the device and the sizes, not yet checked -> Form."""
    on_gpu = device.type == "cuda"
    bf16 = speed.fast_bf16(device)
    compiled = args.compile == "on"
    if args.compile == "auto":
        compiled = on_gpu or config.d_model >= COMPILED_FROM
    long_rows = (args.sequence_length or 0) >= FLEX_FROM
    wide_heads = config.d_model // config.n_heads >= LEAST_FLEX_HEAD
    return Form(
        fused=args.fused == "on" or (args.fused == "auto" and config.K >= FUSED_FROM),
        bf16=bf16,
        compiled=compiled,
        flex=compiled and on_gpu and long_rows and wide_heads,
        written=bf16 and not on_gpu,
        recompute=args.recompute,
    )


def without(form, names):
    """Leave parts of a form out, and what only makes sense with them -> Form."""
    form = form._replace(**dict.fromkeys(names, False))
    return form._replace(flex=form.flex and form.compiled, written=form.written and form.bf16)


def keep_caches_apart():
    """Give the compiled programs of each kind of CPU their own cache, unless the user names one.

    torch.compile (2.13) does not: it loads programs for instructions that this CPU lacks, which
    give wrong numbers or crash.
    """
    usual = default_cache_dir()  # which torch may have put into the environment
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", usual) == usual:
        kind = torch.backends.cpu.get_cpu_capability().replace(" ", "_")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{usual}_{kind}"


def choose_form(state, batch, args, device, accumulate):
    """Make the network and the optimizers of a State compute in a form that is fast and right here.

    batch: a micro-batch of the run. If the form of `wanted_form` is wrong here, as little of it as
    possible is left out, and a line says why. Raises ValueError if fused.py is wrong with
    --fused=on.
    """
    keep_caches_apart()
    model = state.model
    form = wanted_form(args, model.config, device)
    if form.fused:
        form = form._replace(fused=can_fuse(model, args, device, accumulate))
    config = replace(model.config, n_layers=min(CHECKED_LAYERS, model.config.n_layers), dropout=0.0)
    check = Check(type(model), config, Form(fused=form.fused), batch, device, accumulate)
    if reason := check.fault(form):
        slower = fastest_right_form(form, check)
        print(f"{reason} ({form}): training with {slower}", file=sys.stderr)
        form = slower
    model.use(form)
    for optimizer in state.optimizers:
        if isinstance(optimizer, optim.Muon):
            optimizer.fast = is_fast_muon_right(model, device)


def fastest_right_form(form, check):
    """Leave out one part of a form, or two, ..., until one is right -> the fastest of these."""
    parts = [name for name, used in form._asdict().items() if used and name != "fused"]
    for n_parts in range(1, len(parts) + 1):
        forms = sorted({without(form, names) for names in combinations(parts, n_parts)})
        if right := [other for other in forms if not check.fault(other)]:
            return right[0] if len(right) == 1 else min(right, key=check.seconds)
    return check.plain


def can_fuse(model, args, device, accumulate):
    """Whether fused.py computes what bfn.py and model.py say, on a small network.

    If not, an edit of the flow, the given positions, the embedding or the head is not in fused.py.
    Raises ValueError for --fused=on; --fused=auto then says so and trains without it.
    """
    n_heads, K = model.config.n_heads, model.config.K
    small = replace(model.config, d_model=8 * n_heads, n_layers=1, dropout=0.0)
    if model.config.s1 >= fused.LARGEST_S1:
        limit = f"sqrt(K beta) below {fused.LARGEST_S1:g}"
        reason = f"fused.py needs {limit}, here it is {model.config.s1:.1f}"
    else:
        segment_ids = torch.tensor([[1] * 5 + [2] * 3, [1] * 6 + [0] * 2])
        given = torch.zeros(2, 8, dtype=torch.bool)
        given[:, 2] = given[0, 6] = True  # also where t is in the middle
        ids = torch.randint(K, (2, 8), generator=torch.Generator().manual_seed(0))
        check = Check(type(model), small, Form(), (ids, segment_ids, given), device, accumulate)
        reason = check.fault(Form(fused=True))
    if reason and args.fused == "on":
        raise ValueError(f"{reason}: use --fused=off")
    if reason:
        print(f"{reason}: training in the plain form, as with --fused=off", file=sys.stderr)
    return not reason


def is_fast_muon_right(model, device):
    """Whether Muon's fast way to orthogonalise agrees with the plain one here, for all shapes."""
    generator = torch.Generator(device).manual_seed(0)
    for shape in sorted({matrix.shape for matrix in model.layer_matrices()}):
        X = torch.randn(1, *shape, generator=generator, device=device)
        found = {"matrix": optim.orthogonalise(X)}
        expected = {"matrix": optim.orthogonalise(X, fast=False)}
        kind = "bf16" if device.type == "cuda" else "float32"
        if reason := difference(found, expected, TOLERANCE[kind]):
            wrong = f"Muon's fast way is wrong for matrices of {tuple(shape)} ({reason})"
            print(f"{wrong}: not used", file=sys.stderr)
            return False
    return True


# ---------------------------------------------------------------- is it right?


def checked_times(segment_ids, seen):
    """Choose times with both ends: an edit that only matters there must show."""
    B, L = segment_ids.shape
    t = torch.tensor([0.0, 0.001, 0.5, 0.01, 1.0, 0.99, 0.3, 0.999], device=segment_ids.device)
    t = t.repeat(B, -(-L // len(t)))[:, :L].contiguous()
    return t, torch.ones_like(t)


class Check:
    """Compare forms on one training step with random weights: its loss and all gradients.

    kind, config: class and sizes of the network. plain: the form that is right. batch: see
    train.accumulate_gradients.
    """

    def __init__(self, kind, config, plain, batch, device, accumulate):
        self.kind, self.config, self.plain = kind, config, plain
        self.batch, self.device, self.accumulate = batch, device, accumulate

    @cached_property
    def expected(self):
        """What the plain form gives in full float32 precision: see `step`."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # TF32 differs too much to compare with
        try:
            return self.step(self.network(self.plain))
        finally:
            torch.set_float32_matmul_precision(before)

    def own_random_numbers(self):
        """Keep the random numbers of the run as they are: a context."""
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    def network(self, form):
        """Build a network that computes in a form. Its weights are always the same, none zero."""
        with self.own_random_numbers():
            torch.manual_seed(0)
            network = self.kind(self.config)
            for p in network.parameters():
                if p.requires_grad:
                    torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.ndim > 1 else 0.2)
        network.to(self.device).use(form)
        return network

    def step(self, network):
        """Take the loss and the gradients of a step, with the same noise -> {name: tensor}."""
        network.zero_grad(set_to_none=True)
        inputs = network, [self.batch], [0], self.device
        with self.own_random_numbers():
            found = {"the loss": self.accumulate(*inputs, times=checked_times)}
        for name, p in reversed(list(network.named_parameters())):  # the last is computed first
            if p.grad is not None:
                found[f"the gradient of {name}"] = p.grad
        return found

    def fault(self, form):
        """Say what is wrong in this form, in any process of the run -> a reason, or None."""
        if form == self.plain:
            return None
        reason = None
        try:
            found = self.step(self.network(form))
            kind = "bf16" if form.bf16 else "tf32" if self.device.type == "cuda" else "float32"
            if reason := difference(found, self.expected, TOLERANCE[kind]):
                reason = f"other numbers than the plain form, {reason}"
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # noqa: BLE001 - a compiler raises many kinds
            misfit = f"{form} does not fit this network{in_brackets(error)}"
            reason = compiler_fault(error) if form.compiled else misfit
        n_wrong = parallel.total(int(reason is not None))
        return reason or ("other numbers in another process" if n_wrong else None)

    def seconds(self, form):
        """Measure a step in this form, as the first process does -> seconds."""
        network = self.network(form)
        seconds = median_seconds(lambda: self.step(network)["the loss"].item())
        return parallel.from_first(seconds)


def difference(found, expected, tolerance):
    """Say which tensor differs by more than tolerance times its norm -> words, or None."""
    for name, x in expected.items():
        if name not in found:
            return f"{name} is missing"
        error, size = (found[name].float() - x).norm().item(), x.norm().item()
        if not error < float("inf"):  # NaN is not less than anything
            return f"{name} is not finite"
        if error > tolerance * size + 1e-7:
            return f"{name} is off by {error / max(size, 1e-30):.1%}"
    return None


def compiler_fault(error):
    """Say why torch.compile failed -> words."""
    if re.search("No working C\\+\\+ compiler|Failed to find C compiler", str(error)):
        return "no C++ compiler (g++) was found"
    while inner := getattr(error, "inner_exception", None):  # the outer one says: "backend raised"
        error = inner
    return f"torch.compile failed{in_brackets(error)}"


def in_brackets(error):
    """Quote an error in one line -> words, or nothing if it has no message."""
    lines = str(error).strip().splitlines()
    return f" ({type(error).__name__}: {lines[0]:.200})" if lines else ""


# ---------------------------------------------------------------- how fast?


def warm_up(state, batch, args, device, accumulate):
    """Do the work of some steps, but change nothing -> seconds that a step takes."""
    model = state.model

    def micro_batch():
        model.zero_grad(set_to_none=True)
        accumulate(model, [batch], [0], device).item()

    new = [optimizer for optimizer in state.optimizers if not optimizer.state]

    def update():
        parallel.add_up([p.grad for p in shards.not_cut(model)])
        for optimizer in state.optimizers:
            optimizer.found_inf = torch.ones((), device=device)  # computed, but left out
            optimizer.step()
        next(model.parameters()).sum().item()  # waits for the device

    check_optimizers(state.optimizers)
    for _ in range(2):
        micro_batch()
    counts = (5, 5) if args.shard else ()  # as often in all processes, which exchange weights
    seconds = args.accumulation_steps // parallel.size() * median_seconds(micro_batch, *counts)
    parallel.wait()  # they may have compiled for different times
    update()  # the first takes longer
    seconds += median_seconds(update, 5, 5)  # as often in all processes, which exchange updates
    for optimizer in new:  # torch's fused SGD leaves garbage where its first step is left out
        optimizer.state.clear()
    model.zero_grad(set_to_none=True)
    return seconds


def check_optimizers(optimizers):
    """Raise ValueError for an optimizer that would step where a gradient is not finite."""
    for optimizer in optimizers:
        if not getattr(optimizer, "_step_supports_amp_scaling", False):  # torch's own name for it
            way = "give it fused=True, or let it read found_inf as Muon in training/optim.py does"
            raise ValueError(f"{type(optimizer).__name__} does not skip bad steps: {way}")


def median_seconds(work, least=2, most=10, seconds=2.0):
    """Repeat work for about `seconds`, `least` to `most` times -> median seconds of a call."""
    times = []
    while len(times) < least or (len(times) < most and sum(times) < seconds):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
