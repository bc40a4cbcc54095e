"""A text at each network call, and prompts that are typed."""

import io
import re
import sys

import pytest
import torch
from untrained import run_command

import sample
from sampling import terminal
from sampling.terminal import Trace


def run_sample(monkeypatch, capsys, *argv, stdin=""):
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    return run_command(sample.main, monkeypatch, capsys, *argv)


def test_lines_from_a_pipe_are_a_batch_with_the_texts_of_the_command(run_dir, monkeypatch, capsys):
    flags = [f"-mdir={run_dir}", "--num_samples=2", "--interactive"]
    lines, error, code = run_sample(
        monkeypatch, capsys, *flags, stdin=":set steps 3\nthe ___ sleeps\n:set seed 7\nanna\n"
    )
    assert code == 0 and not error
    model = sample.Sampler.load(run_dir, device="cpu")
    assert lines == model("the ___ sleeps", n=2, steps=3) + model("anna", n=2, seed=7, steps=3)


def test_switches_are_set_on_and_off_and_a_label_steers_typed_prompts(run_dir, monkeypatch, capsys):
    lines = [":set argmax on", ":set argmax yes", ":settings"]
    output, error, code = run_sample(
        monkeypatch, capsys, f"-mdir={run_dir}", "--interactive", stdin="\n".join(lines)
    )
    assert (
        code == 2
        and "  argmax True" in output
        and "write :set argmax on, or :set argmax off" in error
    )
    _, error, code = run_sample(
        monkeypatch, capsys, f"-mdir={run_dir}", "--interactive", "--label=x", stdin="anna\n"
    )
    assert code == 2 and "was not trained with --labelled" in error
    _, error, code = run_sample(
        monkeypatch, capsys, f"-mdir={run_dir}", "--interactive", "--prompt=anna", "--trace"
    )
    assert code == 2 and "leave --prompt, --trace out" in error


def test_lines_that_are_refused_change_nothing_and_are_counted(run_dir, monkeypatch, capsys):
    lines = [":set steps many", ":set colour blue", ":set", ":sing", "anna ___{99}", ":settings"]
    output, error, code = run_sample(
        monkeypatch, capsys, f"-mdir={run_dir}", "--interactive", stdin="\n".join(lines)
    )
    assert code == 2 and error.count("\nerror: ") + error.startswith("error: ") == 5
    assert (
        "no setting colour" in error
        and "write :set NAME VALUE" in error
        and "the model was trained on 32" in error
    )
    assert "  steps 32" in output and "  seed 0" in output


def test_quit_leaves_the_rest_unread(run_dir, monkeypatch, capsys):
    lines, _, code = run_sample(
        monkeypatch, capsys, f"-mdir={run_dir}", "--interactive", stdin=":settings\n:quit\n:sing\n"
    )
    assert code == 0 and lines


def test_ctrl_d_leaves_and_ctrl_c_leaves_the_line(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert terminal.next_line(True) == ":"
    monkeypatch.undo()
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert terminal.next_line(False) is None


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_trace_has_control_codes_only_in_a_terminal(loaded, monkeypatch, is_terminal):
    _, tokenizer, _ = loaded
    monkeypatch.setattr(terminal.time, "sleep", lambda seconds: None)
    p = torch.eye(len(tokenizer))[tokenizer.encode("the king sleeps")][None] * 0.5
    given = torch.zeros(p.shape[:2], dtype=torch.bool)
    given[0, 0] = True
    file = io.StringIO()
    file.isatty = lambda: is_terminal
    trace = Trace(tokenizer, file)
    trace(0.5, p, given)
    trace(1.0, p, given)
    trace.close(tokenizer.encode("the king sleeps"))
    shown = file.getvalue()
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown)
    assert plain.count("the king sleeps") == 3
    assert plain.count("\n") == (1 if is_terminal else 3)
    assert all(
        (code in shown) == is_terminal for code in ("\x1b[0;1m", "\x1b[0;22m")
    )  # given: bold, p = 0.5: normal
