"""SentencePiece tokenizers: train, load and use them."""

import hashlib
import io
import os
import re
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from itertools import pairwise
from pathlib import Path
from unicodedata import category

import numpy as np
import sentencepiece
from tqdm import tqdm

from common.files import writing
from text.reading import BYTES_BAR, Corpus, read_pieces

SPACE = "\u2581"  # the character that SentencePiece writes for a space
JOIN = "\u2040"  # in a word tokenizer: no space before this token
BREAK = "\u2424"  # in a word tokenizer: a line break
LABEL = "label:"  # begins the name of a label's token
MAX_LABELS = 1000
TOKENIZER_BYTES = 20_000_000  # how much text a tokenizer is trained on
VOCAB_SIZES = 512, 8192  # the smallest and the largest that follow from the corpus
BYTES_PER_TOKEN = 250  # of the corpus, for a new vocabulary
MAX_PUNCTUATION = 100  # marks that a word tokenizer takes from words, characters that follow them


def default_vocab_size(corpus, kind):
    """Choose the size of a vocabulary: a power of two, about a token per BYTES_PER_TOKEN."""
    smallest, largest = VOCAB_SIZES
    if kind == "word":  # what is not in it cannot be written
        return largest
    n_tokens = Corpus.of(corpus).n_bytes // BYTES_PER_TOKEN
    return min(max(smallest, 1 << n_tokens.bit_length()), largest)


def train_tokenizer(corpus, kind, vocab_size=None, example="line"):
    """Train a SentencePiece model of `kind` bpe, unigram, char or word on a corpus -> bytes.

    Text encoded with bpe, unigram or char decodes to exactly the same text, but for SPACE, which
    becomes a space. char has one token per character and one for unknown characters, and nothing
    else. word has one token per word and per punctuation mark (`spacing_rules`), and does not keep
    repeated spaces. A line break inside an example is a token. vocab_size: None chooses one
    (`default_vocab_size`, or more if the characters need more). Raises ValueError if the corpus
    has no text or SentencePiece cannot build it.
    """
    texts, characters, labels = read_sample(corpus, example)
    if not texts:
        raise ValueError(f"{corpus} has no text")
    size = vocab_size or default_vocab_size(corpus, kind)
    refused = f"no {kind} tokenizer with --vocab_size={size} from {corpus}"
    n_reserved = 4 + len(labels)  # unk, bos, eos and a word: SentencePiece gives no reason for less
    if kind == "word" and size < n_reserved:
        raise ValueError(f"{refused}: give {n_reserved} or more")
    try:
        return _train(kind, max(size, n_reserved), texts, characters, labels)
    except RuntimeError as error:
        least = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        if least and not vocab_size:
            return _train(kind, 1 << int(least[1]).bit_length(), texts, characters, labels)
        reason = str(error).split("] ")[-1].split(". Increase")[0].strip() or "no reason given"
        if least:
            reason = f"its {len(characters):,} different characters need {least[1]} or more"
        refused = refused if kind != "char" else f"no char tokenizer from {corpus}"
        raise ValueError(f"{refused}: {reason}") from None


def _train(kind, vocab_size, texts, characters, labels):
    """Call SentencePiece's trainer -> the model as bytes. Raises RuntimeError, as it does."""
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        options = trainer_options(kind, vocab_size, texts, characters, labels, Path(folder))
        options |= dict(sentence_iterator=iter(texts), model_writer=model)
        train = partial(sentencepiece.SentencePieceTrainer.train, **options)
        show_seconds(train, f"training a {kind} tokenizer")
    return model.getvalue()


def read_sample(corpus, example):
    """Read about TOKENIZER_BYTES from all over a corpus -> texts, all characters, all labels."""
    corpus, texts, characters, labels = Corpus.of(corpus), [], set(), set()
    n = 1 + corpus.n_bytes // TOKENIZER_BYTES  # every n-th piece is kept
    with tqdm(desc=f"reading {Path(corpus.path).name}", total=corpus.n_bytes, **BYTES_BAR) as bar:
        for i, piece in enumerate(read_pieces(corpus, example, max_bytes=1000)):
            if i % n == 0:
                texts.append(piece.text)
            characters.update(piece.text)
            labels.update({piece.label} - {None})
            bar.update(piece.n_bytes)
    if len(labels) > MAX_LABELS:
        found = f"{corpus} has {len(labels)} labels, at most {MAX_LABELS} are possible"
        raise ValueError(f"{found}: a line is label<TAB>text")
    return texts, characters, labels


def trainer_options(kind, vocab_size, texts, characters, labels, folder):
    """Choose the options of SentencePiece's trainer -> dict. It may name files in `folder`."""
    options = dict(
        model_type=kind, vocab_size=vocab_size, hard_vocab_limit=False, character_coverage=0.9999,
        normalization_rule_name="identity", unk_id=0, bos_id=1, eos_id=2, minloglevel=2,
        num_threads=4,  # unigram's result depends on it
        control_symbols=[LABEL + label for label in sorted(labels)],  # text never becomes these
    )  # fmt: skip
    if kind == "word":
        options |= dict(add_dummy_prefix=True, remove_extra_whitespaces=True)
        return options | write_rules(texts, folder)
    options |= dict(add_dummy_prefix=False, remove_extra_whitespaces=False)
    if kind != "char":
        symbols = ["\n"] if "\n" in characters else []
        return options | dict(byte_fallback=True, user_defined_symbols=symbols)
    characters = characters - {"\0"}  # SentencePiece cannot have it: it stays unknown
    symbols = sorted(c for c in characters if c != " " and not c.isprintable())  # else left out
    rest = sorted({SPACE if c == " " else c for c in characters} - set(symbols))
    options |= dict(character_coverage=1.0, bos_id=-1, eos_id=-1)
    options["vocab_size"] = len(symbols) + len(rest) + len(labels) + 1
    return options | dict(user_defined_symbols=symbols, required_chars="".join(rest))


def show_seconds(function, what):
    """Call a function and show how long it takes so far, in a terminal."""
    bar = tqdm(desc=what, bar_format="{desc}: {elapsed}", disable=None)
    with ThreadPoolExecutor(1) as pool, bar:
        future = pool.submit(function)
        while wait([future], timeout=0.5).not_done:
            bar.refresh()
        return future.result()


def spacing_rules(texts):
    """List how a word tokenizer takes punctuation from words -> two lists of rules (old, new).

    The first list changes text before it is cut at spaces. JOIN marks what had no space before it:

        He said: "Yes!"    becomes    He said JOIN: " JOINYes JOIN! JOIN"

    The second list undoes that. Apostrophes and hyphens belong to words. A line break takes the
    spaces around it along.
    """
    pairs = Counter(pair for text in texts for pair in pairwise(text + " "))
    punctuation, followers = Counter(), Counter()
    for (c, after), n in pairs.items():
        if is_punctuation(c):
            punctuation[c] += n
            if not after.isspace() and not is_punctuation(after):
                followers[after] += n
    rules = [("\n", f" {BREAK} ")] if any("\n" in pair for pair in pairs) else []
    for c, _ in punctuation.most_common(MAX_PUNCTUATION):
        rules += [(c, f" {JOIN}{c} "), (f" {c}", f" {c} ")]
        for w, _ in followers.most_common(MAX_PUNCTUATION):
            rules += [(c + w, f" {JOIN}{c} {JOIN}{w}"), (f" {c}{w}", f" {c} {JOIN}{w}")]
    undo = [(f"{before}{BREAK}{after}", "\n") for before in (" ", "") for after in (" ", "")]
    return rules, [(f" {JOIN}", ""), (JOIN, ""), *undo] if rules else []


def is_punctuation(c):
    """Whether a character is a token of a word tokenizer. Apostrophes and hyphens are not."""
    return category(c)[0] in "PS" and c not in "'\u2019-_"


def write_rules(texts, folder):
    """Write `spacing_rules` as the files that SentencePiece reads -> its options."""
    options = {}

    def code_points(text):
        return " ".join(f"{ord(c):X}" for c in text)

    names = "normalization_rule_tsv", "denormalization_rule_tsv"
    for name, rules in zip(names, spacing_rules(texts), strict=True):
        if rules:
            lines = ["\t".join(map(code_points, rule)) for rule in rules]
            with writing(folder / name):
                (folder / name).write_text("\n".join(lines) + "\n")
            options[name] = str(folder / name)
    return options


def load_tokenizer(path):
    """Read a SentencePiece model -> Tokenizer. Raises ValueError if it is missing or is not one."""
    if not os.path.isfile(path):
        raise ValueError(f"no tokenizer at {path}")
    try:
        return Tokenizer(Path(path).read_bytes())
    except (RuntimeError, OSError):
        raise ValueError(f"{path} is not a SentencePiece model") from None


class Tokenizer:
    """A SentencePiece model of K tokens.

        pieces        list of K     as SentencePiece writes them, with SPACE for a space
        is_control    (K,)  bool    marks and labels
        is_text       (K,)  bool    neither these nor the unknown token
        is_byte       (K,)  bool    a byte of a character
        starts_word   (K,)  bool    begins with a space

    bos, eos, unk   ids of the marks and of the unknown token, -1 where it has none
    labels          {label: id}, empty if it was trained without labels
    hash            sha256 of the file
    adds_prefix     it puts a space before every text, also before the rest of a line
    joins_space     some token is a space and more: so are subwords and words, not characters
    continues_words some token continues a word: so do subwords and characters, not words
    """

    def __init__(self, model):
        """Read the bytes of a SentencePiece model. Raises RuntimeError if they are none."""
        self.processor = processor = sentencepiece.SentencePieceProcessor()
        processor.load_from_serialized_proto(model)
        self.hash = hashlib.sha256(model).hexdigest()
        self.bos, self.eos, self.unk = processor.bos_id(), processor.eos_id(), processor.unk_id()
        ids = list(range(len(processor)))
        self.pieces = pieces = processor.id_to_piece(ids)
        self.is_control = np.array(processor.is_control(ids))
        self.is_text = ~(self.is_control | processor.is_unknown(ids) | processor.is_unused(ids))
        self.is_byte = np.array(processor.is_byte(ids))
        spaced = [p.startswith(SPACE) and not p.startswith(SPACE + JOIN) for p in pieces]
        self.starts_word = np.array(spaced)
        labels = [k for k in ids if self.is_control[k] and pieces[k].startswith(LABEL)]
        self.labels = {pieces[k].removeprefix(LABEL): k for k in labels}
        self.adds_prefix = "".join(self.split("a")).startswith(SPACE)
        whole = [pieces[k] for k in np.flatnonzero(self.is_text & ~self.is_byte)]
        self.joins_space = any(len(p) > 1 and p[0] == SPACE for p in whole)
        self.continues_words = any(p[0] != SPACE for p in whole)

    def __len__(self):
        return len(self.pieces)

    def encode(self, text):
        """Turn a text into ids, without marks -> list."""
        return self.processor.encode(text)

    def encode_all(self, texts):
        """Turn texts into ids -> list of arrays. Without Python's lock: threads use all cores."""
        return self.processor.encode_as_numpy(texts)

    def split(self, text):
        """Cut a text into the pieces of its tokens; unknown ones are what they stand for."""
        return self.processor.encode(text, out_type=str)

    def unknown_pieces(self, text):
        """List the pieces of a text that it does not know."""
        pairs = zip(self.encode(text), self.split(text), strict=True)
        return [piece for k, piece in pairs if k == self.unk]

    def add_marks(self, ids, begin=True, end=True):
        """Put bos before and eos after a list of tokens, what there is of them -> list."""
        bos = [self.bos] if begin and self.bos >= 0 else []
        eos = [self.eos] if end and self.eos >= 0 else []
        return bos + ids + eos

    def decode(self, ids, unknown=()):
        """Turn ids into text, up to the first eos, as label<TAB>text if it has a label.

        Unknown tokens read as `unknown`, in order, or as nothing.
        """
        if self.eos in ids:
            ids = ids[: ids.index(self.eos)]
        rest = iter(unknown)
        pieces = [next(rest, "") if k == self.unk else self.pieces[k] for k in ids if k != self.bos]
        names = {k: label for label, k in self.labels.items()}
        label = "".join(f"{names[k]}\t" for k in ids if k in names)
        text = self.processor.decode(pieces).removeprefix(SPACE)
        return label + text.replace(SPACE, " ")  # of `unknown`

    def piece_text(self, k):
        """Write one token as it reads within a text: with its space, a label with its tab."""
        piece = self.pieces[k]
        piece = piece.removeprefix(LABEL) + "\t" if k in self.labels.values() else piece
        return piece.replace(SPACE + JOIN, "").replace(SPACE + BREAK, "\n").replace(SPACE, " ")

    def keeps_breaks(self):
        """Tell whether a line break is still there after encoding and decoding."""
        is_known = self.unk not in self.encode("\n")
        return is_known and self.decode(self.encode("a\na")).count("\n") == 1


def one_line(text):
    """Put a text on one line, with a space for each line break."""
    return " ".join(text.splitlines())
