"""The token cache: a corpus is tokenised once, into files that are mapped into memory.

    document    an example of the corpus as tokens, for example a line: [bos] ids [eos], each mark only where the tokenizer has one
    Tokens.ids  (N,)  all documents, one after another

A cache belongs to the content of the corpus. The hashes of a large corpus are remembered until a file changes its size or
time. The arrays of a cache have a checksum per block. Each start reads the first block, the last one and random others: a
start takes about a second at most, finds arrays that are cut or shifted, and finds zeros in a share p of the blocks with
probability 1 - (1 - p)^30. A cache of up to 128 MB per array is checked as a whole.
"""

import hashlib
import json
import os
import random
import shutil
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

import cli
from data import prefetch
from documents import Corpus, is_jsonl
from text import add_marks, adds_prefix, file_hash, label_ids, load_tokenizer, read_part, unknown_bytes

CACHE_FORMAT = 2
STALE_SECONDS = 3600  # a cache that was begun and not written to for so long belongs to a run that was killed
LARGE_BYTES = 1 << 26  # a corpus of so many bytes is not read at each start
FRESH_SECONDS = 2  # a file that was just changed may change once more without a new time
BLOCK_BYTES = 1 << 22
N_BLOCKS = 32  # of each array that are checked at a start
SHARD_DOCUMENTS, SHARD_TOKENS = 1 << 20, 1 << 28  # the most in a shard, except for a longer document


def default_cache_dir():
    """Return the folder of tokenised corpora: bayesian-flow-lm in the user's cache folder."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "bayesian-flow-lm")


@dataclass(frozen=True)
class Tokens:
    """A tokenised corpus: document d is ids[offsets[d] : offsets[d + 1]]."""

    ids: np.ndarray  # (N,) uint16 or uint32, memory-mapped
    offsets: np.ndarray  # (n_documents + 1,) int64
    n_chars: int  # of the text, without the line breaks between documents
    n_bytes: int
    n_unknown_bytes: int  # of text that the tokenizer does not know
    key: str  # identifies the content

    @property
    def lengths(self):
        """Tokens in each document, bos and eos included: (n_documents,) int64."""
        return np.diff(self.offsets)

    @property
    def n_shards(self):
        """Number of parts that are packed one after another: one, unless the corpus is large."""
        n_documents = len(self.offsets) - 1
        return min(n_documents, max(-(-n_documents // SHARD_DOCUMENTS), -(-int(self.offsets[-1]) // SHARD_TOKENS)))

    def shard_documents(self, shard):
        """List the documents of a shard, which come from all over the corpus -> (n,) int64."""
        n_documents = len(self.offsets) - 1
        size = max(1, n_documents // (256 * self.n_shards))  # neighbours that stay together, so that reading them is fast
        index = (np.arange(shard * size, n_documents, self.n_shards * size)[:, None] + np.arange(size)).ravel()
        return index[index < n_documents]

    def read_shard(self, shard):
        """Look up the documents of a shard -> their starts in ids and their lengths, (n,) int64."""
        index = self.shard_documents(shard)
        starts = np.asarray(self.offsets[index])
        return starts, self.offsets[index + 1] - starts

    def count_lengths(self, longest, chunk=1 << 20):
        """Count the documents of 0, 1, ..., longest tokens, longer ones as `longest` -> (longest + 1,) int64."""
        counts = np.zeros(longest + 1, np.int64)
        for begin in range(0, len(self.offsets) - 1, chunk):  # all lengths of a large corpus would take much memory
            lengths = np.minimum(np.diff(self.offsets[begin : begin + chunk + 1]), longest)
            counts += np.bincount(lengths, minlength=longest + 1)
        return counts


def load_corpus(corpus, tokenizer_path, cache_dir, part="all", example="line"):
    """Tokenise a part of a corpus, or open the cache of an earlier call with the same content -> Tokens.

    corpus: a Corpus, or the path of one. Raises ValueError for a missing file, an empty part, or text that is not UTF-8.
    """
    corpus = Corpus.of(corpus)
    key = text_key(corpus, tokenizer_path, cache_dir, part, example)
    folder = Path(cache_dir) / key
    if (tokens := _read_cache(folder, key)) is None:
        shutil.rmtree(folder, ignore_errors=True)
        _write_cache(corpus, part, example, load_tokenizer(tokenizer_path), folder)
        tokens = _read_cache(folder, key)
    if tokens is None:
        raise ValueError(f"{folder} is damaged and cannot be replaced: delete it")
    return tokens


# ---------------------------------------------------------------- the content of a corpus


def text_key(corpus, tokenizer_path, cache_dir, part="all", example="line"):
    """Compute what identifies the Tokens of a part of a Corpus -> str."""
    key = f"{content_hash(corpus, cache_dir)} {file_hash(tokenizer_path)} {part} {CACHE_FORMAT}"
    return hashlib.sha256((key + f" {example}" * (example != "line")).encode()).hexdigest()[:32]


def content_hash(corpus, cache_dir):
    """Compute a number that identifies the content of a corpus, whatever its files are called -> hexadecimal.

    That of one plain text file is its sha256. The hashes of the files of a large corpus are kept in cache_dir/hashes.json.
    """
    hashes = _file_hashes(corpus.files, Path(cache_dir) / "hashes.json")
    kinds = [f"jsonl {corpus.text_field}" if is_jsonl(path) else "text" for path in corpus.files]
    kinds = [kind + " gz" * path.endswith(".gz") for kind, path in zip(kinds, corpus.files, strict=True)]
    if kinds == ["text"]:
        return hashes[0]
    lines = [f"{kind} {value}" for kind, value in zip(kinds, hashes, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _file_hashes(files, memory):
    """Compute the sha256 of each file, or look it up in the file `memory` if they are large together -> list of str."""
    stats = [os.stat(path) for path in files]
    n_bytes = sum(stat.st_size for stat in stats)
    if n_bytes < LARGE_BYTES:
        return list(map(file_hash, files))
    try:
        known = {path: [size, time, value] for path, (size, time, value) in json.loads(memory.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        known = {}
    hashes, is_new = [], False
    with tqdm(desc="reading", total=n_bytes, unit="B", unit_scale=True, delay=1, disable=None) as bar:
        for path, stat in zip(map(os.path.realpath, files), stats, strict=True):
            stamp = [stat.st_size, stat.st_mtime_ns]
            if known.get(path, [])[:2] != stamp:
                known[path], is_new = [*stamp, file_hash(path, bar.update)], True
            else:
                bar.update(stat.st_size)
            hashes.append(known[path][2])
            if time.time() - stat.st_mtime < FRESH_SECONDS:
                del known[path]
    if is_new:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError), cli.replacing(memory) as temporary:  # another process may write it now
            temporary.write_text(json.dumps(known))
    return hashes


# ---------------------------------------------------------------- the files of a cache


def _read_cache(folder, key):
    """Open a cache -> Tokens, or None if it is missing or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        ids = np.memmap(folder / "ids.bin", dtype=meta["dtype"], mode="r")
        offsets = np.memmap(folder / "offsets.bin", dtype=np.int64, mode="r")
        whole = meta.pop("checksum", None) in (None, checksum(meta))  # None: a cache of before there was one
        whole = whole and len(ids) == meta["n_tokens"] and len(offsets) == meta["n_documents"] + 1
        whole = whole and all(check(folder / name, meta["checksums"][name]) for name in ("ids.bin", "offsets.bin"))
        tokens = Tokens(ids, offsets, meta["n_chars"], meta["n_bytes"], meta["n_unknown_bytes"], key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return tokens if whole else None


def checksum(meta):
    """Compute the CRC-32 of the content of meta.json -> int."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def checksums(path, block_bytes, blocks=None):
    """Compute the CRC-32 of the blocks of a file, or of some of them, at about 1 GB/s -> list of int."""
    sums, n_bytes = [], os.path.getsize(path)
    with open(path, "rb") as file:
        for i in range(-(-n_bytes // block_bytes)) if blocks is None else blocks:
            value, end = 0, min((i + 1) * block_bytes, n_bytes)
            file.seek(i * block_bytes)
            while n := min(end - file.tell(), BLOCK_BYTES):
                value = zlib.crc32(file.read(n), value)
            sums.append(value)
    return sums


def check(path, sums):
    """Compare the first and the last block of a file and some random others with their checksums -> whether they agree.

    sums: one per block; a number is that of the whole file, as caches of before had it.
    """
    n_bytes = os.path.getsize(path)
    sums, block_bytes = (sums, BLOCK_BYTES) if isinstance(sums, list) else ([sums], n_bytes)
    n = len(sums)
    if n != -(-n_bytes // block_bytes):
        return False
    blocks = range(n) if n <= N_BLOCKS else sorted({0, n - 1, *random.sample(range(n), N_BLOCKS - 2)})
    return checksums(path, block_bytes, blocks) == [sums[i] for i in blocks]


def _remove_stale(folder):
    """Remove what runs that were killed have begun to write for the same cache."""
    for old in folder.parent.glob(f"{folder.name}.*.tmp"):
        with suppress(OSError):  # another process may finish just now
            newest = max((file.stat().st_mtime for file in [old, *old.iterdir()]), default=0)
            if time.time() - newest > STALE_SECONDS:
                shutil.rmtree(old, ignore_errors=True)


def _write_cache(corpus, part, example, tokenizer, folder):
    """Tokenise into a temporary folder and rename it to `folder` at the end, so that no cache is ever incomplete."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    try:
        with cli.writing(folder):
            meta = _tokenize(corpus, part, example, tokenizer, temporary)
            meta["checksums"] = {name: checksums(temporary / name, BLOCK_BYTES) for name in ("ids.bin", "offsets.bin")}
            (temporary / "meta.json").write_text(json.dumps({**meta, "checksum": checksum(meta)}))
        for name in ("ids.bin", "offsets.bin", "meta.json"):
            with open(temporary / name, "r+b") as file:
                os.fsync(file.fileno())
        if not folder.exists():
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tokenize(corpus, part, example, tokenizer, folder):
    """Tokenise a part of a corpus on all cores and write ids.bin and offsets.bin -> the content of meta.json."""
    meta = dict(n_chars=0, n_bytes=0, n_unknown_bytes=0, n_documents=0)
    meta["dtype"] = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    n_tokens = document_end = 0
    all_pieces, n_cores = read_part(corpus, part, example), os.cpu_count()
    batches = iter(lambda: list(islice(all_pieces, 1000)), [])
    with (
        open(folder / "ids.bin", "wb") as ids_file,
        open(folder / "offsets.bin", "wb") as offsets_file,
        tqdm(desc=f"tokenising {Path(corpus.path).name} ({part})", unit="B", unit_scale=True, disable=None) as bar,
    ):
        offsets_file.write(np.int64(0).tobytes())
        encode = partial(_encode, tokenizer=tokenizer)
        for pieces, ids, example_ends in prefetch(encode, batches, depth=4 * n_cores, threads=n_cores):
            ends = np.unique(n_tokens + example_ends)
            ends = ends[ends > document_end]  # an example without tokens is not a document
            document_end = ends.max(initial=document_end)
            n_tokens += len(ids)
            ids_file.write(ids.astype(meta["dtype"]).tobytes())
            offsets_file.write(ends.tobytes())
            meta["n_documents"] += len(ends)
            meta["n_chars"] += sum(len(piece.text) for piece in pieces)
            meta["n_bytes"] += (n_bytes := sum(piece.n_bytes for piece in pieces))
            if tokenizer.unk_id() in ids:
                meta["n_unknown_bytes"] += sum(unknown_bytes(piece.text, tokenizer) for piece in pieces)
            bar.update(n_bytes)
    if n_tokens == 0:
        raise ValueError(f"{corpus} has no text" + ("" if part == "all" else f" for the part {part!r}: it is too short"))
    return dict(meta, n_tokens=n_tokens)


def _encode(pieces, tokenizer):
    """Tokenise pieces -> pieces, their tokens with marks (n,), and the number of tokens up to each example's end."""
    # a later piece begins with a space, and the tokenizer may add a second one
    strip = adds_prefix(tokenizer) and tokenizer.encode(" a") != tokenizer.encode("a")
    texts = [p.text.removeprefix(" ") if strip and not p.first else p.text for p in pieces]
    bos = np.array(add_marks([], tokenizer, end=False), np.int32)  # empty if the tokenizer has none
    eos = np.array(add_marks([], tokenizer, begin=False), np.int32)
    nothing = bos[:0]
    encoded = tokenizer.encode_as_numpy(texts)  # releases Python's lock, so threads run on all cores
    labels = {None: nothing} | {label: np.array([k], np.int32) for label, k in label_ids(tokenizer).items()}
    parts, example_ends, n_tokens = [], [], 0
    for piece, ids in zip(pieces, encoded, strict=True):
        if piece.label not in labels:
            raise ValueError(f"no token for the label {piece.label!r}: a tokenizer knows the labels of the text that it was trained on")
        marked = [bos if piece.first else nothing, labels[piece.label], ids, eos if piece.last else nothing]
        parts += marked
        n_tokens += sum(map(len, marked))
        if piece.last:
            example_ends.append(n_tokens)
    return pieces, np.concatenate(parts), np.array(example_ends, np.int64)
