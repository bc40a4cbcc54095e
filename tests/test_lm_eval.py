"""The adapter for lm-evaluation-harness: what it scores and writes, and a task of the harness."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sample import Sampler
from text import toy
from tools import lm_eval

TOY = str(Path(__file__).parent.parent / "examples" / "toy")


@pytest.fixture(scope="module")
def sampler():
    return Sampler.load(TOY)


def test_a_continuation_costs_what_the_text_costs_given_the_context(sampler):
    ids, n = lm_eval.find_span(sampler, "the king", " sees the boat")
    assert sampler.tokenizer.decode(ids) == "the king sees the boat"
    assert sampler.tokenizer.decode(ids[:n]) == "the king"
    whole, given = lm_eval.log_likelihood(sampler, [(ids, 0), (ids, n)])
    assert whole == pytest.approx(sampler.log_likelihood(["the king sees the boat"], 32)[0])
    assert whole < given < 0


def test_batches_of_unlike_lengths_give_the_same_figures(sampler):
    texts = "the king sees the boat", "anna finds the ring and then anna sings", "the kings run"
    spans = [lm_eval.find_span(sampler, "", text) for text in texts]
    apart = [lm_eval.log_likelihood(sampler, [span])[0] for span in spans]
    assert lm_eval.log_likelihood(sampler, spans) == pytest.approx(apart, abs=1e-3)


def test_of_a_long_text_the_end_is_kept_and_each_token_is_scored_once(sampler):
    text = " ".join(["the king sees the boat"] * 40)
    ids, n = lm_eval.find_span(sampler, text, " again")
    assert len(ids) == sampler.limit and 0 < n < len(ids)
    spans = lm_eval.cut_spans(sampler, text)
    scored = [k for ids, n in spans for k in ids[n:]]
    tokenizer = sampler.tokenizer
    assert scored == tokenizer.add_marks(tokenizer.encode(text))
    assert all(len(ids) <= sampler.limit for ids, _ in spans)
    assert len(lm_eval.cut_spans(sampler, "the king")) == 1


def test_the_likeliest_filling_is_found_again(sampler):
    ids, n = lm_eval.find_span(sampler, "anna finds the ring and then", " anna sings")
    template = ids[:n] + [lm_eval.GAP] * (len(ids) - n - 1) + [lm_eval.FREE]
    options = sampler.options(sampler="commit", corrections=0, argmax=True)
    inputs = sampler.model, sampler.tokenizer, [template], 0
    row, _ = next(lm_eval.generate(*inputs, options))
    assert lm_eval.likeliest(sampler, [(row, n), (row[:-2] + row[-1:] * 2, n)]) == [True, False]


def test_a_text_is_continued_up_to_a_stop(sampler):
    whole = lm_eval.write(sampler, "the king", 12, [])
    assert whole.startswith(" ") and len(whole.split()) <= 12
    word = whole.split()[1]
    assert lm_eval.write(sampler, "the king", 12, ["", word]) == whole[: whole.index(word)]
    longer = " ".join(["the king sees the boat again"] * 20)
    assert 0 < len(lm_eval.write(sampler, longer, 12, []).split()) <= 12


def test_text_that_the_tokenizer_does_not_know_is_counted(sampler, capsys):
    harness = SimpleNamespace(api=SimpleNamespace(model=SimpleNamespace(LM=object)))
    model = lm_eval.make_model(harness, sampler, calls=2)
    model.loglikelihood([SimpleNamespace(args=("", text)) for text in ("the king", "the zebra")])
    assert "1 of 2 texts have text that is unknown" in capsys.readouterr().err
    model.loglikelihood([SimpleNamespace(args=("", "the king"))])
    assert "unknown" not in capsys.readouterr().err


def test_the_second_sentence_of_a_pair_has_one_wrong_word():
    pairs = lm_eval.minimal_pairs(50)
    assert pairs == lm_eval.minimal_pairs(50) and len({pair["good"] for pair in pairs}) > 40
    for pair in pairs:
        good, bad = pair["good"].split(), pair["bad"].split()
        assert toy.is_grammatical(pair["good"]) and not toy.is_grammatical(pair["bad"])
        assert sum(a != b for a, b in zip(good, bad, strict=True)) == 1


def test_without_the_harness_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match="pip install lm_eval"):
        lm_eval.main([TOY])


@pytest.mark.slow
def test_the_harness_runs_the_task_of_the_built_in_language(capsys):
    pytest.importorskip("lm_eval.evaluator")
    lm_eval.main([TOY, "--limit=40"])
    line = next(line for line in capsys.readouterr().out.split("\n") if "|acc" in line)
    assert float(line.split("|acc")[1].split("|")[2]) >= 0.95


@pytest.mark.slow
def test_the_harness_gets_what_its_other_kinds_of_request_need(sampler):
    harness = pytest.importorskip("lm_eval")
    pytest.importorskip("lm_eval.api.model")
    model = lm_eval.make_model(harness, sampler, calls=8)
    text = "the king sees the boat"
    (rolling,) = model.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    assert rolling == pytest.approx(sampler.log_likelihood([text], 8)[0])
    options = dict(until=["\n"], max_gen_toks=6)
    (written,) = model.generate_until([SimpleNamespace(args=("the king", options))])
    assert 0 < len(written.split()) <= 6
