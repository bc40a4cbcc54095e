"""Files: replaced whole or not at all, and never one that is not ours."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from untrained import make_run

import sample
import train
from common import drawing, files
from experiments import compare
from tools import normalize
from training import checkpoint, log, run_folder

TINY = "--tokenizer=char -mdim=32 -nl=1 -nh=2 -bsz=4 -slen=32 -nex=0 --compile=off".split()


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "c.txt"
    path.write_text("".join(f"a line of text, number {i}\n" for i in range(400)))
    return path


def test_a_file_is_replaced_through_a_name_that_nobody_has(tmp_path):
    path, users = tmp_path / "a.txt", tmp_path / "a.txt.tmp"
    users.write_text("the user's own")
    for content in ("first", "second"):
        with files.replacing(path) as temporary:
            assert temporary.parent == tmp_path and temporary.name.startswith(".a.txt.")
            temporary.write_text(content)
        assert path.read_text() == content
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_text("third")
        raise RuntimeError
    assert path.read_text() == "second" and users.read_text() == "the user's own"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "a.txt.tmp"]


def test_a_new_file_has_the_usual_permissions(tmp_path):
    with files.replacing(tmp_path / "new") as temporary:
        temporary.write_text("x")
    (tmp_path / "usual").write_text("x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "usual")]
    assert modes[0] == modes[1]


def test_leftovers_of_a_killed_process_go_and_files_of_the_user_stay(tmp_path):
    left = files.new_temporary(tmp_path / "last.pt")
    texts = files.new_temporary(tmp_path / "texts.jsonl").name  # which sample.py promised to keep
    mine = [tmp_path / name for name in (".last.pt.tmp", "last.pt.tmp", texts)]
    for path in mine:
        path.write_text("mine")
    files.remove_leftovers(tmp_path, checkpoint.RUN_FILES)
    assert not left.exists() and all(path.read_text() == "mine" for path in mine)


@pytest.mark.parametrize("kind", ["file", "link", "hard link", "folder", "dangling link"])
def test_a_command_writes_over_nothing_but_its_own_output(tmp_path, kind):
    mine, path = tmp_path / "mine.txt", tmp_path / "out.txt"
    mine.write_text("mine")
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    elif kind == "hard link":
        os.link(mine, path)
    else:
        path.symlink_to(mine if kind == "link" else tmp_path / "gone")
    with pytest.raises(ValueError, match="out.txt exists already and is not ours: give another"):
        files.check_output(path, lambda p: p.read_text() == "ours", "ours")
    if kind == "file":
        path.write_text("ours")
        files.check_output(path, lambda p: p.read_text() == "ours", "ours")
    assert mine.read_text() == "mine"


def test_a_place_where_nothing_can_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        files.check_output(tmp_path / "file" / "x.pt", bool, "")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ValueError, match="x.pt cannot be written: .* is read-only"):
        files.check_output(tmp_path / "new" / "x.pt", bool, "")


# ---------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrained") / "run"
    make_run(folder, "word", "some words of a text\n" * 50)
    return folder


@pytest.fixture
def run_dir(tmp_path, untrained):
    return Path(shutil.copytree(untrained, tmp_path / "run"))


@pytest.mark.parametrize("name", ["c.txt", "run/best.pt", "run/older/step-0000000006.pt"])
def test_sample_writes_over_no_corpus_and_no_checkpoint(tmp_path, run_dir, corpus, name):
    (tmp_path / "run" / "older").mkdir(exist_ok=True)
    path = tmp_path / name
    before = path.read_bytes() if path.exists() else b"x"
    path.write_bytes(before)
    with pytest.raises(ValueError, match="exists already and is not of an earlier --output"):
        sample.main([f"-mdir={run_dir}", "--num_samples=1", "--steps=2", f"--output={path}"])
    assert path.read_bytes() == before


def test_an_earlier_output_is_replaced_and_an_interrupted_one_is_kept(
    tmp_path, run_dir, monkeypatch, capsys
):
    words = [f"-mdir={run_dir}", "--num_samples=3", "--steps=2", f"--output={tmp_path / 'o.jsonl'}"]
    users = tmp_path / "o.jsonl.part"
    users.write_text("mine")
    for _ in range(2):
        sample.main(words)
    whole = (tmp_path / "o.jsonl").read_text()
    assert len(whole.splitlines()) == 3 and users.read_text() == "mine"
    stream = sample.Sampler.stream

    def stopped(*inputs, **options):
        yield next(stream(*inputs, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(sample.Sampler, "stream", stopped)
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        sample.main(words)
    kept = capsys.readouterr().err.split("the texts so far are in ")[1].splitlines()[0]
    assert Path(kept).read_text() == whole.splitlines(keepends=True)[0]
    assert (tmp_path / "o.jsonl").read_text() == whole


def test_the_first_texts_of_a_long_job_are_written_after_one_batch(run_dir, monkeypatch):
    batches = []
    real = sample.generate.__globals__["sample_batch"]

    def counted(model, tokenizer, templates, *more):
        batches.append(len(templates))
        return real(model, tokenizer, templates, *more)

    monkeypatch.setitem(sample.generate.__globals__, "sample_batch", counted)
    monkeypatch.setitem(sample.generate.__globals__, "rows_at_once", lambda *_: 2)
    texts = sample.Sampler.load(run_dir).stream([""] * 40, steps=1)
    next(texts)
    assert batches == [2]
    assert len(list(texts)) == 39


def test_normalize_keeps_a_text_whose_name_ends_in_tmp(tmp_path):
    text, out = tmp_path / "w.txt.tmp", tmp_path / "w.txt"
    text.write_text("A Text\n")
    normalize.main([str(text), str(out), "--lower"])
    assert text.read_text() == "A Text\n" and out.read_text() == "a text\n"


def test_a_picture_of_the_user_is_not_drawn_over(tmp_path):
    path = tmp_path / "pic.png"
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="is not a picture of plot.py"):
        drawing.check_output(path, [".png"])


# ---------------------------------------------------------------- the run folder


def test_files_of_the_user_next_to_a_tokenizer_stay(tmp_path):
    contents = {"tokenizer.model": "mine", "samples.txt": "notes", "curves.png": "x"}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="that is of no run: give another -mdir"):
        run_folder.lock(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == contents


@pytest.mark.parametrize("name", ["tokenizer.model", "samples.txt", "training.lock", "last.pt"])
def test_a_pipe_in_the_run_folder_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"has a {name} that is of no run"):
        run_folder.lock(tmp_path)


@pytest.mark.parametrize("content", [None, "[]", "mine", '[{"mine": 1}]'])
def test_experiments_write_into_no_folder_of_other_files(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    (tmp_path / "results.md").write_text("mine")
    if content == "[]":
        files.check_folder(tmp_path, "results.json", compare.is_results)
    else:
        with pytest.raises(ValueError, match="give another"):
            files.check_folder(tmp_path, "results.json", compare.is_results)
    files.check_folder(tmp_path / "new", "results.json", compare.is_results)


@pytest.mark.parametrize("kind", ["text", "link"])
def test_a_file_of_the_user_called_as_the_lock_stays(tmp_path, kind):
    folder = tmp_path / "L"
    folder.mkdir()
    mine, lock = tmp_path / "precious.txt", folder / "training.lock"
    mine.write_text("precious")
    lock.symlink_to(mine) if kind == "link" else lock.write_text("precious")
    with pytest.raises(ValueError, match="give another -mdir"):
        run_folder.lock(folder)
    assert lock.read_text() == mine.read_text() == "precious"


def test_a_folder_of_other_files_is_refused_before_a_lock_is_made(tmp_path):
    (tmp_path / "samples.txt").write_text("x")
    (tmp_path / "lock").write_text("precious")
    with pytest.raises(ValueError, match="samples.txt that is of no run"):
        run_folder.lock(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"samples.txt", "lock"}


def test_a_file_of_the_user_in_older_is_no_checkpoint(tmp_path):
    (tmp_path / "older").mkdir()
    mine = tmp_path / "older" / "step-my-notes.pt"
    mine.write_text("notes")
    checkpoint.older_path(tmp_path, 3).write_bytes(b"x")
    assert checkpoint.older_checkpoints(tmp_path) == [checkpoint.older_path(tmp_path, 3)]
    checkpoint.delete_older(tmp_path, 9, keep=0)
    assert mine.read_text() == "notes"


@pytest.mark.parametrize("damage", ["a foreign line", "deleted"])
def test_a_damaged_metrics_file_does_not_end_a_running_training(
    tmp_path, corpus, monkeypatch, capsys, damage
):
    run_dir = tmp_path / "run"
    real = log.draw_curves

    def damaged(folder):
        path = folder / "metrics.jsonl"
        path.unlink(missing_ok=True)
        if damage == "a foreign line":
            path.write_text("not of a run\n" + json.dumps(dict(loss=1)) + "\n")
        real(folder)

    monkeypatch.setattr(log, "draw_curves", damaged)
    words = [f"-d={corpus}", f"-mdir={run_dir}", f"--cache_dir={tmp_path}", *TINY]
    train.main([*words, "--max_steps=4", "-vli=2", "-svi=2"])
    assert checkpoint.read_checkpoint(run_dir / "last.pt")["step"] == 4
    assert "(this run goes on)" in capsys.readouterr().err


def test_a_link_to_the_best_checkpoint_is_replaced_and_not_written_through(tmp_path):
    best, last = tmp_path / "best.pt", tmp_path / "last.pt"
    best.write_bytes(b"best")
    checkpoint.link(best, last)
    assert last.samefile(best)
    with files.replacing(last) as temporary:
        temporary.write_bytes(b"later")
    assert best.read_bytes() == b"best" and last.read_bytes() == b"later"


def test_the_mended_command_trains_after_a_text_that_was_too_short(tmp_path, corpus):
    short = tmp_path / "short.txt"
    short.write_text("a\n")
    words = [f"-mdir={tmp_path / 'run'}", f"--cache_dir={tmp_path}", *TINY, "--max_steps=1"]
    with pytest.raises(ValueError, match="too short"):
        train.main([f"-d={short}", *words])
    train.main([f"-d={corpus}", *words])
    assert (tmp_path / "run" / "last.pt").exists()


def test_a_tokenizer_of_the_user_in_the_run_folder_stays(tmp_path, corpus):
    path = tmp_path / "run" / "tokenizer.model"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    words = [f"-mdir={tmp_path / 'run'}", f"--cache_dir={tmp_path}", *TINY, "--max_steps=1"]
    with pytest.raises(ValueError, match="does not belong to this run"):
        train.main([f"-d={corpus}", *words])
    assert path.read_bytes() == b"mine"
