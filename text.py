"""Text and SentencePiece tokenizers: read a corpus in pieces of bounded size, train and load a tokenizer.

A corpus is a `documents.Corpus`, or the path of one.
"""

import hashlib
import io
import math
import os
import re
import shlex
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache, partial
from itertools import islice, pairwise, takewhile
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple
from unicodedata import category

import sentencepiece
from tqdm import tqdm

import cli
from documents import Corpus, conversion
from noise import GOLDEN

PIECE_BYTES = 1 << 16  # longer examples are tokenised in pieces of this size, cut at spaces
SPACE = "\u2581"  # the character that SentencePiece writes for a space
JOIN = "\u2040"  # in a word tokenizer: no space before this token
BREAK = "\u2424"  # in a word tokenizer: a line break
EXAMPLES = "line", "labelled", "paragraph", "file"  # else a line that separates examples
EXAMPLE_HELP = (
    "what one example is: line, labelled, paragraph, file, or else the separator that stands "
    "between examples, such as '<|endoftext|>', as a line by itself (line)"
)
ONE_LINE = "line", "labelled"  # kinds of examples that have no line break
SEPARATOR = re.compile(r"<[|/]?\w+\|?>|\[[A-Z]+\]|([-=*#~_+\u2013\u2014])( ?\1){2,}|%")
MARK = re.compile(r"<\|\w+\|>")  # no text has it by chance
HEAD_BYTES = 1 << 20  # of a text, in which blank lines and separators are looked for
LABEL = "label:"  # begins the name of a label's token
MAX_LABELS = 1000
FEW_EXAMPLES = 100  # a corpus of fewer examples is split for validation by bytes
VAL_SHARE = {"examples": 0.02, "bytes": 0.05}
TOKENIZER_BYTES = 20_000_000  # how much text a tokenizer is trained on
VOCAB_SIZES = 512, 8192  # the smallest and the largest that follow from the corpus
BYTES_PER_TOKEN = 250  # of the corpus, for a new vocabulary
MAX_PUNCTUATION = 100  # marks that a word tokenizer takes from words, and characters that may follow them

# ---------------------------------------------------------------- reading text


class Piece(NamedTuple):
    """An example of the corpus, or a part of a very long one."""

    text: str
    n_bytes: int
    first: bool  # starts its example
    last: bool  # ends its example
    label: str | None  # of the example, if it is labelled and this is its first piece
    number: int  # of its example in the corpus: 0, 1, ...
    end: int  # bytes of the corpus up to its end; from the last piece of an example, reading can go on there


def read_pieces(corpus, example="line", start=0, stop=math.inf, max_bytes=None, number=0):
    """Yield the examples between two byte positions of a corpus as pieces, in bounded memory.

    example: a "line", a "labelled" line (label<TAB>text; a header is left out, see `header_end`),
    a "paragraph" (blank lines separate them), the whole "file", that is a document, or else the
    separator: a line by itself, with or without spaces around it. Line breaks inside an example
    are one character, "\\n". Blank examples are left out. Examples of more than `max_bytes`
    (default PIECE_BYTES) are cut before a space, or between two characters if there is no space.
    Positions count the bytes of all documents. number: of the first example. Raises ValueError for
    bytes that are not UTF-8, and for a labelled line without a label.
    """
    begin = 0  # of the document in the corpus
    for name, stream in Corpus.of(corpus).documents():
        size = stream.seek(0, os.SEEK_END) if start > begin or stop < math.inf else None
        if size is None or (stop > begin and start < begin + size):
            bounds = max(0, start - begin), stop - begin
            number = yield from _read_document(name, stream, example, *bounds, max_bytes or PIECE_BYTES, number, begin)
        begin += stream.tell() if size is None else size


def _read_document(name, stream, example, start, stop, max_bytes, number, begin):
    """Yield the pieces of a document, which is at byte `begin` of the corpus, see `read_pieces` -> number of the next example."""
    if example == "labelled" and start == 0:
        start = header_end(stream)
    position, held, first, starts_line = start, bytearray(), True, True  # held: what is read but not yielded, at `position`
    separator = b"" if example == "paragraph" else example.strip().encode()
    is_separated = example not in (*ONE_LINE, "file")

    def piece(raw, last, end):
        nonlocal number
        text = _decode(raw, name, stream, position).replace("\r\n", "\n")
        if position == 0:
            text = text.removeprefix("\ufeff")  # byte order mark
        if first and last and not text.strip():
            return []
        label, tab, rest = text.partition("\t") if example == "labelled" and first else (None, True, text)
        label = label and label.strip()
        if not tab or label == "":
            raise ValueError(f"{name}: line {_line_at(stream, position)} is not label<TAB>text")
        number += last
        return [Piece(rest, len(rest.encode()), first, last, label, number - last, begin + end)]

    n_unread = stop - start
    stream.seek(start)
    longest = max(max_bytes, len(separator) + 100)  # a separator is not read in parts
    while raw := stream.readline(limit := int(min(longest, n_unread))):
        n_unread -= len(raw)
        ends_line = raw.endswith(b"\n")
        is_whole = starts_line and (ends_line or len(raw) < limit)
        begins = first and not held  # a blank line here is left out, like the separator
        stands_between = raw.strip() == separator or (begins and raw.isspace())
        is_separator = is_separated and is_whole and stands_between
        complete = is_separator or (example in ONE_LINE and ends_line)
        starts_line = ends_line
        if not is_separator:
            held += raw
        while len(held) > max_bytes or (len(held) == max_bytes and not complete):
            cut = _find_cut(held[:max_bytes]) or max_bytes  # 0 only of bytes that are not UTF-8
            yield from piece(held[:cut], False, position + cut)
            position, held, first = position + cut, held[cut:], False
        if complete:
            end = position + len(held) + is_separator * len(raw)
            yield from piece(held.rstrip(b"\r\n"), True, end)
            position, held, first = end, bytearray(), True
    if held or not first:
        yield from piece(held.rstrip(b"\r\n"), True, position + len(held))
    return number


def header_end(stream):
    """Find the end of the header of a file of labelled lines -> bytes, or 0 if it has none.

    The first line is a header if its label is in no other line, while that of the second is.
    """

    def label(raw):
        return raw.partition(b"\t")[0].strip()

    stream.seek(0)
    lines = filter(bytes.strip, iter(partial(stream.readline, PIECE_BYTES), b""))
    first = next(lines, b"").removeprefix(b"\xef\xbb\xbf")  # byte order mark
    end, second, is_header = stream.tell(), next(lines, b""), False
    for raw in lines if b"\t" in first and label(first) != label(second) else ():
        if label(raw) == label(first):
            return 0
        is_header = is_header or label(raw) == label(second)
    return end if is_header else 0


def reading_notes(corpus, example):
    """Say what of a corpus is left out as a header, and what may be a separator -> lines."""
    notes, headers = [], []
    if example == "labelled":
        for name, stream in corpus.documents():
            if end := header_end(stream):
                stream.seek(0)
                headers.append((name, stream.read(end).decode("utf-8-sig", "replace").strip()))
        for name, header in headers[:1]:
            also = f", and those of {len(headers) - 1} more files" if len(headers) > 1 else ""
            notes.append(f"left out as a header: {header!r}, the first line of {name}{also}")
    elif example in ("line", "paragraph") and (found := find_separator(corpus)):
        flag, n = shlex.quote(f"--example={found[0]}"), found[1]
        notes.append(f"{found[0]!r} occurs {n:,} times: if it separates examples, {flag}")
    return notes


def find_separator(corpus):
    """Find what looks like a separator near the beginning of a corpus -> (separator, n) or None.

    It is a line like <end>, [END], --- or %, or <|MARK|> anywhere. It occurs three times or more,
    and as often as all others together.
    """
    found = Counter()
    for piece in read_head(corpus, "line"):
        line = piece.text.strip()
        found.update([line] if SEPARATOR.fullmatch(line) else MARK.findall(line))
    line, n = max(found.items(), key=itemgetter(1), default=("", 0))
    return (line, n) if n >= max(3, found.total() / 2) else None


def check_separator(corpus, example):
    """Raise ValueError if `example` is a separator, and no line of the corpus is."""
    if example in EXAMPLES:
        return
    separator, is_within = example.strip(), False
    for piece in read_pieces(corpus, "line"):
        if piece.text.strip() == separator:
            return
        is_within = is_within or separator in piece.text
    advice = f"--example is {', '.join(EXAMPLES)}, or a line that stands between examples"
    if separator and is_within:
        pattern = re.sub(r"([][\\.*^$/])", r"\\\1", separator)
        command = shlex.quote(f"s/{pattern}/\\n&\\n/g")
        advice = f"it stands within lines: give it lines of its own, with sed {command}"
    raise ValueError(f"no line of {corpus} is {example!r}: {advice}")


def read_head(corpus, example):
    """Yield the pieces of the first HEAD_BYTES of a corpus."""
    return takewhile(lambda piece: piece.end <= HEAD_BYTES, read_pieces(corpus, example))


def _find_cut(raw):
    """Find where to cut a part of a long example: before its last space, else after its last line, else between characters."""
    space, line = raw.rfind(b" ", 1), raw.rfind(b"\n") + 1
    if space > 0 or line:
        return space if space > 0 else line
    cut = len(raw)
    while cut > 1 and raw[cut - 1] & 0xC0 == 0x80:  # a byte that continues a character
        cut -= 1
    return cut - 1 if raw and raw[cut - 1] >= 0xC0 else len(raw)  # the last character may be incomplete


def _decode(raw, name, stream, position):
    """Decode UTF-8. Raises ValueError that names the first wrong byte of the document; `raw` begins at `position`."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = position + error.start
        raise ValueError(
            f"{name} is not UTF-8: byte {wrong} is 0x{raw[error.start]:02x}, in line {_line_at(stream, wrong)}. "
            f"{conversion(name)}"
        ) from None


def _line_at(stream, position):
    """Find the line of a byte of a document, counted from 1."""
    stream.seek(0)
    blocks = (stream.read(min(1 << 20, position - start)) for start in range(0, position, 1 << 20))
    return 1 + sum(block.count(b"\n") for block in blocks)


def split_position(corpus, example="line"):
    """Find the byte where the validation part of a corpus of few examples begins: after a space, close to the last 5 %.

    Returns None for a corpus of at least FEW_EXAMPLES, because `read_part` holds out whole examples of it.
    """
    examples = (piece for piece in read_pieces(corpus, example) if piece.last)
    if sum(1 for _ in islice(examples, FEW_EXAMPLES)) == FEW_EXAMPLES:
        return None
    corpus = Corpus.of(corpus)
    position = begin = int(corpus.n_bytes * (1 - VAL_SHARE["bytes"]))
    for _, stream in corpus.documents():
        size = stream.seek(0, os.SEEK_END)
        if begin <= size:  # it begins in this document
            stream.seek(max(0, begin - PIECE_BYTES))
            raw = stream.read(min(begin, PIECE_BYTES))
            by_words = example in ("line", "paragraph", "file")
            space = max(raw.rfind(b" ") if by_words else 0, raw.rfind(b"\n"))
            return position - len(raw) + (space + 1 if space > 0 else _find_cut(raw))
        begin -= size
    return position


def read_part(corpus, part, example="line", start=0, number=0):
    """Yield the pieces of one part of a corpus: "all", "train" or "val". The last two do not overlap.

    start, number: bytes and examples of the corpus that were read before, see `Piece.end`. Example i is in "val" if frac(i * golden ratio) < 2 %: these are spread evenly over the corpus, whatever period its
    examples may have. A corpus of few examples is cut in two instead (`split_position`).
    """
    if part == "all":
        yield from read_pieces(corpus, example, start, number=number)
    elif (position := split_position(corpus, example)) is not None:
        bounds = (start, position) if part == "train" else (max(start, position),)
        yield from read_pieces(corpus, example, *bounds, number=number)
    else:
        for piece in read_pieces(corpus, example, start, number=number):
            if (part == "val") == (piece.number * GOLDEN % 1 < VAL_SHARE["examples"]):
                yield piece


# ---------------------------------------------------------------- tokenizers


def default_vocab_size(corpus, kind):
    """Choose the size of a vocabulary by the size of the corpus: a token per BYTES_PER_TOKEN, up to a power of two.

    Whole words have the largest, because what is not in it cannot be written.
    """
    smallest, largest = VOCAB_SIZES
    n_bytes = Corpus.of(corpus).n_bytes
    return largest if kind == "word" else min(max(smallest, 1 << (n_bytes // BYTES_PER_TOKEN).bit_length()), largest)


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
    """Read about TOKENIZER_BYTES of a corpus, spread over all of it -> texts, and the sets of all characters and labels.

    Raises ValueError for more than MAX_LABELS labels.
    """
    corpus, texts, characters, labels = Corpus.of(corpus), [], set(), set()
    n = 1 + corpus.n_bytes // TOKENIZER_BYTES  # every n-th piece is kept
    with tqdm(desc=f"reading {Path(corpus.path).name}", total=corpus.n_bytes, unit="B", unit_scale=True, disable=None) as bar:
        for i, piece in enumerate(read_pieces(corpus, example, max_bytes=1000)):
            texts += [piece.text] * (i % n == 0)
            characters.update(piece.text)
            labels.update({piece.label} - {None})
            bar.update(piece.n_bytes)
    if len(labels) > MAX_LABELS:
        raise ValueError(f"{corpus} has {len(labels)} labels, at most {MAX_LABELS} are possible: a line is label<TAB>text")
    return texts, characters, labels


def trainer_options(kind, vocab_size, texts, characters, labels, folder):
    """Choose the options of SentencePiece's trainer -> dict. Files that they name are written into `folder`."""
    options = dict(
        model_type=kind, vocab_size=vocab_size, hard_vocab_limit=False, character_coverage=0.9999,
        normalization_rule_name="identity", unk_id=0, bos_id=1, eos_id=2, minloglevel=2,
        num_threads=4,  # unigram's result depends on it
        control_symbols=[LABEL + label for label in sorted(labels)],  # text never becomes these
    )  # fmt: skip
    if kind == "word":
        return options | dict(add_dummy_prefix=True, remove_extra_whitespaces=True) | write_rules(texts, folder)
    options |= dict(add_dummy_prefix=False, remove_extra_whitespaces=False)
    if kind != "char":
        return options | dict(byte_fallback=True, user_defined_symbols=["\n"] if "\n" in characters else [])
    characters = characters - {"\0"}  # SentencePiece cannot have it: it stays unknown
    symbols = sorted(c for c in characters if c != " " and not c.isprintable())  # it would leave these out otherwise
    rest = sorted({SPACE if c == " " else c for c in characters} - set(symbols))
    sizes = dict(vocab_size=len(symbols) + len(rest) + len(labels) + 1, character_coverage=1.0, bos_id=-1, eos_id=-1)
    return options | sizes | dict(user_defined_symbols=symbols, required_chars="".join(rest))


def show_seconds(function, what):
    """Call a function and show how long it takes so far, in a terminal."""
    with ThreadPoolExecutor(1) as pool, tqdm(desc=what, bar_format="{desc}: {elapsed}", disable=None) as bar:
        future = pool.submit(function)
        while wait([future], timeout=0.5).not_done:
            bar.refresh()
        return future.result()


def spacing_rules(texts):
    """List the rules by which a word tokenizer takes punctuation from words and puts it back -> two lists of (old, new).

    The first list normalises text before it is cut at spaces. JOIN marks what had no space before it:

        He said: "Yes!"    becomes    He said JOIN: " JOINYes JOIN! JOIN"

    The second list undoes that. Apostrophes and hyphens belong to words. A line break takes the spaces around it along.
    """
    pairs = Counter(pair for text in texts for pair in pairwise(text + " "))
    punctuation, followers = Counter(), Counter()
    for (c, after), n in pairs.items():
        if is_punctuation(c):
            punctuation[c] += n
            followers[after] += n * (not after.isspace() and not is_punctuation(after))
    rules = [("\n", f" {BREAK} ")] if any("\n" in pair for pair in pairs) else []
    for c, _ in punctuation.most_common(MAX_PUNCTUATION):
        rules += [(c, f" {JOIN}{c} "), (f" {c}", f" {c} ")]
        for w, n in followers.most_common(MAX_PUNCTUATION):
            rules += [(c + w, f" {JOIN}{c} {JOIN}{w}"), (f" {c}{w}", f" {c} {JOIN}{w}")] * (n > 0)
    undo = [(f"{before}{BREAK}{after}", "\n") for before in (" ", "") for after in (" ", "")]
    return rules, [(f" {JOIN}", ""), (JOIN, ""), *undo] if rules else []


def is_punctuation(c):
    """Whether a word tokenizer makes a token of a character: punctuation and symbols, but not apostrophes and hyphens."""
    return category(c)[0] in "PS" and c not in "'\u2019-_"


def write_rules(texts, folder):
    """Write `spacing_rules` as the files that SentencePiece reads -> its options."""
    options = {}
    for name, rules in zip(("normalization_rule_tsv", "denormalization_rule_tsv"), spacing_rules(texts), strict=True):
        if rules:
            lines = ["\t".join(" ".join(f"{ord(c):X}" for c in text) for text in rule) for rule in rules]
            with cli.writing(folder / name):
                (folder / name).write_text("\n".join(lines) + "\n")
            options[name] = str(folder / name)
    return options


def load_tokenizer(path):
    """Read a SentencePiece model. Raises ValueError for a file that is missing or is not one."""
    if not os.path.isfile(path):
        raise ValueError(f"no tokenizer at {path}")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise ValueError(f"{path} is not a SentencePiece model") from None


def adds_prefix(tokenizer):
    """Tell whether the tokenizer puts a space before every text, also before the rest of a line."""
    return "".join(tokenizer.encode("a", out_type=str)).startswith(SPACE)


def keeps_breaks(tokenizer):
    """Tell whether a line break is still there after encoding and decoding."""
    ids = tokenizer.encode("a\na")
    return tokenizer.decode(ids).count("\n") == 1 and tokenizer.unk_id() not in tokenizer.encode("\n")


def unknown_bytes(text, tokenizer):
    """Count the bytes of a text that the tokenizer turns into unknown tokens."""
    pieces = zip(tokenizer.encode(text), tokenizer.encode(text, out_type=str), strict=True)
    return sum(len(piece.replace(SPACE, "").replace(JOIN, "").encode()) for i, piece in pieces if i == tokenizer.unk_id())


def add_marks(ids, tokenizer, begin=True, end=True):
    """Put bos before and eos after the tokens of a text, each only if the tokenizer has one: list -> list."""
    bos, eos = tokenizer.bos_id(), tokenizer.eos_id()
    return ([bos] if begin and bos >= 0 else []) + ids + ([eos] if end and eos >= 0 else [])


@lru_cache(maxsize=4)
def label_ids(tokenizer):
    """List the labels that have a token -> {label: id}, empty unless the tokenizer was trained on labelled lines."""
    pieces = {k: tokenizer.id_to_piece(k) for k in range(len(tokenizer)) if tokenizer.is_control(k)}
    return {piece.removeprefix(LABEL): k for k, piece in pieces.items() if piece.startswith(LABEL)}


def piece_text(k, tokenizer):
    """Write one token as it reads within a text: its space before it, a label with its tab -> str."""
    piece = tokenizer.id_to_piece(k)
    piece = piece.removeprefix(LABEL) + "\t" if k in label_ids(tokenizer).values() else piece
    return piece.replace(SPACE + JOIN, "").replace(SPACE + BREAK, "\n").replace(SPACE, " ")


def decode(tokenizer, ids, unknown=()):
    """Turn ids into text, up to the first eos, as label<TAB>text if it has a label.

    Unknown tokens read as `unknown`, in order, or as nothing.
    """
    if tokenizer.eos_id() in ids:
        ids = ids[: ids.index(tokenizer.eos_id())]
    rest, unk = iter(unknown), tokenizer.unk_id()
    pieces = [next(rest, "") if k == unk else tokenizer.id_to_piece(k) for k in ids if k != tokenizer.bos_id()]
    labels = {k: label for label, k in label_ids(tokenizer).items()}
    label = "".join(f"{labels[k]}\t" for k in ids if k in labels)
    return label + tokenizer.decode(pieces).removeprefix(SPACE).replace(SPACE, " ")  # SPACE: of `unknown`


def one_line(text):
    """Put a text on one line, with a space for each line break."""
    return " ".join(text.splitlines())


def file_hash(path, progress=None):
    """Compute the sha256 of a file's content, in hexadecimal. progress: is called with the number of bytes of each block."""
    value = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value.update(block)
            if progress:
                progress(len(block))
    return value.hexdigest()
