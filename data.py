"""From text to batches: SentencePiece, a memory-mapped token cache, packing, and conditioning masks.

A document is a line of the corpus, stored as [bos] tokens [eos] (each where the tokenizer has one). It is cut into
windows, and windows are packed into rows:

    ids          (B, L) int64  tokens of a batch's rows, 0 where there is padding
    segment_ids  (B, L) int64  1, 2, ... numbers a row's windows, 0 = padding
    cond_mask    (B, L) bool   True = given to the network, not predicted

Everything random is a function of (seed, epoch) or (seed, batch number): there is no loader state to save.
"""

import hashlib
import io
import json
import os
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

PIECE_BYTES = 1 << 16  # longer lines are tokenised in pieces of this size, cut at spaces
CACHE_FORMAT = 2
FEW_LINES = 100  # a corpus of fewer lines is split for validation by bytes
VAL_SHARE = {"lines": 0.02, "bytes": 0.05}
TOKENIZER_BYTES = 20_000_000  # how much text a tokenizer is trained on
GOLDEN = (5**0.5 - 1) / 2


# ---------------------------------------------------------------- reading text


@dataclass(frozen=True)
class Piece:
    """A line of the corpus, or a part of a very long one."""

    text: str
    n_bytes: int
    first: bool  # starts its line
    last: bool  # ends its line


def read_pieces(path, start=0, stop=None, max_bytes=PIECE_BYTES):
    """Yield the non-blank lines between two byte positions as pieces of at most `max_bytes`, in bounded memory.

    Longer lines are cut before a space, or between characters where there is none. Raises ValueError for bytes that
    are not UTF-8.
    """
    with open(path, "rb") as file:
        file.seek(start)
        position, carry, first = start, b"", True
        while True:
            room = max_bytes - len(carry)
            if stop is not None:
                room = min(room, stop - position)
            chunk = file.readline(room)
            position += len(chunk)
            raw, carry = carry + chunk, b""
            last = raw.endswith(b"\n") or len(chunk) < room or position == stop
            if not last:
                cut = _cut(raw)
                raw, carry = raw[:cut], raw[cut:]
            at = position - len(carry) - len(raw)
            text = _decode(raw.rstrip(b"\r\n") if last else raw, path, at)
            if at == 0:
                text = text.removeprefix("\ufeff")
            if not (first and last) or text.strip():
                yield Piece(text, len(text.encode()), first, last)
            first = last
            if last and (not chunk or position == stop):
                return


def _cut(raw):
    """Where to cut a part of a long line: before its last space, else between two characters."""
    space = raw.rfind(b" ", 1)
    if space > 0:
        return space
    cut = len(raw)
    while cut > 1 and raw[cut - 1] & 0xC0 == 0x80:  # inside a character of several bytes
        cut -= 1
    return cut - 1 if cut > 1 and raw[cut - 1] >= 0xC0 else len(raw)


def _decode(raw, path, position):
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {position + error.start} is 0x{raw[error.start]:02x}. "
            "Convert it, for example with iconv -t UTF-8"
        ) from None


def split_position(path):
    """Where a corpus of few lines is cut for validation: after the last space before its last 5 %, as a byte position.

    None where there are at least 100 non-blank lines: those are split line by line.
    """
    lines = (piece for piece in read_pieces(path) if piece.last)
    if sum(1 for _ in islice(lines, FEW_LINES)) == FEW_LINES:
        return None
    position = int(os.path.getsize(path) * (1 - VAL_SHARE["bytes"]))
    with open(path, "rb") as file:
        file.seek(max(0, position - PIECE_BYTES))
        raw = file.read(min(position, PIECE_BYTES))
    if (space := max(raw.rfind(b" "), raw.rfind(b"\n"))) > 0:
        return position - len(raw) + space + 1
    return position - len(raw) + _cut(raw)


def read_part(path, part):
    """Yield the pieces of one part of a corpus: "all", "train" or "val". The two latter share no line.

    Lines are held out by the golden ratio, evenly and in step with no pattern of the file.
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

    bpe and unigram give back every line unchanged: no normalisation, bytes for what the vocabulary lacks. char is the
    plain character model, without bytes or special pieces. Raises ValueError where SentencePiece cannot build it.
    """
    if next(read_pieces(path), None) is None:
        raise ValueError(f"{path} has no text")
    every = 1 + os.path.getsize(path) // TOKENIZER_BYTES
    texts = (piece.text for i, piece in enumerate(read_pieces(path, max_bytes=1000)) if i % every == 0)
    options = dict(
        model_type=kind, vocab_size=vocab_size, hard_vocab_limit=False, character_coverage=0.9999, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        unk_id=0, bos_id=1, eos_id=2, num_threads=4, minloglevel=2,  # unigram's result depends on the thread count
    )  # fmt: skip
    if kind == "char":
        characters = sorted(set(chain.from_iterable(set(p.text.replace(" ", "\u2581")) for p in read_pieces(path))))
        options |= dict(byte_fallback=False, bos_id=-1, eos_id=-1, character_coverage=1.0)
        options |= dict(vocab_size=len(characters) + 1, required_chars="".join(characters))
    if kind == "word":
        options |= dict(byte_fallback=False, add_dummy_prefix=True, remove_extra_whitespaces=True)
    model, unreadable = io.BytesIO(), []

    def readable():
        try:
            yield from texts
        except ValueError as error:  # SentencePiece would bury it in a message of its own
            unreadable.append(error)

    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=readable(), model_writer=model, **options)
    except RuntimeError as error:
        if not unreadable:
            size = f"with --vocab_size={vocab_size} " if kind != "char" else ""
            reason = str(error).split("] ")[-1].split(". Increase")[0].strip() or "no reason given"
            raise ValueError(f"no {kind} tokenizer {size}from {path}: {reason}") from None
    if unreadable:
        raise unreadable[0]
    return model.getvalue()


def load_tokenizer(path):
    """Read a SentencePiece model. Raises ValueError for a file that is not one."""
    if not os.path.isfile(path):
        raise ValueError(f"no tokenizer at {path}")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise ValueError(f"{path} is not a SentencePiece model") from None


def adds_prefix(tokenizer):
    """Whether the tokenizer puts a space before a text that has none, so that a continuation must not bring its own."""
    return tokenizer.encode("a", out_type=str)[0].startswith("\u2581")


def unknown_bytes(text, tokenizer):
    """How many bytes of a text the tokenizer turns into unknown tokens."""
    pieces = zip(tokenizer.encode(text), tokenizer.encode(text, out_type=str), strict=True)
    return sum(len(piece.replace("\u2581", "").encode()) for i, piece in pieces if i == tokenizer.unk_id())


def file_hash(path):
    """sha256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- the token cache


def default_cache_dir():
    """Where tokenised corpora are kept: bayesian-flow-lm in the user's cache folder."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "bayesian-flow-lm")


@dataclass(frozen=True)
class Tokens:
    """A tokenised corpus: `ids` (N,) memory-mapped, document d at offsets[d]:offsets[d + 1]."""

    ids: np.ndarray
    offsets: np.ndarray
    n_chars: int  # of the raw text, line breaks not counted
    n_bytes: int
    n_unknown_bytes: int  # of text that the tokenizer does not know
    key: str  # identifies the content

    @property
    def lengths(self):
        """Tokens in each document, bos and eos included: (n_documents,) int64."""
        return np.diff(self.offsets)


def load_corpus(path, tokenizer_path, cache_dir, part="all"):
    """Tokenise a part of a corpus, or map the cache of an earlier call with the same content -> Tokens.

    Raises ValueError for a missing file, an empty part, or text that is not UTF-8.
    """
    if not os.path.isfile(path):
        raise ValueError(f"no text file at {path}")
    key = f"{file_hash(path)} {file_hash(tokenizer_path)} {part} {CACHE_FORMAT}"
    key = hashlib.sha256(key.encode()).hexdigest()[:32]
    folder = Path(cache_dir) / key
    if (tokens := _read_cache(folder, key)) is None:
        shutil.rmtree(folder, ignore_errors=True)
        _write_cache(path, part, load_tokenizer(tokenizer_path), folder)
        tokens = _read_cache(folder, key)
    if tokens is None:
        raise ValueError(f"{folder} is damaged and cannot be replaced: delete it")
    return tokens


def _read_cache(folder, key):
    """Map a cache -> Tokens, or None where it is missing or not whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        ids = np.memmap(folder / "ids.bin", dtype=meta["dtype"], mode="r")
        offsets = np.memmap(folder / "offsets.bin", dtype=np.int64, mode="r")
    except (OSError, ValueError, KeyError):
        return None
    if len(ids) != meta["n_tokens"] or len(offsets) != meta["n_documents"] + 1 or offsets[-1] != len(ids):
        return None
    return Tokens(ids, offsets, meta["n_chars"], meta["n_bytes"], meta["n_unknown_bytes"], key)


def _write_cache(path, part, tokenizer, folder):
    """Tokenise into a temporary folder beside `folder`, then rename it: a cache is whole or absent."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        meta = _tokenize(path, part, tokenizer, temporary)
        (temporary / "meta.json").write_text(json.dumps(meta))
        for name in ("ids.bin", "offsets.bin", "meta.json"):
            with open(temporary / name, "r+b") as file:
                os.fsync(file.fileno())
        if not folder.exists():
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tokenize(path, part, tokenizer, folder):
    """Encode all pieces of a part on all cores and write ids and offsets as they come -> the cache's description."""
    bos, eos = tokenizer.bos_id(), tokenizer.eos_id()
    strip = adds_prefix(tokenizer)
    meta = dict(
        n_chars=0, n_bytes=0, n_unknown_bytes=0, n_documents=0, dtype="uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    )
    end = end_of_last = 0

    def encode(batch):  # SentencePiece lets go of Python's lock: threads use all cores
        texts = [p.text if p.first or not strip else p.text.removeprefix(" ") for p in batch]
        rows = tokenizer.encode_as_numpy(texts)
        ends = np.cumsum([len(row) for row in rows])
        begins = ends - [len(row) for row in rows]
        marked = np.array([(p.first and bos >= 0, p.last and eos >= 0) for p in batch])  # (n, 2)
        at, marks = np.stack([begins, ends], 1)[marked], np.broadcast_to((bos, eos), marked.shape)[marked]
        ids = np.insert(np.concatenate(rows), at, marks).astype(meta["dtype"])
        return batch, ids, ends + np.cumsum(marked.sum(1))

    pieces = read_part(path, part)
    batches = iter(lambda: list(islice(pieces, 1000)), [])
    with (
        open(folder / "ids.bin", "wb") as ids_file,
        open(folder / "offsets.bin", "wb") as offsets_file,
        tqdm(desc=f"tokenising {Path(path).name} ({part})", unit="B", unit_scale=True, disable=None) as bar,
    ):
        offsets_file.write(np.int64(0).tobytes())
        for batch, ids, ends in ahead(encode, batches, depth=4 * os.cpu_count(), threads=os.cpu_count()):
            ids_file.write(ids.tobytes())
            documents = np.unique((end + ends)[[p.last for p in batch]])  # a line of no tokens is no document
            documents = documents[documents > end_of_last]
            offsets_file.write(documents.astype(np.int64).tobytes())
            meta["n_documents"] += len(documents)
            end_of_last = documents[-1] if len(documents) else end_of_last
            end += len(ids)
            meta["n_chars"] += sum(len(p.text) for p in batch)
            meta["n_bytes"] += sum(p.n_bytes for p in batch)
            if (ids == tokenizer.unk_id()).any():
                meta["n_unknown_bytes"] += sum(unknown_bytes(p.text, tokenizer) for p in batch)
            bar.update(sum(p.n_bytes for p in batch))
    if end == 0:
        raise ValueError(f"{path} has no text" + ("" if part == "all" else f" for the part {part!r}: it is too short"))
    return dict(meta, n_tokens=end)


# ---------------------------------------------------------------- packing


@dataclass(frozen=True)
class Plan:
    """Windows of the token stream placed in rows: window w of row r for w in row_starts[r]:row_starts[r + 1]."""

    starts: np.ndarray  # (n_windows,) int64, first token in Tokens.ids
    lengths: np.ndarray  # (n_windows,) int64
    row_starts: np.ndarray  # (n_rows + 1,) int64

    @property
    def n_rows(self):
        return len(self.row_starts) - 1

    def fill(self, row_length):
        """Share of positions that hold a token."""
        return self.lengths.sum() / (self.n_rows * row_length)


def pack(lengths, row_length, rng):
    """Place items of at most `row_length` in rows, largest first -> (row of each item (n,), number of rows).

    A row takes, from long to short, as many items of each length as fit; the same pattern is repeated while the items
    last, so the work depends on the number of lengths, not of items. `rng` decides which item of a length goes where.
    """
    order = rng.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]  # random within each length
    counts = np.bincount(lengths, minlength=row_length + 1)
    last = np.cumsum(counts)  # items of length l are order[last[l] - counts[l] : last[l]], taken from the back
    rows, n_rows = np.empty(len(lengths), dtype=np.int64), 0
    while counts.any():
        pattern, free = [], row_length
        for length in np.flatnonzero(counts)[::-1]:
            take = min(free // length, counts[length])
            if take:
                pattern.append((length, take))
                free -= take * length
        repeats = min(counts[length] // take for length, take in pattern)
        for length, take in pattern:
            n = take * repeats
            rows[order[last[length] - n : last[length]]] = n_rows + np.arange(n) // take
            last[length] -= n
            counts[length] -= n
        n_rows += repeats
    return rows, int(n_rows)


def _plan(starts, lengths, rows, n_rows, rng):
    """Sort windows by row, the rows in random order -> Plan."""
    rows = rng.permutation(n_rows)[rows]
    order = np.argsort(rows, kind="stable")
    row_starts = np.searchsorted(rows[order], np.arange(n_rows + 1))
    return Plan(starts[order], lengths[order], row_starts)


def plan_epoch(tokens, row_length, seed, epoch):
    """Cover every token once: short documents whole, long ones as a stream that fills what is left -> Plan.

    Documents of at most `row_length` are packed first. The others, in random order, flow through the gaps of those
    rows and then through whole rows; a window ends where its row or its document does. The stream starts at a random
    offset, so that windows differ from epoch to epoch; the number of rows does not.
    """
    rng = np.random.default_rng((seed, epoch))
    offsets, lengths = np.asarray(tokens.offsets), tokens.lengths
    short = np.flatnonzero(lengths <= row_length)
    rows, n_packed = pack(lengths[short], row_length, rng)
    gaps = row_length - np.bincount(rows, weights=lengths[short], minlength=n_packed).astype(np.int64)

    stream = rng.permutation(np.flatnonzero(lengths > row_length))
    total = lengths[stream].sum()
    n_rows = n_packed
    if total:
        n_rows += max(0, -(-(total + row_length - 1 - gaps.sum()) // row_length))
    skip = rng.integers(row_length)
    row_ends = np.cumsum(np.concatenate([gaps, np.full(n_rows - n_packed, row_length)]))
    document_ends = skip + np.cumsum(lengths[stream])
    cuts = np.unique(np.concatenate([row_ends[row_ends < skip + total], document_ends, [skip]]))
    cuts = cuts[cuts >= skip]
    begin, end = cuts[:-1], cuts[1:]
    document = np.searchsorted(document_ends, begin, side="right")
    starts = offsets[stream][document] + begin - (document_ends - lengths[stream])[document]
    return _plan(
        np.concatenate([offsets[short], starts]),
        np.concatenate([lengths[short], end - begin]),
        np.concatenate([rows, np.searchsorted(row_ends, begin, side="right")]),
        n_rows,
        rng,
    )


def plan_validation(tokens, row_length):
    """Cover every token once with windows at multiples of `row_length` in their document, always the same -> Plan."""
    n_windows = -(-tokens.lengths // row_length)
    document = np.repeat(np.arange(len(n_windows)), n_windows)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
    starts = tokens.offsets[document] + nth * row_length
    lengths = np.minimum(row_length, tokens.offsets[document + 1] - starts)
    rng = np.random.default_rng(0)
    rows, n_rows = pack(lengths, row_length, rng)
    return _plan(starts, lengths, rows, n_rows, rng)


# ---------------------------------------------------------------- batches


def gather_rows(tokens, plan, rows, row_length):
    """Read rows of a plan -> ids (B, L), segment_ids (B, L), int64 arrays."""
    first, last = plan.row_starts[rows], plan.row_starts[rows + 1]
    counts = last - first
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # 0, 1, ... in each row
    window = np.repeat(first, counts) + within
    lengths = plan.lengths[window]
    row = np.repeat(np.arange(len(rows)), counts)
    begins = np.cumsum(lengths) - lengths
    row_begins = np.append(begins, 0)[np.cumsum(counts) - counts]  # 0 for empty rows at the end, which do not use it
    column = begins - np.repeat(row_begins, counts)  # of each window's first token
    offset = np.arange(lengths.sum()) - np.repeat(begins, lengths)
    at = np.repeat(row * row_length + column, lengths) + offset
    ids, segment_ids = np.zeros((2, len(rows), row_length), dtype=np.int64)
    ids.reshape(-1)[at] = tokens.ids[np.repeat(plan.starts[window], lengths) + offset]
    segment_ids.reshape(-1)[at] = np.repeat(within + 1, lengths)
    return ids, segment_ids


def places(segment_ids):
    """Each position's place in its segment, from 0, and the segment's size: (B, L) -> (B, L), (B, L), int64 arrays."""
    B, L = segment_ids.shape
    of_segment = (np.arange(B)[:, None], segment_ids)
    size = np.zeros((B, L + 1), dtype=np.int64)
    np.add.at(size, of_segment, 1)
    first = segment_ids != np.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    position = np.arange(L) - np.maximum.accumulate(np.where(first, np.arange(L), 0), axis=1)
    return position, size[of_segment]


def draw_cond_mask(segment_ids, rng):
    """Choose what is given: nothing in half of the segments, else a random span or random positions -> (B, L) bool.

    The share of a segment that is given is uniform on (0, 1).
    """
    B, L = segment_ids.shape
    position, size = places(segment_ids)
    of_segment = (np.arange(B)[:, None], segment_ids)  # looks a position's segment up in a (B, L + 1) array
    kind, share, place = (draw[of_segment] for draw in rng.random((3, B, L + 1)))
    n = (share * size).astype(np.int64)
    begin = (place * (size - n + 1)).astype(np.int64)
    span = (begin <= position) & (position < begin + n)
    scattered = rng.random((B, L)) < share
    return np.where(kind < 0.5, False, np.where(kind < 0.75, span, scattered)) & (segment_ids > 0)


class Loader:
    """Training batches of packed rows; `batch(n)` is a pure function of (seed, n).

    Rows of epoch 0, 1, 2, ... follow one another without a break, and batch n takes rows n B to (n + 1) B.
    """

    def __init__(self, tokens, row_length, batch_size, seed, bos_id=-1):
        self.tokens, self.row_length, self.batch_size = tokens, row_length, batch_size
        self.seed, self.bos_id = seed, bos_id
        self.plan = lru_cache(maxsize=2)(lambda epoch: plan_epoch(tokens, row_length, seed, epoch))
        self.rows_per_epoch = self.plan(0).n_rows

    def batch(self, n):
        """-> ids, segment_ids, cond_mask of batch n, each (B, L), torch tensors. bos is always given."""
        rows = n * self.batch_size + np.arange(self.batch_size)
        epochs = rows // self.rows_per_epoch
        parts = [
            gather_rows(self.tokens, self.plan(int(e)), rows[epochs == e] % self.rows_per_epoch, self.row_length)
            for e in np.unique(epochs)
        ]
        ids, segment_ids = (np.concatenate(part) for part in zip(*parts, strict=True))
        cond_mask = draw_cond_mask(segment_ids, np.random.default_rng((self.seed, 0, n)))
        cond_mask |= (ids == self.bos_id) & (segment_ids > 0)
        return tuple(map(torch.from_numpy, (ids, segment_ids, cond_mask)))


def ahead(function, items, depth=8, threads=1):
    """Yield function(item) for the items in order, computed by threads that keep up to `depth` results ready."""
    with ThreadPoolExecutor(threads) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
