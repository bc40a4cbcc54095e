"""Interrupt tiny trainings at random moments: the same command then ends with the same run.

    python tests/crash.py --rounds=100

A round interrupts a training in one of the PHASES, by one of the ACTIONS. The moment is the n-th
call or return of a function in that phase (of the imports: the n-th module), so a seed repeats it.
A folder sees one to three rounds, then the command runs to its end there. Other rounds are the
FAULTS. After each of them:

- checkpoints can be read, and hold at least the steps of the last save that was complete
- standard error has no traceback, and an error is one line with exit code 2 that names a file
- at the end, checkpoints, losses, bounds and samples are those of an uninterrupted run

The processes are forks of this one, which has imported all packages. Folders that failed are kept
and named.
"""

import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from untrained import equal

import evaluate
import plot
import train
from common import cli
from text import cache, toy
from training import forms, log, run_folder
from training.checkpoint import read_checkpoint, read_metrics

os.environ.setdefault("OMP_NUM_THREADS", "1")

FLAGS = "-mdim=32 -nl=2 -nh=2 -bsz=4 -slen=32 -nex=2 -lgi=1 -vli=4 -smi=4 -svi=3".split()
FLAGS += ["--max_steps=8", "-lr=0.003", "--tokenizer=word"]
SECONDS = 120  # a process that takes longer hangs
PHASES = {  # the functions that are a phase each, or a part of it
    "imports": [],
    "tokenising": [(run_folder, "prepare_text")],
    "probing": [(forms, "warm_up"), (evaluate, "validation_seconds")],
    "training": [(train, "accumulate_gradients"), (train, "update_weights")],
    "validating": [(evaluate, "validate"), (log, "draw_curves")],
    "saving": [(train, "save")],
    "sampling": [(log, "write_samples")],
}
ACTIONS = {
    "kill -9": signal.SIGKILL,
    "SIGTERM": signal.SIGTERM,
    "Ctrl-C": signal.SIGINT,
    "full disk": None,
}
FAULTS = (
    "read-only folder",
    "two processes",
    "truncated checkpoint",
    "flipped bit",
    "empty checkpoint",
)
IMPORTS = """
import os, runpy, sys
n, moment, number = 0, int(sys.argv[1]), int(sys.argv[2])

class Count:
    def find_spec(self, name, path=None, target=None):
        global n
        n += n > 0 or name == "numpy"  # the first large package
        if n == moment:
            os.kill(os.getpid(), number)

sys.meta_path.insert(0, Count())
sys.argv = ["train.py", *sys.argv[3:]]
runpy.run_path("train.py", run_name="__main__")
"""

# ---------------------------------------------------------------- one process


class Watch:
    """Count calls and returns of functions in a phase (None: in all), and act at a moment.

    notes: file descriptor to which a line is written for the moment and for each complete save.
    """

    def __init__(self, notes, phase=None, moment=None, action=None):
        self.notes, self.phase, self.moment, self.action = notes, phase, moment, action
        self.now, self.counts = None, Counter()
        for name, functions in PHASES.items():
            for module, function in functions:
                setattr(module, function, self.wrap(name, getattr(module, function)))

    def wrap(self, name, function):
        def watched(*args, **options):
            if self.now:  # a part of another phase
                return function(*args, **options)
            self.now = name
            sys.setprofile(self.count if self.phase in (name, None) else None)
            try:
                result = function(*args, **options)
            finally:
                sys.setprofile(None)
                self.now = None
            if name == "saving":
                self.note(f"saved {args[0].step}")
            return result

        return watched

    def count(self, _frame, _event, _argument):
        self.counts[self.now] += 1
        if self.counts[self.now] == self.moment:
            self.note("reached")
            self.action()

    def note(self, text):
        os.write(self.notes, f"{text}\n".encode())


def fill_disk():
    """From now on no file can be written to, and none can grow."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def send(number):
    """Make an action: the process sends a signal to itself."""
    return lambda: os.kill(os.getpid(), number)


@dataclass
class Outcome:
    """What a process left behind."""

    code: int | str  # exit code, negative for a signal, or "hangs"
    err: str
    reached: bool  # the chosen moment
    saved: int  # step of the last complete save, 0 for none
    counts: dict  # calls and returns in each phase, if it ended by itself


def words(folder):
    """The words of the command line of a training in a folder."""
    return [
        "train.py",
        f"-d={folder.parent / 'corpus.txt'}",
        f"-mdir={folder / 'run'}",
        f"--cache_dir={folder / 'cache'}",
        *FLAGS,
    ]


def victim(folder, pipes, phase, moment, action, as_nobody):
    """Train in a folder. The body of a forked process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )
    tqdm._instances.clear()  # the bar of the first process is not ours
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(pipes["err"][1], 2)
    if as_nobody:
        os.seteuid(65534)
    run_folder.VAL_TOKENS = (
        run_folder.LEAST_VAL_TOKENS
    )  # and not a number that follows from the speed
    cache.BATCH, cache.PART_BYTES = 10, 1000  # so that this small text has several parts
    plot._draw = lambda path, *_: path.write_bytes(
        b"a picture, without the seconds that matplotlib takes"
    )
    watch = Watch(pipes["notes"][1], phase, moment, action)
    sys.argv = words(folder)
    cli.run(train.main)
    watch.note("counts " + json.dumps(watch.counts))


class Process:
    """A training in a folder, begun as a fork. action: what it does to itself at a moment."""

    def __init__(self, folder, phase="none", moment=None, action=None, as_nobody=False):
        self.pipes = {name: os.pipe() for name in ("err", "notes")}
        sys.stdout.flush()
        arguments = folder, self.pipes, phase, moment, action, as_nobody
        self.process = multiprocessing.get_context("fork").Process(target=victim, args=arguments)
        self.process.start()
        for _, writing in self.pipes.values():
            os.close(writing)

    def wait_for_note(self):
        """Wait until it has written a note, or has ended -> the note."""
        return os.read(self.pipes["notes"][0], 1 << 16).decode()

    def end(self, noted=""):
        """Wait for its end -> Outcome. noted: what was read of its notes before."""
        self.process.join(SECONDS)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
            code = "hangs"
        texts = {}
        for name, (reading, _) in self.pipes.items():
            with open(reading, encoding="utf-8", errors="replace") as file:
                texts[name] = file.read()
        notes = (noted + texts["notes"]).splitlines()
        saved = [int(note.split()[1]) for note in notes if note.startswith("saved")]
        counts = [
            json.loads(note.removeprefix("counts ")) for note in notes if note.startswith("counts")
        ]
        return Outcome(
            code,
            texts["err"],
            "reached" in notes,
            max(saved, default=0),
            counts[0] if counts else {},
        )


def interrupt_imports(folder, moment, number):
    """Start a process that sends itself a signal at its `moment`-th import -> Outcome."""
    argv = [sys.executable, "-c", IMPORTS, str(moment), str(int(number)), *words(folder)[1:]]
    done = subprocess.run(
        argv, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    return Outcome(done.returncode, done.stderr, True, 0, {})


# ---------------------------------------------------------------- what must be true


def one_line_error(outcome):
    """Complaints about an error: it must be one line, exit code 2, and name a file -> list."""
    lines = [line for line in outcome.err.splitlines() if "error: " in line]
    if outcome.code != 2 or len(lines) != 1 or "/" not in lines[0]:
        return [
            f"exit code {outcome.code}, not one line that names a file: {outcome.err.strip()!r}"
        ]
    return []


def traceback_of(outcome):
    """Complaints about what standard error must never show -> list."""
    found = re.search(r"Traceback|Exception ignored|hangs", f"{outcome.err} {outcome.code}")
    return [f"{found[0]}: {outcome.err.strip()[-2000:]!r}"] if found else []


def check_interrupted(outcome, action, folder):
    """Complaints about an interrupted process and what it left in the folder -> list."""
    found, run_dir, number = traceback_of(outcome), folder / "run", ACTIONS[action]
    if not number:
        found += one_line_error(outcome) if outcome.code != 0 else []
    elif outcome.code not in ({-9} if action == "kill -9" else {0, -number, 128 + number}):
        found.append(f"exit code {outcome.code} after {action}: {outcome.err.strip()!r}")
    steps = {}
    for path in run_dir.rglob("*.pt"):
        try:
            steps[path.name] = read_checkpoint(path)["step"]
        except ValueError as error:
            found.append(str(error))
    step = steps.get("last.pt", 0)
    if step < outcome.saved:
        found.append(f"step {outcome.saved} was saved, last.pt is of step {step}")
    announced = re.search(r"saved at step (\d+)", outcome.err)
    if announced and int(announced[1]) != step:
        found.append(f"it says {announced[0]}, last.pt is of step {step}")
    return found


def figures_of(run_dir):
    """The lines of metrics.jsonl without what depends on the machine's speed -> dicts."""
    measured = "tokens_per_s utilisation peak_memory_gb minutes".split()
    measured += ["model_tflops_per_s", "peak_tflops_per_s"]
    return [
        {name: value for name, value in line.items() if name not in measured}
        for line in read_metrics(run_dir)
    ]


def differences(one, other):
    """List what differs between two run folders, except for the flags -> list."""
    found = []
    for name in ("last.pt", "best.pt"):
        a, b = (read_checkpoint(run_dir / name) for run_dir in (one, other))
        a.pop("args"), b.pop("args")
        found += [
            f"{name}: {key}"
            for key in sorted(a.keys() | b.keys())
            if not equal(a.get(key), b.get(key))
        ]
    for name in ("samples.txt", "tokenizer.model"):
        found += [name] * ((one / name).read_bytes() != (other / name).read_bytes())
    found += ["metrics.jsonl"] * (figures_of(one) != figures_of(other))
    return found + [
        f"{path.name} was left" for run_dir in (one, other) for path in run_dir.rglob("*.tmp")
    ]


def check_finished(outcome, whole, folder):
    """Complaints about a finished run, compared with the uninterrupted one in `whole` -> list."""
    found = traceback_of(outcome)
    if outcome.code != 0:
        return [*found, f"exit code {outcome.code} of the same command: {outcome.err.strip()!r}"]
    return found + [
        f"differs from an uninterrupted run: {name}"
        for name in differences(whole / "run", folder / "run")
    ]


# ---------------------------------------------------------------- rounds


def interrupt(folder, phase, action, counts, rng, earliest=0.0):
    """Train in a folder and interrupt it at a random moment of a phase -> Outcome.

    counts: calls and returns in each phase of an uninterrupted run; the moment is after the share
    `earliest` of them.
    """
    number = ACTIONS[action]
    if phase == "imports":
        return interrupt_imports(folder, rng.randint(1, int(0.8 * len(sys.modules))), number)
    moment = rng.randint(1 + int(earliest * counts[phase]), counts[phase])
    return Process(folder, phase, moment, send(number) if number else fill_disk).end()


def break_checkpoint(path, fault, rng):
    """Replace a checkpoint by a damaged copy. A hard link to it stays whole."""
    raw = bytearray(path.read_bytes())
    if fault == "flipped bit":
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    else:
        del raw[rng.randrange(1, len(raw)) if fault == "truncated checkpoint" else 0 :]
    path.unlink()
    path.write_bytes(raw)


def cause(fault, folder, whole, counts, rng):
    """Damage a training that was killed, follow the message's advice, finish -> complaints."""
    run_dir = folder / "run"
    if fault == "two processes":
        first = Process(
            folder, "training", rng.randint(1, counts["training"]), send(signal.SIGSTOP)
        )
        noted = first.wait_for_note()
        while noted and not noted.endswith("reached\n"):
            noted += first.wait_for_note()
        second = Process(folder).end()
        os.kill(first.process.pid, signal.SIGCONT)
        found = one_line_error(second) + ["the lock was not seen"] * (
            "another process trains" not in second.err
        )
        return found + check_finished(first.end(noted), whole, folder)
    interrupt(
        folder, "training", "kill -9", counts, rng, earliest=0.7
    )  # after the first validation, which writes best.pt
    if fault == "read-only folder":
        run_dir.chmod(0o555)
        refused = Process(
            folder, as_nobody=os.geteuid() == 0
        ).end()  # nothing is read-only for root
        run_dir.chmod(0o755)
        found = one_line_error(refused)
    else:
        break_checkpoint(run_dir / "last.pt", fault, rng)
        refused = Process(folder).end()
        if (
            refused.code == 0 and fault == "flipped bit"
        ):  # of a byte that means nothing, such as a date
            return check_finished(refused, whole, folder)
        found = one_line_error(refused)
        if advice := re.search(r"type: (rm .*)", refused.err):
            subprocess.run(advice[1], shell=True, check=True)
    return found + traceback_of(refused) + check_finished(Process(folder).end(), whole, folder)


def cells(rng):
    """Yield (phase, action) or (fault, None) without end: all in random order, then again."""
    possible = [
        pair for pair in itertools.product(PHASES, ACTIONS) if pair != ("imports", "full disk")
    ]
    possible += [(fault, None) for fault in FAULTS]
    while True:
        yield from rng.sample(possible, len(possible))


def one_folder(folder, whole, counts, todo, rng):
    """Do a fault, or one to three interruptions, in a new folder, and let the run end there.

    todo: list of cells, of which the last ones are done and removed. -> [(cell, complaints)],
    complaints about the end.
    """
    folder.mkdir()
    folder.chmod(0o755)
    found = []
    for _ in range(rng.randint(1, 3)):
        if not todo or (found and todo[-1][1] is None):  # each fault needs its own folder
            break
        phase, action = cell = todo.pop()
        if action is None:
            return [(cell, cause(phase, folder, whole, counts, rng))], []
        outcome = interrupt(folder, phase, action, counts, rng)
        if not outcome.reached:  # little of the phase was left: do this one in another folder
            todo.insert(0, cell)
            break
        found.append((cell, check_interrupted(outcome, action, folder)))
    return found, check_finished(Process(folder).end(), whole, folder)


def table(rounds, failures):
    """Lay out rounds and failures of each cell -> lines."""

    def entry(cell):
        return f"{rounds[cell]} ({failures[cell]})" if rounds[cell] else "-"

    lines = ["rounds (failures)   " + "".join(f"{action:>12}" for action in ACTIONS)]
    lines += [
        f"{phase:20}" + "".join(f"{entry((phase, action)):>12}" for action in ACTIONS)
        for phase in PHASES
    ]
    return lines + [f"{fault:20}{entry((fault, None)):>12}" for fault in FAULTS]


def main():
    p = cli.Parser(__doc__.split("\n")[0])
    p.add_argument("--rounds", type=cli.count, default=100, help="interruptions and faults (100)")
    p.add_argument("--seed", type=cli.natural, default=0, help="seed of all random choices (0)")
    args = p.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # which a shell's background job, and what it starts, ignores
    rng, rounds, failures, kept = random.Random(args.seed), Counter(), Counter(), 0
    todo, tqdm.monitor_interval = (
        list(itertools.islice(cells(rng), args.rounds)),
        0,
    )  # a thread would not survive a fork
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # only on the CPU are results the same bit for bit
    work = Path(tempfile.mkdtemp(prefix="crash-"))
    work.chmod(0o755)  # for a process that is not root
    (work / "corpus.txt").write_text(toy.corpus(300))
    whole = work / "whole"
    counts = Process(whole, phase=None).end().counts
    with tqdm(total=args.rounds, unit="round", disable=None) as bar:
        for number in itertools.count():
            if not todo:
                break
            folder = work / str(number)
            found, at_end = one_folder(folder, whole, counts, todo, rng)
            failed = [cell for cell, complaints in found if complaints or at_end]
            rounds.update(cell for cell, _ in found)
            failures.update(failed)
            bar.update(len(found))
            if failed or at_end:
                kept += 1
                history = ", ".join(" ".join(filter(None, cell)) for cell, _ in found)
                complaints = [line for _, lines in found for line in lines] + at_end
                tqdm.write("\n  ".join([f"{folder} ({history}):", *complaints]))
            else:
                shutil.rmtree(folder)
    print(*table(rounds, failures), sep="\n")
    if kept:
        print(
            f"{kept} folders failed: they are in {work}, next to {whole.name}, "
            "the uninterrupted run"
        )
        sys.exit(1)
    shutil.rmtree(work)


if __name__ == "__main__":
    cli.run(main)
