"""What the user says about a text: prompts with gaps become templates, odds of tokens become log-odds.

A template is a list with one entry per position: the id of a given token, or a kind of position where a token is drawn.

    template  list of L         ids, or FREE, GAP, WORD_START, WORD_REST, ANY_LABEL
    allowed   (6, K)   bool     tokens that may be drawn at each kind of position, in row -kind; row 0 = given
    hint      (L, K)   float32  log-odds that are added to the network's input
"""

import difflib
import math
import os
import random
import re
import sys
from functools import lru_cache

import torch

from common import parallel
from text.reading import ONE_LINE, lines_of
from text.tokenizer import BREAK, JOIN, SPACE, add_marks, adds_prefix, label_ids, starts_word

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
    """List the tokens that may be drawn at each kind of position -> (6, K) bool, the row of a kind is -kind."""
    K = len(tokenizer)
    pieces = [tokenizer.id_to_piece(k) for k in range(K)]
    text = torch.tensor(
        [not (tokenizer.is_control(k) or tokenizer.is_unknown(k) or tokenizer.is_unused(k)) for k in range(K)]
    )
    spaced = torch.tensor([starts_word(piece) for piece in pieces])
    whole = torch.tensor([not tokenizer.is_byte(k) and pieces[k] not in (SPACE, "\n", SPACE + BREAK) for k in range(K)])
    is_label = torch.zeros_like(text)
    is_label[list(label_ids(tokenizer).values())] = True
    allowed = torch.stack([torch.ones_like(text), text, text, text & spaced & whole, text & ~spaced & whole, is_label])
    if tokenizer.eos_id() >= 0:
        allowed[-FREE, tokenizer.eos_id()] = True
    allowed[~allowed.any(1)] = text & whole  # a vocabulary of characters has no WORD_START, for example
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


# ---------------------------------------------------------------- templates


def read_lines(path, run, what="texts"):
    """Read the lines of a file that are not blank -> {number of the line: text}. Raises ValueError if there are none."""
    if not os.path.isfile(path):
        raise ValueError(f"no file of {what} at {path}")
    lines = {n: read_breaks(line, run) for n, line in lines_of(path) if line.strip()}
    if not lines:
        raise ValueError(f"no {what} in {path}")
    return lines


def read_prompts(path, tokenizer, run, length=None):
    """Read a file of prompts, one per line -> list.

    Raises ValueError if it is missing or has no prompts. If some do not fit (`candidates`), one ValueError names all of them.
    """
    prompts, errors = read_lines(path, run, "prompts"), []
    for number, prompt in prompts.items():
        try:
            candidates(prompt, tokenizer, run, length)
        except ValueError as error:
            errors.append(f"line {number}: {error}")
    if errors:
        raise ValueError(f"{path}, {'; '.join(errors)}")
    return list(prompts.values())


def read_breaks(text, run):
    """Read \\n as a line break, and \\\\ as a backslash, if the model was trained on examples of several lines -> text."""
    return text if run["args"]["example"] in ONE_LINE else re.sub(r"\\([n\\])", lambda m: {"n": "\n"}.get(m[1], m[1]), text)


def check_unicode(text):
    """Raise ValueError for a text from the command line or a file that is not UTF-8."""
    if any("\ud800" <= c <= "\udfff" for c in text):  # how Python stands for bytes that it cannot decode
        raise ValueError(f"{shorten(text)} is not UTF-8: convert it, for example with iconv")


def shorten(prompt):
    """Shorten a prompt for messages."""
    return ascii(prompt) if len(prompt) <= 60 else ascii(prompt[:60]) + "..."


def split_label(text, tokenizer):
    """Split label<TAB>text -> [id of the label], text. ANY_LABEL stands for a label that is not named.

    If the model was not trained on labelled texts: [], text. Raises ValueError for a label that it does not know.
    """
    labels = label_ids(tokenizer)
    label, tab, rest = text.partition("\t")
    if not labels or not tab:
        return [ANY_LABEL] * bool(labels), text
    if label not in labels:
        raise ValueError(f"the model knows no label {label!r}, only {', '.join(labels)}")
    return [labels[label]], rest


def unknown_pieces(prompt, tokenizer):
    """List the text of each token of a prompt that the tokenizer does not know, with SPACE for a space -> list of str."""
    found = []
    for text in split_gaps(split_label(prompt, tokenizer)[1])[0]:
        pieces = zip(tokenizer.encode(text), tokenizer.encode(text, out_type=str), strict=True)
        found += [piece.replace(SPACE + JOIN, "") for k, piece in pieces if k == tokenizer.unk_id()]
    return found


@lru_cache(maxsize=4)
def known_words(tokenizer):
    """Map the tokens that may be drawn, in lower case and without the space before them, to how they are written."""
    ids = allowed_tokens(tokenizer)[-GAP].nonzero().flatten().tolist()
    words = [tokenizer.id_to_piece(k).removeprefix(SPACE).removeprefix(JOIN) for k in reversed(ids)]  # of "The" and "THE", the first stays
    return {word.lower(): word for word in words if word}


def nearest_words(word, tokenizer):
    """Find the known word that differs from `word` only in case, otherwise up to two that look alike -> list."""
    known, lower = known_words(tokenizer), word.lower()
    return [known[close] for close in ([lower] if lower in known else difflib.get_close_matches(lower, known, n=2))]


@parallel.first_only
def warn_unknown(prompts, tokenizer):
    """Warn on standard error of words or characters that the tokenizer does not know: one line per prompt."""
    _, continues_words = space_style(tokenizer)
    for prompt in dict.fromkeys(prompts):
        words = "".join(unknown_pieces(prompt, tokenizer)).split(SPACE)  # neighbours are one piece
        words = list(dict.fromkeys("".join(words) if continues_words else filter(None, words)))
        named, question = [], "did you mean {}?"
        for word in words[:MAX_NAMED]:
            close = " or ".join(map(repr, nearest_words(word, tokenizer)))
            named.append(f"{word!r} ({question.format(close)})" if close else repr(word))
            question = "{}" if close else question
        if named:
            more = f" and {len(words) - MAX_NAMED} more" if len(words) > MAX_NAMED else ""
            print(f"the tokenizer does not know {', '.join(named)}{more}", file=sys.stderr)


def encode_part(text, tokenizer, follows_gap):
    """Encode the text before, between or after gaps -> ids. Raises ValueError if it cannot be joined to a gap.

    A space at its end belongs to the next token where the tokenizer joins them, or is its own token.
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
    if tokenizer.id_to_piece(ids[0]).startswith((SPACE + JOIN, SPACE + BREAK)):
        return ids
    if tokenizer.id_to_piece(ids[0]) != SPACE:
        raise ValueError(f"this tokenizer cannot join {text!r} to a gap: put a space between them")
    return ids[1:]


def gap_sizes(low, high, follows_space, tokenizer, word_lengths):
    """List what a gap may become -> [(kinds of its tokens, weight)]: one word if low is None, else low to high tokens.

    A word has as many tokens as the words of the training text, weighted by how often.
    """
    if low is not None:
        low = min(int(low), 1_000_000)  # a larger gap is too long as well, and would fill the memory
        high = low if high is None else min(int(high), low + MAX_CANDIDATES)
        return [([GAP] * n, 1.0) for n in range(low, high + 1)]
    joins_space, continues_words = space_style(tokenizer)
    if not continues_words:
        return [([WORD_START if follows_space else WORD_REST], 1.0)]
    sizes = [(n, weight) for n, weight in enumerate(word_lengths) if weight]
    if not joins_space:  # n counts the space, which is a token before the gap
        return [([WORD_REST] * max(1, n - 1), weight) for n, weight in sizes]
    return [([WORD_START if follows_space else WORD_REST] + [WORD_REST] * (n - 1), weight) for n, weight in sizes if n]


def split_gaps(text):
    """Split a text at its gaps -> the texts between them, and [(low or None, high or None)].

    Underscores after a backslash are text, without the backslash.
    """
    parts = re.split(GAP_MARK, text)
    texts = [re.sub(r"\\(___)", r"\1", part) for part in parts[::3]]
    return texts, list(zip(parts[1::3], parts[2::3], strict=True))


def parse_prompt(prompt, tokenizer, word_lengths):
    """Turn a text with gaps into templates without bos and eos -> [(template, weight)], whether it has a gap.

    ___ is one word, ___{3} is three tokens, ___{1-4} is one to four; \\___ is text, and so is ___
    between two Latin letters or digits. Gaps of unknown size give several templates, of which the
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
            raise ValueError(f"{shorten(prompt)}: a gap ___{{N-M}} has at least N and at most M tokens, here {low}-{high}")
        at_start = i == 0 and not texts[0]
        _, continues_words = space_style(tokenizer)
        ends_line = texts[i].endswith("\n") and not continues_words  # whole words have a space there, which is not written
        follows_space = texts[i].endswith(" ") or ends_line or (at_start and adds_prefix(tokenizer))
        sizes = gap_sizes(low, high, follows_space, tokenizer, word_lengths)
        after = encode_part(texts[i + 1], tokenizer, follows_gap=True)
        templates = [(t + kinds + after, w * weight) for t, w in templates for kinds, weight in sizes]
        templates = heaviest(templates)
    return templates, bool(gaps)


def heaviest(templates):
    """Keep the MAX_CANDIDATES templates of largest weight: [(template, weight)] -> the same."""
    return sorted(templates, key=lambda pair: -pair[1])[:MAX_CANDIDATES]


def candidates(prompt, tokenizer, run, length=None):
    """Turn a prompt into the templates of a whole text that it may become -> templates, weights: lists.

    A prompt with gaps is the whole text, of one template per size of its gaps. One without is continued to `length`
    tokens, or to each length of the training texts. Weights are how often these occur in the training text. Raises
    ValueError if the prompt does not fit.
    """
    limit, shares = run["args"]["sequence_length"], run["lengths"]
    bodies, has_gap = parse_prompt(prompt, tokenizer, run["word_lengths"])
    if has_gap:
        templates = [(add_marks(body, tokenizer), weight) for body, weight in bodies]
        shortest = min((template for template, _ in templates), key=len)
        if all(kind >= 0 for kind in shortest) and len(templates) == 1:
            raise ValueError(f"{shorten(prompt)} has a gap of no tokens: nothing is left to sample")
        if len(shortest) > limit:
            message = f"takes {len(shortest)} tokens, the model was trained on {limit}: shorten it"
            raise ValueError(f"{shorten(prompt)} {message}")
        fitting = [(t, w) for t, w in templates if len(t) <= limit and min(t) < 0]
        share = {len(t): shares[len(t)] if len(t) < len(shares) else 0 for t, _ in fitting}
        if any(share.values()):  # of these sizes, the ones that make a text as long as a training text
            fitting = [(t, w * share[len(t)]) for t, w in fitting if share[len(t)]]
        return map(list, zip(*fitting, strict=True))
    given = add_marks(bodies[0][0], tokenizer, end=False)
    if length is None:
        lengths = {n: weight for n, weight in enumerate(shares) if weight and n > len(given)} or {limit: 1}
    else:
        lengths = {length: 1}
    if max(lengths) <= len(given):
        left = f"a text of {max(lengths)} has none left to sample"
        raise ValueError(f"{shorten(prompt)} takes {len(given)} tokens, {left}: raise --length")
    return [given + [FREE] * (n - len(given)) for n in lengths], list(lengths.values())


def make_template(prompt, tokenizer, run, seed, length=None):
    """Draw one of the `candidates` of a prompt by its weight, whatever the network says of the prompt."""
    templates, weights = candidates(prompt, tokenizer, run, length)
    return random.Random(seed).choices(templates, weights)[0]


# ---------------------------------------------------------------- odds of tokens


def find_ids(text, tokenizer):
    """Find the tokens that a text is, with or without a space before it -> ids.

    Raises ValueError if the text is not a single token.
    """
    text = text.strip(" ")
    ids = {tokenizer.piece_to_id(piece) for piece in (text, SPACE + text, SPACE + JOIN + text)} - {tokenizer.unk_id()}
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
        shares, position = {word.strip(" "): float(share) for word, _, share in pairs}, int(position)
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
