"""Pictures: each command writes one of the right format, what is drawn is right, and bad input is
one line.
"""

import json
import math
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from untrained import make_run

import bfn
import data
import plot
from bfn import Controls
from common import cli, drawing
from evaluation import likelihood, tables
from plotting import pictures
from sampling.generate import Options, sample_batch
from sampling.prompts import make_template
from text import cache, toy
from text.tokenizer import SPACE
from training.checkpoint import load, read_checkpoint, read_metrics, save_checkpoint

METRICS = [
    dict(
        step=10,
        loss=9.0,
        grad_norm=3.0,
        learning_rate=0.1,
        tokens_per_s=100.0,
        peak_memory_gb=1.0,
        minutes=0.5,
    ),
    dict(step=10, val_bits_per_char=2.5, val_exact_bits_per_char=2.25),
    dict(
        step=20,
        loss=5.0,
        grad_norm=2.0,
        learning_rate=0.2,
        tokens_per_s=300.0,
        peak_memory_gb=1.5,
        minutes=1.0,
    ),
    dict(step=20, val_bits_per_char=2.75, val_exact_bits_per_char=2.0),
]


def write_metrics(run_dir, lines):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run folder with an untrained network, two checkpoints, and metrics.
    """
    run_dir = make_run(tmp_path_factory.mktemp("runs") / "run", "word", toy.corpus(300))
    checkpoint = read_checkpoint(run_dir / "best.pt")
    checkpoint["args"] |= dict(val_path=str(run_dir / "text.txt"), learning_rate=0.1)
    for name, step in (("best", 10), ("last", 20)):
        save_checkpoint(
            run_dir / f"{name}.pt",
            {**checkpoint, "step": step},
        )
    write_metrics(run_dir, METRICS)
    return run_dir


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """draw("beta", ...) runs the command in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, words)])
        cli.run(plot.main)

    return run


@pytest.fixture
def drawn(monkeypatch):
    """The figures that commands make, which are not saved: that takes most of the time."""
    made = []

    def keep(path, make_figure, dark=False):
        with drawing.style(dark):
            made.append(make_figure())
        path.write_bytes(drawing.MARK.encode())

    monkeypatch.setattr(plot, "save", keep)
    return made


def fails(draw, capsys, *words):
    """Run a command that fails -> its only line on standard error."""
    with pytest.raises(SystemExit) as error:
        draw(*words)
    (line,) = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and line.startswith("plot.py: error: ")
    return line


# ---------------------------------------------------------------- files


@pytest.fixture
def exact_json(tmp_path):
    """What the quickest of the pictures draws."""
    content = dict(
        bound_nats_per_token=2.5,
        exact_1_call_nats_per_token=3.0,
        exact_1_call_text_error_nats_per_token=None,
    )
    (tmp_path / "exact.json").write_text(json.dumps(content))
    return "exact.json"


def test_pictures_are_png_or_svg_by_their_ending_and_light_or_dark(draw, exact_json, tmp_path):
    draw("quality", exact_json)
    draw("quality", exact_json, "--dark", "--output=pictures/dark.png")
    draw("quality", exact_json, "--output=a.svg")
    for name, least, most in (("quality.png", 250, 255), ("pictures/dark.png", 0, 40)):
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG" and image.width == round(5.5 * drawing.DPI)
            assert all(
                least <= channel <= most for channel in image.convert("RGB").getpixel((0, 0))
            )
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()[:1000]


def test_only_pictures_of_plot_py_are_written_over(draw, capsys, exact_json, tmp_path):
    (tmp_path / "mine.png").write_bytes(b"a photograph")
    line = fails(draw, capsys, "quality", exact_json, "--output=mine.png")
    assert "mine.png exists already and is not a picture of plot.py" in line
    assert (tmp_path / "mine.png").read_bytes() == b"a photograph"
    for output in ("a.svg", "a.svg", "a.png", "a.png"):  # the second time over its own
        draw("quality", exact_json, f"--output={output}")
    assert "must end in .png or .svg" in fails(
        draw, capsys, "quality", exact_json, "--output=a.jpg"
    )
    assert "must end in .gif" in fails(draw, capsys, "sampling", "run", "--gif", "--output=a.png")


def test_a_figure_of_several_panels_is_saved(draw, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "other")
    draw("run", run_dir, "other", "--dark")
    with Image.open(tmp_path / "run.png") as image:
        assert image.format == "PNG" and image.width == round(drawing.WIDTH * drawing.DPI)


@pytest.mark.parametrize("picture", plot.PICTURES)
def test_the_help_of_the_command_names_every_picture(picture, capsys):
    with pytest.raises(SystemExit) as end:
        plot.flags(picture).parse_args(["--help"])
    assert end.value.code == 0 and f"python plot.py {picture} " in capsys.readouterr().out


# ---------------------------------------------------------------- simplex and beta


def test_beta_draws_how_often_the_evidence_names_the_token(draw, drawn):
    draw("beta", "--beta", "0.005")
    by_time, by_beta = drawn[0].axes
    for i, K in enumerate(pictures.VOCABULARIES):
        auto, other = by_time.lines[2 * i : 2 * i + 2]
        assert auto.get_ydata()[[0, -1]] == pytest.approx([1 / K, 0.955], abs=1e-3)
        assert other.get_ydata()[50] == pytest.approx(
            bfn.evidence_accuracy(math.sqrt(K * 0.005) / 2, K)
        )
    stars = {
        line.get_xdata()[0]: line.get_ydata()[0]
        for line in by_beta.lines
        if line.get_marker() == "*"
    }
    assert stars[0.5625] == pytest.approx(0.955, abs=1e-3) and stars[3.0] == pytest.approx(
        0.958, abs=1e-3
    )
    dots = [line for line in by_beta.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in dots] == [
        bfn.auto_beta1(K) for K in pictures.VOCABULARIES
    ]


# ---------------------------------------------------------------- runs


def test_a_run_is_drawn_as_it_was_measured_and_several_over_each_other(
    draw, drawn, run_dir, tmp_path
):
    write_metrics(tmp_path / "other", METRICS[:2])
    draw("run", run_dir, "other")
    loss, bound, exact, rate, norm, speed = drawn[0].axes
    assert loss.lines[0].get_xydata().tolist() == [[10, 9], [20, 5]] and loss.lines[
        1
    ].get_xydata().tolist() == [[10, 9]]
    assert bound.lines[0].get_ydata().tolist() == [2.5, 2.75] and exact.lines[
        0
    ].get_ydata().tolist() == [2.25, 2]
    values = [axes.lines[0].get_ydata().tolist() for axes in (rate, norm, speed)]
    assert values == [[0.1, 0.2], [3, 2], [100, 300]]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["run", "other"]


def test_the_legend_names_every_run_and_the_panels_keep_their_size(drawn, draw, tmp_path):
    names = [f"a long name of a run, number {i}" for i in range(23)] + ["_hidden", "$x" * 60]
    for name in names:
        write_metrics(tmp_path / name, METRICS)
    draw("run", *names[:1])
    draw("run", *names)
    _, many = drawn
    *shown, cut = [text.get_text() for text in many.legends[0].get_texts()]
    assert shown == names[:-1] and " ... " in cut
    looks = {(line.get_color(), line.get_linestyle()) for line in many.axes[0].lines[:24]}
    assert len(looks) == 24
    heights = []
    for figure in drawn:
        figure.draw_without_rendering()
        inches = figure.get_size_inches()
        heights.append(figure.axes[0].get_position().height * inches[1])
        box = figure.legends[0].get_window_extent().transformed(figure.transFigure.inverted())
        assert box.x0 > 0 and box.x1 < 1 and box.y0 > figure.axes[0].get_position().y1
    assert heights[1] == pytest.approx(heights[0], rel=0.15)


def test_watching_draws_again_until_it_is_interrupted(draw, drawn, monkeypatch, tmp_path):
    """A line that is not whole yet is left out."""
    write_metrics(tmp_path / "run", METRICS[:1])
    rest = [json.dumps(METRICS[2])[:20], json.dumps(METRICS[2])[20:] + "\n"]

    def sleep(seconds):
        if not rest:
            raise KeyboardInterrupt
        with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
            file.write(rest.pop(0))

    monkeypatch.setattr(time, "sleep", sleep)
    draw("run", "run", "--watch")
    assert [len(figure.axes[0].lines[0].get_xdata()) for figure in drawn] == [1, 1, 2]


def test_a_comparison_prints_what_differs_and_draws_nothing(draw, drawn, capsys, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "other")
    checkpoint = read_checkpoint(run_dir / "last.pt")
    args = checkpoint["args"] | dict(learning_rate=0.25, model_dir="elsewhere")
    save_checkpoint(tmp_path / "other" / "last.pt", {**checkpoint, "args": args})
    write_metrics(tmp_path / "other", METRICS[:2])
    draw("compare", run_dir, "other")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[:3] == [["run", "other"], ["learning_rate", "0.1", "0.25"], ["steps", "20", "10"]]
    printed = {" ".join(row[:-2]): row[-2:] for row in rows}
    assert printed["best bound, bits per character"] == ["2.5", "2.5"] and printed[
        "bound at the end"
    ] == ["2.75", "2.5"]
    assert printed["tokens per second, median"] == ["200", "100"] and printed[
        "exact at the end"
    ] == ["2", "2.25"]
    assert not drawn and not (tmp_path / "compare.png").exists()


def test_missing_and_foreign_runs_are_one_line(draw, capsys, run_dir, tmp_path):
    write_metrics(tmp_path / "foreign", [{"epoch": 1}])
    write_metrics(tmp_path / "begun", METRICS)
    assert "no nowhere/metrics.jsonl" in fails(draw, capsys, "run", "nowhere")
    assert "metrics.jsonl is not of a run" in fails(draw, capsys, "run", "foreign")
    assert "two or more run folders" in fails(draw, capsys, "compare", run_dir, run_dir)
    assert "no checkpoint at begun/last.pt" in fails(draw, capsys, "compare", run_dir, "begun")
    assert "no checkpoint at nowhere/best.pt" in fails(draw, capsys, "sampling", "nowhere")


# ---------------------------------------------------------------- packing


def test_packing_draws_the_segments_of_both_plans_with_their_fill(draw, drawn, run_dir, tmp_path):
    words = (
        f"-d={run_dir / 'text.txt'}",
        f"-spm={run_dir / 'tokenizer.model'}",
        "-slen=32",
        f"--cache_dir={tmp_path}",
    )
    draw("packing", *words)
    single, packed = drawn[0].axes
    tokens = cache.load_corpus(run_dir / "text.txt", load(run_dir)[1], tmp_path)
    n_tokens = len(tokens.ids)
    assert f"{n_tokens / (32 * tokens.n_documents):.1%} filled" in single.get_title()
    assert f"{data.plan_epoch(tokens, 32, 0, 0).fill(32):.1%} filled" in packed.get_title()
    bars = single.images[0].get_array()
    assert ((bars > 0).sum(1) == np.diff(tokens.offsets)[: len(bars)]).all() and bars.max() == 1
    bars = packed.images[0].get_array()
    assert (bars > 0).mean() > 0.9 and bars.shape == (plot.PACKED_ROWS, 32)


def test_packing_trains_a_tokenizer_if_none_is_given(draw, drawn, capsys, run_dir, tmp_path):
    draw("packing", f"-d={run_dir / 'text.txt'}", f"--cache_dir={tmp_path}")
    assert "filled" in drawn[0].axes[1].get_title()
    assert "no text file at gone.txt" in fails(draw, capsys, "packing", "-d=gone.txt")
    words = f"-d={run_dir / 'text.txt'}", "-spm=packing.png"
    assert "packing.png is not a SentencePiece model" in fails(draw, capsys, "packing", *words)


# ---------------------------------------------------------------- sampling


def test_sampling_draws_the_certainty_of_each_position_at_each_call(draw, drawn, run_dir):
    draw(
        "sampling",
        run_dir,
        "--prompt",
        "the king",
        "--length=6",
        "--steps=3",
        "--sampler=sde2",
        "--seed=5",
    )
    axes = drawn[0].axes[0]
    shares = axes.images[0].get_array()
    assert shares.shape == (4, 5)  # steps + 1 calls; all but bos
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert (
        labels[:2] == [" the", " king"]
        and (shares[:, :2] == 1).all()
        and (shares[:-1, 2:] < 1).all()
    )
    model, tokenizer, run = load(run_dir)
    seen = []
    options = Options(Controls("sde2", 3, watch=lambda t, p, given: seen.append(p[0, 1:].amax(-1))))
    template = make_template("the king", tokenizer, run, 0, 6)
    ((ids, _),) = sample_batch(model, tokenizer, [template], [plot.mix_seed(5, 0)], options)
    assert np.asarray(shares[:, 2:]) == pytest.approx(torch.stack(seen)[:, 2:].numpy())
    assert [
        tokenizer.pieces.index(label.replace(" ", SPACE)) for label in labels if label != "(end)"
    ] == [k for k in ids[1:] if k != tokenizer.eos]


def test_an_animation_has_a_frame_per_call_and_holds_the_last(draw, run_dir, tmp_path):
    draw(
        "sampling", run_dir, "--gif", "--sampler=sde2", "--steps=3", "--length=6", "--num_samples=2"
    )
    with Image.open(tmp_path / "sampling.gif") as image:
        assert image.format == "GIF" and image.n_frames == 4 and image.info["loop"] == 0
        image.seek(3)
        assert image.info["duration"] == 1000 * pictures.HOLD_SECONDS
    draw(
        "sampling", run_dir, "--gif", "--sampler=sde2", "--steps=1", "--length=6"
    )  # over its own picture


# ---------------------------------------------------------------- quality


def record(sampler, calls, value, temperature=1.0):
    names = ("word entropy (bits)", "n-gram divergence (bits)")
    job = dict(sampler=sampler, calls=calls, temperature=temperature, calls_per_text=calls)
    return dict(job, figures={name: (value, value - 1, value + 1) for name in names})


def test_quality_draws_figures_over_calls_at_temperature_one(draw, drawn, tmp_path):
    results = [
        record("held-out text", 0, 3.0),
        record("pace", 8, 5.0),
        record("pace", 4, 7.0),
        record("pace", 4, 6.0, 0.5),
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    draw("quality", "results.json")
    *by_calls, frontier = drawn[0].axes
    for axes in by_calls:
        assert axes.lines[0].get_xydata().tolist() == [[4, 7], [8, 5]]
        assert axes.lines[1].get_ydata() == [3, 3] and axes.lines[1].get_label() == "held-out text"
    more, few, real = (line.get_xydata().tolist() for line in frontier.lines)
    assert (more, few, real) == ([[5, 5]], [[6, 6], [7, 7]], [[3, 3]])
    assert [text.get_text() for text in frontier.texts] == ["8", "4"]


def test_quality_draws_trainings_of_each_text_and_the_frontier_on_one_page(draw, drawn, tmp_path):
    """Two files of a folder share a panel; a run without exact likelihoods is a star."""
    curve = [[0.5, 1000, 4.5, 4.0], [1.0, 2000, 3.5, 3.0]]
    runs = [dict(name="base", curve=curve), dict(name="masked", curve=curve[1:])]
    results = [record("held-out text", 0, 3.0), record("pace", 4, 7.0), record("pace", 4, 6.0, 0.5)]
    files = {
        "wiki8/results": runs,
        "wiki8/published": [dict(name="published code", curve=[[3.6, 2000, 4.7, None]])],
        "enwiki/results": runs[:1],
        "samplers": results,
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    draw("quality", *(f"{name}.json" for name in files))
    wiki8, enwiki, frontier = drawn[0].axes
    assert wiki8.get_title() == "wiki8: exact, bits per character"
    lines = [(line.get_label(), line.get_xydata().tolist()) for line in wiki8.lines]
    assert lines[0] == ("this code", [[1000, 4], [2000, 3]])
    assert lines[1:] == [("masked diffusion", [[2000, 3]]), ("published code", [[2000, 4.7]])]
    assert len(enwiki.lines) == 1 and frontier.lines[0].get_xydata().tolist() == [[6, 6], [7, 7]]


def test_quality_draws_the_exact_likelihoods_that_evaluate_prints(draw, drawn, tmp_path):
    names = [tables.to_key(name) for name in likelihood.figures_of([1, 16])]
    values = {f"{name}_nats_per_token": 3.0 - i for i, name in enumerate(names)}
    errors = {
        f"{name}_text_error_nats_per_token": error
        for name, error in zip(names, (0.25, None), strict=True)
    }
    (tmp_path / "exact.json").write_text(
        json.dumps(dict(values, **errors, bound_nats_per_token=2.5))
    )
    draw("quality", "exact.json")
    curve, bound = drawn[0].axes[0].lines[0], drawn[0].axes[0].lines[-1]
    assert curve.get_xydata().tolist() == [[1, 3], [16, 2]] and bound.get_ydata() == [2.5, 2.5]


def test_files_of_one_name_in_different_folders_are_drawn_apart(draw, drawn, tmp_path):
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        name = "exact_1_call"
        content = {f"{name}_nats_per_token": value, f"{name}_text_error_nats_per_token": 0.1}
        content |= dict(bound_nats_per_token=2.5)
        (tmp_path / folder / "eval.json").write_text(json.dumps(content))
    draw("quality", "a/eval.json", "b/eval.json")
    labels = [line.get_label() for line in drawn[0].axes[0].lines]
    assert any("a/eval.json" in label for label in labels)
    assert any("b/eval.json" in label for label in labels)


def test_quality_draws_the_losses_by_time_that_evaluate_prints(draw, drawn, tmp_path):
    """A bin is drawn at its middle, a step of L_n where it starts, a bin without draws nowhere."""
    curves = np.array([0]), np.array([2.0, np.nan, 1.0, 3.0]), np.array([4.0, np.nan, 3.0, 2.0])
    for n_steps, t in ((None, [0.125, 0.625, 0.875]), (4, [0.0, 0.5, 0.75])):
        scores = SimpleNamespace(n_steps=n_steps, by_time=lambda: curves)
        content = dict(bound_nats_per_token=2.5, by_time=tables.by_time(scores))
        (tmp_path / "loss.json").write_text(json.dumps(content))
        draw("quality", "loss.json")
        loss, cross_entropy = drawn[-1].axes[0].lines
        assert loss.get_xydata().tolist() == [list(pair) for pair in zip(t, [2.0, 1.0, 3.0])]
        assert cross_entropy.get_ydata().tolist() == [4.0, 3.0, 2.0]


def test_other_files_are_refused_in_one_line(draw, capsys, tmp_path):
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "other.json").write_text('[{"sampler": 1}, {}]')
    (tmp_path / "bound.json").write_text('{"bound_nats_per_token": 1}')
    assert "no file at gone.json" in fails(draw, capsys, "quality", "gone.json")
    assert "text.json is not JSON" in fails(draw, capsys, "quality", "text.json")
    for name in ("other.json", "bound.json"):
        assert f"{name} is not one of the files to give" in fails(draw, capsys, "quality", name)


def test_metrics_are_read_as_they_were_written(run_dir):
    assert read_metrics(run_dir) == METRICS


def test_long_texts_of_an_animation_are_split_at_words(monkeypatch):
    monkeypatch.setattr(plot, "LINE_COLUMNS", 12)
    pieces = ["a", " story", " of", " lan", "terns", "", " at night", "."]
    lines = ["".join(pieces[line]) for line in plot.wrap(pieces)]
    assert lines == ["a story of", " lanterns", " at night."]
