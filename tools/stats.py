"""What is in a text: examples, lengths, characters, scripts, duplicates, and how to train on it.

    python -m tools.stats TEXT

A TEXT is a file, a folder or a pattern, as for train.py.
"""

import shlex
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from operator import itemgetter

from common import cli  # isort: skip - first, because of Ctrl-C
import numpy as np
from tqdm import tqdm

from text import reading
from text.reading import BYTES_BAR, Corpus, read_head, read_pieces
from text.tokenizer import VOCAB_SIZES, is_punctuation, read_sample
from training import log

MOST_HASHES = 1 << 21  # of examples, kept to find duplicates
MINUTES = 10  # of a first training
CATEGORIES = dict(L="letters", M="marks", N="digits", P="punctuation", S="symbols", Z="spaces")
CATEGORIES |= dict(C="line breaks, controls")  # by the first letters of Unicode's categories
FEW_WORDS = VOCAB_SIZES[0]  # so few different words are worth more unknown ones
NEW_IN_FEW = 0.02  # share of new words that they are worth


@dataclass
class Duplicates:
    """Count examples that repeat an earlier one, in bounded memory."""

    hashes: Counter = field(default_factory=Counter)  # only those divisible by `divisor`
    divisor: int = 1
    most: tuple = (1, "")  # times of the most frequent example, and its beginning

    def add(self, text):
        value = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
        if value % self.divisor == 0:
            self.hashes[value] += 1
            self.most = max(self.most, (self.hashes[value], text[:60]), key=itemgetter(0))
            if len(self.hashes) > MOST_HASHES:
                self.divisor *= 2
                kept = {v: n for v, n in self.hashes.items() if v % self.divisor == 0}
                self.hashes = Counter(kept)

    def share(self):
        """Share of the examples; an estimate if not all hashes were kept."""
        n = self.hashes.total()
        return (n - len(self.hashes)) / max(1, n)


def survey(corpus, example):
    """Read a text -> counts of lengths in characters, of characters, Duplicates, counts of labels.

    Raises ValueError for a text without examples.
    """
    lengths, characters, labels = Counter(), Counter(), Counter()
    duplicates, parts = Duplicates(), []
    with tqdm(desc="reading", total=corpus.n_bytes, **BYTES_BAR) as bar:
        for piece in read_pieces(corpus, example):
            characters.update(piece.text)
            if piece.label is not None:
                labels[piece.label] += 1
            parts.append(piece.text)
            bar.update(piece.n_bytes)
            if piece.last:
                text, parts = "".join(parts), []
                lengths[len(text)] += 1
                duplicates.add(text)
    if not lengths:
        raise ValueError(f"{corpus} has no text")
    return lengths, characters, duplicates, labels


def describe(corpus, example, lengths, characters, duplicates, labels):
    """Lay out what `survey` has found -> lines."""
    n, n_chars = lengths.total(), characters.total()
    values, counts = map(np.array, zip(*sorted(lengths.items()), strict=True))
    median, most = (values[np.searchsorted(counts.cumsum(), share * n)] for share in (0.5, 0.9))
    kinds, scripts = Counter(), Counter()
    for c, n_times in characters.items():
        category = unicodedata.category(c)[0]
        kinds[CATEGORIES[category]] += n_times
        if category == "L":
            scripts[unicodedata.name(c, "unknown").split()[0].lower()] += n_times
    n_most, text = duplicates.most
    repeated = "the same as an earlier one" + (f", {text!r} {n_most:,} times" if n_most > 1 else "")
    common = (c for c, _ in characters.most_common(20))
    common = (c if c.isprintable() and c != " " else f"U+{ord(c):04X}" for c in common)
    once = f"{sum(n_times == 1 for n_times in characters.values()):,} of them once"
    shares = f"half up to {median:,}, nine of ten up to {most:,}"
    return [
        corpus.describe(n, corpus.n_bytes),
        f"lengths in characters (--example={example}): {shares}, the longest {values[-1]:,}",
        f"characters: {n_chars:,}, {len(characters):,} different ones, {once}; {_shares(kinds)}",
        f"the most frequent ones: {' '.join(common)}",
        f"scripts of the letters: {_shares(scripts) or 'there are none'}",
        f"duplicates: {duplicates.share():.1%} of the examples are {repeated}",
        *reading.list_labels(labels),
    ]


def _shares(counts, most=6):
    """Lay out the largest counts as shares."""
    return ", ".join(f"{name} {n / counts.total():.1%}" for name, n in counts.most_common(most))


# ---------------------------------------------------------------- how to train on it


def suggest_tokenizer(corpus, example):
    """Suggest words if the largest vocabulary holds all and new text has hardly any others.

    Else suggest bpe -> kind, reason. The probability that the next word is a new one is the share
    of words that occurred once [Good 1953, "The population frequencies of species and the
    estimation of population parameters"]. Where a text has few different words, more new ones are
    worth it: on greetings that training had not seen, the bound was 1.16 bits per character with
    words, of which some were unknown, and 1.42 with bpe (docs/own_text.md).
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
    """Suggest a separator, or paragraphs if blank lines separate several lines -> lines."""
    notes = reading.reading_notes(corpus, example)
    if example != "line" or notes:
        return notes
    head = [piece.text for piece in islice(read_head(corpus, "line"), 1000)]
    if head and all("\t" in text for text in head):
        flags = "--labelled in training and --example=labelled here"
        return [f"each line has a tab: if it is label<TAB>text, {flags}"]
    n_lines = sum(piece.last for piece in read_head(corpus, "line"))
    n_paragraphs = sum(piece.last for piece in read_head(corpus, "paragraph"))
    if not n_lines / 50 < n_paragraphs < 0.9 * n_lines:  # hardly any blank lines, or one each line
        return []
    found = f"blank lines: the first {n_lines:,} lines are {n_paragraphs:,} paragraphs"
    return [f"{found}; if these are your examples, --example=paragraph"]


def command(corpus, example):
    """Write the command that trains on a text, and say why this tokenizer -> two lines."""
    kind, found = suggest_tokenizer(corpus, example)
    words = ["python", "train.py", f"-d={corpus}"]
    words += [f"--text_field={corpus.text_field}"] if corpus.text_field else []
    words += [f"--example={example}"] if example != "line" else []
    words += [f"--tokenizer={kind}", f"--minutes={MINUTES}", "-mdir=RUN_DIR"]
    return [
        f"tokenizer: {kind} ({found})",
        f"suggested: {shlex.join(words)} (with --dry_run, it only says what it would do)",
    ]


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("text", type=cli.path, help="text file, folder, 'pattern*.txt', or several with commas")
    p.add_flags("--text_field --example")
    return p


def main(argv=None):
    args = flags().parse_args(argv)
    corpus = Corpus(args.text, args.text_field)
    reading.check_separator(corpus, args.example)
    print(*describe(corpus, args.example, *survey(corpus, args.example)), sep="\n", flush=True)
    print(*suggest_example(corpus, args.example), *command(corpus, args.example), sep="\n")


if __name__ == "__main__":
    cli.run(main)
