"""What the user says about a text: prompts with gaps become templates, odds of tokens become log-odds.

A template is a list with one entry per position: the id of a given token, or a kind of position where a token is drawn.

    template  list of L         ids, or FREE, GAP, WORD_START, WORD_REST
    allowed   (5, K)   bool     tokens that may be drawn at each kind of position, in row -kind; row 0 = given
    hint      (L, K)   float32  log-odds that are added to the network's input
"""

import math
import os
import random
import re
import sys
from functools import lru_cache

import numpy as np
import torch

from text import add_marks, adds_prefix, read_pieces, unknown_bytes

FREE = -1  # any text, or its end
GAP = -2  # any text
WORD_START, WORD_REST = -3, -4  # the first token of a word, a later token
GAP_MARK = r"___(?:\{(\d+)\})?"
SPACE = "\u2581"  # how SentencePiece writes a space


# ---------------------------------------------------------------- the tokenizer's habits


@lru_cache(maxsize=4)
def allowed_tokens(tokenizer):
    """List the tokens that may be drawn at each kind of position -> (5, K) bool, the row of a kind is -kind."""
    K = len(tokenizer)
    pieces = [tokenizer.id_to_piece(k) for k in range(K)]
    text = torch.tensor(
        [not (tokenizer.is_control(k) or tokenizer.is_unknown(k) or tokenizer.is_unused(k)) for k in range(K)]
    )
    spaced = torch.tensor([piece.startswith(SPACE) for piece in pieces])
    whole = torch.tensor([not tokenizer.is_byte(k) and pieces[k] != SPACE for k in range(K)])
    allowed = torch.stack([torch.ones_like(text), text, text, text & spaced & whole, text & ~spaced & whole])
    if tokenizer.eos_id() >= 0:
        allowed[-FREE, tokenizer.eos_id()] = True
    allowed[~allowed.any(1)] = text  # a vocabulary of characters has no WORD_START, for example
    return allowed


def allowed_at(padded, tokenizer, banned):
    """Look up which tokens may be drawn at each position of a batch of templates: (B, L) -> (B, L, K) bool.

    banned: ids that must not be drawn. Raises ValueError if they leave nothing to draw.
    """
    allowed = allowed_tokens(tokenizer).clone()
    allowed[1:, list(banned)] = False
    if not allowed.any(1).all():
        raise ValueError("--ban leaves no token to draw: ban fewer tokens")
    return allowed.to(padded.device)[(-padded).clamp(min=0)]


@lru_cache(maxsize=4)
def space_style(tokenizer):
    """Tell whether some token is a space and more, and whether some token continues a word -> (bool, bool).

    (True, True) for subwords, (False, True) for characters, (True, False) for whole words.
    """
    text = [k for k in range(len(tokenizer)) if not (tokenizer.is_control(k) or tokenizer.is_unknown(k))]
    pieces = [tokenizer.id_to_piece(k) for k in text if not tokenizer.is_byte(k)]
    return any(len(p) > 1 and p[0] == SPACE for p in pieces), any(p[0] != SPACE for p in pieces)


def word_lengths(tokenizer, tokens, longest=16):
    """Count the words of 0, 1, ..., `longest` tokens in the first million tokens of a text -> list of counts."""
    spaced = np.array([tokenizer.id_to_piece(k).startswith(SPACE) for k in range(len(tokenizer))])
    begins = np.flatnonzero(spaced[tokens.ids[:1_000_000]])
    document = np.searchsorted(tokens.offsets, begins, side="right")
    lengths = np.diff(begins)[document[1:] == document[:-1]]  # not from one document to the next
    counts = np.bincount(lengths[lengths <= longest], minlength=2)
    return counts.tolist() if counts.any() else [0, 1]


# ---------------------------------------------------------------- templates


def read_prompts(path):
    """Read a file of prompts, one per line -> list. Raises ValueError if it is missing or has none."""
    if not os.path.isfile(path):
        raise ValueError(f"no file of prompts at {path}")
    prompts = [piece.text for piece in read_pieces(path)]
    if not prompts:
        raise ValueError(f"no prompts in {path}")
    return prompts


def shorten(prompt):
    """Shorten a prompt for messages."""
    return ascii(prompt) if len(prompt) <= 60 else ascii(prompt[:60]) + "..."


def warn_unknown(texts, tokenizer):
    """Warn on standard error of texts with characters or words that the tokenizer does not know."""
    for text in dict.fromkeys(texts):
        if unknown_bytes(re.sub(GAP_MARK, " ", text), tokenizer):
            print(f"the tokenizer does not know all characters or words of {shorten(text)}", file=sys.stderr)


def encode_part(text, tokenizer, follows_gap):
    """Encode the text before, between or after gaps -> ids. Raises ValueError if it cannot be joined to a gap.

    A space at its end belongs to the next token where the tokenizer joins them, or is a token of its own.
    """
    joins_space, _ = space_style(tokenizer)
    body = text.removesuffix(" ")  # the tokenizer may strip it
    ids = encode_after_gap(body, tokenizer) if follows_gap else tokenizer.encode(body)
    if body != text and not joins_space:
        ids.append(tokenizer.piece_to_id(SPACE))
    return ids


def encode_after_gap(text, tokenizer):
    """Encode a text that follows a gap, without the space that some tokenizers put before every text -> ids.

    Raises ValueError if the tokenizer cannot leave that space out.
    """
    if not adds_prefix(tokenizer):
        return tokenizer.encode(text)
    ids = tokenizer.encode(text.removeprefix(" "))
    if not ids or text.startswith(" "):
        return ids
    if tokenizer.id_to_piece(ids[0]) != SPACE:
        raise ValueError(f"this tokenizer cannot join {text!r} to a gap: put a space between them")
    return ids[1:]


def gap_kinds(count, follows_space, tokenizer, word_lengths, rng):
    """Choose what may be drawn in a gap: `count` tokens (digits), or one word if that is None -> list of kinds.

    The word has as many tokens as a random word of the training text.
    """
    if count is not None:
        return [GAP] * min(int(count), 1_000_000)  # a larger gap is too long as well, and would fill the memory
    joins_space, continues_words = space_style(tokenizer)
    n = rng.choices(range(len(word_lengths)), word_lengths)[0] if continues_words else 1
    if not joins_space:
        return [WORD_REST] * max(1, n - 1)  # n counts the space, which is a token before the gap
    return [WORD_START if follows_space else WORD_REST] + [WORD_REST] * (n - 1)


def parse_prompt(prompt, tokenizer, word_lengths, rng):
    """Turn a text with gaps into a template -> (template without bos and eos, whether it has a gap).

    ___ is one word, ___{3} is three tokens. Raises ValueError for a gap that is written otherwise, and for text that is not
    Unicode.
    """
    if re.search(r"____|___\{(?!\d+\})", prompt):
        raise ValueError(f"{shorten(prompt)}: a gap is ___ or ___{{N}}")
    if any("\ud800" <= c <= "\udfff" for c in prompt):  # how Python stands for bytes that it cannot decode
        raise ValueError(f"{shorten(prompt)} is not UTF-8: convert it, for example with iconv")
    parts = re.split(GAP_MARK, prompt)  # text, count or None, text, ..., count or None, text
    texts, counts = parts[::2], parts[1::2]
    template = encode_part(texts[0], tokenizer, follows_gap=False)
    for i, count in enumerate(counts):
        at_start = i == 0 and not texts[0]
        follows_space = texts[i].endswith(" ") or (at_start and adds_prefix(tokenizer))
        template += gap_kinds(count, follows_space, tokenizer, word_lengths, rng)
        template += encode_part(texts[i + 1], tokenizer, follows_gap=True)
    return template, bool(counts)


def make_template(prompt, tokenizer, run, seed, length=None):
    """Turn a prompt into the template of a whole text.

    A prompt with gaps is the whole text. One without is continued to `length` tokens, by default drawn from the lengths
    of the training text. Raises ValueError if the prompt does not fit.
    """
    rng, limit = random.Random(seed), run["args"]["sequence_length"]
    body, has_gap = parse_prompt(prompt, tokenizer, run["word_lengths"], rng)
    if has_gap:
        template = add_marks(body, tokenizer)
        if all(kind >= 0 for kind in template):
            raise ValueError(f"{shorten(prompt)} has a gap of no tokens: nothing is left to sample")
        if len(template) > limit:
            raise ValueError(f"{shorten(prompt)} takes {len(template)} tokens, the model was trained on {limit}: shorten it")
        return template
    given = add_marks(body, tokenizer, end=False)
    if length is None:
        weights = [n * (i > len(given)) for i, n in enumerate(run["lengths"])]  # only lengths that leave something to draw
        length = rng.choices(range(len(weights)), weights)[0] if any(weights) else limit
    if length <= len(given):
        left = f"a text of {length} has none left to sample"
        raise ValueError(f"{shorten(prompt)} takes {len(given)} tokens, {left}: raise --length")
    return given + [FREE] * (length - len(given))


# ---------------------------------------------------------------- odds of tokens


def find_ids(text, tokenizer):
    """Find the token that a text is, with a space before it, without, or both -> ids.

    Raises ValueError if the text is not a single token.
    """
    ids = {tokenizer.piece_to_id(piece) for piece in (text, SPACE + text)} - {tokenizer.unk_id()}
    if not ids:
        pieces = " ".join(tokenizer.encode(text, out_type=str))
        raise ValueError(f"{text!r} is not one token of this tokenizer, but {pieces}: name single tokens")
    return sorted(ids)


def parse_hint(text, tokenizer):
    """Read a hint such as "3:cat=0.7,dog=0.3" -> position, log-odds (K,). Raises ValueError if it is written otherwise.

    The odds are what was observed at the position: 0.7 for cat, 0.3 for dog, and the rest to 1, at least a ten-thousandth
    because nothing is certain, spread over all other tokens.
    """
    position, colon, odds = text.partition(":")
    pairs = [pair.rpartition("=") for pair in odds.split(",")]
    try:
        shares, position = {word: float(share) for word, _, share in pairs}, int(position)
        in_range = all(0 < share <= 1 for share in shares.values()) and sum(shares.values()) <= 1.001
        if not colon or position < 0 or not in_range or len(shares) < len(pairs):
            raise ValueError
    except ValueError:
        usage = "write POSITION:TOKEN=SHARE,TOKEN=SHARE with shares that sum to at most 1"
        raise ValueError(f"--hint {text}: {usage}") from None
    K = len(tokenizer)
    hint = torch.full((K,), math.log(max(1e-4, 1 - sum(shares.values())) / K))
    for word, share in shares.items():
        hint[find_ids(word, tokenizer)] = math.log(share)
    return position, hint


def check_hints(hints, templates, has_bos):
    """Raise ValueError if a template lacks the position of a hint, or gives it. Positions are counted without bos."""
    for position, _ in hints:
        for template in templates:
            if position + has_bos >= len(template):
                raise ValueError(f"a hint is for token {position}, a text has {len(template) - has_bos}: raise --length")
            if template[position + has_bos] >= 0:
                raise ValueError(f"a hint is for token {position}, which is given: count tokens from 0")


def make_hint(hints, L, has_bos, K):
    """Put parsed hints [(position, log-odds (K,))] at their positions -> (L, K)."""
    hint = torch.zeros(L, K)
    for position, log_odds in hints:
        hint[position + has_bos] += log_odds
    return hint
