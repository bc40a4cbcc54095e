"""The token cache: a corpus is tokenised once, into files that are mapped into memory.

    document    an example of the corpus as tokens, for example a line: [bos] ids [eos], each mark only where the tokenizer has one
    Tokens.ids  (N,)  all documents, one after another

Tokenising that was interrupted goes on after the last part that is complete, if neither text nor tokenizer have changed.
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
import sys
import time
import uuid
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import cli
from common.files import file_hash, replacing, writing
from common.parallel import prefetch
from text.reading import Corpus, is_json, look_at, read_part
from text.tokenizer import add_marks, adds_prefix, label_ids, load_tokenizer, unknown_bytes

CACHE_FORMAT = 2
ARRAYS = "ids.bin", "offsets.bin", "shard_lengths.bin", "hash_counts.bin"  # of a cache, named after the fields of Tokens
COUNTS = "n_chars", "n_bytes", "n_unknown_bytes", "n_documents", "n_tokens"
BATCH = 1000  # pieces of text that are tokenised together
PART_BYTES = 1 << 25  # of text that are tokenised between two writes of done.json
STALE_SECONDS = 7 * 24 * 3600  # what was begun and not written to for so long is removed
LARGE_BYTES = 1 << 26  # a corpus of so many bytes is not read at each start
FRESH_SECONDS = 2  # a file that was just changed may change once more without a new time
BLOCK_BYTES = 1 << 22
N_BLOCKS = 32  # of each array that are checked at a start
SHARD_DOCUMENTS, SHARD_TOKENS = 1 << 20, 1 << 28  # the most in a shard, except for a longer document
N_HASHES = 1 << 18  # documents of different content that are remembered, to find them in another text


def default_cache_dir():
    """Return the folder of tokenised corpora: bayesian-flow-lm in `cli.user_cache_dir`."""
    return os.path.join(cli.user_cache_dir()[0], "bayesian-flow-lm")


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
        """Tokens in each document, bos and eos included: (n_documents,) int64. Of a large corpus, these take much memory."""
        return np.diff(self.offsets)

    @property
    def n_documents(self):
        """Number of documents."""
        return len(self.offsets) - 1

    @property
    def n_shards(self):
        """Number of parts that are packed one after another: one, unless the corpus is large."""
        n = self.n_documents
        return min(n, max(-(-n // SHARD_DOCUMENTS), -(-int(self.offsets[-1]) // SHARD_TOKENS)))

    def shard_documents(self, shard):
        """List the documents of a shard, which come from all over the corpus -> (n,) int64."""
        size = max(1, self.n_documents // (256 * self.n_shards))  # neighbours that stay together, so that reading them is fast
        index = (np.arange(shard * size, self.n_documents, self.n_shards * size)[:, None] + np.arange(size)).ravel()
        return index[index < self.n_documents]

    def read_shard(self, shard):
        """Look up the documents of a shard -> their starts in ids and their lengths, (n,) int64."""
        index = self.shard_documents(shard)
        starts = np.asarray(self.offsets[index])
        return starts, self.offsets[index + 1] - starts

    @cached_property
    def shard_lengths(self):
        """Count the documents of each length in each shard -> (n, 3) int64: shard, tokens, documents. A cache remembers them."""
        shards = tqdm(range(self.n_shards), "counting lengths", unit="shard", delay=1, disable=None)
        counts = [np.unique(self.read_shard(shard)[1], return_counts=True) for shard in shards]
        parts = [np.column_stack([np.full_like(lengths, i), lengths, n]) for i, (lengths, n) in enumerate(counts)]
        return np.concatenate(parts)

    @cached_property
    def hash_counts(self):
        """Find the N_HASHES lowest hashes of documents -> (n, 2) uint64: hash, documents that have it. A cache remembers them.

        As hashes are random, these documents are a random sample of all different ones, and the same in every corpus.
        """
        known, counts = np.zeros((2, 0), np.uint64)
        for shard in tqdm(range(self.n_shards), "comparing documents", unit="shard", delay=1, disable=None):
            hashes = hash_documents(self, self.shard_documents(shard))
            known, index = np.unique(np.append(known, hashes), return_inverse=True)
            counts = np.bincount(index, np.append(counts, np.ones_like(hashes)))[:N_HASHES].astype(np.uint64)
            known = known[:N_HASHES]
        return np.column_stack([known, counts])

    def shard_counts(self, shard):
        """Look up the lengths of the documents of a shard, in order, and how many have each -> two (n,) int64."""
        begin, end = np.searchsorted(self.shard_lengths[:, 0], [shard, shard + 1])
        return self.shard_lengths[begin:end, 1:].T

    def count_lengths(self, longest):
        """Count the documents of 0, 1, ..., longest tokens, longer ones as `longest` -> (longest + 1,) int64."""
        _, lengths, n = self.shard_lengths.T
        return np.bincount(np.minimum(lengths, longest), n, minlength=longest + 1).astype(np.int64)


def hash_documents(tokens, which, chunk=1 << 20):
    """Compute a number for each of the documents `which` (n,), the same for documents of the same tokens -> (n,) uint64."""
    lengths, hashes = tokens.offsets[which + 1] - tokens.offsets[which], []
    for group in np.split(which, np.searchsorted(lengths.cumsum(), np.arange(chunk, lengths.sum(), chunk))):
        sizes = tokens.offsets[group + 1] - tokens.offsets[group]
        position = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
        x = tokens.ids[np.repeat(tokens.offsets[group], sizes) + position].astype(np.uint64)
        x += position.astype(np.uint64) << np.uint64(32)
        for shift, odd in ((32, 0xD6E8FEB86659FD93), (29, 0xBF58476D1CE4E5B9)):  # mixes token and position
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(odd)
        starts = np.cumsum(sizes) - sizes
        hashes.append(np.add.reduceat(x, starts) if len(group) else x)
    return np.concatenate(hashes)


def share_in_training(tokens, training):
    """Compute the share of documents that the training text has too, estimated from N_HASHES documents if there are more.

    Both texts are judged by the documents of the lowest hashes. So any text that is looked for in the training text is found.
    """
    (hashes, n), (known, _) = tokens.hash_counts.T, training.hash_counts.T
    looked_for = hashes <= known[-1] if len(known) == N_HASHES else np.full(len(hashes), True)
    return float(n[looked_for & np.isin(hashes, known)].sum() / max(1, n[looked_for].sum()))


def load_corpus(corpus, tokenizer_path, cache_dir, part="all", example="line"):
    """Tokenise a part of a corpus, or open the cache of an earlier call with the same content -> Tokens.

    corpus: a Corpus, or the path of one. Raises ValueError for a missing file, an empty part, text
    that is not UTF-8, and a cache_dir that cannot be written.
    """
    corpus = Corpus.of(corpus)
    if str(cache_dir) == default_cache_dir() and not cli.user_cache_dir()[1]:
        where = f"this user has no folder for caches: tokenised texts go to {cache_dir}"
        cli.warn_once(f"{where}; --cache_dir=FOLDER names another")
    key = text_key(corpus, tokenizer_path, cache_dir, part, example)
    folder = Path(cache_dir) / key
    if (tokens := _read_cache(folder, key)) is None:
        with _hold(folder) as temporary:
            tokens = _read_cache(folder, key)  # another process may have written it
            if tokens is None:
                shutil.rmtree(folder, ignore_errors=True)
                _write_cache(corpus, part, example, load_tokenizer(tokenizer_path), folder, temporary)
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
    objects = f"jsonl {corpus.text_field}"
    kinds = [" ".join(filter(None, [objects if is_json(path) else "text", *look_at(path)])) for path in corpus.files]
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
        with suppress(OSError):  # another process may write it now
            memory.parent.mkdir(parents=True, exist_ok=True)
            with replacing(memory) as temporary:
                temporary.write_text(json.dumps(known))
    return hashes


# ---------------------------------------------------------------- the files of a cache


def _read_cache(folder, key):
    """Open a cache -> Tokens, or None if it is missing or damaged."""
    try:
        meta = _read_json(folder / "meta.json")
        tokens = _open_arrays(folder, meta, key)
        whole = len(tokens.ids) == meta["n_tokens"] and tokens.n_documents == meta["n_documents"]
        whole = whole and all(check(folder / name, meta["checksums"][name]) for name in ARRAYS)
        remembered = dict(shard_lengths=(np.int64, 3), hash_counts=(np.uint64, 2))
        for name, (dtype, width) in remembered.items():
            vars(tokens)[name] = np.fromfile(folder / f"{name}.bin", dtype).reshape(-1, width)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return tokens if whole else None


def _open_arrays(folder, meta, key):
    """Map ids.bin and offsets.bin into memory -> Tokens."""
    ids = np.memmap(folder / "ids.bin", dtype=meta["dtype"], mode="r")
    offsets = np.memmap(folder / "offsets.bin", dtype=np.int64, mode="r")
    return Tokens(ids, offsets, meta["n_chars"], meta["n_bytes"], meta["n_unknown_bytes"], key)


def _write_json(path, content):
    """Write a dict with its checksum; the file is replaced as a whole."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({**content, "checksum": _checksum(content)}))


def _read_json(path):
    """Read a dict that `_write_json` wrote. Raises ValueError, or another error, if it is damaged."""
    content = json.loads(path.read_text())
    if content.pop("checksum") != _checksum(content):
        raise ValueError(f"{path} is damaged")
    return content


def _checksum(content):
    """Compute the CRC-32 of a dict of plain types -> int."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


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
    """Compare the first and the last block of a file and some random others with their checksums -> whether they agree."""
    n = len(sums)
    if n != -(-os.path.getsize(path) // BLOCK_BYTES):
        return False
    blocks = range(n) if n <= N_BLOCKS else sorted({0, n - 1, *random.sample(range(n), N_BLOCKS - 2)})
    return checksums(path, BLOCK_BYTES, blocks) == [sums[i] for i in blocks]


@contextmanager
def _hold(folder):
    """Wait until no other process writes this cache -> the temporary folder to write it into.

    Other processes are kept out. Without locks (`cli.hold`), the folder is this process's own, and
    none continues it.
    """
    path = folder.with_name(f"{folder.name}.lock")
    while True:
        with _open(path) as file:
            try:
                is_held = cli.hold(file)
            except BlockingIOError:
                print("another process tokenises the same text: waiting for it", file=sys.stderr)
                is_held = cli.hold(file, wait=True)
            if is_held and not _is_at(path, file):  # who held it has removed it
                continue
            try:
                own = "" if is_held else f".{uuid.uuid4().hex}"
                yield folder.with_name(f"{folder.name}{own}.tmp")
            finally:
                with suppress(PermissionError):  # Windows: it is open
                    path.unlink(missing_ok=True)
            return


def _open(path):
    """Open a file of the cache folder for writing. Raises ValueError if that cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a")
    except OSError as error:
        found = f"{path.parent} cannot be written ({error.strerror})"
        raise ValueError(f"{found}: give --cache_dir=FOLDER for the tokenised text") from None


def _is_at(path, file):
    """Tell whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_stale(cache_dir):
    """Remove what runs that were killed have begun to write, and no later run has continued."""
    for old in cache_dir.glob("[0-9a-f]" * 32 + "*.tmp"):  # and nothing else that may be there
        with suppress(OSError):  # another process may finish just now
            newest = max((file.stat().st_mtime for file in [old, *old.iterdir()]), default=0)
            if time.time() - newest > STALE_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
                old.with_suffix(".lock").unlink(missing_ok=True)


def _write_cache(corpus, part, example, tokenizer, folder, temporary):
    """Tokenise into a temporary folder and rename it to `folder` at the end, so that no cache is ever incomplete.

    What is complete in the temporary folder stays there after an interruption, and is continued.
    """
    temporary.mkdir(exist_ok=True)
    _remove_stale(folder.parent)
    try:
        with writing(folder):
            meta = _tokenize(corpus, part, example, tokenizer, temporary)
            tokens = _open_arrays(temporary, meta, "")
            tokens.shard_lengths.tofile(temporary / "shard_lengths.bin")
            tokens.hash_counts.tofile(temporary / "hash_counts.bin")
            for name in ARRAYS:
                with open(temporary / name, "r+b") as file:
                    os.fsync(file.fileno())
            sums = {name: checksums(temporary / name, BLOCK_BYTES) for name in ARRAYS}
            _write_json(temporary / "meta.json", {**meta, "checksums": sums})
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():  # without locks, another process may have been faster
                raise
            shutil.rmtree(temporary, ignore_errors=True)
        (folder / "done.json").unlink(missing_ok=True)
    except BaseException as error:
        if isinstance(error, ValueError) or not (temporary / "done.json").exists():  # ValueError: of the text
            shutil.rmtree(temporary, ignore_errors=True)
        raise


# ---------------------------------------------------------------- tokenising


def _begin(folder, dtype):
    """Begin the files of a cache, or go on after what is complete of them -> what is, see `_tokenize`.

    sums: CRC-32 of each file. position, n_examples: bytes and examples of the corpus that were read.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        done = _read_json(folder / "done.json")
        sizes = {"ids.bin": done["n_tokens"] * np.dtype(dtype).itemsize, "offsets.bin": 8 * (done["n_documents"] + 1)}
        for name, n_bytes in sizes.items():
            os.truncate(folder / name, n_bytes)
        if all(checksums(folder / name, max(1, n_bytes)) == [done["sums"][name]] for name, n_bytes in sizes.items()):
            return done
    for name, content in (("ids.bin", b""), ("offsets.bin", bytes(8))):
        (folder / name).write_bytes(content)
    names = *COUNTS, "document_end", "position", "n_examples"
    return dict.fromkeys(names, 0) | dict(sums={"ids.bin": 0, "offsets.bin": zlib.crc32(bytes(8))})


def _tokenize(corpus, part, example, tokenizer, folder):
    """Tokenise a part of a corpus on all cores and write ids.bin and offsets.bin -> the content of meta.json.

    After each PART_BYTES of text, done.json says what is complete. If there is one already, tokenising goes on from there.
    """
    dtype, n_cores = "uint16" if len(tokenizer) <= 1 << 16 else "uint32", os.cpu_count()
    done = _begin(folder, dtype)
    if n_complete := done["n_bytes"]:
        print(f"{corpus} ({part}): tokenising goes on after {n_complete / 1e6:,.0f} MB", file=sys.stderr)
    all_pieces = read_part(corpus, part, example, done["position"], done["n_examples"])
    batches = iter(lambda: list(islice(all_pieces, BATCH)), [])
    bar = tqdm(desc=f"tokenising {Path(corpus.path).name} ({part})", initial=n_complete, unit="B", unit_scale=True, disable=None)
    with open(folder / "ids.bin", "ab") as ids_file, open(folder / "offsets.bin", "ab") as offsets_file, bar:
        encode = partial(_encode, tokenizer=tokenizer)
        for pieces, ids, example_ends in prefetch(encode, batches, depth=4 * n_cores, threads=n_cores):
            ends = np.unique(done["n_tokens"] + example_ends)
            ends = ends[ends > done["document_end"]]  # an example without tokens is not a document
            for file, name, array in ((ids_file, "ids.bin", ids.astype(dtype)), (offsets_file, "offsets.bin", ends)):
                file.write(array.tobytes())
                done["sums"][name] = zlib.crc32(array.tobytes(), done["sums"][name])
            _count(done, pieces, ids, ends, tokenizer)
            bar.update(sum(piece.n_bytes for piece in pieces))
            if pieces[-1].last and done["n_bytes"] - n_complete >= PART_BYTES:
                for file in (ids_file, offsets_file):
                    file.flush()
                    os.fsync(file.fileno())
                _write_json(folder / "done.json", done)
                n_complete = done["n_bytes"]
    if done["n_tokens"] == 0:
        raise ValueError(f"{corpus} has no text" + ("" if part == "all" else f" for the part {part!r}: it is too short"))
    return {name: done[name] for name in COUNTS} | dict(dtype=dtype)


def _count(done, pieces, ids, ends, tokenizer):
    """Add tokenised pieces to the counts of `_begin`: their tokens, and the ends of their documents in ids.bin."""
    done["n_tokens"] += len(ids)
    done["n_documents"] += len(ends)
    done["document_end"] = int(ends.max(initial=done["document_end"]))
    done["n_chars"] += sum(len(piece.text) for piece in pieces)
    done["n_bytes"] += sum(piece.n_bytes for piece in pieces)
    if tokenizer.unk_id() in ids:
        done["n_unknown_bytes"] += sum(unknown_bytes(piece.text, tokenizer) for piece in pieces)
    done["position"], done["n_examples"] = pieces[-1].end, pieces[-1].number + 1


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
