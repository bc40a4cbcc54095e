"""Type prompts in a terminal and see them filled. Lines from a pipe are read as a batch.

    python sample.py -mdir=RUN_DIR --interactive

    > the ___ sees the ___
    > :set steps 8
"""

import sys
from contextlib import suppress

from prompts import read_breaks, warn_unknown

SETTINGS = "num_samples length seed".split()  # and the options of sample.py
HELP = """A prompt is continued; ___ is a gap of one word, \\___ is text.
Each prompt draws from the next seed.
  :set NAME VALUE   change a setting       :settings   show them
  :help             this text              :quit       leave, as Ctrl-D does"""


def run(model, args, options, parse, separator=(), **more):
    """Read lines until their end, and print texts -> how many lines were refused.

    args: the flags of sample.py, which `:set` changes. options: the names of those that `Sampler.stream` takes. parse: turns
    words into flags, or raises ValueError. separator: lines to print after each text. more: what
    else `Sampler.stream` gets.
    """
    is_terminal, n_refused = sys.stdin.isatty(), 0
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
                prompt, chosen = read_breaks(line, model.run), {name: getattr(args, name) for name in options}
                for text, *_ in model.stream([prompt] * args.num_samples, args.seed, args.length, **chosen, **more):
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
    """Do what a line with a colon says: change or show settings. Raises ValueError for anything else."""
    if words[:1] == ["set"] and len(words) == 3:
        name, value = words[1:]
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
    elif words == ["settings"]:
        print(*(f"  {name} {getattr(args, name)}" for name in names), sep="\n")
    elif words == ["help"]:
        print(HELP)
    elif words:
        raise ValueError("write :set NAME VALUE, :settings or :help")
