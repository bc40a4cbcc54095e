"""Pictures: lines over time or steps, in one style."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import cli

_reported = set()  # messages that `lines` has printed


def lines(path, series, x_label, y_label, title, log="", top=None):
    """Draw {label: (x, y)} as lines into a picture file -> whether that worked. log: "x" or "xy", the logarithmic axes.

    top: a second axis above the picture, as increasing x, the values there, and its label.
    The file's ending decides its format. A picture never stops a run: if it cannot be drawn or written, one line on standard
    error says why, once for each path and reason.
    """
    try:
        write(Path(path), lambda temporary, kind: _draw(temporary, kind, series, x_label, y_label, title, log, top))
    except Exception as error:  # noqa: BLE001 - a broken matplotlib raises anything
        message = f"no picture at {path}: {_reason(error)}"
        if message not in _reported:
            _reported.add(message)
            tqdm.write(message, file=sys.stderr)  # unlike print, it leaves a progress bar whole
        return False
    return True


def write(path, draw):
    """Call draw(temporary path, format) and give the picture its name: it is written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with cli.replacing(path) as temporary:
        draw(temporary, path.suffix[1:] or "png")


def _draw(path, kind, series, x_label, y_label, title, log, top):
    import matplotlib.figure  # takes a second to import; pyplot would need a display on some machines

    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, (x, y) in series.items():
        axes.plot(x, y, label=label, linewidth=1.8)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    for axis in log:
        axes.set(**{f"{axis}scale": "log"})
    if top:
        x, values, label = top
        x, values = [0, *x, 2 * x[-1]], [0, *values, 2 * values[-1]]  # the axes are a little longer than the lines
        convert = partial(np.interp, xp=x, fp=values), partial(np.interp, xp=values, fp=x)
        axes.secondary_xaxis("top", functions=convert).set_xlabel(label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, format=kind)


def _reason(error):
    """What went wrong and what to do about it, in one line."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, ImportError):
        return f"{text} (pip install matplotlib)"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} (give a path that can be written)"
    if isinstance(error, ValueError):  # of the data or the file's ending, which its text names
        return text
    return f"{type(error).__name__}: {text} (pip install --force-reinstall matplotlib)"
