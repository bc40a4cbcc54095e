"""Prompts, gaps, hints and drafts, and the sampling command."""

import copy
import io
import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from untrained import make_run

import bfn
import data
import evaluate
import model as model_file
import sample
from bfn import Controls
from common import cli
from common.noise import Draws, mix_seed
from sample import Sampler
from sampling import generate as generation
from sampling import prompts, terminal
from sampling.generate import Options, generate
from sampling.prompts import (
    FREE,
    GAP,
    WORD_REST,
    WORD_START,
    allowed_at,
    allowed_tokens,
    check_hints,
    find_ids,
    make_template,
    parse_hint,
    parse_prompt,
    read_breaks,
    unknown_pieces,
    warn_unknown,
)
from sampling.terminal import Trace
from text import cache, toy
from text.tokenizer import add_marks, count_word_lengths
from training.checkpoint import load

QUICK = Options(Controls(steps=3))


@pytest.fixture(scope="module", params=["bpe", "word", "char"])
def run_dir(request, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / request.param, request.param, toy.corpus(300))


@pytest.fixture(scope="module")
def loaded(run_dir):
    return load(run_dir)


@pytest.fixture(scope="module")
def mixing(loaded):
    """A run whose network mixes positions and knows the time: the layers of an untrained one do nothing yet."""
    model, tokenizer, run = loaded
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return model, tokenizer, run


def run_command(monkeypatch, capsys, *argv):
    """Run sample.py -> the lines of its standard output."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *argv])
    cli.run(sample.main)
    return capsys.readouterr().out.splitlines()


def run_failing_command(monkeypatch, capsys, *argv):
    """Run sample.py with flags that it refuses -> its one line on standard error."""
    with pytest.raises(SystemExit) as stop:
        run_command(monkeypatch, capsys, *argv)
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.err.count("\n") == 1 and not output.out
    return output.err


def sample_prompt(loaded, prompt, seed=0):
    """Sample one prompt -> its template, ids."""
    model, tokenizer, run = loaded
    template = make_template(prompt, tokenizer, run, seed)
    ((ids, _),) = generate(model, tokenizer, [template], seed, QUICK)
    return template, ids


def train_plain_tokenizer(kind, lines):
    """Train a tokenizer with SentencePiece's own defaults, which puts a space before every text."""
    model = io.BytesIO()
    options = dict(model_type=kind, vocab_size=60, hard_vocab_limit=False, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


# ---------------------------------------------------------------- a sample depends on nothing but its seed and number


def test_the_same_seed_gives_the_same_text_and_another_seed_a_different_one(loaded):
    assert sample_prompt(loaded, "", 1) == sample_prompt(loaded, "", 1)
    assert sample_prompt(loaded, "", 1)[1] != sample_prompt(loaded, "", 2)[1]


@pytest.mark.parametrize(
    "options",
    [
        Options(Controls(steps=3)),
        Options(Controls(steps=20, corrections=2)),
        Options(Controls(steps=20, corrections=2, until=0.5)),
        *(Options(Controls(name, steps=3)) for name in bfn.SAMPLERS if name != "commit"),
        Options(Controls("sde2", steps=10, until=0.2)),
    ],
    ids=lambda o: f"{o.controls.sampler}-{o.controls.steps}-{o.controls.corrections}-{o.controls.until}",
)
def test_a_sample_does_not_change_with_its_neighbours(mixing, options):
    """Short texts next to a long one are padded, make fewer calls, and with `until` finish at other calls than it."""
    model, tokenizer, run = mixing
    templates = [make_template("", tokenizer, run, i, length) for i, length in enumerate([4, 30, 3, 17])]
    together = generation.sample_batch(model, tokenizer, templates, seeds=[5, 6, 7, 8], options=options)
    for template, seed, text in zip(templates, [5, 6, 7, 8], together, strict=True):
        assert generation.sample_batch(model, tokenizer, [template], [seed], options) == [text]
    if options.controls.until:
        n_calls = [calls for _, calls in together]
        assert len(set(n_calls)) > 1 and min(n_calls) < options.controls.steps


def test_the_size_of_the_batches_does_not_change_a_sample(loaded, monkeypatch):
    model, tokenizer, run = loaded
    lengths = [20, 12, 16, 14, 12]
    templates = [make_template("the king", tokenizer, run, i, length) for i, length in enumerate(lengths)]
    in_one_batch = list(generate(model, tokenizer, templates, 5, QUICK))
    assert [len(ids) for ids, _ in in_one_batch] == lengths
    monkeypatch.setattr(generation, "SORTED_BATCHES", 2)
    monkeypatch.setitem(model_file.BATCH_ELEMENTS, "cpu", 1)  # batches of one text
    assert list(generate(model, tokenizer, templates, 5, QUICK)) == in_one_batch


def test_the_number_of_a_text_decides_its_random_numbers(loaded):
    model, tokenizer, run = loaded
    templates = [make_template("", tokenizer, run, 0, 12)] * 3
    texts = list(generate(model, tokenizer, templates, 5, QUICK))
    assert texts[0] != texts[1] != texts[2]
    assert list(generate(model, tokenizer, templates[:2], 5, QUICK, numbers=[2, 0])) == [texts[2], texts[0]]


@pytest.mark.parametrize("sampler", bfn.SAMPLERS)
def test_the_evidence_of_a_draft_changes_no_other_draw(loaded, sampler):
    """A draft of strength 0 is no evidence, so all that it could change are the random numbers of the sampler."""
    model, tokenizer, _ = loaded
    draft = tuple(tokenizer.encode("the old king sleeps"))
    templates = [[FREE] * len(draft)] * 3
    without = generate(model, tokenizer, templates, 0, Options(Controls(sampler, steps=4)))
    assert list(generate(model, tokenizer, templates, 0, Options(Controls(sampler, steps=4), draft=draft))) == list(without)


@pytest.mark.parametrize("sampler", bfn.SAMPLERS)
def test_no_random_numbers_are_used_twice(loaded, sampler, monkeypatch):
    model, tokenizer, _ = loaded
    used, real = [], Draws.at

    def at(self, phase, call):
        used.append((phase, call))
        return real(self, phase, call)

    monkeypatch.setattr(Draws, "at", at)
    draft = tuple(tokenizer.encode("the old king sleeps"))
    controls = Controls(sampler, steps=3, corrections=1, until=1e-9)
    options = Options(controls, draft=draft, strength=0.3)
    list(generate(model, tokenizer, [[FREE] * len(draft)], 0, options))
    assert (generation.DRAFT, 0) in used and len(used) == len(set(used)) >= 4


# ---------------------------------------------------------------- prompts and gaps


@pytest.mark.parametrize(
    "prompt", ["the king", "the ___ sleeps", "the ___{3} sleeps", "___ sleeps today", "the king ___", "___"]
)
def test_given_tokens_come_out_unchanged(loaded, prompt):
    template, ids = sample_prompt(loaded, prompt)
    assert len(ids) == len(template)
    assert all(token == given for token, given in zip(ids, template, strict=True) if given >= 0)


@pytest.mark.parametrize("seed", range(5))
def test_each_gap_is_filled_with_one_word(loaded, seed):
    _, tokenizer, _ = loaded
    _, ids = sample_prompt(loaded, "the ___ sleeps near ___ boat", seed)
    text = sample.decode(tokenizer, ids)
    assert re.fullmatch(r"the \S+ sleeps near \S+ boat", text), text


def test_a_gap_with_a_count_takes_that_many_tokens(loaded):
    _, tokenizer, _ = loaded
    ((template, _),), has_gap = parse_prompt("the ___{3} sleeps", tokenizer, [0, 1])
    assert has_gap and template.count(GAP) == 3
    assert tokenizer.decode([token for token in template if token >= 0]).split() == ["the", "sleeps"]


def test_a_gap_without_a_count_takes_as_many_tokens_as_a_word(run_dir, loaded):
    """Of 4 tokens here. A tokenizer of whole words has one, and one of characters counts the space before the gap."""
    _, tokenizer, _ = loaded
    words_of_4 = [0, 0, 0, 0, 1]
    ((template, _),), _ = parse_prompt("the ___ sleeps", tokenizer, words_of_4)
    expected = {"bpe": [WORD_START] + [WORD_REST] * 3, "word": [WORD_START], "char": [WORD_REST] * 3}[run_dir.name]
    assert [kind for kind in template if kind < 0] == expected


@pytest.mark.parametrize("kind, prompt", [("char", "the ___s"), ("bpe", "the ___, then")])
def test_text_right_after_a_gap_gets_no_space(kind, prompt):
    """Also with a tokenizer that puts a space before every text."""
    tokenizer = train_plain_tokenizer(kind, ["the king, then the queen s sleeps", "a king s hat, a queen"] * 20)
    ((template, _),), _ = parse_prompt(prompt, tokenizer, [0, 1])
    filled = [token if token >= 0 else tokenizer.encode("k")[-1] for token in template]
    assert tokenizer.decode(filled).split() == prompt.replace("___", "k").split()


def punctuated(tmp_path, kind):
    """A run of a corpus with punctuation."""
    return make_run(tmp_path / kind, kind, "The king is sweet.\nIs the old king sweet?\nNo, the king said." * 40)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word", "char"])
@pytest.mark.parametrize("prompt", ["The king is ___.", "___, the king said.", "Is the ___ sweet?"])
def test_a_gap_next_to_punctuation_works_with_every_tokenizer(tmp_path, kind, prompt):
    tokenizer = load(punctuated(tmp_path, kind))[1]
    for template, _ in parse_prompt(prompt, tokenizer, [0, 0, 1])[0]:
        letter = tokenizer.encode("k")[-1] if kind != "word" else tokenizer.encode(" king")[-1]
        text = tokenizer.decode([k if k >= 0 else letter for k in template])
        before, after = prompt.split("___")
        assert text.strip().startswith(before.strip()) and text.endswith(after)


def test_a_word_gap_after_a_space_is_filled_with_a_word_and_no_punctuation(tmp_path):
    tokenizer = load(punctuated(tmp_path, "word"))[1]
    comma, king = tokenizer.piece_to_id("\u2581\u2040,"), tokenizer.piece_to_id("\u2581king")
    allowed = allowed_tokens(tokenizer)
    assert not allowed[-WORD_START, comma] and allowed[-WORD_START, king]
    assert find_ids(",", tokenizer) == [comma]


def test_text_that_cannot_be_joined_to_a_gap_is_refused():
    tokenizer = train_plain_tokenizer("word", ["the king s hat", "a queen s hat"] * 20)
    with pytest.raises(ValueError, match="cannot join 's'"):
        parse_prompt("king___{1}s", tokenizer, [0, 1])


def test_special_tokens_are_never_drawn(loaded):
    model, tokenizer, run = loaded
    templates = [make_template("", tokenizer, run, i, 30) for i in range(20)]
    special = {tokenizer.unk_id(), tokenizer.bos_id()}
    for ids, _ in generate(model, tokenizer, templates, 0, QUICK):
        assert not special & set(ids[1:] if tokenizer.bos_id() >= 0 else ids)


def test_a_text_can_end_at_a_free_position_but_not_in_a_gap(loaded):
    _, tokenizer, _ = loaded
    if tokenizer.eos_id() >= 0:
        may_end = allowed_tokens(tokenizer)[:, tokenizer.eos_id()]
        assert may_end[-FREE] and not any(may_end[-kind] for kind in (GAP, WORD_START, WORD_REST))


def test_lengths_are_drawn_from_the_training_texts(loaded):
    _, tokenizer, run = loaded
    lengths = [len(make_template("", tokenizer, run, seed)) for seed in range(2000)]
    for length, share in ((5, 1 / 15), (6, 5 / 15), (7, 9 / 15)):
        assert lengths.count(length) / 2000 == pytest.approx(share, abs=0.04)


def test_words_are_counted_by_their_tokens_and_within_documents():
    class Pieces(list):
        id_to_piece = list.__getitem__

    tokenizer = Pieces(["\u2581the", "s", "\u2581king"])
    ids = np.array([0, 1, 1, 2, 0, 0, 1, 2])  # "thess king the", "thes king"
    tokens = SimpleNamespace(ids=ids, offsets=np.array([0, 5, 8]))
    assert count_word_lengths(tokenizer, tokens) == [0, 1, 1, 1]
    assert count_word_lengths(tokenizer, tokens, longest=2) == [0, 1, 1]


@pytest.mark.parametrize(
    "prompt, length, message",
    [
        ("the ___{40} sleeps", None, "trained on 32: shorten it"),
        ("the ___{0} sleeps", None, "gap of no tokens"),
        ("the old king sleeps", 3, "a text of 3 has none left to sample: raise --length"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(loaded, prompt, length, message):
    _, tokenizer, run = loaded
    with pytest.raises(ValueError, match=message):
        make_template(prompt, tokenizer, run, 0, length)


@pytest.mark.parametrize("prompt", ["a ___{-1}", "a ___{} b", "____", "___{3", "___{two}", "___{2-}", "___{3-1}", "___{%s}" % ("9" * 5000)])
def test_a_misspelled_gap_is_refused(loaded, prompt):
    _, tokenizer, run = loaded
    with pytest.raises(ValueError, match="a gap (is )?___"):
        make_template(prompt, tokenizer, run, seed=0)


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("snake_case and a_b___c", None),  # None: the text is the prompt
        ("x9____y __init__", None),
        ("fill \\___ here", "fill ___ here"),
        ("\\_____", "_____"),
        ("\\___{3}", "___{3}"),
        ("\\\\___", "\\___"),
    ],
)
def test_underscores_in_a_word_or_after_a_backslash_are_text(prompt, text):
    assert not re.search(prompts.MISSPELLED, prompt)
    assert prompts.split_gaps(prompt) == ([text or prompt], [])


@pytest.mark.parametrize(
    "prompt, texts",
    [
        ("a_b___c ___", ["a_b___c ", ""]),
        ("the ___s", ["the ", "s"]),
        ("\u5929___\u6c14", ["\u5929", "\u6c14"]),
        ("a___{1}b", ["a", "b"]),
        ("___{1}___", ["", "", ""]),
    ],
)
def test_other_underscores_are_gaps_also_between_letters_of_scripts_without_spaces(prompt, texts):
    assert prompts.split_gaps(prompt)[0] == texts


def test_underscores_that_are_text_reach_the_template():
    tokenizer = train_plain_tokenizer("char", ["a_b___c", "d ___"] * 20)
    ((template, _),), has_gap = parse_prompt(r"a_b___c \___", tokenizer, [0, 1])
    assert not has_gap and tokenizer.decode(template) == "a_b___c ___"


def test_a_prompt_that_is_not_unicode_is_refused(loaded):
    _, tokenizer, run = loaded
    with pytest.raises(ValueError, match="is not UTF-8: convert it"):
        make_template("caf\udce9", tokenizer, run, seed=0)


def test_a_sample_of_a_model_of_lines_is_printed_on_one_line():
    assert sample.lay_out("a\u2028b\x0cc\r\nd", {"args": {"example": "line"}}) == "a b c d"
    assert sample.lay_out("a\nb", {"args": {"example": "paragraph"}}) == "a\nb"


@pytest.fixture(params=["bpe", "char", "word"])
def poems(request, tmp_path):
    """A run whose examples have several lines."""
    text = "\n\n".join(["the king\nsleeps", "anna\nsees the\nboat"] * 60)
    return make_run(tmp_path / request.param, request.param, text, "paragraph")


def test_texts_of_several_lines_are_printed_with_a_separator_and_written_as_json(poems, monkeypatch, capsys, tmp_path):
    prompt = r"--prompt=the king\nsleeps ___{2}"
    lines = run_command(monkeypatch, capsys, f"-mdir={poems}", prompt, "--num_samples=2", f"--output={tmp_path / 'out'}")
    records = [json.loads(line) for line in open(tmp_path / "out")]
    assert lines.count(sample.SEPARATOR) == 2 and lines[:1] == ["the king"] and lines[1].startswith("sleeps")
    for record in records:
        assert record["text"].startswith("the king\nsleeps") and record["prompt"] == "the king\nsleeps ___{2}"


def test_a_draft_of_several_lines_is_read_with_its_line_breaks(poems, monkeypatch, capsys):
    drafts = []
    monkeypatch.setattr(sample.Sampler, "read_draft", lambda self, text: drafts.append(text) or ())
    run_command(monkeypatch, capsys, f"-mdir={poems}", r"--draft=the king\nsleeps", "--num_samples=1", "--steps=1")
    assert drafts == ["the king\nsleeps"]


@pytest.mark.parametrize("prompt", ["the king\n___", "___\nsleeps", "anna\n___\nboat"])
def test_a_gap_next_to_a_line_break_is_a_word(poems, prompt):
    tokenizer = load(poems)[1]
    (template, _), *_ = parse_prompt(prompt, tokenizer, [0, 1])[0]
    kinds = [kind for kind in template if kind < 0]
    assert kinds == [WORD_START if poems.name == "word" else WORD_REST]
    text = tokenizer.decode([k if k >= 0 else tokenizer.encode("anna")[0] for k in template])
    before, after = prompt.split("___")
    assert text.startswith(before) and text.endswith(after)


def test_a_backslash_is_a_line_break_only_for_examples_of_several_lines():
    paragraph, line = ({"args": {"example": example}} for example in ("paragraph", "line"))
    assert read_breaks(r"a\nb\\n\t", paragraph) == "a\nb\\n\\t" and read_breaks(r"a\nb", line) == r"a\nb"


def test_a_word_gap_has_no_line_break_and_its_length_counts_no_line_break(poems):
    _, tokenizer, _ = load(poems)
    tokens = cache.load_corpus(poems / "text.txt", poems / "tokenizer.model", poems, example="paragraph")
    line_break = [k for k in range(len(tokenizer)) if "\n" in tokenizer.decode([k])]
    allowed = allowed_tokens(tokenizer)
    assert not allowed[[-WORD_START, -WORD_REST]][:, line_break].any() and allowed[-GAP, line_break].any()
    if poems.name == "char":  # "the", at the end of a line or not, takes 4 tokens with the space before it
        assert [n for n, count in enumerate(count_word_lengths(tokenizer, tokens)) if count] == [4, 5]


@pytest.mark.parametrize("prompt", ["zq the xj xj king \u5468", "\u5468\u672b the", "the zq"])
@pytest.mark.parametrize("plain", [False, True])
def test_unknown_tokens_read_as_the_prompt_or_as_nothing(loaded, plain, prompt):
    """Also with a tokenizer that puts a space before every text, and when neighbours are one unknown token."""
    _, tokenizer, _ = loaded
    if plain:
        tokenizer = train_plain_tokenizer("bpe", ["the king sleeps", "a queen sleeps"] * 20)
    ids = tokenizer.encode(prompt)
    assert sample.decode(tokenizer, ids, unknown_pieces(prompt, tokenizer)) == prompt
    without = sample.decode(tokenizer, ids)
    assert "\u2047" not in without and "the" in without.split()


def test_a_text_ends_at_eos(loaded):
    _, tokenizer, _ = loaded
    the = tokenizer.encode("the")
    assert sample.decode(tokenizer, add_marks(the, tokenizer)) == "the"
    if tokenizer.eos_id() >= 0:
        assert sample.decode(tokenizer, add_marks(the, tokenizer) + the) == "the"


# ---------------------------------------------------------------- hints, bans and drafts


def test_a_hint_is_the_odds_of_its_tokens(loaded):
    _, tokenizer, _ = loaded
    token = tokenizer.id_to_piece(tokenizer.encode("the")[0]).removeprefix("\u2581")
    ids = find_ids(token, tokenizer)
    position, hint = parse_hint(f"3:{token}=0.75", tokenizer)
    odds = hint.exp()
    assert position == 3 and odds[ids].tolist() == pytest.approx([0.75] * len(ids))
    others = [k for k in range(len(odds)) if k not in ids]
    assert odds[others].tolist() == pytest.approx([0.25 / len(odds)] * len(others))


@pytest.mark.parametrize("hint", ["the=1", "3:", "3:the", "-1:the=1", "0:the=2", "0:the=0.9,anna=0.9", "0:the=0", "x:the=1"])
def test_a_misspelled_hint_is_refused(loaded, hint):
    with pytest.raises(ValueError, match="write POSITION:TOKEN=SHARE"):
        parse_hint(hint, loaded[1])


def test_a_word_of_several_tokens_is_refused_with_its_tokens(loaded):
    with pytest.raises(ValueError, match="not one token of this tokenizer, but"):
        find_ids("the zebra", loaded[1])


def test_spaces_around_the_tokens_of_hints_and_bans_are_ignored(loaded):
    _, tokenizer, _ = loaded
    a, b = (tokenizer.id_to_piece(tokenizer.encode(text)[0]).removeprefix("\u2581") for text in ("the", "king"))
    position, hint = parse_hint(f" 3 : {a} = 0.7, {b}=0.3 ", tokenizer)
    expected = parse_hint(f"3:{a}=0.7,{b}=0.3", tokenizer)
    assert position == expected[0] and torch.equal(hint, expected[1])
    assert find_ids(f" {a} ", tokenizer) == find_ids(a, tokenizer)
    with pytest.raises(ValueError, match="write POSITION:TOKEN=SHARE"):
        parse_hint(f"3:{a}=0.3, {a}=0.3", tokenizer)


@pytest.mark.parametrize("sampler", ["commit", "sde2"])
def test_a_strong_hint_decides_its_position(loaded, sampler):
    model, tokenizer, run = loaded
    template = make_template("", tokenizer, run, 0, 12)
    drawable = allowed_tokens(tokenizer)[-FREE].nonzero().flatten().tolist()
    for wanted in drawable[3:5]:
        hint = torch.full((len(tokenizer),), -30.0).index_fill(0, torch.tensor(wanted), 0.0)
        options = Options(Controls(sampler, steps=3), hints=((2, hint),))
        ((ids, _),) = generate(model, tokenizer, [template], 0, options)
        assert ids[2 + (tokenizer.bos_id() >= 0)] == wanted


def test_a_hint_outside_the_text_or_for_a_given_token_is_refused(loaded):
    _, tokenizer, run = loaded
    template = make_template("the", tokenizer, run, 0, 12)
    with pytest.raises(ValueError, match="a hint is for token 40"):
        check_hints([(40, None)], [template], tokenizer.bos_id() >= 0)
    with pytest.raises(ValueError, match="which is given"):
        check_hints([(3, None), (0, None)], [template], tokenizer.bos_id() >= 0)


def test_a_banned_token_is_never_drawn_but_may_be_given(loaded):
    model, tokenizer, run = loaded
    template = make_template("the", tokenizer, run, 0, 25)
    n_given = sum(kind >= 0 for kind in template)
    drawn = {k for ids, _ in generate(model, tokenizer, [template] * 20, 0, QUICK) for k in ids[n_given:]}
    banned = tuple(sorted(drawn)[:3])
    assert len(banned) == 3
    options = Options(Controls(steps=3, corrections=4), banned=(*banned, template[n_given - 1]))
    for ids, _ in generate(model, tokenizer, [template] * 20, 0, options):
        assert ids[:n_given] == template[:n_given] and not set(options.banned) & set(ids[n_given:])


def test_a_ban_does_not_touch_given_tokens(loaded):
    """The trace shows them as what the network is most certain of."""
    _, tokenizer, _ = loaded
    (allowed,) = allowed_at(torch.tensor([[5, FREE]]), tokenizer, banned=(5,))
    assert allowed[0].all() and not allowed[1, 5]


def test_bans_that_leave_no_token_are_refused(loaded):
    _, tokenizer, _ = loaded
    with pytest.raises(ValueError, match="--ban leaves no token to draw"):
        allowed_at(torch.tensor([[FREE]]), tokenizer, banned=range(len(tokenizer)))


def test_a_stronger_draft_keeps_more_of_its_text(run_dir, loaded, monkeypatch, capsys, tmp_path):
    _, tokenizer, _ = loaded
    text, n_kept = "the old king sleeps", []
    draft = add_marks(tokenizer.encode(text), tokenizer)
    flags = [f"-mdir={run_dir}", f"--draft={text}", "--num_samples=20", "--steps=4", f"--output={tmp_path / 'out'}"]
    for strength in (0.01, 0.6, 0.99):
        run_command(monkeypatch, capsys, *flags, f"--strength={strength}")
        texts = [json.loads(line)["ids"] for line in open(tmp_path / "out")]
        assert len(texts) == 20 and all(len(ids) == len(draft) for ids in texts)
        assert tokenizer.bos_id() < 0 or all(ids[0] == tokenizer.bos_id() for ids in texts)
        n_kept.append(sum(a == b for ids in texts for a, b in zip(ids, draft, strict=True)))
    assert n_kept[0] < n_kept[1] < n_kept[2]


def test_the_network_is_told_the_time_of_the_draft_but_not_of_a_strength_without_one(loaded):
    """The flag --strength has a default, so it is set without a draft too."""
    model, tokenizer, _ = loaded
    draft, times = tuple(tokenizer.encode("the old king sleeps")), set()
    for options, expected in ((Options(strength=0.4), 0.0), (Options(draft=draft, strength=0.4), 0.4)):
        times.clear()
        hook = model.register_forward_pre_hook(lambda model, inputs: times.update(inputs[1].flatten().tolist()))
        list(generate(model, tokenizer, [[FREE] * len(draft)], 0, options))
        hook.remove()
        assert sorted(times) == pytest.approx([expected, 1.0])  # 1: tokens that are given to the next call


# ---------------------------------------------------------------- texts longer than the trained length


def test_each_block_of_a_long_text_begins_with_the_end_of_the_text_so_far(loaded, monkeypatch):
    model, tokenizer, run = loaded
    template = make_template("the king", tokenizer, run, 0, 60)
    monkeypatch.setattr(tokenizer, "eos_id", lambda: -1)
    blocks, real = [], generation.sample_batch

    def record(model, tokenizer, templates, *rest):
        blocks.extend(templates)
        return real(model, tokenizer, templates, *rest)

    monkeypatch.setattr(generation, "sample_batch", record)
    ids, calls = generation.write_blocks(model, tokenizer, template, 16, 0, QUICK)
    n_written = sum(k >= 0 for k in template)
    assert len(ids) == 60 and ids[:n_written] == template[:n_written]
    for block in blocks:
        given = [k for k in block if k >= 0]
        assert given == ids[max(0, n_written - 8) : n_written] and len(block) <= 16
        n_written += block.count(FREE)
    assert n_written == 60
    assert calls == sum(min(QUICK.controls.steps, block.count(FREE)) for block in blocks)


def test_a_long_text_changes_none_of_the_short_ones(loaded):
    model, tokenizer, run = loaded
    templates = [make_template("the king", tokenizer, run, i, n) for i, n in enumerate((10, 40, 12))]
    mixed = list(generate(model, tokenizer, templates, 3, QUICK, limit=16))
    assert mixed[::2] == list(generate(model, tokenizer, templates[::2], 3, QUICK, numbers=[0, 2]))
    assert mixed[1] == generation.write_blocks(model, tokenizer, templates[1], 16, mix_seed(3, 1), QUICK)


def test_the_command_samples_a_prompt_with_a_gap_next_to_a_long_text(run_dir, monkeypatch, capsys):
    flags = [f"-mdir={run_dir}", "--num_samples=1", "--steps=3", "--prompt=the ___ walks"]
    (text,) = run_command(monkeypatch, capsys, *flags)
    assert run_command(monkeypatch, capsys, *flags, "--prompt=anna", "--length=50")[0] == text


# ---------------------------------------------------------------- watching


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_trace_has_control_codes_only_in_a_terminal(loaded, monkeypatch, is_terminal):
    _, tokenizer, _ = loaded
    monkeypatch.setattr(terminal.time, "sleep", lambda seconds: None)
    p = torch.eye(len(tokenizer))[tokenizer.encode("the king sleeps")][None] * 0.5
    given = torch.zeros(p.shape[:2], dtype=torch.bool)
    given[0, 0] = True
    file = io.StringIO()
    file.isatty = lambda: is_terminal
    trace = generation.Trace(tokenizer, file)
    trace(0.5, p, given)
    trace(1.0, p, given)
    trace.close(tokenizer.encode("the king sleeps"))
    shown = file.getvalue()
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown)
    assert plain.count("the king sleeps") == 3
    assert plain.count("\n") == (1 if is_terminal else 3)
    assert all((code in shown) == is_terminal for code in ("\x1b[0;1m", "\x1b[0;22m"))  # given: bold, p = 0.5: normal


def test_tracing_shows_only_the_first_text_and_changes_none(loaded, capsys):
    model, tokenizer, run = loaded
    templates = [make_template("", tokenizer, run, i, n) for i, n in enumerate((14, 9, 20))]
    traced = list(generate(model, tokenizer, templates, 0, replace(QUICK, trace=Trace(tokenizer))))
    shown = capsys.readouterr().err.splitlines()
    assert traced == list(generate(model, tokenizer, templates, 0, QUICK))
    assert [line.split("  ")[0] for line in shown] == ["call 1", "call 2", "call 3", "sample"]


def test_the_trace_ends_with_the_text_that_is_printed(run_dir, monkeypatch, capsys):
    """The network is untrained, so the likeliest tokens of the last call are not the ones that are drawn."""
    argv = ["sample.py", f"-mdir={run_dir}", "--num_samples=1", "--steps=3", "--prompt=the_\u5468 ___{9}", "--trace"]
    monkeypatch.setattr(sys, "argv", argv)
    sample.main()
    output = capsys.readouterr()
    assert output.err.endswith(f"\nsample  {output.out}") and output.out.startswith("the_\u5468")


def test_the_examples_of_training_are_free_or_continue_validation_texts(run_dir, loaded, tmp_path):
    model, tokenizer, run = loaded
    tokens = cache.load_corpus(run_dir / "text.txt", run_dir / "tokenizer.model", tmp_path)
    lines = Sampler(model, tokenizer, run).examples(tokens, n=5, seed=3)
    free = [make_template("", tokenizer, run, mix_seed(3, i)) for i in range(2)]
    assert lines[:2] == [sample.decode(tokenizer, ids) for ids, _ in generate(model, tokenizer, free, 3)]
    plan = data.plan_validation(tokens, 32)
    for i, line in list(enumerate(lines))[2:]:
        start, length = plan.starts[i], plan.lengths[i]
        assert line.startswith(f"[{sample.decode(tokenizer, tokens.ids[start : start + length // 3].tolist())}] ")
    assert len(lines) == 5


# ---------------------------------------------------------------- the command


def test_the_command_prints_samples_and_nothing_else(run_dir, monkeypatch, capsys, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffanna ___\n\n___ walks\n")  # with a byte order mark
    flags = [f"-mdir={run_dir}", "--num_samples=2", "--steps=3", "--device=cpu", "--prompt=the", f"--prompt_file={prompts}"]
    lines = run_command(monkeypatch, capsys, *flags, f"--output={tmp_path / 'out'}")
    records = [json.loads(line) for line in open(tmp_path / "out")]
    assert len(lines) == 6 and lines == [record["text"] for record in records]
    assert [record["prompt"] for record in records] == ["the"] * 2 + ["anna ___"] * 2 + ["___ walks"] * 2
    assert lines == run_command(monkeypatch, capsys, *flags, "--trace")


def test_a_file_without_prompts_is_refused(run_dir, monkeypatch, capsys, tmp_path):
    (tmp_path / "empty").write_text("\n \n")
    for name, message in (("empty", "no prompts in"), ("missing", "no file of prompts at")):
        assert message in run_failing_command(monkeypatch, capsys, f"-mdir={run_dir}", f"--prompt_file={tmp_path / name}")


@pytest.mark.parametrize(
    "text, prompt, line",
    [
        ("The lamp they like is sweet.", "the ___ is sweet, zq", "'the' (did you mean 'The'?), 'sweet,' ('sweet.'), 'zq'"),
        ("THE lamp lump THE tHE", "limp The", "'limp' (did you mean 'lump' or 'lamp'?), 'The' ('THE')"),
        ("lamp", "b1 b2 b3 b4 b5 b6 b7 b1", "'b1', 'b2', 'b3', 'b4', 'b5' and 2 more"),
    ],
)
def test_a_warning_names_unknown_words_and_the_nearest_known_ones(capsys, text, prompt, line):
    tokenizer = train_plain_tokenizer("word", [text] * 9)
    warn_unknown([prompt, text, prompt], tokenizer)
    assert capsys.readouterr().err == f"the tokenizer does not know {line}\n"


def test_a_warning_names_unknown_characters_one_by_one(capsys):
    """bpe without bytes puts neighbours into one unknown token."""
    warn_unknown(["Zqueen ___ \u5468\u672b"], train_plain_tokenizer("bpe", ["a queen sleeps, z"] * 20))
    assert capsys.readouterr().err == "the tokenizer does not know 'Z' (did you mean 'z'?), '\u5468', '\u672b'\n"


def test_unknown_words_get_a_warning_and_are_printed_as_written(run_dir, monkeypatch, capsys):
    """bpe spells them in bytes."""
    argv = ["sample.py", f"-mdir={run_dir}", "--num_samples=1", "--steps=2", "--prompt=the_\u5468 ___ the zq\u672b"]
    monkeypatch.setattr(sys, "argv", argv)
    sample.main()
    output = capsys.readouterr()
    assert ("does not know" in output.err) == (run_dir.name != "bpe")
    assert re.fullmatch("the_\u5468 \\S+ the zq\u672b\n", output.out)


def test_all_bad_lines_of_a_file_of_prompts_are_named_at_once(run_dir, monkeypatch, capsys, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfanna ___\r\n\n___{x}\n \nthe ___{40}\ncaf\xe9\nanna\n")
    error = run_failing_command(monkeypatch, capsys, f"-mdir={run_dir}", f"--prompt_file={path}")
    assert re.findall(r"line (\d+): (\S+)", error) == [("3", "'___{x}':"), ("5", "'the"), ("6", "'caf\\udce9'")]


@pytest.mark.parametrize("flag", ["--draft", "--ban", "--hint"])
def test_text_that_is_not_unicode_gets_one_line(run_dir, monkeypatch, capsys, flag):
    assert "is not UTF-8: convert it" in run_failing_command(monkeypatch, capsys, f"-mdir={run_dir}", f"{flag}=caf\udce9")


def test_a_prompt_that_is_not_unicode_gets_one_line(run_dir, monkeypatch, capsys):
    assert "is not UTF-8" in run_failing_command(monkeypatch, capsys, f"-mdir={run_dir}", "--prompt=caf\udce9")


def test_output_is_replaced_only_when_all_samples_are_written(run_dir, monkeypatch, capsys, tmp_path):
    """Until then they are in a file of their own, and stay there after an error."""
    output = tmp_path / "out.jsonl"
    output.write_text("old")
    real = sample.decode
    monkeypatch.setattr(sample, "decode", lambda *inputs: real(*inputs) if capsys.readouterr().out == "" else 1 / 0)
    flags = f"-mdir={run_dir}", f"--output={output}", "--num_samples=2", "--length=6"
    with pytest.raises(ZeroDivisionError):
        run_command(monkeypatch, capsys, *flags)
    assert output.read_text() == "old" and len((tmp_path / "out.jsonl.part").read_text().splitlines()) == 1
    monkeypatch.setattr(sample, "decode", real)
    run_command(monkeypatch, capsys, *flags)
    assert len(output.read_text().splitlines()) == 2 and not (tmp_path / "out.jsonl.part").exists()


def test_output_never_overwrites_the_prompts_or_the_run(run_dir, monkeypatch, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("anna\n")
    (run_dir / "metrics.jsonl").write_text("{}\n")
    for path in (tmp_path / "prompts.txt", run_dir / "best.pt", run_dir / "metrics.jsonl"):
        before = path.read_bytes()
        flags = [f"-mdir={run_dir}", f"--prompt_file={tmp_path / 'prompts.txt'}", f"--output={path}"]
        assert "give another name" in run_failing_command(monkeypatch, capsys, *flags)
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--top_p=0"], "must be above 0"),
        (["--length=70", "--trace"], "--hint and --trace need texts of at most 32 tokens"),
        (["--prompt=the ___ sleeps ___{40}", "--length=60"], "the model was trained on 32"),
        (["--draft=the king", "--length=9"], "--draft is the whole text"),
        (["--draft= "], "--draft is empty"),
        ([f"--draft={'the king ' * 20}"], "the model was trained on at most 32"),
    ],
)
def test_flags_that_do_not_go_together_get_one_line(run_dir, monkeypatch, capsys, flags, message):
    assert message in run_failing_command(monkeypatch, capsys, f"-mdir={run_dir}", "--steps=2", *flags)


def test_a_folder_without_a_run_gets_one_line(monkeypatch, capsys, tmp_path):
    assert "no checkpoint at" in run_failing_command(monkeypatch, capsys, f"-mdir={tmp_path}")


@pytest.mark.parametrize("sampler", bfn.SAMPLERS)
def test_all_controls_go_together_on_the_command_line(run_dir, loaded, monkeypatch, capsys, tmp_path, sampler):
    _, tokenizer, _ = loaded
    token = tokenizer.id_to_piece(tokenizer.encode("the")[0]).removeprefix("\u2581")
    flags = [f"-mdir={run_dir}", "--num_samples=2", "--steps=4", "--corrections=1", f"--output={tmp_path / 'out'}"]
    flags += ["--temperature=0.8", "--top_p=0.9", "--argmax", "--until=0.5", f"--hint=1:{token}=0.5", f"--ban={token}"]
    flags += [f"--sampler={sampler}"]
    for text in ("--length=12", "--draft=the king sleeps"):
        lines = run_command(monkeypatch, capsys, *flags, text)
        records = [json.loads(line) for line in open(tmp_path / "out")]
        assert lines == [record["text"] for record in records] and len(lines) == 2
        assert all(1 <= record["calls"] <= 5 for record in records)


def test_the_command_writes_texts_longer_than_the_trained_length(run_dir, monkeypatch, capsys, tmp_path):
    flags = [f"-mdir={run_dir}", "--num_samples=1", "--steps=2", "--length=70", f"--output={tmp_path / 'out'}"]
    assert len(run_command(monkeypatch, capsys, *flags)) == 1
    assert len(json.loads((tmp_path / "out").read_text())["ids"]) > 16


def test_solver_is_another_name_for_sampler():
    assert sample.flags().parse_args(["--solver=sde2"]) == sample.flags().parse_args(["--sampler=sde2"])


@pytest.mark.parametrize("command, flag", [(sample, "--steps"), (evaluate, "--n_steps")])
def test_more_than_a_million_steps_are_refused(command, flag):
    with pytest.raises(ValueError, match="must be at most 1000000"):
        command.flags().parse_args(["-d=x"] * (command is evaluate) + [f"{flag}=1000001"])


# ---------------------------------------------------------------- from Python


def test_the_object_and_the_command_write_the_same_texts(run_dir, monkeypatch, capsys):
    flags = ["--num_samples=3", "--steps=4", "--seed=5", "--prompt=the ___ sleeps", "--ban=the", "--guidance=1"]
    model = sample.Sampler.load(run_dir)
    banned = [] if "char" in str(run_dir) or "bpe" in str(run_dir) else ["the"]
    flags = flags if banned else [flag for flag in flags if flag != "--ban=the"]
    texts = model("the ___ sleeps", n=3, seed=5, steps=4, ban=banned, guidance=1.0)
    assert texts == run_command(monkeypatch, capsys, f"-mdir={run_dir}", *flags)


def test_log_likelihoods_are_those_of_the_function_for_each_text_alone(mixing):
    model = sample.Sampler(*mixing)
    texts = ["the king sleeps", "anna sees the lamp"]
    log_p = model.log_likelihood(texts, calls=2)
    for text, value in zip(texts, log_p, strict=True):
        ids = torch.tensor([model.encode(text, "it")])
        given = ids == model.tokenizer.bos_id()
        config = model.model.config
        assert value == pytest.approx(bfn.log_likelihood(model.model, ids, given, config.s1, config.K, 2).sum().item(), rel=1e-5)
    with pytest.raises(ValueError, match="the text takes .* tokens, the model was trained on at most 32"):
        model.log_likelihood(["the king " * 40])


def test_filling_keeps_given_tokens_and_draws_no_mark_before_the_end(mixing):
    model = sample.Sampler(*mixing)
    ids = torch.randint(3, model.model.config.K, (4, 12), generator=torch.Generator().manual_seed(0))
    given = torch.rand(4, 12, generator=torch.Generator().manual_seed(1)) < 0.4
    filled = model.fill(ids.tolist(), given.tolist(), seed=2, steps=4)
    marks = torch.tensor([model.tokenizer.bos_id(), model.tokenizer.eos_id()])
    assert (filled[given] == ids[given]).all()
    assert not torch.isin(filled[:, :-1][~given[:, :-1]], marks).any()
    assert (model.fill(ids, given, seed=2, steps=4) == filled).all() and (model.fill(ids, given, seed=3, steps=4) != filled).any()


def test_a_guide_sees_texts_of_one_length_and_steers_them(mixing):
    model, wanted = sample.Sampler(*mixing), 7
    shapes = []

    def guide(z, t):
        shapes.append(z.shape)
        return z[..., wanted].sum(1)

    def share(texts):
        return np.mean([k == wanted for _, ids, _ in texts for k in ids])

    prompts = ["the king", "anna"] * 4
    plain, steered = list(model.stream(prompts, steps=8)), list(model.stream(prompts, steps=8, guide=guide))
    assert share(steered) > share(plain) + 0.1
    assert len(set(shapes)) > 1


def test_guidance_counts_two_calls_for_one_and_without_a_prompt_changes_nothing(mixing):
    model = sample.Sampler(*mixing)
    plain, guided = (list(model.stream([""] * 3, steps=5, guidance=w)) for w in (0.0, 2.0))
    assert [text for text, *_ in plain] == [text for text, *_ in guided]
    assert [2 * calls for *_, calls in plain] == [calls for *_, calls in guided]
    plain, guided = (list(model.stream(["the king"] * 3, steps=5, guidance=w)) for w in (0.0, 2.0))
    assert [text for text, *_ in plain] != [text for text, *_ in guided]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(sampler="bogus"), "sampler='bogus' is out of range"),
        (dict(steps=0), "steps=0"),
        (dict(steps=2.5), "steps=2.5"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_p=2.0, guidance=-1.0), "top_p=2.0 is out of range; guidance=-1.0 is out of range"),
        (dict(draft="the king", prompt="anna"), "a draft is the whole text"),
        (dict(label="x"), "was not trained with --labelled"),
    ],
)
def test_the_object_refuses_what_the_command_refuses(loaded, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sample.Sampler(*loaded)(**options)


def test_the_object_takes_empty_lists_and_no_texts_in_place_of_lists(loaded):
    model = sample.Sampler(*loaded)
    assert model("the king", n=0) == [] and list(model.stream([])) == [] and len(model.log_likelihood([])) == 0
    for wrong in (lambda: model.log_likelihood("the king"), lambda: model.stream("the king"), lambda: model.log_likelihood(["a"], 0)):
        with pytest.raises(ValueError, match="give a list"):
            wrong()
    for ids, given in (([1, 2], [True, False]), ([[1, 2]], [[True]]), ([[1, 10**6]], [[True, True]]), ([[-7, 2]], [[True, True]])):
        with pytest.raises(ValueError, match="ids"):
            model.fill(ids, given)


def test_a_guide_chooses_lengths_that_its_label_has(mixing):
    model = sample.Sampler(*mixing)
    lengths = sorted({len(ids) for _, ids, _ in model.stream([""] * 40, steps=1, corrections=0)})

    def guide(z, t):
        return 0 * z.sum((1, 2)) - 30.0 * (z.shape[1] != lengths[0])

    assert len(lengths) > 1
    assert {len(ids) for _, ids, _ in model.stream([""] * 40, steps=1, corrections=0, guide=guide)} == {lengths[0]}
