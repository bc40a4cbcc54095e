"""Prompts, gaps and the sampling command."""

import io
import json
import random
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from runs import make_run

import bfn
import cli
import data
import evaluate
import model as model_file
import sample
import toy
import train
from model import load
from prompts import (
    FREE,
    GAP,
    WORD_REST,
    WORD_START,
    allowed_tokens,
    check_hints,
    find_token,
    make_template,
    parse_hint,
    parse_prompt,
)
from sample import Options, generate

FEW = Options(steps=3, corrections=0)


@pytest.fixture(scope="module", params=["bpe", "word", "char"])
def run_dir(request, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / request.param, request.param, toy.corpus(300))


@pytest.fixture(scope="module")
def loaded(run_dir):
    return load(run_dir)


def command(monkeypatch, capsys, *argv):
    """Run sample.py -> its standard output, line by line."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *argv])
    cli.run(sample.main)
    return capsys.readouterr().out.splitlines()


def fill(loaded, prompt, seed=0):
    model, tokenizer, run = loaded
    template = make_template(prompt, tokenizer, run, seed)
    ((ids, _),) = generate(model, tokenizer, [template], seed, FEW)
    return template, ids


def test_the_same_seed_gives_the_same_text_and_another_seed_another(loaded):
    assert fill(loaded, "", 1) == fill(loaded, "", 1)
    assert fill(loaded, "", 1)[1] != fill(loaded, "", 2)[1]


def test_a_sample_does_not_depend_on_its_neighbours(loaded):
    model, tokenizer, run = loaded
    templates = [make_template("", tokenizer, run, i, length) for i, length in enumerate([9, 14, 9])]
    for options in (FEW, Options(steps=20, corrections=2)):  # a shorter text is corrected while a longer one is drawn
        together = list(generate(model, tokenizer, templates, 5, options))
        alone = [
            next(generate(model, tokenizer, [template], 5, options, numbers=[i])) for i, template in enumerate(templates)
        ]
        assert together == alone


def test_batches_of_one_equal_one_batch(loaded, monkeypatch):
    model, tokenizer, run = loaded
    templates = [make_template("the king", tokenizer, run, i, 20) for i in range(3)]
    whole = list(generate(model, tokenizer, templates, 5, FEW))
    monkeypatch.setitem(model_file.AT_ONCE, "cpu", 1)
    assert list(generate(model, tokenizer, templates, 5, FEW)) == whole


@pytest.mark.parametrize(
    "prompt", ["the king", "the ___ sleeps", "the ___{3} sleeps", "___ sleeps today", "the king ___", "___"]
)
def test_given_tokens_come_out_unchanged(loaded, prompt):
    template, ids = fill(loaded, prompt)
    assert all(token == wanted for token, wanted in zip(ids, template, strict=True) if wanted >= 0)


@pytest.mark.parametrize("seed", range(5))
def test_a_gap_is_filled_with_one_word_and_the_rest_stays(loaded, seed):
    _, tokenizer, _ = loaded
    _, ids = fill(loaded, "the ___ sleeps near ___ boat", seed)
    text = sample.decode(tokenizer, ids)
    assert re.fullmatch(r"the \S+ sleeps near \S+ boat", text), text


def test_a_gap_with_a_count_takes_so_many_tokens(loaded):
    _, tokenizer, _ = loaded
    template, closed = parse_prompt("the ___{3} sleeps", tokenizer, [0, 1], random.Random(0))
    assert closed and template.count(GAP) == 3
    assert tokenizer.decode([token for token in template if token >= 0]).split() == ["the", "sleeps"]


def test_text_right_after_a_gap_gets_no_space(tmp_path):
    """Also with a tokenizer that puts a space before every text; where it cannot do without, it says so."""
    corpus = ["the king, then the queen s sleeps", "a king s hat, a queen"] * 20
    for kind, text in (("char", "the ___s"), ("bpe", "the ___, then")):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=model,
            model_type=kind,
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        template, _ = parse_prompt(text, tokenizer, [0, 1], random.Random(0))
        filled = [token if token >= 0 else tokenizer.encode("k")[-1] for token in template]
        assert tokenizer.decode(filled).split() == text.replace("___", "k").split()
    with pytest.raises(ValueError, match="cannot join 's'"):
        word = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=word,
            model_type="word",
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        parse_prompt("king___s", sentencepiece.SentencePieceProcessor(model_proto=word.getvalue()), [0, 1], random.Random(0))


def test_special_tokens_are_never_drawn(loaded):
    model, tokenizer, run = loaded
    templates = [make_template("", tokenizer, run, i, 30) for i in range(20)]
    special = {tokenizer.unk_id(), tokenizer.bos_id()}
    for ids, _ in generate(model, tokenizer, templates, 0, FEW):
        assert not special & set(ids[1:] if tokenizer.bos_id() >= 0 else ids)
    table = allowed_tokens(tokenizer)
    if tokenizer.eos_id() >= 0:
        assert [bool(table[-kind, tokenizer.eos_id()]) for kind in (FREE, GAP, WORD_START, WORD_REST)] == [True] + [
            False
        ] * 3


def test_lengths_are_drawn_from_the_training_texts(loaded):
    _, tokenizer, run = loaded
    lengths = [len(make_template("", tokenizer, run, seed)) for seed in range(2000)]
    for length, share in ((5, 1 / 15), (6, 5 / 15), (7, 9 / 15)):
        assert lengths.count(length) / 2000 == pytest.approx(share, abs=0.04)


def test_a_prompt_that_does_not_fit_is_refused(loaded):
    _, tokenizer, run = loaded
    with pytest.raises(ValueError, match="trained on 32"):
        make_template("the ___{40} sleeps", tokenizer, run, 0)
    with pytest.raises(ValueError, match="gap of no tokens"):
        make_template("the ___{0} sleeps", tokenizer, run, 0)
    with pytest.raises(ValueError, match="leaves nothing of length 3"):
        make_template("the old king sleeps", tokenizer, run, 0, length=3)


@pytest.mark.parametrize("prompt", ["a ___{-1}", "a ___{} b", "____", "___{3", "caf\udce9"])
def test_gaps_written_otherwise_and_text_that_is_not_unicode_are_refused(loaded, prompt):
    _, tokenizer, run = loaded
    with pytest.raises(ValueError, match="a gap is ___ or|is not UTF-8"):
        make_template(prompt, tokenizer, run, seed=0)


def test_a_sample_is_one_line(loaded):
    tokenizer = SimpleNamespace(eos_id=lambda: -1, bos_id=lambda: -1, decode=lambda ids: "a\u2028b\x0cc\r\nd")
    assert sample.decode(tokenizer, []) == "a b c d"


def test_a_file_without_prompts_gets_one_line_and_unknown_words_a_warning(run_dir, monkeypatch, capsys, tmp_path):
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, capsys, f"-mdir={run_dir}", f"--prompt_file={tmp_path / 'empty'}")
    assert stop.value.code == 2 and "no prompts in" in capsys.readouterr().err
    monkeypatch.setattr(
        sys, "argv", ["sample.py", f"-mdir={run_dir}", "--num_samples=1", "--steps=2", "--prompt=the \u5468"]
    )
    sample.main()
    assert ("does not know" in capsys.readouterr().err) == (run_dir.name != "bpe")


def test_text_ends_at_eos(run_dir):
    tokenizer = data.load_tokenizer(run_dir / "tokenizer.model")
    the = tokenizer.encode("the")
    if tokenizer.eos_id() >= 0:
        assert sample.decode(tokenizer, [tokenizer.bos_id(), *the, tokenizer.eos_id(), *the]) == "the"
    assert sample.decode(tokenizer, the) == "the"


def test_the_command_prints_samples_and_nothing_else(run_dir, monkeypatch, capsys, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("anna ___\n\n___ walks\n")
    flags = [f"-mdir={run_dir}", "--num_samples=2", "--steps=3", "--device=cpu"]
    lines = command(monkeypatch, capsys, *flags, "--prompt=the", f"--prompt_file={prompts}", f"--output={tmp_path / 'out'}")
    records = [json.loads(line) for line in open(tmp_path / "out")]
    assert len(lines) == 6 and lines == [record["text"] for record in records]
    assert [record["prompt"] for record in records] == ["the"] * 2 + ["anna ___"] * 2 + ["___ walks"] * 2
    assert lines == command(monkeypatch, capsys, *flags, "--prompt=the", f"--prompt_file={prompts}", "--trace")


# ---------------------------------------------------------------- what the user knows


def test_a_hint_is_the_odds_of_its_tokens(loaded):
    _, tokenizer, _ = loaded
    token = tokenizer.id_to_piece(tokenizer.encode("the")[0]).removeprefix("\u2581")
    (i, *_) = ids = find_token(token, tokenizer)
    position, hint = parse_hint(f"3:{token}=0.75", tokenizer)
    odds = hint.exp()
    assert position == 3 and odds[i] == pytest.approx(0.75)
    assert odds[[k for k in range(len(odds)) if k not in ids]] == pytest.approx(0.25 / len(odds))


@pytest.mark.parametrize("hint", ["the=1", "3:", "3:the", "-1:the=1", "0:the=2", "0:the=0.9,anna=0.9", "0:the=0", "x:the=1"])
def test_a_hint_written_otherwise_is_refused(loaded, hint):
    with pytest.raises(ValueError, match="write POSITION:TOKEN=SHARE"):
        parse_hint(hint, loaded[1])


def test_what_is_not_one_token_is_refused_with_its_tokens(loaded):
    with pytest.raises(ValueError, match="not one token of this tokenizer, but"):
        find_token("the zebra", loaded[1])


def test_a_prompt_with_a_gap_is_the_same_beside_a_text_longer_than_the_trained_length(run_dir, monkeypatch, capsys):
    flags = [f"-mdir={run_dir}", "--num_samples=1", "--steps=3", "--prompt=the ___ walks"]
    alone = command(monkeypatch, capsys, *flags)
    assert command(monkeypatch, capsys, *flags, "--prompt=anna", "--length=50")[0] == alone[0]


def test_output_is_not_written_over_the_prompts_or_the_run(run_dir, monkeypatch, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("anna\n")
    (run_dir / "metrics.jsonl").write_text("{}\n")
    for path in (tmp_path / "prompts.txt", run_dir / "best.pt", run_dir / "metrics.jsonl"):
        before = path.read_bytes()
        flags = [f"-mdir={run_dir}", f"--prompt_file={tmp_path / 'prompts.txt'}", f"--output={path}"]
        with pytest.raises(SystemExit):
            command(monkeypatch, capsys, *flags)
        assert path.read_bytes() == before and "give another name" in capsys.readouterr().err


def test_a_hint_decides_its_position(loaded):
    model, tokenizer, run = loaded
    template = make_template("", tokenizer, run, 0, 12)
    ids = [i for i in range(len(tokenizer)) if allowed_tokens(tokenizer)[1, i]]
    for wanted in ids[3:5]:
        hint = (2, torch.full((len(tokenizer),), -30.0).index_fill(0, torch.tensor(wanted), 0.0))
        for solver in ("commit", "sde2"):
            ((text, _),) = generate(model, tokenizer, [template], 0, Options(solver, 3, hints=(hint,)))
            assert text[2 + (tokenizer.bos_id() >= 0)] == wanted


def test_a_hint_without_its_position_or_for_a_given_token_is_refused(loaded):
    _, tokenizer, run = loaded
    template = make_template("the", tokenizer, run, 0, 12)
    with pytest.raises(ValueError, match="a hint is for token 40"):
        check_hints([(40, None)], [template], tokenizer.bos_id() >= 0)
    with pytest.raises(ValueError, match="which is given"):
        check_hints([(3, None), (0, None)], [template], tokenizer.bos_id() >= 0)


def test_a_banned_token_is_never_drawn_but_may_be_given(loaded):
    model, tokenizer, run = loaded
    template = make_template("the", tokenizer, run, 0, 25)
    given = sum(kind >= 0 for kind in template)
    drawn = {k for ids, _ in generate(model, tokenizer, [template] * 20, 0, FEW) for k in ids[given:]}
    banned = tuple(sorted(drawn)[:3])
    for ids, _ in generate(model, tokenizer, [template] * 20, 0, Options(steps=3, banned=(*banned, template[given - 1]))):
        assert ids[:given] == template[:given] and not set(banned) & set(ids[given:])


def test_the_stronger_the_evidence_for_a_draft_the_more_of_it_stays(run_dir, monkeypatch, capsys, tmp_path):
    text, kept = "the old king sleeps", []
    for strength in (0.01, 0.6, 0.99):
        flags = [
            f"--draft={text}",
            f"--strength={strength}",
            "--num_samples=20",
            "--steps=4",
            f"--output={tmp_path / 'out'}",
        ]
        command(monkeypatch, capsys, f"-mdir={run_dir}", *flags)
        tokenizer = data.load_tokenizer(run_dir / "tokenizer.model")
        marks = [[i] if i >= 0 else [] for i in (tokenizer.bos_id(), tokenizer.eos_id())]
        draft = marks[0] + tokenizer.encode(text) + marks[1]
        texts = [json.loads(line)["ids"] for line in open(tmp_path / "out")]
        assert all(len(ids) == len(draft) and ids[: len(marks[0])] == marks[0] for ids in texts)
        kept.append(sum(a == b for ids in texts for a, b in zip(ids, draft, strict=True)))
    assert kept[0] <= kept[1] <= kept[2] and kept[0] < kept[2]


def test_text_longer_than_the_trained_length_goes_on_from_its_end(loaded, monkeypatch):
    model, tokenizer, run = loaded
    prompt = make_template("the king", tokenizer, run, 0, 60)
    monkeypatch.setattr(tokenizer, "eos_id", lambda: -1)
    seen = []
    real = sample.generate

    def watched(model, tokenizer, templates, *rest):
        seen.extend(templates)
        return real(model, tokenizer, templates, *rest)

    monkeypatch.setattr(sample, "generate", watched)
    ids, calls = sample.generate_long(model, tokenizer, prompt, 16, 0, FEW)
    given = [k for k in prompt if k >= 0][-8:]
    assert len(ids) == 60 and ids[: len(given)] == given and 3 * len(seen) - 2 <= calls <= 3 * len(seen)
    end = len([k for k in prompt if k >= 0])
    for template in seen:
        begin = [k for k in template if k >= 0]
        assert begin == ids[max(0, end - 8) : end] and len(template) <= 16
        end += len(template) - len(begin)
    assert end == 60


def test_short_texts_beside_a_long_one_are_those_without_it(loaded):
    model, tokenizer, run = loaded
    templates = [make_template("the king", tokenizer, run, i, n) for i, n in enumerate((10, 40, 12))]
    mixed = list(sample.generate_mixed(model, tokenizer, templates, 16, 3, FEW))
    assert mixed[::2] == list(generate(model, tokenizer, templates[::2], 3, FEW, numbers=[0, 2]))
    assert mixed[1] == sample.generate_long(model, tokenizer, templates[1], 16, bfn.mix_seed(3, 1), FEW)


def test_the_trace_shades_in_place_in_a_terminal_and_has_no_control_codes_elsewhere(loaded, monkeypatch):
    _, tokenizer, _ = loaded
    monkeypatch.setattr(sample.time, "sleep", lambda seconds: None)
    p = torch.eye(len(tokenizer))[tokenizer.encode("the king sleeps")][None] * 0.5
    given = torch.zeros(p.shape[:2], dtype=torch.bool)
    given[0, 0] = True
    for is_terminal in (True, False):
        file = io.StringIO()
        file.isatty = lambda is_terminal=is_terminal: is_terminal
        trace = sample.Trace(tokenizer, p.shape[1], file)
        trace(0.5, p, given), trace(1.0, p, given)
        trace.close()
        plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", file.getvalue())
        assert ("\x1b[" in file.getvalue()) == is_terminal
        assert plain.count("the king sleeps") == 2 and (is_terminal or plain.count("\n") == 2)
        if is_terminal:
            assert "\x1b[0;1m" in file.getvalue() and "\x1b[0;22m" in file.getvalue()


def test_the_trace_shows_the_first_text_beside_shorter_ones(loaded):
    model, tokenizer, run = loaded
    templates, seen = [make_template("", tokenizer, run, i, n) for i, n in enumerate((14, 9, 12))], []
    texts = list(generate(model, tokenizer, templates, 0, FEW, watch=lambda t, p, given: seen.append(given[0].sum().item())))
    bos = tokenizer.bos_id() >= 0
    assert len(texts[0][0]) == 14 and len(seen) == 3 and seen[0] == bos  # no padding in the first row


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--top_p=0"], "must be above 0"),
        (["--length=70", "--trace"], "trained"),
        (["--prompt=the ___ sleeps ___{40}", "--length=60"], "the model was trained on 32"),
        (["--draft=the king", "--length=9"], "--draft is the whole text"),
        (["--draft= "], "--draft is empty"),
        (["--time_grid=learned"], "before the first validation"),
    ],
)
def test_what_does_not_go_together_gets_one_line(run_dir, monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, capsys, f"-mdir={run_dir}", "--steps=2", *flags)
    output = capsys.readouterr()
    assert stop.value.code == 2 and message in output.err and output.err.count("\n") == 1 and not output.out


def test_all_controls_go_together_on_the_command_line(run_dir, monkeypatch, capsys, tmp_path):
    tokenizer = data.load_tokenizer(run_dir / "tokenizer.model")
    token = tokenizer.id_to_piece(tokenizer.encode("the")[0]).removeprefix("\u2581")
    flags = [f"-mdir={run_dir}", "--num_samples=2", "--steps=4", "--corrections=1", f"--output={tmp_path / 'out'}"]
    flags += ["--temperature=0.8", "--top_p=0.9", "--argmax", "--until=0.5", f"--hint=1:{token}=0.5", f"--ban={token}"]
    for solver in ("commit", *sample.bfn.SOLVERS):
        assert len(command(monkeypatch, capsys, *flags, f"--solver={solver}", "--length=12")) == 2
        assert all(1 <= json.loads(line)["calls"] <= 5 for line in open(tmp_path / "out"))
    assert len(command(monkeypatch, capsys, *flags, "--draft=the king sleeps", "--strength=0.5")) == 2
    assert len(command(monkeypatch, capsys, f"-mdir={run_dir}", "--num_samples=1", "--steps=2", "--length=70")) == 1


def test_a_folder_without_a_run_gets_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["sample.py", f"-mdir={tmp_path}"])
    with pytest.raises(SystemExit) as stop:
        cli.run(sample.main)
    output = capsys.readouterr()
    assert stop.value.code == 2 and "no checkpoint at" in output.err and output.err.count("\n") == 1 and not output.out


def test_every_command_of_the_readme_has_flags_that_exist():
    readme = (Path(train.__file__).parent / "README.md").read_text()
    commands = re.findall(r"python ((?:train|sample|evaluate)\.py[^\n`|&#)]*)", readme)
    assert len(commands) >= 6
    for line in commands:
        name, *flags = shlex.split(line)
        if flags == ["--help"]:
            continue
        {"train.py": train, "sample.py": sample, "evaluate.py": evaluate}[name].flags().parse_args(flags)
