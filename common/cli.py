"""What all commands share: strict flags, errors in one line, signals, locks."""

import argparse
import difflib
import errno
import importlib
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise
from pathlib import Path

from common.files import writing

MAY_BE_EMPTY = ("--prompt", "--flags")
NO_LOCKS = errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL  # no locks here
DEEPEST = 500  # folders in a path; Python makes folders recursively
ROOT = Path(__file__).resolve().parent.parent


# A command imports this file first. Ctrl-C while it imports the rest ends it without a traceback,
# until `run` takes over. In the background of a script, Ctrl-C stays ignored.
_main = getattr(sys.modules["__main__"], "__file__", None)
_is_command = bool(_main) and Path(_main).resolve().is_relative_to(ROOT)
if _is_command and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses unknown and abbreviated flags, with a ValueError.

    argparse itself reads -dpo=0.1 as -d po=0.1, -bs=12 as -b s=12, and -md as -mdir.
    """

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def add_flags(self, chosen, flags=None):
        """Add flags {names: options}, by default FLAGS, of which the first name is in `chosen`."""
        for names, options in (flags or FLAGS).items():
            if names.split()[0] in chosen.split():
                self.add_argument(*names.split(), **options)

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        known = self._option_string_actions  # not public, but the only list of the flags
        parts = [word.split("=", 1) for word in words]
        for flag, *_ in parts:
            is_text = " " in flag or self._negative_number_matcher.match(flag)
            if flag[:1] == "-" and flag not in known and not is_text:
                hint = "a value that begins with a dash is written --flag=VALUE"
                for close in difflib.get_close_matches(flag, known, n=1):
                    hint = f"did you mean {close}?"
                self.error(f"unknown flag {flag} ({hint})")
        given = {known[flag]: flag for flag, *_ in parts if flag in known}
        self.given = {action.dest for action in given}
        if len(self.given) < len(given):  # two flags of one setting
            same = [f for a, f in given.items() if [b.dest for b in given].count(a.dest) > 1]
            self.error(f"{' and '.join(same)} exclude each other: give one")
        joined = [part for part in parts if len(part) == 2]
        for flag, value in [*joined, *pairwise(words)]:
            if value == "" and flag in known and flag not in MAY_BE_EMPTY:  # an unset variable
                self.error(f"{flag} is empty: give a value or leave the flag out")
            if value == "--" and flag in known:  # argparse would make it an empty list
                self.error(f"{flag} cannot be --: give another value")
        return super().parse_args(words, namespace)

    def refuse_idle(self, args, needs):
        """Raise ValueError for flags that were given but do nothing: {flag: those it needs}."""
        for name, needed in needs.items():
            if name in self.given and not any(getattr(args, other) for other in needed.split()):
                others = " or ".join(f"--{other}" for other in needed.split())
                self.error(f"--{name} does nothing without {others}: leave it out")

    def error(self, message):
        raise ValueError(message)


def _number(kind, least, exclusive=False, below=math.inf, most=2**31 - 1):
    """Make a type for flags: a function from text to a number of this kind and range."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {name}") from None
        lower = f"above {least}" if exclusive else f"at least {least}"
        for is_met, limit in (
            (value > least if exclusive else value >= least, lower),
            (value < below, f"below {below}"),
            (value <= most, f"at most {most}"),
        ):
            if not is_met:
                raise argparse.ArgumentTypeError(f"{text} must be {limit}")
        return value

    return convert


natural, count, several = (_number(int, least) for least in (0, 1, 2))  # from 0, 1, 2 on
steps = samples = _number(int, 1, most=10**6)  # beyond, float32 or memory runs out
layers = _number(int, 1, most=1000)  # beyond, a network takes hours to build
positive, non_negative = _number(float, 0, exclusive=True), _number(float, 0)
row_length = _number(int, 2, most=1 << 17)  # beyond, memory runs out
micro_batches = _number(int, 1, most=10**5)  # of a step; more take hours
share = _number(float, 0, below=1)
above_zero_to_one = _number(float, 0, exclusive=True, most=1)


def counts(text):
    """Read "8,32" -> [8, 32]."""
    return [count(part) for part in text.split(",")]


def shares(text):
    """Read "0.99,0.999" -> [0.99, 0.999]."""
    return [share(part) for part in text.split(",")]


def auto_or_positive(text):
    """Read "auto" or a positive number."""
    return text if text == "auto" else positive(text)


def path(text):
    """Read a path, or several with commas, as a shell would: ~ is the home folder."""
    parts = [os.path.expanduser(part) for part in text.split(",")]
    if any(f"{part}/".startswith("~/") for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: this user has no home folder, give a whole path")
    if any(os.path.abspath(part).count(os.sep) > DEEPEST for part in parts):
        raise argparse.ArgumentTypeError(f"more than {DEEPEST} folders: give a shorter path")
    return ",".join(parts)


def user_cache_dir():
    """Find the user's folder for caches, or a temporary one -> path, whether it is the user's."""
    usual = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not usual.startswith("~"):  # else this user has no home folder
        path = Path(usual).absolute()
        above = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
        if os.access(above, os.W_OK | os.X_OK):
            return usual, True
    user = getattr(os, "getuid", os.getpid)()
    return os.path.join(tempfile.gettempdir(), f"cache-of-user-{user}"), False


def default_cache_dir():
    """Return the folder of tokenised corpora: bayesian-flow-lm in `user_cache_dir`."""
    return os.path.join(user_cache_dir()[0], "bayesian-flow-lm")


FLAGS = {  # of several commands
    "-mdir --model_dir": dict(type=path, default="runs/demo", help="run folder (runs/demo)"),
    "--checkpoint": dict(choices=["best", "last"], default="best",
        help="the best by validation, or the last (best)"),
    "--text_field": dict(help="field of .jsonl, column of tables that holds the text (text)"),
    "--example": dict(default="line",
        help="what one example is: line, labelled, paragraph, file, or else the separator that "
        "stands between examples, such as '<|endoftext|>', as a line by itself (line)"),
    "--seed": dict(type=natural, default=0, help="seed of all random numbers (0)"),
    "--device": dict(default="auto", help="cpu, cuda, cuda:1, ... (cuda if there is one)"),
    "--cache_dir": dict(type=path, default=default_cache_dir(),
        help="folder for tokenised corpora (%(default)s)"),
}


@cache
def warn_once(message):
    """Print a line on standard error, unless this process has printed it already."""
    print(message, file=sys.stderr)


def hold(file, wait=False):
    """Lock an open file until it is closed -> whether that worked.

    Windows and some file systems have no locks. Raises BlockingIOError if another process holds
    it; with `wait`, waits for that process.
    """
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        folder = os.path.dirname(os.path.abspath(file.name))
        advice = "going on; start no second process that writes there"
        warn_once(f"{folder} cannot be locked ({error.strerror}): {advice}")
        return False
    return True


@contextmanager
def catch_signals(
    names=("SIGINT", "SIGTERM", "SIGHUP"), promise="finishing this step, then saving"
):
    """Collect signals in the list that is yielded, instead of stopping. A second one stops at once.

    Signals within a second count as one: a terminal and torchrun send the same one twice. In a
    thread other than the main one, none is caught: Python allows no handlers there.
    """
    caught, before, first_at = [], {}, 0.0

    def handle(number, _frame):
        nonlocal first_at
        if not caught:
            first_at = time.monotonic()
            caught.append(number)
            if os.environ.get("RANK", "0") == "0":  # print is not safe here
                os.write(2, f"\n{promise} (again to leave at once)\n".encode())
        elif time.monotonic() - first_at > 1:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        # Windows has no SIGHUP, nohup ignores it, and None is a handler that is not Python's.
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        kept = signal.SIG_IGN, None
        before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) not in kept}
    try:
        for number in before:
            signal.signal(number, handle)
        yield caught
    except ConnectionError:
        if "RANK" in os.environ and signal.SIGTERM in before:
            before[signal.SIGTERM] = signal.SIG_IGN  # torchrun ends this process, which says why
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def visible(text):
    """Write control characters, which a terminal would obey, with a backslash."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def fail(message):
    """Print one line to standard error and leave with exit code 2.

    Many processes that fail together print it once: torchrun ends the others while they wait.
    """
    if os.environ.get("RANK", "0") != "0" or isinstance(message, ConnectionError):
        time.sleep(2)
    line = visible(" ".join(str(message).split()))
    print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr)
    sys.exit(2)


def open_closed_streams():
    """Send what goes to a closed stream (`>&-`) nowhere, and not into the next file. `<&-` ends."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(number, mode, closefd=False))


def run(main):
    """Call main(). An error that the user can correct becomes one line and exit code 2.

    BFN_DEBUG=1 shows tracebacks. KeyboardInterrupt(number of a signal) becomes exit code
    128 + number; Ctrl-C is the default. What the encoding of standard output lacks is written with
    a backslash, as on standard error.
    """
    open_closed_streams()
    try:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(AttributeError):  # a notebook has another kind of standard output
            sys.stdout.reconfigure(errors="backslashreplace")
        with writing("standard output"):  # all other writing names its own path
            main()
            sys.stdout.flush()
    except KeyboardInterrupt as stop:
        sys.exit(128 + (*stop.args, signal.SIGINT)[0])
    except BrokenPipeError:  # whoever reads our output has stopped, for example head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, OverflowError, MemoryError, RuntimeError) as error:
        out_of_memory = ran_out_of_memory(error)
        if os.environ.get("BFN_DEBUG") or (isinstance(error, RuntimeError) and not out_of_memory):
            raise
        if out_of_memory and not str(error).startswith("out of memory: "):  # training says more
            error = "out of memory: a shorter text or a smaller model takes less"
        if getattr(error, "filename", None) == "standard output":
            with suppress(OSError):  # else Python tries again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail(error)


def import_optional(name, needed):
    """Import a library that few need. Raises ValueError, which says for what it is `needed`."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{needed}: pip install {name.split('.')[0]}") from None


def ran_out_of_memory(error):
    """Tell whether an error says that memory has run out."""
    said = re.search("out of memory|allocate memory", str(error))
    return isinstance(error, MemoryError) or bool(said)
