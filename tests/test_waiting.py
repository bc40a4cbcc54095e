"""How threads wait for each other: asleep while others are busy, by spinning otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

if not sys.platform.startswith("linux") or len(os.sched_getaffinity(0)) < 2:
    pytest.skip("needs Linux and two cores", allow_module_level=True)

START = "import subprocess, sys, threading, time, torch; from common import waiting\n"

SPIN = """
def spin():
    x, begin = torch.zeros(torch.get_num_threads() * 65_536), time.process_time()
    for _ in range(100):
        x.add_(1)
        time.sleep(0.002)
    return time.process_time() - begin

print("spinning", spin())
end = waiting.hold_team(torch.get_num_threads())
print("asleep", spin())
end()
"""

WATCH = """
waiting.watch(look_seconds=0.2)
before = waiting.used_seconds()
busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
end = time.monotonic() + SECONDS
while threading.active_count() < 3 and time.monotonic() < end:
    time.sleep(0.1)
busy.kill()
print("threads", threading.active_count())
everyone, we = (b - a for a, b in zip(before, waiting.used_seconds()))
print("others", everyone - we)
"""


def printed(code, **environ):
    """Run Python code in a new process, with a thread for each core -> {word: number} it prints."""
    unset = "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    environ |= {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", START + code],
        cwd=Path(__file__).parent.parent,
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    return {word: float(number) for word, number in map(str.split, done.stdout.splitlines())}


def test_threads_sleep_while_another_process_is_busy():
    found = printed(SPIN + WATCH.replace("SECONDS", "60"))
    assert found["asleep"] < 0.7 * found["spinning"]
    assert found["threads"] == 3  # main, the watch, and the second team
    assert found["others"] > 0


def test_what_the_user_chose_stays():
    assert printed(WATCH.replace("SECONDS", "1"), OMP_WAIT_POLICY="PASSIVE")["threads"] == 1
