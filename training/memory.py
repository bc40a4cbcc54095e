"""How much memory a training step takes, and the refusal of a step that does not fit.

The estimate is known before anything is allocated. Its constants were measured on CPUs with torch
2.13. With tensors of 32 MB and more it is between 15 % below the peak of the process and 2 % above
it. With smaller ones, malloc keeps up to as much again.
"""

import math
import os
import sys
from argparse import Namespace
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import torch

from common import cli, parallel
from model import BFNTransformer
from training import forms, fused

# Bytes that a layer keeps for the gradient, per token and unit of width, by (compiled, bf16).
LAYER = {(False, False): 142, (False, True): 120, (True, False): 96, (True, True): 68}
LAYER_GPU = LAYER | {(True, True): 50}  # counted on allocations of the CUDA build of torch
RECOMPUTED = 4  # the same with --recompute: the layer's input
OUTSIDE = 55  # the same before and after the layers
LOGITS = 32  # bytes per token and token of the vocabulary; the fused form has only a chunk of them
MUON_COPIES = 6  # of all matrices of a shape, while they are orthogonalised
PROCESS = {"cpu": 0.35e9, "cuda": 0.0}  # of Python and torch
GROWN = "base"  # the preset whose batch grows, on a GPU
MOST_GROWTH = 4  # of the tokens of a step: so far the rule for the learning rate was tried
GROWN_SHARE = 0.5  # of the memory
LEAST_STEPS = 2000  # of a run whose batch grows
MARGIN = 1.3  # refused is only what takes this much more than there is: what fits must start


def step_bytes(config, args, device, form=None):
    """Estimate the most memory that a training step takes at once, in bytes.

    form: of the computation, by default that of `forms.wanted_form`.

        weights + averages + moments + max(activations, gradients + work space of the optimizer)

    With several micro-batches, the gradients are there while the next ones are computed. A batch or
    a length that is not chosen yet (None) counts as one.
    """
    with torch.device("meta"):  # takes no memory
        model = BFNTransformer(config)
    of_shape = Counter()
    for matrix in model.layer_matrices():
        of_shape[matrix.shape] += 4 * matrix.numel()
    weights = sum(4 * p.numel() for p in model.parameters())
    in_muon = of_shape.total()
    averages = weights * len(args.ema_rate)
    optimizer = MUON_COPIES * max(of_shape.values())
    if args.shard and parallel.size() > 1:
        optimizer = (in_muon + optimizer) // config.n_layers  # those of one layer are whole
        weights -= in_muon
        in_muon //= parallel.size()
        weights += in_muon
    moments = 2 * (weights - in_muon) + in_muon
    optimizer += weights
    accumulated = weights if args.accumulation_steps > parallel.size() else 0
    at_once = max(optimizer, accumulated + activation_bytes(config, args, device, form))
    return int(PROCESS[device.type] + weights + averages + moments + at_once)


def activation_bytes(config, args, device, form=None):
    """Estimate what a micro-batch keeps for its gradient, in bytes."""
    B, L, D = args.batch_size or 1, args.sequence_length or 1, config.d_model
    form = form or forms.wanted_form(args, config, device)
    layer = (LAYER_GPU if device.type == "cuda" else LAYER)[form.compiled, form.bf16] * D
    if device.type == "cpu":  # the scores, or the mask in float32; GPUs compute them again
        layer += 2 * config.n_heads * L if form.written else 4 * L
    layers = config.n_layers * layer
    if form.recompute:
        layers = config.n_layers * RECOMPUTED * D + layer
    n_logits = B * L * config.K
    if form.fused:
        n_logits = min(n_logits, fused.CHUNK[device.type])
    return B * L * (layers + OUTSIDE * D) + LOGITS * n_logits


def total_bytes(device):
    """Read how much memory a process may use, in bytes; infinite where the system does not tell.

    It is the GPU's, or the machine's within the limits of cgroups, which the processes that
    torchrun starts there share.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [math.inf]
    with suppress(AttributeError, ValueError, OSError):  # Windows
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError):  # not Linux
        limits += cgroup_limits(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup"))
    return min(limits) / max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def cgroup_limits(groups, root):
    """Read the limits of the groups in /proc/self/cgroup, and of those around them -> bytes.

    groups: the text of that file. root: the folder of all groups. Both versions of cgroups are
    known; a container sees its own group as the root.
    """
    limits = []
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        top, name = root, "memory.max"
        if "memory" in controllers.split(","):  # version 1 has a folder for each controller
            top, name = root / "memory", "memory.limit_in_bytes"
        path = PurePosixPath(path).relative_to("/")
        for group in (path, *path.parents):
            with suppress(OSError, ValueError):  # no such file, or "max"
                limits.append(int((top / group / name).read_text()))
    return limits


def check(config, args, device):
    """Refuse a training step that does not fit -> advice for when memory runs out all the same.

    Raises ValueError if the estimate is more than MARGIN times what there is.
    """
    needed, there = step_bytes(config, args, device), total_bytes(device)
    ways = ["a lower -slen", "a smaller --preset"]
    if not args.recompute:
        ways.insert(0, "--recompute")
    if (args.batch_size or 1) > 1:
        ways.insert(0, "a lower -bsz with a higher -acc")
    figures = f"takes about {needed / 1e9:,.1f} GB, and there are {there / 1e9:,.1f} GB on {device}"
    advice = f"a training step {figures}: {', '.join(ways[:-1])} or {ways[-1]} takes less"
    if needed > MARGIN * there:
        raise ValueError(advice)
    return advice


def fit(model, args, device):
    """Recompute activations if the form that a network has now would not fit without."""
    form = model.form
    needed = step_bytes(model.config, args, device, form)
    if needed > total_bytes(device) and not form.recompute:
        found = f"{form} takes about {needed / 1e9:,.1f} GB of {total_bytes(device) / 1e9:,.1f}"
        if parallel.rank() == 0:
            print(f"{found}: training as with --recompute", file=sys.stderr)
        model.use(form._replace(recompute=True))


def not_named(args):
    """List what `grow_batch` may choose, before the flags are completed."""
    return [name for name in ("batch_size", "learning_rate") if getattr(args, name) is None]


def grow_batch(config, args, device, n_tokens):
    """Double the rows of a micro-batch while memory is left; scale the learning rate with the step.

        learning rate = that of the preset sqrt(min(4, tokens of a step / those of the preset))

    Only for a new run of the preset GROWN on a GPU, and only what no flag names (args.by_memory,
    which this removes). n_tokens: of an epoch; the steps of --epochs stay above LEAST_STEPS.
    """
    free = vars(args).pop("by_memory")
    if device.type != "cuda" or args.preset != GROWN or "batch_size" not in free:
        return
    growth, accumulation = 1, args.accumulation_steps
    n_tokens *= math.inf if args.minutes or args.max_steps else args.epochs
    while 2 * growth * accumulation <= MOST_GROWTH:
        larger = Namespace(**vars(args) | dict(batch_size=2 * growth * args.batch_size))
        step_tokens = larger.batch_size * args.sequence_length * accumulation
        if LEAST_STEPS * step_tokens > n_tokens:
            break
        if step_bytes(config, larger, device) > GROWN_SHARE * total_bytes(device):
            break
        growth *= 2
    growth = parallel.from_first(growth)  # memories differ
    args.batch_size *= growth
    if "learning_rate" in free:
        args.learning_rate *= min(MOST_GROWTH, growth * accumulation) ** 0.5


@contextmanager
def explained(advice):
    """Raise MemoryError with this advice if memory runs out within the block."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not cli.ran_out_of_memory(error):
            raise
        raise MemoryError(f"out of memory: {advice}") from error
