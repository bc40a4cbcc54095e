"""Pictures: none of them stops a run, and every character is drawn."""

import sys
import warnings
from types import SimpleNamespace

import pytest

from common import cli, drawing


@pytest.fixture
def picture(tmp_path):
    """picture(name) draws a line into a file of tmp_path."""
    cli.warn_once.cache_clear()
    return lambda name: drawing.lines(
        tmp_path / name, {"a line": ([0, 1], [1, 2])}, "t", "nats", "title"
    )


def test_without_matplotlib_a_picture_is_one_line_on_standard_error(
    picture, monkeypatch, tmp_path, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not picture("a.png") and not picture("a.png")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"no picture at {tmp_path / 'a.png'}: " in error
    assert error.endswith("(pip install matplotlib)\n")
    assert not picture("b.png") and "b.png" in capsys.readouterr().err


def test_a_broken_matplotlib_does_not_stop_a_run(picture, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(figure=None))
    assert not picture("a.png")
    assert capsys.readouterr().err.count("\n") == 1


def test_a_picture_that_cannot_be_written_leaves_nothing_behind(picture, tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    assert not picture("folder.png")
    assert "directory (give a path that can be written)" in capsys.readouterr().err
    (tmp_path / "file").write_text("text")
    assert not picture("file/a.png") and not picture("a.unknown")
    assert capsys.readouterr().err.count("\n") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_picture_that_fails_keeps_the_one_that_was_there(picture, tmp_path, monkeypatch, capsys):
    assert picture("a.png") and capsys.readouterr().err == ""
    before = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda figure, path, **options: path.write_text("half") / 0,
    )
    assert not picture("a.png")
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def bundled_fonts(monkeypatch):
    """No fonts but those that come with matplotlib."""
    from matplotlib import font_manager, get_data_path

    bundled = [f for f in font_manager.fontManager.ttflist if f.fname.startswith(get_data_path())]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", bundled)
    cli.warn_once.cache_clear()


def test_characters_that_the_usual_font_lacks_are_drawn_in_a_font_that_has_them(
    bundled_fonts, capsys
):
    with drawing.style():
        assert drawing.fonts_for("plain") == ["sans-serif"]
        assert drawing.fonts_for("\u1d81") == ["sans-serif", "STIXGeneral"]
        assert drawing.fonts_for("\u05d0", "monospace") == ["monospace", "DejaVu Sans"]
        figure = drawing.new_figure(1)
        text, other = figure.text(0, 0, "\u1d81"), figure.text(0, 0, "a", family="monospace")
        drawing.use_fonts(figure)
    assert text.get_fontfamily() == ["sans-serif", "STIXGeneral"]
    assert other.get_fontfamily()[0] == "monospace" and not capsys.readouterr().err


def test_characters_that_no_font_has_are_named_in_one_line(bundled_fonts, capsys, tmp_path):
    series = {"\u5929\u6c14": ([0, 1], [0, 1])}
    with warnings.catch_warnings(record=True) as warned:
        for name in ("a.png", "b.svg"):
            assert drawing.lines(tmp_path / name, series, "\u5929", "y", "title")
    error = capsys.readouterr().err
    assert "no font on this system has \u5929 \u6c14 (2 characters)" in error
    assert error.count("\n") == 1 and not warned
