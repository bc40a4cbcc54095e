"""The page of a run: it is one file, foreign text stays text, and the slider moves the texts."""

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_plot import METRICS, write_metrics
from untrained import make_run

import plot
import sample
from common import cli
from plotting import report
from training import log
from training.checkpoint import load, read_checkpoint, save_checkpoint

ROOT = Path(plot.__file__).parent
HOSTILE = "</script><img src=x onerror=alert(1)>"
FOLDER = "<img src=x onerror=alert(2)>&amp;'\"$name"  # a name of a file has no slash
LONG = "x" * 300  # a word that does not fit into a line
CPU = torch.device("cpu")
FIGURES = dict(
    val_bound_nats_per_token=2.0,
    val_monte_carlo_error_nats_per_token=0.5,
    val_text_error_nats_per_token=0.25,
    val_bits_per_char=1.0,
    val_n_tokens_scored=1234,
)


class Reader(HTMLParser):
    """Collect what is in a page: elements with attributes, text, the text of each script."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self.scripts, self.open = [], "", [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open = tag
        self.scripts += [""] * (tag == "script")

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        if self.open == "script":
            self.scripts[-1] += data
        else:
            self.text += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run folder in which all text that others write is hostile: labels, which are tokens, flags,
    samples, names.
    """
    lines = "".join(
        f"{HOSTILE}\tthe baker sees the {thing}\nplain\tthe king sleeps\n"
        for thing in ("boat", "ring", "king") * 40
    )
    run_dir = make_run(tmp_path_factory.mktemp("runs") / FOLDER, "word", lines, "labelled")
    checkpoint = read_checkpoint(run_dir / "best.pt")
    checkpoint["args"] |= dict(
        data_path=f"/home/me/{FOLDER}", text_field=HOSTILE + LONG, max_steps=20
    )
    save_checkpoint(run_dir / "best.pt", {**checkpoint, "step": 10})
    write_metrics(run_dir, [*METRICS, dict(step=10, **FIGURES)])
    (run_dir / "samples.txt").write_text(
        f"10\t{HOSTILE}\n10\t{LONG}\n10\tone\\ntwo\n20\t{HOSTILE}\n"
        f"not of a run\n20\tunfinished {LONG}"
    )
    return run_dir


@pytest.fixture(scope="module")
def page(run_dir):
    return plot.run_page(run_dir, CPU)


def test_foreign_text_is_text_and_nothing_is_loaded_from_elsewhere(page):
    found = Reader(page)
    assert {tag for tag, _ in found.elements}.isdisjoint(
        {"img", "link", "iframe", "object", "base"}
    )
    assert [attributes.get("type") for tag, attributes in found.elements if tag == "script"] == [
        "application/json",
        None,
    ]
    names = {
        (name, value) for _, attributes in found.elements for name, value in attributes.items()
    }
    assert not [
        name for name, _ in names if name.startswith("on") or name in ("src", "srcset", "data")
    ]
    assert all(value.startswith("#") for name, value in names if name in ("href", "xlink:href"))
    assert found.text.count(HOSTILE) == 3  # a flag and two samples
    assert found.text.count(FOLDER) == 4  # title, heading, the text that was trained on, its flag
    assert "/home/me" not in page
    pieces = json.loads(found.scripts[0])["pieces"].values()
    assert HOSTILE + "\t" in pieces


def test_samples_are_shown_by_step_with_their_line_breaks(run_dir):
    assert report.read_samples(run_dir) == {10: [HOSTILE, LONG, "one\ntwo"], 20: [HOSTILE]}
    assert (
        report.thin(list(range(101)), 3) == [0, 50, 100]
        and report.thin([7, 8], 3) == [7, 8]
        and report.thin([], 3) == []
    )


def test_figures_have_their_errors_in_each_unit(page):
    """1.0 bits per character are 2.0 nats per token, so errors halve; 2 nats are 2.8854 bits."""
    rows = dict(re.findall(r"<tr><th scope=row>(bound, [^<]*)</th>(.*?)</tr>", page))
    cells = {name: re.findall("<td>(.*?)</td>", row) for name, row in rows.items()}
    assert cells["bound, nats per token"] == ["2.0000", "0.5000", "0.2500"]
    assert cells["bound, bits per character"] == ["1.0000", "0.2500", "0.1250"]
    assert cells["bound, bits per token"] == ["2.8854", "0.7213", "0.3607"]
    assert "1,234 tokens were scored" in page and "exact, nats" not in page


def test_a_text_at_each_call_is_what_the_network_says(run_dir):
    """Tokens by falling probability, the first of them always; in the end stands what sample.py
    prints.
    """
    sampler = sample.Sampler(*load(run_dir))
    data = plot.sample_texts(sampler)
    printed = sampler(n=plot.N_TEXTS)
    for text, expected in zip(data["texts"], printed, strict=True):
        drawn = "".join(data["pieces"][k] for k in text["ids"])
        assert drawn.split(" (end)")[0].split() == expected.split()
        for call in text["calls"]:
            assert len(call) == len(text["ids"])
            for position in call:
                shares = position[1::2]
                assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1000 + len(
                    shares
                )
                assert all(share >= plot.LEAST for share in shares[1:])


def test_a_run_without_a_checkpoint_or_a_validation_shows_what_it_has(
    run_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["plot.py", "report", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.run(plot.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert "has nothing to show yet" in line
    write_metrics(tmp_path, METRICS[:1])
    early = plot.run_page(tmp_path, CPU)
    assert (
        early.count("There is no checkpoint yet.") == 3
        and "training loss over step" in early
        and "<script" not in early
    )
    shutil.copyfile(run_dir / "best.pt", tmp_path / "last.pt")
    shutil.copyfile(run_dir / "tokenizer.model", tmp_path / "tokenizer.model")
    stopped = plot.run_page(tmp_path, CPU)
    assert (
        "Nothing was validated at step 10 yet" in stopped
        and "step 10 of 20" in stopped
        and "<script" in stopped
    )
    assert "There is no samples.txt" in stopped


def test_the_command_writes_the_page_of_an_exported_folder_and_spares_files_of_the_user(
    tmp_path, capsys, monkeypatch
):
    exported, output = tmp_path / "toy", tmp_path / "toy" / "report.html"
    shutil.copytree(ROOT / "examples" / "toy", exported)
    monkeypatch.setattr(sys, "argv", ["plot.py", "report", str(exported)])
    output.write_text("the user's own")
    with pytest.raises(SystemExit):
        cli.run(plot.main)
    assert output.read_text() == "the user's own" and "exists already" in capsys.readouterr().err
    output.unlink()
    for _ in range(2):  # the second time over its own
        cli.run(plot.main)
    text = output.read_text()
    assert (
        "the built-in language" in text
        and "exact, bits per token" in text
        and "loss by time over t" in text
    )
    assert len(text) < 100_000
    with pytest.raises(ValueError, match="exists already and is not of an earlier"):
        sample.main([f"-mdir={exported}", f"--output={output}"])


def test_training_ends_with_a_command_that_exists():
    lines = log.closing_lines(
        SimpleNamespace(model_dir="runs/mine", data_path=None, max_steps=1000)
    ).splitlines()
    (words,) = [line.split()[2:] for line in lines if "plot.py report" in line]
    assert plot.flags(words[0]).parse_args(words[1:]).run_dir == "runs/mine"


# ---------------------------------------------------------------- in a browser

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def open_in_browser(url, profile):
    """Open a page without a window -> its elements after the script has run, and what it wrote to
    the console.
    """
    flags = "--headless --no-sandbox --disable-gpu --virtual-time-budget=2000".split()
    flags += ["--dump-dom", "--enable-logging=stderr"]
    command = [CHROMIUM, *flags, "--window-size=360,700", f"--user-data-dir={profile}", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


@needs_browser
def test_the_slider_moves_the_texts_without_an_error(page, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page)
    data = json.loads(Reader(page).scripts[0])
    shown = {}
    for call in (1, 3, 999):
        elements, console = open_in_browser(f"{path.as_uri()}#call={call}", tmp_path / "profile")
        assert console == []
        assert "<img" not in elements
        lines = re.findall('<p class="text">(.*?)</p>', elements, re.DOTALL)
        shown[call] = [Reader(line).text.split() for line in lines]
        n_calls = max(len(text["calls"]) for text in data["texts"])
        assert f"call {min(call, n_calls)} of {n_calls}" in elements
    for call, lines in shown.items():
        for text, words in zip(data["texts"], lines, strict=True):
            is_done = call >= len(text["calls"])
            ids = text["ids"] if is_done else [position[0] for position in text["calls"][call - 1]]
            assert words == "".join(data["pieces"][str(k)] for k in ids).split()
    assert shown[1] != shown[3] != shown[999]


@needs_browser
def test_on_a_phone_nothing_is_wider_than_the_screen_and_tokens_tell_their_alternatives(
    page, tmp_path
):
    """A script at the end of a copy, which the page's own policy would not let run, writes what it
    finds as the title.
    """
    ask = """<script>
      const [first, second] = document.querySelectorAll(".text span"), found = [];
      const shown = element("alternatives");
      const note = () => found.push(shown.hidden ? "" : shown.innerText);
      document.querySelector("details").open = true;
      HTMLElement.prototype.focus = function () {  // without a window, focus may come late
        this.dispatchEvent(new FocusEvent("focusin", {bubbles: true}));
      };
      first.focus(), note();
      first.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true})), note();
      second.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true})), note();
      first.dispatchEvent(new PointerEvent("pointerover", {bubbles: true})), note();
      document.title = JSON.stringify([innerWidth, document.documentElement.scrollWidth, found]);
    </script></html>"""
    path = tmp_path / "page.html"
    path.write_text(re.sub("<meta http-equiv[^\n]*", "", page).replace("</html>", ask))
    elements, console = open_in_browser(f"{path.as_uri()}#call=1", tmp_path / "profile")
    assert console == []
    width, needed, found = json.loads(unescape(re.search("<title>(.*?)</title>", elements)[1]))
    assert needed <= width <= 500  # Chromium may have a least width
    data = json.loads(Reader(page).scripts[0])
    first, second = data["texts"][0]["calls"][0][:2]
    for shown, expected in zip(found, (first, second, [], first), strict=True):
        lines = [
            f"{data['pieces'][str(k)].strip()}\t{share / 10:.1f}%"
            for k, share in zip(expected[::2], expected[1::2], strict=True)
        ]
        assert shown.splitlines()[: len(lines)] == lines and bool(shown) == bool(expected)
