"""Odds of tokens that the user gives become log-odds, which are added to the network's input.

    hint  (K,)  float32  log-odds of each token at one position
"""

import math

import torch

from text.tokenizer import JOIN, SPACE


def find_ids(text, tokenizer):
    """Find the tokens that a text is, with or without a space before it -> ids, or ValueError."""
    text = text.strip(" ")
    named = text, SPACE + text, SPACE + JOIN + text
    ids = [k for k, piece in enumerate(tokenizer.pieces) if piece in named and k != tokenizer.unk]
    if not ids:
        message = f"{text!r} is not one token of this tokenizer, but"
        pieces = " ".join(tokenizer.split(text))
        raise ValueError(f"{message} {pieces}: name single tokens")
    return ids


def parse(text, tokenizer):
    """Read a hint such as "3:cat=0.7,dog=0.3" -> position, log-odds (K,), or ValueError.

    The odds are what was observed at the position. What is left to 1, at least a ten-thousandth
    because nothing is certain, is spread over all other tokens.
    """
    position, colon, odds = text.partition(":")
    pairs = [pair.rpartition("=") for pair in odds.split(",")]
    try:
        shares = {word.strip(" "): float(share) for word, _, share in pairs}
        position = int(position)
        total = sum(shares.values())
        in_range = all(0 < share <= 1 for share in shares.values()) and total <= 1.001
        if not colon or position < 0 or not in_range or len(shares) < len(pairs):
            raise ValueError
    except ValueError:
        usage = "write POSITION:TOKEN=SHARE,TOKEN=SHARE with shares that sum to at most 1"
        raise ValueError(f"--hint {text}: {usage}") from None
    K = len(tokenizer)
    hint = torch.full((K,), math.log(max(1e-4, 1 - total) / K))
    for word, share in shares.items():
        hint[find_ids(word, tokenizer)] = math.log(share)
    return position, hint


def check(hints, templates, has_bos):
    """Raise ValueError if a template lacks the position of a hint, or gives it.

    Positions are counted without bos.
    """
    for position, _ in hints:
        for template in templates:
            message = f"a hint is for token {position},"
            if position + has_bos >= len(template):
                raise ValueError(f"{message} a text has {len(template) - has_bos}: raise --length")
            if template[position + has_bos] >= 0:
                raise ValueError(f"{message} which is given: count tokens from 0")
