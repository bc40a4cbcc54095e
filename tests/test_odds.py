"""Odds of tokens: what a hint means, and which hints are refused."""

import pytest
import torch

from sampling import odds
from sampling.prompts import (
    make_template,
)


def test_a_hint_is_the_odds_of_its_tokens(loaded):
    _, tokenizer, _ = loaded
    token = tokenizer.pieces[tokenizer.encode("the")[0]].removeprefix("\u2581")
    ids = odds.find_ids(token, tokenizer)
    position, hint = odds.parse(f"3:{token}=0.75", tokenizer)
    shares = hint.exp()
    assert position == 3 and shares[ids].tolist() == pytest.approx([0.75] * len(ids))
    others = [k for k in range(len(shares)) if k not in ids]
    assert shares[others].tolist() == pytest.approx([0.25 / len(shares)] * len(others))


@pytest.mark.parametrize(
    "hint",
    ["the=1", "3:", "3:the", "-1:the=1", "0:the=2", "0:the=0.9,anna=0.9", "0:the=0", "x:the=1"],
)
def test_a_misspelled_hint_is_refused(loaded, hint):
    with pytest.raises(ValueError, match="write POSITION:TOKEN=SHARE"):
        odds.parse(hint, loaded[1])


def test_a_word_of_several_tokens_is_refused_with_its_tokens(loaded):
    with pytest.raises(ValueError, match="not one token of this tokenizer, but"):
        odds.find_ids("the zebra", loaded[1])


def test_spaces_around_the_tokens_of_hints_and_bans_are_ignored(loaded):
    _, tokenizer, _ = loaded
    a, b = (
        tokenizer.pieces[tokenizer.encode(text)[0]].removeprefix("\u2581")
        for text in ("the", "king")
    )
    position, hint = odds.parse(f" 3 : {a} = 0.7, {b}=0.3 ", tokenizer)
    expected = odds.parse(f"3:{a}=0.7,{b}=0.3", tokenizer)
    assert position == expected[0] and torch.equal(hint, expected[1])
    assert odds.find_ids(f" {a} ", tokenizer) == odds.find_ids(a, tokenizer)
    with pytest.raises(ValueError, match="write POSITION:TOKEN=SHARE"):
        odds.parse(f"3:{a}=0.3, {a}=0.3", tokenizer)


def test_a_hint_outside_the_text_or_for_a_given_token_is_refused(loaded):
    _, tokenizer, run = loaded
    template = make_template("the", tokenizer, run, 0, 12)
    with pytest.raises(ValueError, match="a hint is for token 40"):
        odds.check([(40, None)], [template], tokenizer.bos >= 0)
    with pytest.raises(ValueError, match="which is given"):
        odds.check([(3, None), (0, None)], [template], tokenizer.bos >= 0)
