"""Prompts become templates: what the user says of a text, position by position.

    template  list of L         of each position the id of its token, or the kind of token to draw:
                                FREE, GAP, WORD_START, WORD_REST, ANY_LABEL
    allowed   (6, K)   bool     tokens that may be drawn: row -kind for each kind, row 0 = given
"""

import difflib
import os
import random
import re
import sys
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from common import parallel
from text.reading import ONE_LINE, lines_of
from text.tokenizer import BREAK, JOIN, SPACE

FREE = -1  # any text, or its end
GAP = -2  # any text
WORD_START, WORD_REST = -3, -4  # the first token of a word, a later token
ANY_LABEL = -5  # a label
START = r"(?<![\\_])"  # of underscores, without a backslash
LETTER = "[A-Za-z0-9]"  # around underscores within a word; Chinese, for example, has no spaces
SIZE = r"\{(\d{1,9})(?:-(\d{1,9}))?\}"
GAP_MARK = rf"{START}___(?:{SIZE}|(?!_)(?!(?<={LETTER}___){LETTER}))"
MISSPELLED = rf"{START}(?:(?<!{LETTER})____|_{{4,}}(?!_|{LETTER})|___(?!{SIZE})\{{)"
MAX_CANDIDATES = 32  # templates of a prompt whose gaps have unknown sizes
MAX_NAMED = 5  # unknown words of a prompt that a warning names


@lru_cache(maxsize=4)
def allowed_tokens(tokenizer):
    """List the tokens that may be drawn at each kind of position -> (6, K) bool, row -kind."""
    text, spaced = map(torch.from_numpy, (tokenizer.is_text, tokenizer.starts_word))
    blank = torch.tensor([piece in (SPACE, "\n", SPACE + BREAK) for piece in tokenizer.pieces])
    whole = torch.from_numpy(~tokenizer.is_byte) & ~blank
    is_label = torch.zeros_like(text)
    is_label[list(tokenizer.labels.values())] = True
    start, rest = text & spaced & whole, text & ~spaced & whole
    allowed = torch.stack([torch.ones_like(text), text, text, start, rest, is_label])
    if tokenizer.eos >= 0:
        allowed[-FREE, tokenizer.eos] = True
    allowed[~allowed.any(1)] = text & whole  # a vocabulary of characters has no WORD_START
    return allowed


def allowed_at(padded, tokenizer, banned):
    """Look up which tokens may be drawn at each position: (B, L) -> (B, L, K) bool.

    banned: ids that must not be drawn. Raises ValueError if they leave nothing to draw.
    """
    allowed = allowed_tokens(tokenizer).clone()
    allowed[1:, list(banned)] = False
    if not allowed.any(1).all():
        raise ValueError("--ban leaves no token to draw: ban fewer tokens")
    return allowed.to(padded.device)[(-padded).clamp(min=0)]


# ---------------------------------------------------------------- templates


def read_lines(path, run, what="texts"):
    """Read the lines of a file that are not blank -> {number: text}, or raise ValueError."""
    if not os.path.isfile(path):
        raise ValueError(f"no file of {what} at {path}")
    lines = {n: read_breaks(line, run) for n, line in lines_of(path) if line.strip()}
    if not lines:
        raise ValueError(f"no {what} in {path}")
    return lines


def read_prompts(path, tokenizer, run, length=None):
    """Read a file of prompts, one per line -> list. One ValueError names all that do not fit."""
    prompts = read_lines(path, run, "prompts")
    errors = []
    for number, prompt in prompts.items():
        try:
            Prompt.read(prompt, tokenizer, run, length)
        except ValueError as error:
            errors.append(f"line {number}: {error}")
    if errors:
        raise ValueError(f"{path}, {'; '.join(errors)}")
    return list(prompts.values())


def read_breaks(text, run):
    """Read \\n as a line break, and \\\\ as a backslash, for a model of texts of several lines."""
    if run["args"]["example"] in ONE_LINE:
        return text
    return re.sub(r"\\([n\\])", lambda m: "\n" if m[1] == "n" else m[1], text)


def check_unicode(text):
    """Raise ValueError for a text from the command line or a file that is not UTF-8."""
    if any("\ud800" <= c <= "\udfff" for c in text):  # bytes that Python could not decode
        raise ValueError(f"{shorten(text)} is not UTF-8: convert it, for example with iconv")


def shorten(prompt):
    """Shorten a prompt for messages."""
    return ascii(prompt) if len(prompt) <= 60 else ascii(prompt[:60]) + "..."


def split_label(text, tokenizer):
    """Split label<TAB>text -> [id of the label], text; [ANY_LABEL] if none is named.

    Without labels in the vocabulary: [], text. Raises ValueError for an unknown label.
    """
    labels = tokenizer.labels
    label, tab, rest = text.partition("\t")
    if not labels:
        return [], text
    if not tab:
        return [ANY_LABEL], text
    if label not in labels:
        raise ValueError(f"the model knows no label {label!r}, only {', '.join(labels)}")
    return [labels[label]], rest


def unknown_pieces(prompt, tokenizer):
    """List the texts of a prompt's unknown tokens, with SPACE for a space -> list of str."""
    texts, _ = split_gaps(split_label(prompt, tokenizer)[1])
    return [p.replace(SPACE + JOIN, "") for t in texts for p in tokenizer.unknown_pieces(t)]


@lru_cache(maxsize=4)
def known_words(tokenizer):
    """Map each word of the vocabulary in lower case to how it is written."""
    ids = allowed_tokens(tokenizer)[-GAP].nonzero().flatten().tolist()
    pieces = [tokenizer.pieces[k] for k in reversed(ids)]  # the first of "The", "THE" stays
    words = [piece.removeprefix(SPACE).removeprefix(JOIN) for piece in pieces]
    return {word.lower(): word for word in words if word}


def nearest_words(word, tokenizer):
    """Find the known word that differs only in case, else up to two that look alike -> list."""
    known, lower = known_words(tokenizer), word.lower()
    if lower in known:
        return [known[lower]]
    return [known[close] for close in difflib.get_close_matches(lower, known, n=2)]


@parallel.first_only
def warn_unknown(prompts, tokenizer):
    """Name the words or characters that the tokenizer does not know, one line per prompt."""
    for prompt in dict.fromkeys(prompts):
        words = "".join(unknown_pieces(prompt, tokenizer)).split(SPACE)  # neighbours are one piece
        words = "".join(words) if tokenizer.continues_words else filter(None, words)
        words = list(dict.fromkeys(words))
        named, question = [], "did you mean {}?"
        for word in words[:MAX_NAMED]:
            close = " or ".join(map(repr, nearest_words(word, tokenizer)))
            named.append(f"{word!r} ({question.format(close)})" if close else repr(word))
            question = "{}" if close else question
        if named:
            more = f" and {len(words) - MAX_NAMED} more" if len(words) > MAX_NAMED else ""
            print(f"the tokenizer does not know {', '.join(named)}{more}", file=sys.stderr)


def encode_part(text, tokenizer, follows_gap):
    """Encode the text next to gaps -> ids. Raises ValueError if it cannot be joined to a gap.

    A space at its end belongs to the next token, or is a token where no token joins a space.
    """
    body = text.removesuffix(" ")  # the tokenizer may strip it
    ids = encode_after_gap(body, tokenizer) if follows_gap else tokenizer.encode(body)
    if body != text and not tokenizer.joins_space:
        ids.append(tokenizer.processor.piece_to_id(SPACE))
    return ids


def encode_after_gap(text, tokenizer):
    """Encode a text without the space that some tokenizers put before it -> ids.

    Raises ValueError if the tokenizer cannot leave that space out.
    """
    if not tokenizer.adds_prefix:
        return tokenizer.encode(text)
    ids = tokenizer.encode(text.removeprefix(" "))
    if not ids or text.startswith(" "):
        return ids
    first = tokenizer.pieces[ids[0]]
    if first.startswith((SPACE + JOIN, SPACE + BREAK)):
        return ids
    if first != SPACE:
        raise ValueError(f"this tokenizer cannot join {text!r} to a gap: put a space between them")
    return ids[1:]


def gap_sizes(low, high, follows_space, tokenizer, word_lengths):
    """List what a gap may become -> [(kinds of its tokens, weight)].

    low to high tokens, or one word if low is None: as long as the words of the training text.
    """
    if low is not None:
        low = min(int(low), 1_000_000)  # a larger gap would fill the memory
        high = low if high is None else min(int(high), low + MAX_CANDIDATES)
        return [([GAP] * n, 1.0) for n in range(low, high + 1)]
    begin = WORD_START if follows_space else WORD_REST
    if not tokenizer.continues_words:
        return [([begin], 1.0)]
    sizes = [(n, weight) for n, weight in enumerate(word_lengths) if weight]
    if not tokenizer.joins_space:  # n counts the space, which is a token before the gap
        return [([WORD_REST] * max(1, n - 1), weight) for n, weight in sizes]
    return [([begin] + [WORD_REST] * (n - 1), weight) for n, weight in sizes if n]


def split_gaps(text):
    """Split a text at its gaps -> the texts between them, and [(low or None, high or None)].

    Underscores after a backslash are text, without the backslash.
    """
    parts = re.split(GAP_MARK, text)
    texts = [re.sub(r"\\(___)", r"\1", part) for part in parts[::3]]
    return texts, list(zip(parts[1::3], parts[2::3], strict=True))


def parse_prompt(prompt, tokenizer, word_lengths):
    """Turn a text with gaps into templates without bos and eos -> [(template, weight)], has_gap.

    ___ is one word, ___{3} is three tokens, ___{1-4} is one to four; \\___ is text, and so is ___
    between two Latin letters or digits. A gap of unknown size gives several templates; the
    MAX_CANDIDATES of largest weight are kept. Raises ValueError for a gap that is written
    otherwise, and for text that is not Unicode.
    """
    if re.search(MISSPELLED, prompt):
        usage = "a gap is ___ or ___{N} or ___{N-M}, and \\____ is text"
        raise ValueError(f"{shorten(prompt)}: {usage}")
    check_unicode(prompt)
    label, text = split_label(prompt, tokenizer)
    texts, gaps = split_gaps(text)
    templates = [(label + encode_part(texts[0], tokenizer, follows_gap=False), 1.0)]
    for i, (low, high) in enumerate(gaps):
        if high is not None and int(high) < int(low):
            usage = f"a gap ___{{N-M}} has at least N and at most M tokens, here {low}-{high}"
            raise ValueError(f"{shorten(prompt)}: {usage}")
        at_start = i == 0 and not texts[0] and tokenizer.adds_prefix
        # Whole words have a space after a line break, which is not written.
        ends_line = texts[i].endswith("\n") and not tokenizer.continues_words
        follows_space = texts[i].endswith(" ") or ends_line or at_start
        sizes = gap_sizes(low, high, follows_space, tokenizer, word_lengths)
        after = encode_part(texts[i + 1], tokenizer, follows_gap=True)
        templates = [(t + gap + after, w * weight) for t, w in templates for gap, weight in sizes]
        templates.sort(key=lambda pair: -pair[1])
        del templates[MAX_CANDIDATES:]
    return templates, bool(gaps)


@dataclass(frozen=True)
class Prompt:
    """A prompt, read for one model: the texts that it may become."""

    templates: list
    weights: list  # of the templates: how often their sizes occur in the training text
    unknown: list = ()  # see `unknown_pieces`

    @classmethod
    def read(cls, text, tokenizer, run, length=None):
        """Read a prompt, with gaps or to be continued to `length` tokens.

        If length is None, it is continued to each length of the training texts. Raises ValueError
        if it does not fit.
        """
        bodies, has_gap = parse_prompt(text, tokenizer, run["word_lengths"])
        if has_gap:
            bodies = [(tokenizer.add_marks(body), weight) for body, weight in bodies]
            pairs = fitting(text, bodies, run)
        else:
            pairs = continued(text, tokenizer.add_marks(bodies[0][0], end=False), run, length)
        return cls(*map(list, zip(*pairs, strict=True)), unknown_pieces(text, tokenizer))

    def weighted(self, log_p):
        """Multiply the weights by exp(log_p), log_p (n,), up to a constant -> Prompt."""
        log_p = log_p + np.log(self.weights)
        return replace(self, weights=np.exp(log_p - log_p.max()).tolist())

    def draw(self, seed):
        """Draw a template by its weight."""
        return random.Random(seed).choices(self.templates, self.weights)[0]


def fitting(prompt, templates, run):
    """Choose the templates that fit the model: [(template, weight)] -> the same.

    Lengths that the training texts have are preferred, by how often these have them.
    """
    limit, shares = run["args"]["sequence_length"], run["lengths"]
    shortest = min((template for template, _ in templates), key=len)
    if all(kind >= 0 for kind in shortest) and len(templates) == 1:
        raise ValueError(f"{shorten(prompt)} has a gap of no tokens: nothing is left to sample")
    if len(shortest) > limit:
        message = f"takes {len(shortest)} tokens, the model was trained on {limit}: shorten it"
        raise ValueError(f"{shorten(prompt)} {message}")
    open_ones = [(t, w) for t, w in templates if len(t) <= limit and min(t) < 0]
    known = {length: share for length, share in enumerate(shares) if share}
    return [(t, w * known[len(t)]) for t, w in open_ones if len(t) in known] or open_ones


def continued(prompt, given, run, length):
    """Continue given tokens to a length, or to those of training texts -> [(template, weight)]."""
    limit, shares = run["args"]["sequence_length"], run["lengths"]
    longer = [(n, weight) for n, weight in enumerate(shares) if weight and n > len(given)]
    lengths = (longer or [(limit, 1)]) if length is None else [(length, 1)]
    longest, _ = lengths[-1]
    if longest <= len(given):
        left = f"a text of {longest} has none left to sample"
        raise ValueError(f"{shorten(prompt)} takes {len(given)} tokens, {left}: raise --length")
    return [(given + [FREE] * (n - len(given)), weight) for n, weight in lengths]


def make_template(prompt, tokenizer, run, seed, length=None):
    """Draw a template of a prompt by its weight, whatever the network says of the prompt."""
    return Prompt.read(prompt, tokenizer, run, length).draw(seed)
