"""What all commands share: numbers, paths, full disks, signals, and what some places lack."""

import errno
import fcntl
import io
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest

import evaluate
import plot
import sample
import train
from common import cli, files, parallel
from examples import moons
from tools import classify, export, lm_eval, normalize, stats
from training import log


@pytest.mark.parametrize("command, flag", [(train, "-nl=1001"), (sample, "--num_samples=1000001")])
def test_what_would_take_memory_without_an_end_is_refused_at_once(command, flag):
    with pytest.raises(ValueError, match="must be at most 1000"):
        command.flags().parse_args([flag])


def test_two_dashes_are_no_value():
    with pytest.raises(ValueError, match="cannot be --"):
        sample.flags().parse_args(["--hint=--"])


def full(_text):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_error_of_a_full_disk_names_the_file(tmp_path, capsys):
    def main():
        with files.replacing(tmp_path / "file"):
            full("")

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert (
        stop.value.code == 2
        and f"No space left on device: '{tmp_path / 'file'}'" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_a_full_disk_under_standard_output_is_named_too(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "write", full)
    with pytest.raises(SystemExit):
        cli.run(lambda: print("text"))
    assert "No space left on device: 'standard output'" in capsys.readouterr().err


def test_what_the_encoding_of_standard_output_lacks_is_written_with_a_backslash(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    cli.run(lambda: print("caf\u00e9"))
    assert sys.stdout.buffer.getvalue() == b"caf\\xe9\n"


def test_ctrl_c_is_caught_again_once_a_command_runs(monkeypatch):
    """While it imports its packages, Ctrl-C ends the process at once."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as stop:
            cli.run(lambda: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130


# ---------------------------------------------------------------- paths

TEXT = "text_field example prompt ban hint label draft check flags language one device"
TEXT = {*TEXT.split(), "push", "license", "tasks"}


def parsers():
    """The parsers of all commands."""
    commands = train, sample, evaluate, export, classify, stats, normalize, lm_eval, moons
    yield from (command.flags() for command in commands)
    yield from map(plot.flags, plot.PICTURES)


def test_every_flag_that_takes_text_is_a_path_or_known_to_be_none():
    """So that no path is forgotten: ~ must be the home folder in all of them."""
    for parser in parsers():
        for action in parser._actions:
            takes_text = action.type is None and not action.choices and action.nargs != 0
            assert not takes_text or action.dest in TEXT, (parser.prog, action.dest)


def test_the_home_folder_is_written_as_in_a_shell(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    flags = ["-mdir=~/runs/a", "-d=~/a.txt,b~.txt,~/texts/*.txt", "--cache_dir", "~"]
    args = train.flags().parse_args(flags)
    assert (args.model_dir, args.cache_dir) == ("/home/me/runs/a", "/home/me")
    assert args.data_path == "/home/me/a.txt,b~.txt,/home/me/texts/*.txt"
    assert plot.flags("run").parse_args(["~/runs/a", "b"]).run_dirs == ["/home/me/runs/a", "b"]


def test_a_user_without_a_home_folder_cannot_name_it(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", str)  # as for a user id that is not known
    with pytest.raises(ValueError, match="no home folder, give a whole path"):
        train.flags().parse_args(["-mdir=~/runs/a"])


def test_commands_that_are_printed_can_be_pasted(capsys):
    args = train.flags().parse_args(["-d=x", "-mdir=my runs/a", "--max_steps=9999"])
    printed = log.closing_lines(args)
    sampling = next(line for line in printed.splitlines() if "sample.py" in line)
    words = shlex.split(sampling.removeprefix("next: "))
    assert sample.flags().parse_args(words[2:]).model_dir == "my runs/a"
    assert "plot.py report 'my runs/a'" in printed


# ---------------------------------------------------------------- where things are missing


@pytest.mark.parametrize("home", ["/proc/nowhere", "~", "file/below"])
def test_a_user_without_a_folder_for_caches_gets_a_temporary_one(monkeypatch, tmp_path, home):
    (tmp_path / "file").touch()
    home = home.replace("file", str(tmp_path / "file"))
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "access", lambda path, mode: home == "~")  # else, root may write
    folder, is_usual = cli.user_cache_dir()
    assert not is_usual and Path(folder).parent == Path(tempfile.gettempdir())
    assert cli.default_cache_dir() == f"{folder}/bayesian-flow-lm"


def test_a_folder_for_caches_that_can_be_made_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "there"))
    assert cli.user_cache_dir() == (str(tmp_path / "not" / "there"), True)


@pytest.mark.parametrize("number", cli.NO_LOCKS)
def test_a_file_system_without_locks_gets_one_line(monkeypatch, capsys, tmp_path, number):
    failing = Mock(side_effect=OSError(number, os.strerror(number)))
    monkeypatch.setattr(fcntl, "flock", failing)
    for name in "ab":
        with open(tmp_path / name, "a") as file:
            assert not cli.hold(file)
    error = capsys.readouterr().err
    assert f"{tmp_path} cannot be locked ({os.strerror(number)}): going on" in error
    assert error.count("\n") == 1


def test_the_gpu_of_a_mac_is_refused_with_what_works():
    for name in ("mps", "mps:0"):
        with pytest.raises(ValueError, match="mps .* not supported: use --device=cpu"):
            parallel.find_device(name)


# ---------------------------------------------------------------- from a notebook


def test_signals_are_handled_as_before_once_they_are_no_longer_caught():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = list(map(signal.getsignal, numbers))
    with suppress(ZeroDivisionError), cli.catch_signals():
        pairs = zip(map(signal.getsignal, numbers), before, strict=True)
        assert all(now != handler for now, handler in pairs)
        raise ZeroDivisionError
    assert list(map(signal.getsignal, numbers)) == before


def test_a_thread_catches_no_signals_and_does_not_fail():
    with ThreadPoolExecutor(1) as pool, cli.catch_signals() as caught:
        assert pool.submit(lambda: cli.catch_signals().__enter__()).result() == []
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]


def test_a_stop_by_a_signal_is_its_exit_code():
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: (_ for _ in ()).throw(KeyboardInterrupt(signal.SIGTERM)))
    assert stop.value.code == 128 + signal.SIGTERM


def test_a_flag_that_does_nothing_is_refused():
    p = cli.Parser("")
    p.add_argument("--json", action="store_true")
    p.add_argument("--check", action="append", default=[])
    p.refuse_idle(p.parse_args(["--check=a", "--json"]), {"json": "check"})
    p.refuse_idle(p.parse_args(["--check=a"]), {"json": "check"})
    with pytest.raises(ValueError, match="--json does nothing without --check: leave it out"):
        p.refuse_idle(p.parse_args(["--json"]), {"json": "check"})


def test_a_path_that_is_too_deep_to_be_made_is_refused():
    with pytest.raises(ValueError, match="-mdir.* more than 500 folders"):
        train.flags().parse_args(["-mdir=" + "a/" * 1000])


def test_two_flags_of_one_setting_are_refused():
    with pytest.raises(ValueError, match="--labelled and --example exclude each other: give one"):
        train.flags().parse_args(["--labelled", "--example=paragraph"])
    assert train.flags().parse_args(["--labelled"]).example == "labelled"


def test_messages_show_control_characters_with_a_backslash(capsys):
    with pytest.raises(SystemExit):
        cli.fail("a label \x1b[31m\u202e here")
    err = capsys.readouterr().err
    assert "\x1b" not in err and "a label \\x1b[31m\\u202e here" in err


@pytest.mark.parametrize("words", ["requested and 0 written", "unexpected pos 64 vs 0"])
def test_numpy_and_torch_on_a_full_disk_name_the_file(words):
    with pytest.raises(OSError, match="no space left: make room: '/x/ids.bin'"):  # noqa: SIM117
        with files.writing("/x/ids.bin"):
            raise RuntimeError(f"782 {words}" if "requested" in words else words)


@pytest.mark.parametrize(
    "words",
    [
        "tools.stats README.md",
        pytest.param("sample -mdir=examples/toy --num_samples=1", marks=pytest.mark.slow),
        pytest.param("sample -mdir=examples/toy --interactive --steps=x", marks=pytest.mark.slow),
    ],
)
def test_a_command_ends_with_one_line_under_dev_full_and_without_standard_input(words):
    command = f"{sys.executable} -m {words} >/dev/full <&-"
    options = dict(shell=True, cwd=cli.ROOT, capture_output=True, text=True)
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
