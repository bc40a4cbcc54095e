"""Proof-reading, on an untrained network whose layers mix positions."""

import io
import json
import sys

import pytest
import torch
from untrained import make_run, run_command

import bfn
import sample
from sampling import proofread
from sampling.proofread import Surprise
from text import toy


@pytest.fixture(scope="module")
def model(run_dir):
    model = sample.Sampler.load(run_dir, device="cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return model


def run_sample(monkeypatch, capsys, *argv, stdin=""):
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    return run_command(sample.main, monkeypatch, capsys, *argv)


def test_each_token_is_read_with_all_others_given(model):
    ids = model.encode("the king sees anna", "it")
    log_p = proofread.leave_one_out_log_p(model.model, ids)
    for d in range(len(ids)):
        given = torch.arange(len(ids)) != d
        theta, t = (
            torch.full((1, len(ids), model.model.config.K), 1 / model.model.config.K),
            torch.zeros(1, len(ids)),
        )
        with torch.no_grad():
            alone = bfn.predict(model.model, theta, t, torch.tensor([ids]), given[None])[0, d]
        torch.testing.assert_close(log_p[d], alone, atol=1e-4, rtol=1e-4)


def test_a_text_can_be_read_in_several_batches(model, monkeypatch):
    ids = model.encode("the king sees anna", "it")
    whole = proofread.leave_one_out_log_p(model.model, ids)
    monkeypatch.setattr(proofread, "rows_at_once", lambda *_: 2)
    torch.testing.assert_close(
        proofread.leave_one_out_log_p(model.model, ids), whole, atol=1e-4, rtol=1e-4
    )


def test_the_tokens_join_to_the_text_and_no_mark_is_suggested(model):
    text = "the king sees anna"
    found = proofread.surprises(model, text)
    assert "".join(s.token for s in found) == text
    marks = {"", "<s>", "</s>"}
    assert all(
        s.bits > 0 and len(s.suggestions) == 3 and not marks & {t for t, _ in s.suggestions}
        for s in found
    )
    assert all(
        p >= q
        for s in found
        for (_, p), (_, q) in zip(s.suggestions, s.suggestions[1:], strict=False)
    )


FOUND = [
    Surprise("the", 0.1, [("the", 0.9)]),
    Surprise(" bakers", 4.5, [("baker", 0.5)]),
    Surprise(" sees", 9.0, [("see", 0.8)]),
]


def test_a_terminal_shows_odd_tokens_in_color_and_the_worst_first():
    first, *lines = proofread.report(FOUND, "terminal")
    assert first == "\x1b[0mthe\x1b[0;33m bakers\x1b[0;31m sees\x1b[0m"
    assert [line.split()[:2] for line in lines] == [
        ["sees", "9.0"],
        ["bakers", "4.5"],
        ["the", "0.1"],
    ]


def test_other_files_get_columns_or_json():
    assert proofread.report(FOUND, "columns")[1] == "bakers\t4.50\tbaker 0.500"
    (line,) = proofread.report(FOUND, "json")
    assert json.loads(line)[2] == {"token": " sees", "bits": 9.0, "suggestions": [["see", 0.8]]}


def test_the_command_reads_texts_and_files(run_dir, monkeypatch, capsys, tmp_path):
    (tmp_path / "texts.txt").write_text("anna sleeps\n\nthe king sees anna\n")
    flags = [
        f"-mdir={run_dir}",
        "--check=the lamp",
        f"--check_file={tmp_path / 'texts.txt'}",
        "--json",
    ]
    lines, _, code = run_sample(monkeypatch, capsys, *flags)
    texts = ["".join(s["token"] for s in json.loads(line)) for line in lines]
    assert texts == ["the lamp", "anna sleeps", "the king sees anna"] and code == 0


@pytest.mark.parametrize(
    "flag, message",
    [
        (f"--check={'the king ' * 30}", "the text takes"),
        ("--check_file=missing", "no file of texts at missing"),
        ("--check=\udcff", "is not UTF-8"),
    ],
)
def test_texts_that_cannot_be_read_get_one_line(run_dir, monkeypatch, capsys, flag, message):
    lines, error, code = run_sample(monkeypatch, capsys, f"-mdir={run_dir}", flag)
    assert code == 2 and message in error and error.count("\n") == 1 and not lines


def test_a_word_that_the_tokenizer_does_not_know_is_named(monkeypatch, tmp_path):
    model = sample.Sampler.load(make_run(tmp_path / "run", "word", toy.corpus(300)), device="cpu")
    assert [s.token for s in proofread.surprises(model, "the zyzzy sleeps")] == [
        "the",
        " zyzzy",
        " sleeps",
    ]


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_text_is_refused(model, text):
    if model.tokenizer.encode(text):  # a space is a token of some tokenizers
        return
    with pytest.raises(ValueError, match="the text to check is empty"):
        proofread.surprises(model, text)
