"""One run in many processes. torchrun starts them, each does its share, and the first one writes.

    torchrun --nproc_per_node=4 train.py -d=CORPUS.txt -mdir=RUN_DIR

A step consists of numbered micro-batches. Process r takes micro-batches r, r + size, ... What is in
them follows from the seed and their numbers. So the result does not depend on the number of
processes, except for the order in which gradients are added up. Each process holds all weights,
moments and averages, but see training/shards.py. Samples are numbered and shared in the same way.
Without torchrun, every function here returns what it was given. Small counts are sent between CPUs
(gloo), so that nothing waits for a GPU. Gradients go by NCCL between GPUs.
"""

import atexit
import io
import os
import socket
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import wraps

import torch
import torch.distributed as dist

from common import waiting

# After a lost process, torchrun ends the others 30 seconds later.
TIMEOUT_MINUTES = os.environ.get("BFN_TIMEOUT_MINUTES", "2")
STEP_TIMEOUT = timedelta(minutes=float(TIMEOUT_MINUTES) if TIMEOUT_MINUTES.isdecimal() else 2)
START_TIMEOUT = 5 * STEP_TIMEOUT  # until all processes have started; also between GPUs
LONG_TIMEOUT = timedelta(days=1)  # for work that nothing has measured, such as tokenising
BUCKET = 2**23  # numbers that are sent at once
_step_group = _patient_group = None  # groups of all processes, between CPUs, that wait for so long


class WithoutBars(io.TextIOWrapper):
    """Standard error of a process that is not the first: errors, but no progress bars."""

    def isatty(self):
        return False


def find_device(name):
    """Find a device: "auto", "cpu", "cuda", "cuda:1", ... Raises ValueError if there is none."""
    if str(name).startswith("mps"):
        raise ValueError("--device=mps (the GPU of a Mac) is not supported: use --device=cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with suppress(RuntimeError, AssertionError, NotImplementedError, ImportError):
        found = torch.device(name)
        torch.zeros((), device=found)
        if found.type in ("cpu", "cuda"):
            waiting.watch()
            return found
    advice = "use --device=cpu, or --device=cuda if there is a GPU"
    raise ValueError(f"no device {name!r} here: {advice}")


def join(name):
    """Find the device as `find_device` does, and meet the other processes of torchrun."""
    global _step_group, _patient_group
    keys = "WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_RANK RANK MASTER_PORT BFN_TIMEOUT_MINUTES"
    for key in keys.split():
        value = os.environ.get(key, "1")
        if not value.isdecimal() or (key == "BFN_TIMEOUT_MINUTES" and int(value) == 0):
            raise ValueError(f"{key} is {value!r}: unset it, or use torchrun")
    many, local = int(os.environ.get("WORLD_SIZE", "1")) > 1, int(os.environ.get("LOCAL_RANK", "0"))
    if many and str(name) in ("auto", "cuda") and torch.cuda.is_available():
        if local >= (n := torch.cuda.device_count()):
            found = f"process {local + 1} of this machine has no GPU, there are {n}"
            raise ValueError(f"{found}: lower --nproc_per_node")
        torch.cuda.set_device(local)  # first: else all processes allocate on GPU 0
        name = f"cuda:{local}"
    device = find_device(name)
    if not many:
        return device
    try:
        socket.getaddrinfo(os.environ.get("MASTER_ADDR", "localhost"), None)
    except OSError as error:
        raise ValueError(f"MASTER_ADDR names no machine: {error.strerror}") from None
    with _report_lost_process():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=START_TIMEOUT)
        _step_group = _patient_group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
    atexit.register(dist.destroy_process_group)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
        sys.stderr = WithoutBars(open(2, "wb", closefd=False), line_buffering=True)
    return device


def limit_waiting(step_seconds, val_seconds):
    """From now on, end with an error if a process is late, by what a step and a validation take.

    That is STEP_TIMEOUT or four steps within a step, START_TIMEOUT or ten validations elsewhere.
    """
    global _step_group, _patient_group
    if size() > 1:
        with _report_lost_process():
            timeout = max(STEP_TIMEOUT, 4 * timedelta(seconds=step_seconds))
            _step_group = dist.new_group(backend="gloo", timeout=timeout)
            timeout = max(START_TIMEOUT, 10 * timedelta(seconds=val_seconds))
            _patient_group = dist.new_group(backend="gloo", timeout=timeout)


def check_same(value, what):
    """Raise ValueError if a text is not the same in all processes. what: words for the message."""
    if from_first(value) != value:
        raise ValueError(f"process {rank()} has other {what} than the first: start all alike")


def size():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Number of this process: 0, 1, ..."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(items):
    """Select this process's part of a sequence: items r, r + size, ..."""
    return items[rank() :: size()]


def micro_batches(count=None):
    """Check that the processes can share `count` micro-batches evenly -> count, or one for each."""
    count = count or size()
    if count % size():
        found = f"{size()} processes cannot share {count} micro-batches of a step evenly"
        raise ValueError(f"{found}: give -acc={size()} or a multiple")
    return count


def first_only(function):
    """Make a function that only the first process runs. The others wait, and get None."""

    @wraps(function)
    def run(*args, **options):
        result = function(*args, **options) if rank() == 0 else None
        wait()
        return result

    return run


@contextmanager
def _report_lost_process():
    """Say in one line that another process is gone. Raises ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        found = "another process of this run has stopped, or does not answer"
        found = f"process {os.environ.get('RANK')}: {found} ({' '.join(str(error).split()):.200})"
        raise ConnectionError(f"{found}. Run the same command again; training resumes") from error


@contextmanager
def first_alone():
    """Run the block in the first process, then in the others, which find the files it wrote."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


def wait():
    """Wait until all processes are here."""
    if size() > 1:
        with _report_lost_process():
            dist.barrier(group=_patient_group)


def from_first(value):
    """Send a value of plain types from the first process to all -> it."""
    if size() == 1:
        return value
    box = [value]
    with _report_lost_process():
        dist.broadcast_object_list(box, group=_patient_group)
    return box[0]


def total(count):
    """Add up a count over all processes -> int."""
    box = torch.tensor([count])
    add_up([box])
    return int(box)


def add_up(tensors, patient=False):
    """Add up tensors of one dtype and device over all processes, in place.

    patient: their work is not equal, so wait for them. Only for tensors on the CPU.
    """
    if size() == 1:
        return
    flat = torch.cat([x.flatten() for x in tensors])
    with _report_lost_process():
        dist.all_reduce(flat, group=_patient_group if patient else _group_of(flat))
    _unflatten(flat, tensors)


class GradientSum:
    """Adds up gradients over all processes, in place, while the backward pass goes on.

    It sends them in the order in which they become ready, which is the same in all processes.
    n_passes: backward passes of a step; the last one sends.
    """

    def __init__(self, parameters, n_passes):
        self.n_passes, self.counts = n_passes, Counter()
        self.bucket, self.sent = [], []
        if size() == 1:
            return
        for p in parameters:
            p.register_post_accumulate_grad_hook(self._add)

    def _add(self, p):
        self.counts[p] += 1
        if self.counts[p] == self.n_passes:
            self.bucket.append(p.grad)
            if sum(x.numel() for x in self.bucket) >= BUCKET:
                self._send()

    def _send(self):
        flat = torch.cat([x.flatten() for x in self.bucket])
        with _report_lost_process():
            message = dist.all_reduce(flat, group=_group_of(flat), async_op=True)
        self.sent.append((message, flat, self.bucket))
        self.bucket = []

    def finish(self, loss):
        """Wait until the gradients of a step are added up, and its loss.

        Raises ValueError for a gradient that was not computed in each pass, and was not sent.
        """
        if size() == 1:
            return
        if any(n != self.n_passes for n in self.counts.values()):
            raise ValueError("a weight has no gradient in some micro-batch: use it in all")
        self.bucket.append(loss)
        self._send()
        for message, flat, tensors in self.sent:
            with _report_lost_process():
                message.wait()
            _unflatten(flat, tensors)
        self.counts.clear()
        self.sent.clear()


def exchange(tensors, owners):
    """Send tensors of one dtype and device from the ranks `owners` to all, in place."""
    parts = {}
    for x, owner in zip(tensors, owners, strict=True):
        parts.setdefault(owner, []).append(x)
    sent = [(r, torch.cat([x.flatten() for x in part])) for r, part in parts.items()]
    with _report_lost_process():
        group = _group_of(tensors[0])
        for message in [dist.broadcast(x, r, group=group, async_op=True) for r, x in sent]:
            message.wait()
    for r, flat in sent:
        _unflatten(flat, parts[r])


def _group_of(x):
    """The group that exchanges a tensor within a step."""
    return None if x.is_cuda else _step_group


def _unflatten(flat, tensors):
    """Copy one long tensor into those that it was joined from."""
    parts = zip(flat.split([x.numel() for x in tensors]), tensors, strict=True)
    torch._foreach_copy_(list(tensors), [part.view_as(x) for part, x in parts])


def in_order(items, n):
    """Yield what all processes make of n things, in order. items: plain types, of this `share`."""
    if size() == 1:
        yield from items
        return
    for i in range(0, n, size()):
        item, box = next(items, None), [None] * size()
        with _report_lost_process():
            dist.all_gather_object(box, item, group=_patient_group)
        yield from box[: n - i]


def prefetch(function, items, depth=8, threads=1):
    """Yield function(item) for each item, in order. Threads compute the next `depth` meanwhile."""
    with ThreadPoolExecutor(threads) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
