"""What all pictures share: their style, fonts and files, and a plot of lines.

matplotlib is imported where it is needed: that takes a second.
"""

import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import cli, files
from common.files import replacing

WIDTH = 8.4  # inches; with DPI a little wider than a README's column
DPI = 120
N_COLOURS = 6
LIGHT = dict(background="#ffffff", ink="#24292f", pale="#d0d7de",
    colours="#0072b2 #d55e00 #009e73 #aa4499 #b8860b #4a9fd8")
DARK = dict(background="#0d1117", ink="#e6edf3", pale="#3d444d",
    colours="#58a6ff #ff9b50 #3fcf9f #e58fd0 #e3c04d #9fd3ff")
MARK = "made by plot.py"  # in each picture, so that only pictures are written over
METADATA = {"png": {"Software": MARK}, "svg": {"Creator": MARK, "Date": None}}


@contextmanager
def style(dark=False):
    """Set the colours of all figures made and saved in this context."""
    import matplotlib

    c = DARK if dark else LIGHT
    inks = "text.color axes.labelcolor axes.titlecolor axes.edgecolor xtick.color ytick.color"
    backgrounds = "figure.facecolor axes.facecolor savefig.facecolor"
    settings = {
        **dict.fromkeys(inks.split(), c["ink"]),
        **dict.fromkeys(backgrounds.split(), c["background"]),
        "axes.prop_cycle": matplotlib.cycler(color=c["colours"].split()),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.labelsize": 9,
        "font.size": 9,
        "grid.color": c["pale"],
        "grid.alpha": 0.6,
        "legend.frameon": False,
        "svg.hashsalt": "plot.py",  # the same picture is the same file
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # `fonts_for` says it in one line
        yield


def new_figure(height, width=WIDTH):
    """Make an empty figure, sizes in inches."""
    import matplotlib.figure  # pyplot would need a display on some machines

    return matplotlib.figure.Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def ink(share=1.0):
    """Mix a colour between the background (0) and the ink (1) of the style."""
    import matplotlib
    from matplotlib.colors import to_rgb

    background = np.array(to_rgb(matplotlib.rcParams["figure.facecolor"]))
    full = np.array(to_rgb(matplotlib.rcParams["text.color"]))
    return tuple((1 - share) * background + share * full)


def plain(text):
    """Keep matplotlib from reading a text between dollar signs as a formula."""
    return str(text).replace("$", r"\$")


def fonts_for(characters, family="sans-serif"):
    """Find fonts of this system with what a font family lacks -> families to try, in this order.

    One line on standard error names characters that are in no font.
    """
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    usual = get_font(findfont(FontProperties(family=[family])))
    families = [family]
    missing = {c for c in characters if c.isprintable() and not usual.get_char_index(ord(c))}
    for entry in fontManager.ttflist if missing else ():
        is_plain = entry.style == "normal" and entry.weight == 400
        if is_plain and not entry.name.lstrip(".").startswith(("Last", "Adobe Blank")):
            font = get_font(entry.fname)
            found = {c for c in missing if font.scalable and font.get_char_index(ord(c))}
            missing -= found
            families += [entry.name] if found else []
    if missing:
        some = " ".join(sorted(missing)[:5])
        advice = "pictures show boxes instead; install one, such as Noto"
        cli.warn_once(f"no font on this system has {some} ({len(missing)} characters): {advice}")
    return families


def use_fonts(figure):
    """Draw the texts of a figure in fonts that have their characters."""
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    _, *more = fonts_for({c for text in texts for c in text.get_text()})
    for text in texts if more else ():
        text.set_fontfamily([*text.get_fontfamily(), *more])


def mark_level(axes, y, text):
    """Draw a dashed line across at height y, with a text on it."""
    axes.axhline(y, color=ink(0.6), linewidth=1, linestyle="--", label=text)


def lines(path, series, x_label, y_label, title, x_scale="linear"):
    """Draw {label: (x, y)} as lines into a file -> whether that worked."""

    def draw():
        figure = new_figure(4.5, width=7)
        axes = figure.subplots()
        for label, (x, y) in series.items():
            marker = "o" if len(x) < 8 else ""
            axes.plot(x, y, label=plain(label), linewidth=1.8, marker=marker)
        axes.set(xlabel=x_label, ylabel=y_label, title=plain(title), xscale=x_scale)
        axes.grid()
        if series:
            axes.legend()
        return figure

    return try_to_save(path, draw)


def try_to_save(path, make_figure):
    """Save the picture that make_figure() draws -> whether that worked.

    A picture never stops a run: one line on standard error says why there is none, once for each
    path and reason.
    """
    try:
        save(Path(path), make_figure)
    except Exception as error:  # noqa: BLE001 - a broken matplotlib raises anything
        with tqdm.external_write_mode(sys.stderr):  # leaves a progress bar whole
            cli.warn_once(f"no picture at {path}: {_reason(error)}")
        return False
    return True


def save(path, make_figure, dark=False):
    """Save the picture that make_figure() draws, whole or not at all, in the ending's format."""
    kind = path.suffix[1:] or "png"
    with style(dark):
        figure = make_figure()
        use_fonts(figure)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=DPI, format=kind, metadata=METADATA.get(kind))


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


def check_output(path, endings):
    """Raise ValueError for another ending, and for a file that is no picture: it would be lost."""
    if path.suffix not in endings:
        raise ValueError(f"--output={path} must end in {' or '.join(endings)}")
    files.check_output(path, lambda p: MARK.encode() in p.read_bytes(), "a picture of plot.py")
