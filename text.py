"""Text files and SentencePiece tokenizers: read a corpus in pieces of bounded size, train and load a tokenizer."""

import hashlib
import io
import os
from dataclasses import dataclass
from itertools import islice

import sentencepiece

from noise import GOLDEN

PIECE_BYTES = 1 << 16  # longer lines are tokenised in pieces of this size, cut at spaces
SPACE = "\u2581"  # the character that SentencePiece writes for a space
FEW_LINES = 100  # a corpus of fewer lines is split for validation by bytes
VAL_SHARE = {"lines": 0.02, "bytes": 0.05}
TOKENIZER_BYTES = 20_000_000  # how much text a tokenizer is trained on

# ---------------------------------------------------------------- reading text


@dataclass(frozen=True)
class Piece:
    """A line of the corpus, or a part of a very long one."""

    text: str
    n_bytes: int
    first: bool  # starts its line
    last: bool  # ends its line


def read_pieces(path, start=0, stop=None, max_bytes=None):
    """Yield the non-blank lines between two byte positions as pieces, in bounded memory.

    Lines of more than `max_bytes` (default PIECE_BYTES) are cut before a space, or between two characters if there is
    no space. Raises ValueError for bytes that are not UTF-8.
    """
    max_bytes = max_bytes or PIECE_BYTES
    with open(path, "rb") as file:
        file.seek(start)
        position, first = start, True
        while True:
            limit = max_bytes if stop is None else min(max_bytes, stop - position)
            raw = file.readline(limit)
            if first and not raw:
                return
            last = raw.endswith(b"\n") or len(raw) < limit or position + len(raw) == stop
            if not last:
                raw = raw[: _find_cut(raw)]
                file.seek(position + len(raw))
            text = _decode(raw.rstrip(b"\r\n") if last else raw, path, position)
            if position == 0:
                text = text.removeprefix("\ufeff")  # byte order mark
            if not (first and last) or text.strip():
                yield Piece(text, len(text.encode()), first, last)
            position += len(raw)
            first = last


def _find_cut(raw):
    """Find where to cut a part of a long line: before its last space, or between two characters if it has none."""
    space = raw.rfind(b" ", 1)
    if space > 0:
        return space
    cut = len(raw)
    while cut > 1 and raw[cut - 1] & 0xC0 == 0x80:  # a byte that continues a character
        cut -= 1
    return cut - 1 if cut > 1 and raw[cut - 1] >= 0xC0 else len(raw)  # the last character may be incomplete


def _decode(raw, path, position):
    """Decode UTF-8. Raises ValueError that names the first wrong byte of the file; `raw` begins at `position`."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {position + error.start} is 0x{raw[error.start]:02x}. "
            "Convert it, for example with iconv -t UTF-8"
        ) from None


def split_position(path):
    """Find the byte where the validation part of a corpus of few lines begins: after a space, close to the last 5 %.

    Returns None for a corpus of at least 100 non-blank lines, because `read_part` holds out whole lines of it.
    """
    lines = (piece for piece in read_pieces(path) if piece.last)
    if sum(1 for _ in islice(lines, FEW_LINES)) == FEW_LINES:
        return None
    position = int(os.path.getsize(path) * (1 - VAL_SHARE["bytes"]))
    with open(path, "rb") as file:
        file.seek(max(0, position - PIECE_BYTES))
        raw = file.read(min(position, PIECE_BYTES))
    space = max(raw.rfind(b" "), raw.rfind(b"\n"))
    return position - len(raw) + (space + 1 if space > 0 else _find_cut(raw))


def read_part(path, part):
    """Yield the pieces of one part of a corpus: "all", "train" or "val". The last two do not overlap.

    Line i is in "val" if frac(i * golden ratio) < 2 %: these lines are spread evenly over the file, whatever period its
    lines may have. A corpus of few lines is cut in two instead (`split_position`).
    """
    if part == "all":
        yield from read_pieces(path)
    elif (position := split_position(path)) is not None:
        yield from read_pieces(path, stop=position) if part == "train" else read_pieces(path, start=position)
    else:
        line = 0
        for piece in read_pieces(path):
            if (part == "val") == (line * GOLDEN % 1 < VAL_SHARE["lines"]):
                yield piece
            line += piece.last


# ---------------------------------------------------------------- tokenizers


def train_tokenizer(path, kind, vocab_size):
    """Train a SentencePiece model of `kind` bpe, unigram, char or word on a corpus -> the model as bytes.

    Text encoded with bpe or unigram decodes to exactly the same text. char has one token per character and one for
    unknown characters, and nothing else. Raises ValueError if the corpus has no text or SentencePiece cannot build it.
    """
    n = 1 + os.path.getsize(path) // TOKENIZER_BYTES  # of a large corpus, every n-th piece is read
    texts = [piece.text for piece in islice(read_pieces(path, max_bytes=1000), 0, None, n)]
    if not texts:
        raise ValueError(f"{path} has no text")
    options = dict(
        model_type=kind, vocab_size=vocab_size, hard_vocab_limit=False, character_coverage=0.9999, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        unk_id=0, bos_id=1, eos_id=2, num_threads=4, minloglevel=2,  # unigram's result depends on the thread count
    )  # fmt: skip
    if kind == "char":
        characters = set()
        for piece in read_pieces(path):
            characters.update(piece.text.replace(" ", SPACE))
        options |= dict(byte_fallback=False, bos_id=-1, eos_id=-1, character_coverage=1.0)
        options |= dict(vocab_size=len(characters) + 1, required_chars="".join(sorted(characters)))
    if kind == "word":
        options |= dict(byte_fallback=False, add_dummy_prefix=True, remove_extra_whitespaces=True)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **options)
    except RuntimeError as error:
        size = f"with --vocab_size={vocab_size} " if kind != "char" else ""
        reason = str(error).split("] ")[-1].split(". Increase")[0].strip() or "no reason given"
        raise ValueError(f"no {kind} tokenizer {size}from {path}: {reason}") from None
    return model.getvalue()


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
    return tokenizer.encode("a", out_type=str)[0].startswith(SPACE)


def unknown_bytes(text, tokenizer):
    """Count the bytes of a text that the tokenizer turns into unknown tokens."""
    pieces = zip(tokenizer.encode(text), tokenizer.encode(text, out_type=str), strict=True)
    return sum(len(piece.replace(SPACE, "").encode()) for i, piece in pieces if i == tokenizer.unk_id())


def add_marks(ids, tokenizer, begin=True, end=True):
    """Put bos before and eos after the tokens of a text, each only if the tokenizer has one: list -> list."""
    bos, eos = tokenizer.bos_id(), tokenizer.eos_id()
    return ([bos] if begin and bos >= 0 else []) + ids + ([eos] if end and eos >= 0 else [])


def file_hash(path):
    """Compute the sha256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
