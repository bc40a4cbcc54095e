"""Let the threads of OpenMP wait by spinning on a quiet machine, and asleep on a busy one.

Spinning is fastest. But if another process is busy, it takes the core of a thread for which the
others then spin, and training loses more than half of its speed. GNU's OpenMP hardly spins while it
has more threads than cores (`gomp_managed_threads` in the source of libgomp). So a second team of
threads, which does nothing, makes the first one sleep. As many threads as before share the work, so
sums stay the same.
"""

import atexit
import os
import threading
import time
from functools import cache

import torch

LOOK_SECONDS = 2
BUSY = 0.25  # cores that others may use before their work counts


def used_seconds():
    """CPU seconds used so far: by all processes on the cores of this one, and by it -> 2 floats.

    Raises OSError where /proc/stat does not tell: this is not Linux.
    """
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    with open("/proc/stat") as file:
        lines = [line.split() for line in file if line.split()[0] in cores]
    # user nice system idle iowait irq softirq steal, in ticks
    ticks = sum(int(n) for line in lines for n in [*line[1:4], *line[6:9]])
    return ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


@cache
def watch(n_threads=None, look_seconds=LOOK_SECONDS):
    """Look from now on whether others are busy, and choose how `n_threads` wait.

    Does nothing if there is one thread, if the user has chosen, or if this is not Linux.
    """
    n_threads = n_threads or torch.get_num_threads()
    chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    if n_threads > 1 and not chosen and os.path.exists("/proc/stat"):
        _start(_look, n_threads, look_seconds)


def _start(work, *args):
    """Start a thread that works until an Event, the last argument, is set -> function that ends it.

    A thread that is still inside torch when Python ends would abort the process.
    """
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(*args, stop), daemon=True)
    thread.start()

    def end():
        stop.set()
        thread.join()
        atexit.unregister(end)

    atexit.register(end)
    return end


def _look(n_threads, look_seconds, stop):
    """Look again and again, and hold a second team of threads as long as others are busy."""
    n_cores = len(os.sched_getaffinity(0))
    end_team, before = None, (time.monotonic(), *used_seconds())
    while not stop.wait(look_seconds):
        now = (time.monotonic(), *used_seconds())
        seconds, everyone, we = (b - a for a, b in zip(before, now, strict=True))
        busy = (everyone - we) / seconds > n_cores - n_threads + BUSY
        if busy and not end_team:
            end_team = hold_team(n_threads)
        elif end_team and not busy:
            end_team = end_team()
        before = now


def hold_team(n_threads):
    """Start a second team of threads -> function that ends it."""
    ready = threading.Event()

    def hold(stop):
        torch.zeros(n_threads * 65_536).add_(1)  # twice the least that torch gives to a thread
        ready.set()
        stop.wait()

    end = _start(hold)
    ready.wait()
    return end
