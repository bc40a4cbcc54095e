"""How the same numbers are computed: compiled, fused, with flex attention, in bfloat16. Chosen, checked and timed before a run.

`accumulate` is train.accumulate_gradients(model, batches, seeds, device, times) throughout.
"""

import sys
import time

import torch

import fused
import log
import parallel
from times import Times

FUSED_FROM = 1000  # tokens of vocabulary; below, the plain form is as fast
COMPILED_FROM = 256  # width, on a CPU; below, compiling gains nothing
FLEX_FROM = 256  # length of rows; below, the mask is small


def set_switches(model, args, device, accumulate):
    """Choose how to compute, by the flags, the device and the sizes. The numbers stay the same up to rounding.

    Raises ValueError for --fused=on if the fused form cannot be used.
    """
    model.bf16, model.recompute, model.fused = log.fast_bf16(device), args.recompute, can_fuse(model, args, accumulate)
    model.compiled = wants_compiled(args, device)
    if model.compiled:
        wide_heads = args.model_dim // args.num_heads >= 16  # flex attention takes no narrower ones
        model.flex = device.type == "cuda" and args.sequence_length >= FLEX_FROM and wide_heads
        for part in (model.convolution, *model.blocks):
            part.compile()  # one program for all blocks: much faster to compile than the whole model


def wants_compiled(args, device):
    """Whether the blocks are to be compiled, by the flags, the device and the width."""
    return args.compile == "on" or (args.compile == "auto" and (device.type == "cuda" or args.model_dim >= COMPILED_FROM))


def wants_fused(args, K):
    """Whether to train by fused.py if it can be used, by the flags and the size of the vocabulary."""
    return args.fused == "on" or (args.fused == "auto" and K >= FUSED_FROM)


class CheckTimes(Times):
    """Times of the check, with both ends: an edit that only matters there must show."""

    def draw(self, segment_ids):
        t = torch.tensor([0.0, 0.001, 0.5, 0.01, 1.0, 0.99, 0.3, 0.999]).expand(segment_ids.shape)
        return t.clone(), torch.ones(segment_ids.shape)


def can_fuse(model, args, accumulate):
    """Whether to train by fused.py, after a check that it computes what the plain form computes.

    Raises ValueError for --fused=on if it does not; --fused=auto then says so and trains in the plain form.
    """
    if not wants_fused(args, model.config.K):
        return False
    cpu = torch.device("cpu")
    try:
        fused.check(model, lambda small, batch: accumulate(small, [batch], [0], cpu, CheckTimes("uniform", 0.0)))
    except ValueError as error:
        if args.fused == "on":
            raise ValueError(f"{error}: use --fused=off") from None
        print(f"{error}: training in the plain form, as with --fused=off", file=sys.stderr)
        return False
    return True


def seconds_per_step(model, loader, args, device, accumulate, optimizers):
    """Do the work of some steps, but change nothing -> seconds that a step takes."""
    times, batch = Times(args.times, args.position_times, device), loader.batch(0, 0.25)  # of the first half; nothing is learned

    def micro_batch():
        model.zero_grad(set_to_none=True)
        accumulate(model, [batch], [0], device, times).item()

    def update():
        for optimizer in optimizers:
            optimizer.found_inf = torch.ones((), device=device)  # it computes the update and leaves it out
            optimizer.step()
        next(model.parameters()).sum().item()  # waits for the device

    for _ in range(2):  # the first call compiles
        micro_batch()
    seconds = args.accumulation_steps // parallel.size() * mean_seconds(micro_batch)
    parallel.wait()  # they may have compiled for different times
    seconds += mean_seconds(update, 5, 5)  # as often in all processes, which exchange their updates
    parallel.limit_steps(seconds)
    model.zero_grad(set_to_none=True)
    return seconds


def mean_seconds(work, least=2, most=10, seconds=2.0):
    """Repeat work for about 2 seconds, 2 to 10 times -> mean time."""
    begin, n = time.perf_counter(), 0
    while n < least or (n < most and time.perf_counter() - begin < seconds):
        work()
        n += 1
    return (time.perf_counter() - begin) / n


def warm_up(model, loader, args, device, accumulate, optimizers):
    """Compile and measure -> seconds per step. If the compiler fails, go on without it."""
    try:
        return seconds_per_step(model, loader, args, device, accumulate, optimizers)
    except Exception as error:  # the compiler raises many kinds
        if not model.compiled or isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        print(f"torch.compile failed ({type(error).__name__}: {reason}): going on without it", file=sys.stderr)
    torch.compiler.set_stance("force_eager")
    model.compiled = model.flex = False
    return seconds_per_step(model, loader, args, device, accumulate, optimizers)
