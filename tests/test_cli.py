"""What all commands share: numbers out of range, full disks, and what standard output cannot write."""

import errno
import io
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

import cli
import sample
import train


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
        with cli.replacing(tmp_path / "file"):
            full("")

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == 2 and f"No space left on device: '{tmp_path / 'file'}'" in capsys.readouterr().err
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


# ---------------------------------------------------------------- from a notebook


def test_signals_are_handled_as_before_once_they_are_no_longer_caught():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = list(map(signal.getsignal, numbers))
    with suppress(ZeroDivisionError), cli.catch_signals():
        assert all(signal.getsignal(n) != handler for n, handler in zip(numbers, before, strict=True))
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
