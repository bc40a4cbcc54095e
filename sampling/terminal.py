"""Show a text at each network call of a sampler.

    p      (B, L, K)  float32  the network's output
    given  (B, L)     bool     positions that are given
"""

import shutil
import sys
import time
from contextlib import suppress

from sampling.prompts import read_breaks, warn_unknown
from text.tokenizer import one_line


class Trace:
    """Show a text at each network call on standard error.

    A terminal shows it in place, at a readable pace, certain tokens bold and uncertain ones dim.
    Other files get one line per call, without control codes.
    """

    BOLD, DIM, NORMAL = 1, 2, 22

    def __init__(self, tokenizer, file=None, unknown=()):
        self.tokenizer, self.unknown = tokenizer, unknown
        self.file = file or sys.stderr
        self.is_terminal = self.file.isatty()
        self.n_calls = self.n_breaks = 0

    def decode(self, ids):
        """Turn ids into text on one line, with a space for each line break."""
        return one_line(self.tokenizer.decode(ids, self.unknown))

    def __call__(self, t, p, given):
        """Show the likeliest tokens of the first row: p (B, L, K), given (B, L)."""
        self.n_calls += 1
        certainty = p[0].amax(-1).masked_fill(given[0], 1.0).tolist()
        self.show(f"call {self.n_calls}", p[0].argmax(-1).tolist(), certainty)

    def show(self, label, ids, certainty):
        """Show a text. In a terminal it replaces the last one."""
        text = self.decode(ids)
        if not self.is_terminal:
            print(f"{label}  {text}", file=self.file)
            return
        up = f"\x1b[{self.n_breaks}A" if self.n_breaks else ""
        shaded = self.shade(ids, certainty)
        print(f"{up}\r\x1b[J{shaded}\x1b[0m", end="", file=self.file, flush=True)
        self.n_breaks = max(0, len(text) - 1) // shutil.get_terminal_size().columns
        time.sleep(0.08)

    def shade(self, ids, certainty):
        """Style each token by how certain it is -> text with control codes."""
        text, shaded = "", ""
        for i, c in enumerate(certainty):
            longer = self.decode(ids[: i + 1])  # a token reads differently after others
            style = self.BOLD if c > 0.9 else self.DIM if c < 0.4 else self.NORMAL
            text, shaded = longer, f"{shaded}\x1b[0;{style}m{longer[len(text) :]}"
        return shaded

    def close(self, ids):
        """Show the finished text."""
        self.show("sample", ids, [1.0] * len(ids))
        if self.is_terminal:
            print(file=self.file)


SETTINGS = "num_samples length seed".split()  # and the options of sample.py
HELP = """A prompt is continued; ___ is a gap of one word, \\___ is text.
Each prompt draws from the next seed.
  :set NAME VALUE   change a setting       :settings   show them
  :help             this text              :quit       leave, as Ctrl-D does"""


def run(model, args, options, parse, separator=(), **more):
    """Read lines until their end, and print texts -> how many lines were refused.

    args: the flags of sample.py, which `:set` changes. options: the names of those that
    `Sampler.stream` takes. parse: turns words into flags, or raises ValueError. separator: lines to
    print after each text. more: what else `Sampler.stream` gets.
    """
    is_terminal = sys.stdin.isatty()
    n_refused = 0
    if is_terminal:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - gives input() its history and its arrow keys

        print(HELP)
    while (line := next_line(is_terminal)) is not None:
        try:
            if line.strip() == ":quit":
                break
            if line.startswith(":"):
                command(line[1:].split(maxsplit=2), args, [*SETTINGS, *options], parse)
            elif line.strip() or is_terminal:
                prompt = read_breaks(line, model.run)
                chosen = {name: getattr(args, name) for name in options} | more
                prompts = [prompt] * args.num_samples
                for text, *_ in model.stream(prompts, args.seed, args.length, **chosen):
                    print(text, *separator, sep="\n", flush=True)
                warn_unknown([prompt], model.tokenizer)
                args.seed += 1
        except ValueError as error:
            n_refused += 1
            print(f"error: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
    return n_refused


def next_line(is_terminal):
    """Read a line -> str, or None at the end."""
    try:
        return input("> " if is_terminal else "")
    except EOFError:
        return None
    except KeyboardInterrupt:  # leaves the line, as in a shell
        print()
        return ":"


def command(words, args, names, parse):
    """Do what a line with a colon says. Raises ValueError for what is no command."""
    if words[:1] == ["set"] and len(words) == 3:
        set_value(args, *words[1:], names, parse)
    elif words == ["settings"]:
        print(*(f"  {name} {getattr(args, name)}" for name in names), sep="\n")
    elif words == ["help"]:
        print(HELP)
    elif words:
        raise ValueError("write :set NAME VALUE, :settings or :help")


def set_value(args, name, value, names, parse):
    """Change a setting. Raises ValueError if it is none of `names`, or cannot have the value."""
    if name not in names:
        raise ValueError(f"no setting {name}; there are {', '.join(names)}")
    if isinstance(getattr(args, name), bool):
        if value not in ("on", "off"):
            raise ValueError(f"write :set {name} on, or :set {name} off")
        setattr(args, name, value == "on")
        return
    try:
        setattr(args, name, getattr(parse([f"--{name}={value}"]), name))
    except ValueError as error:
        raise ValueError(f"{error}; {name} stays {getattr(args, name)}") from None
