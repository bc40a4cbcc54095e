"""What the user says of a text: prompts and gaps as templates, odds and bans of tokens as log-odds.

A template is a list with one entry a position: the id of a given token, or what may be drawn there (FREE, ...).
"""

import math
import random
import re
from functools import lru_cache

import torch

import data

FREE, GAP, WORD_START, WORD_REST = -1, -2, -3, -4  # any text; no end of text; first, later token of a word
GAP_MARK = r"___(?:\{(\d+)\})?"


# ---------------------------------------------------------------- templates


@lru_cache(maxsize=4)
def allowed_tokens(tokenizer):
    """Which tokens may be drawn at each kind of position: (5, K) bool, indexed by minus the kind; 0 is given, anything."""
    K = len(tokenizer)
    pieces = [tokenizer.id_to_piece(i) for i in range(K)]
    text = torch.tensor(
        [not (tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)) for i in range(K)]
    )
    spaced = torch.tensor([piece.startswith("\u2581") for piece in pieces])
    whole = torch.tensor([not tokenizer.is_byte(i) and pieces[i] != "\u2581" for i in range(K)])
    allowed = torch.stack([torch.ones_like(text), text, text, text & spaced & whole, text & ~spaced & whole])
    if tokenizer.eos_id() >= 0:
        allowed[-FREE, tokenizer.eos_id()] = True
    allowed[~allowed.any(1)] = text  # a vocabulary without spaces, say
    return allowed


@lru_cache(maxsize=4)
def space_style(tokenizer):
    """Whether some token is a space and more, and whether some token continues a word -> (bool, bool).

    (True, True) for subwords, (False, True) for characters, (True, False) for whole words.
    """
    text = [i for i in range(len(tokenizer)) if not (tokenizer.is_control(i) or tokenizer.is_unknown(i))]
    pieces = [tokenizer.id_to_piece(i) for i in text if not tokenizer.is_byte(i)]
    return any(len(p) > 1 and p[0] == "\u2581" for p in pieces), any(p[0] != "\u2581" for p in pieces)


def continue_text(text, tokenizer):
    """Tokens of a text after a gap, for a tokenizer that puts a space before every text. Raises ValueError if it must."""
    ids = tokenizer.encode(text.removeprefix(" "))
    if ids and not text.startswith(" "):
        if tokenizer.id_to_piece(ids[0]) != "\u2581":
            raise ValueError(f"this tokenizer cannot join {text!r} to a gap: put a space between them")
        ids = ids[1:]
    return ids


def shorten(prompt):
    """A prompt as error messages show it."""
    return ascii(prompt) if len(prompt) <= 60 else ascii(prompt[:60]) + "..."


def parse_prompt(prompt, tokenizer, word_lengths, rng):
    """Turn text with gaps into a template -> (template without bos and eos, whether it had a gap).

    ___ is one word, of as many tokens as a random word of the training text has; ___{3} is three tokens. A space
    before a gap belongs to the gap's first token where the tokenizer joins them. Raises ValueError for a gap that is
    written otherwise, and for text that is not Unicode.
    """
    if re.search(r"____|___\{(?!\d+\})", prompt):
        raise ValueError(f"{shorten(prompt)}: a gap is ___ or ___{{N}}")
    if any("\ud800" <= c <= "\udfff" for c in prompt):
        raise ValueError(f"{shorten(prompt)} is not UTF-8: convert it, say with iconv")
    (joins, continues), prefix = space_style(tokenizer), data.adds_prefix(tokenizer)
    texts = re.split(GAP_MARK, prompt)  # text, count or None, text, ...
    template = []
    for i, text in enumerate(texts):
        if i % 2 == 0:
            space = text.endswith(" ") or (not text and i == 0 and prefix)
            body = text.removesuffix(" ")  # the tokenizer may strip it
            template += tokenizer.encode(body) if i == 0 or not prefix else continue_text(body, tokenizer)
            if body != text and not joins:
                template.append(tokenizer.piece_to_id("\u2581"))
        elif text is not None:
            template += [GAP] * min(int(text), 1_000_000)
        else:
            n = rng.choices(range(len(word_lengths)), word_lengths)[0] if continues else 1
            if joins:
                template += [WORD_START if space else WORD_REST] + [WORD_REST] * (n - 1)
            else:
                template += [WORD_REST] * max(1, n - 1)  # the space is counted in n and stands outside
    return template, len(texts) > 1


def make_template(prompt, tokenizer, run, seed, length=None):
    """Complete a prompt to a template of a whole text, drawing lengths from the training text's.

    A prompt with gaps is the whole text; one without is continued. Raises ValueError where it does not fit.
    """
    rng = random.Random(seed)
    bos, eos = ([i] if i >= 0 else [] for i in (tokenizer.bos_id(), tokenizer.eos_id()))
    body, closed = parse_prompt(prompt, tokenizer, run["word_lengths"], rng)
    limit = run["args"]["sequence_length"]
    if closed:
        template = bos + body + eos
        if all(kind >= 0 for kind in template):
            raise ValueError(f"{shorten(prompt)} has a gap of no tokens: nothing is left to sample")
        if len(template) > limit:
            raise ValueError(f"{shorten(prompt)} takes {len(template)} tokens, the model was trained on {limit}")
        return template
    given = bos + body
    if length is None:
        weights = [n * (i > len(given)) for i, n in enumerate(run["lengths"])]
        length = rng.choices(range(len(weights)), weights)[0] if any(weights) else limit
    if length <= len(given):
        raise ValueError(
            f"{shorten(prompt)} takes {len(given)} tokens and leaves nothing of length {length}: raise --length"
        )
    return given + [FREE] * (length - len(given))


# ---------------------------------------------------------------- what the user knows


def find_token(text, tokenizer):
    """The one token of a text, with a space before it or without -> its ids. Raises ValueError where there is none."""
    ids = {tokenizer.piece_to_id(piece) for piece in (text, "\u2581" + text)} - {tokenizer.unk_id()}
    if not ids:
        pieces = " ".join(tokenizer.encode(text, out_type=str))
        raise ValueError(f"{text!r} is not one token of this tokenizer, but {pieces}: name single tokens")
    return sorted(ids)


def parse_hint(text, tokenizer):
    """ "3:cat=0.7,dog=0.3" -> position, log-odds (K,).

    Odds are what was observed at the position: 0.7 for cat, 0.3 for dog, the rest to 1 spread over all other tokens, and a
    ten-thousandth at the least, as nothing is certain. Raises ValueError for what is written otherwise.
    """
    position, colon, odds = text.partition(":")
    pairs = [pair.rpartition("=") for pair in odds.split(",")]
    try:
        shares, position = {word: float(share) for word, _, share in pairs}, int(position)
        in_range = all(0 < share <= 1 for share in shares.values()) and sum(shares.values()) <= 1.001
        if not colon or position < 0 or not in_range or len(shares) < len(pairs):
            raise ValueError
    except ValueError:
        raise ValueError(f"--hint {text}: write POSITION:TOKEN=SHARE,TOKEN=SHARE, shares of at most 1 together") from None
    K = len(tokenizer)
    hint = torch.full((K,), math.log(max(1e-4, 1 - sum(shares.values())) / K))
    for word, share in shares.items():
        hint[find_token(word, tokenizer)] = math.log(share)
    return position, hint


def check_hints(hints, templates, bos):
    """Raise ValueError for a hint at a position that a template does not have, or gives. Positions count without bos."""
    for position, _ in hints:
        for template in templates:
            if position + bos >= len(template):
                raise ValueError(f"a hint is for token {position}, a text has {len(template) - bos}: raise --length")
            if template[position + bos] >= 0:
                raise ValueError(f"a hint is for token {position}, which is given: count tokens from 0")


def make_hint(hints, L, bos, K):
    """Parsed hints [(position, log-odds (K,))] -> hint (L, K)."""
    hint = torch.zeros(L, K)
    for position, odds in hints:
        hint[position + bos] += odds
    return hint
