"""What is in a text and how to train on it, and a simpler form of a text.

    python data.py stats TEXT               examples, lengths, characters, scripts, duplicates, and flags for train.py
    python data.py normalize TEXT OUT.txt   --lower, --digits, --strip=symbols or --text8

A TEXT is a file, a folder or a pattern, as for train.py.
"""

import re
import shlex
import tempfile
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import cache
import cli
import data
import log
import parallel
import switches
import train
from checkpoint import prepare_text
from documents import PACKED, Corpus, is_json
from evaluate import validation_seconds
from text import (
    EXAMPLE_HELP,
    VOCAB_SIZES,
    check_separator,
    is_punctuation,
    read_head,
    read_pieces,
    read_sample,
    reading_notes,
)

MOST_HASHES = 1 << 21  # of examples, kept to find duplicates
MINUTES, MOST_MINUTES = 10, 60  # neither a shorter nor a longer training is suggested
FEW_WORDS, NEW_IN_FEW = VOCAB_SIZES[0], 0.02  # so few different words make a word tokenizer worth more unknown ones
NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")  # 1,234 or 1234 or 12.5
LONGEST_NUMBER = 15  # digits; a longer one is read digit by digit
DIGITS = "zero one two three four five six seven eight nine".split()
TEXT8 = {ord(c): c.lower() for c in map(chr, range(ord("A"), ord("Z") + 1))}
TEXT8 |= {ord("0") + i: f" {word} " for i, word in enumerate(DIGITS)}
STRIPPED = {"symbols": "SC", "punctuation": "SCP"}  # first letters of the Unicode categories

# ---------------------------------------------------------------- figures of a text


@dataclass
class Duplicates:
    """Count examples that repeat an earlier one, in bounded memory: only hashes divisible by a power of two are kept."""

    hashes: Counter = field(default_factory=Counter)
    divisor: int = 1
    most: tuple = (1, "")  # times of the most frequent example, and its beginning

    def add(self, text):
        value = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
        if value % self.divisor == 0:
            self.hashes[value] += 1
            self.most = max(self.most, (self.hashes[value], text[:60]), key=itemgetter(0))
            if len(self.hashes) > MOST_HASHES:
                self.divisor *= 2
                self.hashes = Counter({value: n for value, n in self.hashes.items() if value % self.divisor == 0})

    def share(self):
        """Share of the examples; an estimate if not all hashes were kept."""
        n = self.hashes.total()
        return (n - len(self.hashes)) / max(1, n)


def survey(corpus, example):
    """Read a text once -> numbers of examples by length in characters, of characters, Duplicates.

    Raises ValueError for a text without examples.
    """
    lengths, characters, duplicates, parts = Counter(), Counter(), Duplicates(), []
    with tqdm(desc="reading", total=corpus.n_bytes, unit="B", unit_scale=True, disable=None) as bar:
        for piece in read_pieces(corpus, example):
            characters.update(piece.text)
            parts.append(piece.text)
            bar.update(piece.n_bytes)
            if piece.last:
                text, parts = "".join(parts), []
                lengths[len(text)] += 1
                duplicates.add(text)
    if not lengths:
        raise ValueError(f"{corpus} has no text")
    return lengths, characters, duplicates


def script(character):
    """Name the script of a letter, by the first word of its Unicode name."""
    return unicodedata.name(character, "unknown").split()[0].lower()


def describe(corpus, example, lengths, characters, duplicates):
    """Lay out what `survey` has found -> lines."""
    n, n_chars = lengths.total(), characters.total()
    values, counts = map(np.array, zip(*sorted(lengths.items()), strict=True))
    median, most = (values[np.searchsorted(counts.cumsum(), share * n)] for share in (0.5, 0.9))
    kinds, scripts = Counter(), Counter()
    names = dict(L="letters", M="marks", N="digits", P="punctuation", S="symbols", Z="spaces", C="line breaks, controls")
    for c, count in characters.items():
        kind = unicodedata.category(c)[0]
        kinds[names[kind]] += count
        if kind == "L":
            scripts[script(c)] += count
    n_most, text = duplicates.most
    most_frequent = f", {text!r} {n_most:,} times" if n_most > 1 else ""
    common = " ".join(c if c.isprintable() and c != " " else f"U+{ord(c):04X}" for c, _ in characters.most_common(20))
    once = f"{sum(count == 1 for count in characters.values()):,} of them once"
    shares = f"half up to {median:,}, nine of ten up to {most:,}"
    return [
        corpus.describe(n, corpus.n_bytes),
        f"lengths in characters (--example={example}): {shares}, the longest {values[-1]:,}",
        f"characters: {n_chars:,}, {len(characters):,} different ones, {once}; {_shares(kinds)}",
        f"the most frequent ones: {common}",
        f"scripts of the letters: {_shares(scripts) or 'there are none'}",
        f"duplicates: {duplicates.share():.1%} of the examples are the same as an earlier one"
        + most_frequent,
    ]


def _shares(counts, most=6):
    """Lay out the largest counts as shares."""
    return ", ".join(f"{name} {n / counts.total():.1%}" for name, n in counts.most_common(most))


# ---------------------------------------------------------------- how to train on it


def suggest_tokenizer(corpus, example):
    """Suggest words if the largest vocabulary holds all of them and new text will have hardly any others, else bpe.

    The probability that the next word is a new one is the share of words that occurred once [Good 1953, "The population
    frequencies of species and the estimation of population parameters"]. Where a text has few different words, more new ones
    are worth it: on greetings that training had not seen, the bound was 1.16 bits per character with words, of which some
    were unknown, and 1.42 with bpe (docs/own_text.md). -> kind, reason
    """
    texts, characters, _ = read_sample(corpus, example)
    apart = {ord(c): " " for c in characters if is_punctuation(c)}
    words = Counter(word for text in texts for word in text.translate(apart).split())
    new = sum(n == 1 for n in words.values()) / max(1, words.total())
    found = f"{len(characters):,} different characters, {len(words):,} different words, "
    found += f"{new:.1%} of all words occur once"
    most = NEW_IN_FEW if len(words) <= FEW_WORDS else log.WORTH_SAYING
    return ("word" if len(words) <= VOCAB_SIZES[1] and new <= most else "bpe"), found


def suggest_example(corpus, example):
    """Suggest a separator, or paragraphs if the text was read by lines, and blank lines separate
    several of these -> lines to print.
    """
    notes = reading_notes(corpus, example)
    if example != "line" or notes:
        return notes
    head = [piece.text for piece in islice(read_head(corpus, "line"), 1000)]
    if head and all("\t" in text for text in head):
        return ["each line has a tab: if it is label<TAB>text, --labelled in training and --example=labelled here"]
    kinds = "line", "paragraph"
    n_lines, n_paragraphs = (sum(piece.last for piece in read_head(corpus, kind)) for kind in kinds)
    if not n_lines / 50 < n_paragraphs < 0.9 * n_lines:  # hardly any blank lines, or one after each line
        return []
    found = f"blank lines: the first {n_lines:,} lines are {n_paragraphs:,} paragraphs"
    return [f"{found}; if these are your examples, --example=paragraph"]


def suggest(corpus, example, args):
    """Do what train.py does before its first step, with its own functions, and measure the speed -> lines."""
    device = parallel.find_device(args.device)
    kind, found = suggest_tokenizer(corpus, example)
    with tempfile.TemporaryDirectory() as folder:
        words = [f"-d={corpus}", f"-mdir={folder}", f"--text_field={corpus.text_field}", f"--example={example}"]
        words += [f"--tokenizer={kind}", f"--cache_dir={args.cache_dir}", f"--minutes={MINUTES}"]
        options = train.complete(train.flags().parse_args(words), preset=train.DEFAULT_PRESET[device.type])
        tokenizer, tokens, val = prepare_text(options, Path(folder), None)
        train.fit_rows(options, tokens)
        config, bos_id = train.make_config(options, len(tokenizer)), tokenizer.bos_id()
        loader = data.Loader(tokens, options.sequence_length, options.batch_size, options.seed, bos_id)
        state = train.build(config, options, device)
        trial = loader.batch(0, 0.25), options, device, train.accumulate_gradients
        switches.choose_form(state, *trial)
        seconds = switches.warm_up(state, *trial)
        val_seconds = validation_seconds(state.emas[-1], val, bos_id, options.sequence_length, device)
        log.decide_steps(options, {}, 0, seconds, val_seconds)
    steps = loader.count_steps(options.epochs, options.accumulation_steps)
    minutes = steps * seconds / (1 - log.VAL_SHARE) / 60
    epochs = options.max_steps * options.accumulation_steps * options.batch_size / loader.rows_per_epoch
    suggested = min(max(minutes, MINUTES), MOST_MINUTES)
    length = f"--epochs={options.epochs}" if suggested == minutes else f"--minutes={suggested}"
    reading = [f"--text_field={corpus.text_field}"] * (corpus.text_field != "text")
    reading += [f"--example={example}"] * (example != "line")
    n_parameters = sum(p.numel() for p in state.model.parameters())
    size = f"{options.batch_size} per batch, preset {options.preset}: {n_parameters:,} parameters"
    by_minutes = f"{MINUTES} minutes: about {options.max_steps:,} steps, {epochs:,.2f} epochs"
    vocabulary = f"{kind} with {len(tokenizer):,} tokens ({found})"
    return [
        *log.label_lines(tokenizer, tokens, val),
        f"tokenizer: {vocabulary}; {len(tokens.ids):,} tokens, {tokens.n_chars / len(tokens.ids):.2f} characters each",
        f"rows of {options.sequence_length} tokens, {size}, {seconds:.2f} s per step on {device}",
        f"{options.epochs} epochs: {steps:,} steps, about {minutes:,.0f} minutes here; {by_minutes}",
        "suggested: " + shlex.join(["python", "train.py", f"-d={corpus}", *reading, f"--tokenizer={kind}", length, "-mdir=RUN_DIR"]),
    ]


# ---------------------------------------------------------------- a simpler form


@lru_cache(maxsize=1 << 16)
def number_in_words(number, language):
    """Write a number in words: "12.5" -> "twelve point five".

    Raises ValueError if num2words is missing or does not know the language.
    """
    try:
        from num2words import num2words
    except ImportError:
        raise ValueError("--digits needs a package that is missing: pip install num2words") from None
    try:
        return num2words(number, lang=language)
    except NotImplementedError:
        raise ValueError(f"num2words has no numbers for the language {language!r}: give another one") from None


def in_words(text, language="en"):
    """Write the numbers of a text in words, apart from letters: "12.5km" -> "twelve point five km"."""

    def words(match):
        number = match[0].replace(",", "")
        parts = [digit for digit in number if digit != "."] if len(number) > LONGEST_NUMBER else [number]
        before, after = text[max(0, match.start() - 1) : match.start()], text[match.end() : match.end() + 1]
        name = " ".join(number_in_words(part, language) for part in parts)
        return " " * before.isalpha() + name + " " * after.isalpha()

    return NUMBER.sub(words, text)


def strip(text, kind):
    """Write a space for each symbol, or also for punctuation, by Unicode category. Apostrophes and hyphens stay."""
    keep = "\n'\u2019-"
    drop = {ord(c): " " for c in set(text) - set(keep) if unicodedata.category(c)[0] in STRIPPED[kind]}
    return text.translate(drop)


def text8(text):
    """Write a text as text8 is written: a to z and spaces, digits as words [Mahoney, "About the test data"]. Lines stay."""
    return re.sub(r"[^a-z\n]+", " ", text.translate(TEXT8))


def tidy(texts):
    """Yield the parts of a text with one space for each run of spaces, and none at the ends of lines."""
    held, starts_line = "", True  # held: a space that may be followed by another one
    for text in texts:
        text = re.sub(r" ?\n ?", "\n", re.sub(r"[^\S\n]+", " ", held + text))
        text = text.removeprefix(" ") if starts_line else text
        held, text = " " * text.endswith(" "), text.removesuffix(" ")
        starts_line = text.endswith("\n") if text else starts_line
        yield text


def normalize(corpus, out, changes):
    """Write a text with all `changes`, functions of text, to a new file. Raises ValueError if there is a file already."""
    if out.exists():
        raise ValueError(f"{out} exists already: give another name")
    if is_json(out.name) or out.suffix.lower().removeprefix(".") in PACKED:
        raise ValueError(f"{out} would be plain text: give a name that ends in .txt")

    def changed():
        with tqdm(desc="writing", total=corpus.n_bytes, unit="B", unit_scale=True, disable=None) as bar:
            for piece in read_pieces(corpus, "file"):
                text = piece.text
                for change in changes:
                    text = change(text)
                yield text + "\n" * piece.last
                bar.update(piece.n_bytes)

    parts = changed() if set(changes) == {str.lower} else tidy(changed())
    with cli.replacing(out) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(parts)


# ---------------------------------------------------------------- the command


def flags():
    p = cli.Parser("what is in a text and how to train on it, or a simpler form of it")
    add = p.add_argument
    add("command", choices=["stats", "normalize"], help="describe a text, or write it in a simpler form")
    add("text", type=cli.path, help="text file, folder, 'pattern*.txt', or several with commas")
    add("out", nargs="?", type=cli.path, help="new file, for normalize")
    add("--text_field", default="text", help="field of .jsonl files that holds the text (text)")
    add("--example", default="line", help=f"stats: {EXAMPLE_HELP}")
    add("--device", default="auto", help="stats: where to train: cpu, cuda, ... (cuda if there is one)")
    add("--cache_dir", type=cli.path, default=cache.default_cache_dir(),
        help="stats: folder for tokenised corpora (%(default)s)")
    add("--lower", action="store_true", help="normalize: lower case")
    add("--digits", action="store_true", help="normalize: numbers in words (needs the package num2words)")
    add("--language", default="en", help="normalize: of the numbers in words (en)")
    add("--strip", choices=STRIPPED, help="normalize: a space for each symbol, or for punctuation too")
    add("--text8", action="store_true", help="normalize: a to z and spaces only, digits as words, as in text8")
    return p


def main(argv=None):
    args = flags().parse_args(argv)
    corpus = Corpus(args.text, args.text_field)
    changes = [str.lower] * args.lower + [partial(in_words, language=args.language)] * args.digits
    changes += [partial(strip, kind=args.strip)] * bool(args.strip) + [text8] * args.text8
    if args.command == "normalize":
        if not (args.out and changes):
            raise ValueError("normalize takes a text, a new file, and one or more of --lower, --digits, --strip, --text8")
        normalize(corpus, Path(args.out), changes)
        return
    if args.out or changes:
        raise ValueError("stats takes a text only, and writes no file")
    torch.set_float32_matmul_precision("high")
    check_separator(corpus, args.example)
    print(*describe(corpus, args.example, *survey(corpus, args.example)), sep="\n", flush=True)
    print(*suggest_example(corpus, args.example), *suggest(corpus, args.example, args), sep="\n")
