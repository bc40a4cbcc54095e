"""Labelled texts: each label is a token, given or drawn, in training and in sampling."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from untrained import run_command

import data
import sample
import train
from evaluation import quality
from sampling.prompts import ANY_LABEL, allowed_tokens, split_label
from text import cache, toy
from text.reading import Corpus, read_part, read_pieces, reading_notes
from text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from training import log

KINDS = ["bpe", "unigram", "word", "char"]


def corpus_text(n=300):
    """Sentences labelled by their first word."""
    return "".join(f"{line.split()[0]}\t{line}\n" for line in toy.corpus(n).splitlines())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "labelled.tsv"
    path.write_text(corpus_text())
    return path


@pytest.fixture(scope="module", params=KINDS)
def model(request, corpus):
    """A tokenizer."""
    return Tokenizer(train_tokenizer(corpus, request.param, 300, "labelled"))


@pytest.fixture(scope="module")
def run_dir(corpus, tmp_path_factory):
    """A run of a few steps."""
    folder = tmp_path_factory.mktemp("run")
    flags = [f"-d={corpus}", f"-mdir={folder / 'run'}", f"--cache_dir={folder / 'cache'}"]
    flags += ["--labelled", "--tokenizer=word"]
    flags += "-mdim=32 -nl=1 -nh=2 -bsz=4 -slen=32 --max_steps=3 -nex=2".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *flags])
        train.main()
    return folder / "run"


# ---------------------------------------------------------------- text


def test_lines_are_split_at_their_first_tab(tmp_path):
    (tmp_path / "c.tsv").write_text("a b\tone\ttwo\n\nc\tthree\n")
    pieces = [(piece.label, piece.text) for piece in read_pieces(tmp_path / "c.tsv", "labelled")]
    assert pieces == [("a b", "one\ttwo"), ("c", "three")]


@pytest.mark.parametrize("content, line", [("a\tone\nno label\n", 2), ("\tone\n", 1)])
def test_a_line_without_a_label_is_named(tmp_path, content, line):
    (tmp_path / "c.tsv").write_text(content)
    with pytest.raises(ValueError, match=rf"c.tsv: line {line} is not label<TAB>text"):
        list(read_pieces(tmp_path / "c.tsv", "labelled"))


HEADED = "label\ttext\ngood\tone\n\nbad\ttwo\ngood\tthree\n"


def read(path, **options):
    return [(piece.label, piece.text) for piece in read_pieces(path, "labelled", **options)]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_header_is_neither_an_example_nor_a_label_in_any_file(tmp_path, mark):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(mark + HEADED)
    lines = [("good", "one"), ("bad", "two"), ("good", "three")]
    assert read(tmp_path) == 2 * lines
    (tmp_path / "m").write_bytes(train_tokenizer(tmp_path, "word", example="labelled"))
    assert set(load_tokenizer(tmp_path / "m").labels) == {"good", "bad"}
    (note,) = reading_notes(Corpus.of(tmp_path), "labelled")
    assert r"'label\ttext'" in note and "a.txt, and those of 1 more file" in note
    first = next(read_pieces(tmp_path / "a.txt", "labelled"))
    assert read(tmp_path / "a.txt", start=first.end) == lines[1:]


@pytest.mark.parametrize(
    "text",
    [
        "good\tone\nbad\ttwo\nbad\tthree\ngood\tfour\n",
        "\ufeffgood\tone\ngood\ttwo\nbad\tthree\n",
        "good\tone\nbad\ttwo\nso so\tthree\nso so\tfour\n",
        "good\tone\nbad\ttwo\n",
    ],
    ids=["repeated", "sorted, with a mark", "rare like the second", "one of each"],
)
def test_a_first_line_that_may_be_an_example_is_one(tmp_path, text):
    (tmp_path / "c.tsv").write_text(text)
    assert read(tmp_path / "c.tsv")[0] == ("good", "one")
    assert reading_notes(Corpus.of(tmp_path / "c.tsv"), "labelled") == []


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_listed_with_their_counts_the_most_frequent_first(tmp_path, kind):
    path = tmp_path / "c.tsv"
    path.write_text("".join(f"l{i}\tthe king {j}\n" for i in range(13) for j in range(40 - i)))
    tokenizer = Tokenizer(train_tokenizer(path, kind, example="labelled"))
    read_part = partial(cache.load_corpus, path, tokenizer, tmp_path, example="labelled")
    parts = [read_part(part=part) for part in ("train", "val")]
    (line,) = log.label_lines(*parts)
    assert line.startswith("13 labels: l0 40, l1 39, ") and line.endswith(", l9 31, and 3 more")


def test_more_labels_than_a_vocabulary_should_have_are_refused(tmp_path):
    (tmp_path / "c.tsv").write_text("".join(f"label {i}\ttext\n" for i in range(1001)))
    with pytest.raises(ValueError, match="has 1001 labels, at most 1000"):
        train_tokenizer(tmp_path / "c.tsv", "bpe", 300, "labelled")


def test_each_label_is_one_token_that_no_text_becomes(model, corpus):
    labels = {line.split("\t")[0] for line in corpus.read_text().splitlines()}
    assert set(model.labels) == labels
    for label, k in model.labels.items():
        assert k not in model.encode(f"label:{label} {label}")


def test_documents_begin_with_bos_and_label_and_decode_to_their_line(model, corpus, tmp_path):
    tokens = cache.load_corpus(corpus, model, tmp_path, example="labelled")
    lines = corpus.read_text().splitlines()
    for i in (0, 1, len(lines) - 1):
        ids = tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]].tolist()
        assert ids[: 1 + (model.bos >= 0)][-1] == model.labels[lines[i].split("\t")[0]]
        assert model.decode(ids) == lines[i]


def test_a_tokenizer_without_the_label_is_refused(corpus, tmp_path):
    tokenizer = Tokenizer(train_tokenizer(corpus, "bpe", 300))
    with pytest.raises(
        ValueError, match="no token for the label .*: a tokenizer knows the labels of"
    ):
        cache.load_corpus(corpus, tokenizer, tmp_path / "cache", example="labelled")


# ---------------------------------------------------------------- training


def test_half_of_the_labels_are_given_besides_those_that_are_given_anyway(model, corpus, tmp_path):
    tokens = cache.load_corpus(corpus, model, tmp_path, example="labelled")
    labels = list(model.labels.values())
    loader = data.Loader(tokens, 64, 64, 0, model.bos, labels)
    plain = data.Loader(tokens, 64, 64, 0, model.bos)
    shares = []
    for n in range(6):
        (ids, segment_ids, seen), (same_ids, _, seen_before) = loader.batch(n), plain.batch(n)
        given, before = seen == data.GIVEN, seen_before == data.GIVEN
        is_label = torch.from_numpy(np.isin(ids, labels)) & (segment_ids > 0)
        assert torch.equal(ids, same_ids) and torch.equal(seen[~is_label], seen_before[~is_label])
        shares.append(given[is_label & ~before].float().mean().item())
    assert sum(shares) / 6 == pytest.approx(0.5, abs=0.1)


def test_only_the_label_of_a_text_is_drawn_as_a_label(model):
    allowed, labels = allowed_tokens(model), sorted(model.labels.values())
    assert allowed[-ANY_LABEL].nonzero().flatten().tolist() == labels
    assert not allowed[1:5][:, labels].any()


def test_the_label_of_a_prompt_may_be_named_or_not(model):
    assert split_label("the\tking", model) == ([model.labels["the"]], "king")
    assert split_label("king", model) == ([ANY_LABEL], "king")
    with pytest.raises(ValueError, match="the model knows no label 'x', only "):
        split_label("x\tking", model)


# ---------------------------------------------------------------- sampling


def test_a_run_resumes_and_samples_with_and_without_a_label(run_dir, monkeypatch, capsys):
    flags = [f"-mdir={run_dir}", "--num_samples=4", "--steps=3"]
    lines, _, code = run_command(
        sample.main, monkeypatch, capsys, *flags, "--label=anna", "--prompt=anna ___"
    )
    assert code == 0 and all(line.startswith("anna\tanna ") for line in lines)
    lines, _, code = run_command(sample.main, monkeypatch, capsys, *flags)
    model = sample.Sampler.load(run_dir)
    assert code == 0 and all(line.split("\t")[0] in model.tokenizer.labels for line in lines)
    for text in model(n=2, length=40, steps=3):  # in blocks: longer than the rows of training
        assert text.split("\t")[0] in model.tokenizer.labels and text.count("\t") == 1
    assert model("anna\t", n=2, steps=3) == [
        text for text, *_ in model.stream([""] * 2, label="anna", steps=3)
    ]
    assert {line.count("\t") for line in open(run_dir / "samples.txt")} == {
        2
    }  # after the step and after the label


def test_windows_of_a_label_only_are_not_compared_with_samples(corpus, model, tmp_path):
    tokens = cache.load_corpus(corpus, model, tmp_path, example="labelled")
    assert min(quality.choose_texts(tokens, 3, 20, 0)[1]) == 3
    with pytest.raises(ValueError, match="too short to compare with samples"):
        quality.choose_texts(tokens, 2, 20, 0)


def test_a_whole_text_needs_its_label(run_dir):
    model = sample.Sampler.load(run_dir)
    assert model.log_likelihood(["anna\tanna sleeps", "the\tanna sleeps"]).shape == (2,)
    with pytest.raises(ValueError, match="the text has no label: write label<TAB>text"):
        model.log_likelihood(["anna sleeps"])
    assert model(n=1, draft="the\tthe king sleeps", strength=0.9, steps=3)[0].startswith("the\t")


@pytest.mark.parametrize(
    "label, message", [("nobody", "the model knows no label 'nobody'"), ("", "no label ''")]
)
def test_unknown_labels_get_one_line(run_dir, monkeypatch, capsys, label, message):
    _, error, code = run_command(
        sample.main, monkeypatch, capsys, f"-mdir={run_dir}", "--label", label or ""
    )
    assert code == 2 and error.count("\n") == 1 and (message in error or "empty" in error)


def test_checking_a_text_leaves_its_label_out(run_dir, monkeypatch, capsys):
    lines, _, _ = run_command(
        sample.main, monkeypatch, capsys, f"-mdir={run_dir}", "--check=the\tthe king", "--json"
    )
    assert [token["token"].strip() for token in json.loads(lines[0])] == ["the", "king"]


def test_a_prompt_with_a_label_and_another_label_are_refused(run_dir):
    with pytest.raises(ValueError, match="a prompt names a label already"):
        sample.Sampler.load(run_dir)("the\tanna", label="anna")


def test_a_corpus_of_few_labelled_lines_is_split_between_lines(tmp_path):
    (tmp_path / "c.tsv").write_text(corpus_text(50))
    train_part, val_part = (
        list(read_part(tmp_path / "c.tsv", part, "labelled")) for part in ("train", "val")
    )
    assert (
        len(train_part) + len(val_part) == 50
        and len(val_part) >= 2
        and all(piece.label for piece in val_part)
    )


def test_a_tokenizer_with_labels_needs_labelled_text(run_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "c.txt").write_text(toy.corpus(50))
    flags = [
        f"-d={tmp_path / 'c.txt'}",
        f"--init_from={run_dir}",
        "--example=line",
        f"-mdir={tmp_path / 'new'}",
    ]
    _, error, code = run_command(train.main, monkeypatch, capsys, *flags)
    assert code == 2 and "has tokens for labels: give --labelled" in error
