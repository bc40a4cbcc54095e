"""The token cache: a corpus is tokenised once, into files that are mapped into memory.

    document    an example of the corpus as tokens: [bos] [label] ids [eos], what there is of them
    Tokens.ids  (N,)  all documents, one after another

Tokenising that was interrupted goes on after its last complete part, if neither text nor tokenizer
have changed. A cache belongs to the content of the corpus. The hashes of a large corpus are
remembered until a file changes its size or time. The arrays of a cache have a checksum per block.
Each start reads the first block, the last one and random others, which takes a second at most. It
finds arrays that are cut or shifted, and zeros in a share p of the blocks with probability
1 - (1 - p)^30. A cache of up to 128 MB per array is checked as a whole.
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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import cli
from common.files import check_output, file_hash, write_whole, writing
from common.parallel import prefetch
from text.reading import BYTES_BAR, Corpus, kind_of, look_at, read_part
from text.tokenizer import JOIN, SPACE, Tokenizer

CACHE_FORMAT = 2
DAMAGED = OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError  # of a file
ARRAYS = "ids.bin", "offsets.bin", "shard_lengths.bin", "hash_counts.bin"  # fields of Tokens
COUNTS = "n_chars", "n_bytes", "n_unknown_bytes", "n_documents", "n_tokens"
BATCH = 1000  # pieces of text that are tokenised together
PART_BYTES = 1 << 25  # of text that are tokenised between two writes of done.json
STALE_SECONDS = 7 * 24 * 3600  # what was begun and not written to for so long is removed
LARGE_BYTES = 1 << 26  # a corpus of so many bytes is not read at each start
FRESH_SECONDS = 2  # a file that was just changed may change once more without a new time
BLOCK_BYTES = 1 << 22
N_BLOCKS = 32  # of each array that are checked at a start
SHARD_DOCUMENTS = 1 << 20  # the most in a shard
SHARD_TOKENS = 1 << 28  # the most in a shard, except for a longer document
N_HASHES = 1 << 18  # different documents that are remembered, to find them in another text


@dataclass(frozen=True)
class Tokens:
    """A tokenised corpus: document d is ids[offsets[d] : offsets[d + 1]]."""

    ids: np.ndarray  # (N,) uint16 or uint32, memory-mapped
    offsets: np.ndarray  # (n_documents + 1,) int64
    n_chars: int  # of the text, without the line breaks between documents
    n_bytes: int
    n_unknown_bytes: int  # of text that the tokenizer does not know
    key: str  # identifies the content
    tokenizer: Tokenizer

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
        # Neighbours stay together, so that reading them is fast.
        size = max(1, self.n_documents // (256 * self.n_shards))
        begins = np.arange(shard * size, self.n_documents, self.n_shards * size)
        index = (begins[:, None] + np.arange(size)).ravel()
        return index[index < self.n_documents]

    def read_shard(self, shard):
        """Look up the documents of a shard -> their starts in ids and their lengths, (n,) int64."""
        index = self.shard_documents(shard)
        starts = np.asarray(self.offsets[index])
        return starts, self.offsets[index + 1] - starts

    @cached_property
    def shard_lengths(self):
        """Count the documents of each length -> (n, 3) int64: shard, tokens, documents."""
        parts = []
        for shard in self._shards("counting lengths"):
            lengths, n = np.unique(self.read_shard(shard)[1], return_counts=True)
            parts.append(np.column_stack([np.full_like(lengths, shard), lengths, n]))
        return np.concatenate(parts)

    @cached_property
    def hash_counts(self):
        """Find the N_HASHES lowest hashes of documents -> (n, 2) uint64: hash, its documents.

        Hashes are random, so these are a random sample of all, the same in every corpus.
        """
        known, counts = np.zeros((2, 0), np.uint64)
        for shard in self._shards("comparing documents"):
            hashes = hash_documents(self, self.shard_documents(shard))
            known, index = np.unique(np.append(known, hashes), return_inverse=True)
            counts = np.bincount(index, np.append(counts, np.ones_like(hashes)))
            known, counts = known[:N_HASHES], counts[:N_HASHES].astype(np.uint64)
        return np.column_stack([known, counts])

    def _shards(self, what):
        return tqdm(range(self.n_shards), what, unit="shard", delay=1, disable=None)

    def shard_counts(self, shard):
        """Look up the lengths in a shard, in order, and the documents of each -> (2, n) int64."""
        begin, end = np.searchsorted(self.shard_lengths[:, 0], [shard, shard + 1])
        return self.shard_lengths[begin:end, 1:].T

    def count_lengths(self, longest):
        """Count the documents of 0, 1, ..., `longest` or more tokens -> (longest + 1,) int64."""
        _, lengths, n = self.shard_lengths.T
        return np.bincount(np.minimum(lengths, longest), n, minlength=longest + 1).astype(np.int64)

    def count_word_lengths(self, longest=16):
        """Count the words of 0, 1, ..., `longest` tokens among the first million tokens -> list."""
        ids = self.ids[:1_000_000]
        starts = self.tokenizer.starts_word[ids]
        breaks = np.array([piece == "\n" for piece in self.tokenizer.pieces])[ids]
        begins = np.flatnonzero(starts | breaks)
        document = np.searchsorted(self.offsets, begins, side="right")
        is_word = starts[begins[:-1]] & (document[1:] == document[:-1])
        lengths = np.diff(begins)[is_word]
        counts = np.bincount(lengths[lengths <= longest], minlength=2)
        return counts.tolist() if counts.any() else [0, 1]


def hash_documents(tokens, which, chunk=1 << 20):
    """Hash the tokens of each of the documents `which` (n,) -> (n,) uint64."""
    begins, hashes = tokens.offsets[which], []
    lengths = tokens.offsets[which + 1] - begins
    cuts = np.searchsorted(lengths.cumsum(), np.arange(chunk, lengths.sum(), chunk))
    for starts, sizes in zip(np.split(begins, cuts), np.split(lengths, cuts), strict=True):
        firsts = sizes.cumsum() - sizes
        position = np.arange(sizes.sum()) - np.repeat(firsts, sizes)
        x = tokens.ids[np.repeat(starts, sizes) + position].astype(np.uint64)
        x += position.astype(np.uint64) << np.uint64(32)
        for shift, odd in ((32, 0xD6E8FEB86659FD93), (29, 0xBF58476D1CE4E5B9)):  # mixes the two
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(odd)
        hashes.append(np.add.reduceat(x, firsts) if len(starts) else x)
    return np.concatenate(hashes)


def share_in_training(tokens, training):
    """Compute the share of documents that the training text has too.

    It is an estimate for more than N_HASHES documents: both texts are judged by those of the
    lowest hashes, so any that is looked for in the training text would be found.
    """
    hashes, n = tokens.hash_counts.T
    known = training.hash_counts[:, 0]
    looked_for = hashes <= (known[-1] if len(known) == N_HASHES else np.iinfo(np.uint64).max)
    return float(n[looked_for & np.isin(hashes, known)].sum() / max(1, n[looked_for].sum()))


def load_corpus(corpus, tokenizer, cache_dir, part="all", example="line"):
    """Tokenise a part of a corpus, or open the cache of an earlier call -> Tokens.

    corpus: a Corpus, or the path of one. Raises ValueError for a missing file, an empty part, text
    that is not UTF-8, and a cache_dir that cannot be written.
    """
    corpus = Corpus.of(corpus)
    if str(cache_dir) == cli.default_cache_dir() and not cli.user_cache_dir()[1]:
        where = f"this user has no folder for caches: tokenised texts go to {cache_dir}"
        cli.warn_once(f"{where}; --cache_dir=FOLDER names another")
    stamps = file_stamps(corpus.files)
    folder = Path(cache_dir) / text_key(corpus, tokenizer, cache_dir, part, example)
    if (tokens := _read_cache(folder, tokenizer)) is None:
        with _hold(folder) as temporary:
            tokens = _read_cache(folder, tokenizer)  # another process may have written it
            if tokens is None:
                shutil.rmtree(folder, ignore_errors=True)
                _write_cache(corpus, stamps, part, example, tokenizer, folder, temporary)
                tokens = _read_cache(folder, tokenizer)
    if tokens is None:
        raise ValueError(f"{folder} is damaged and cannot be replaced: delete it")
    return tokens


# ---------------------------------------------------------------- the content of a corpus


def text_key(corpus, tokenizer, cache_dir, part="all", example="line"):
    """Compute what identifies the Tokens of a part of a Corpus -> str."""
    key = f"{content_hash(corpus, cache_dir)} {tokenizer.hash} {part} {CACHE_FORMAT}"
    key += f" {example}" if example != "line" else ""
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def content_hash(corpus, cache_dir):
    """Compute what identifies the content of a corpus, whatever its files are called -> str.

    That of one plain text file is its sha256, in hexadecimal.
    """
    hashes = _file_hashes(corpus.files, Path(cache_dir) / "hashes.json")
    lines = []
    for path, value in zip(corpus.files, hashes, strict=True):
        kind = kind_of(path, corpus.text_field)
        lines.append(" ".join([kind, *filter(None, look_at(path)), value]))
    if lines == [f"text {hashes[0]}"]:
        return hashes[0]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def file_stamps(files):
    """Read the size of each file and when it was changed, in ns -> list of [int, int]."""
    return [[stat.st_size, stat.st_mtime_ns] for stat in map(os.stat, files)]


def _file_hashes(files, memory):
    """Compute the sha256 of each file -> list of str. Those of a large corpus are in `memory`."""
    stamps = file_stamps(files)
    n_bytes = sum(size for size, _ in stamps)
    if n_bytes < LARGE_BYTES:
        return list(map(file_hash, files))
    known = {}
    check_owner(memory)
    with suppress(*DAMAGED):
        read = _read_json(memory)
        known = {path: [size, changed, value] for path, (size, changed, value) in read.items()}
    hashes, is_new = [], False
    with tqdm(desc="reading", total=n_bytes, delay=1, **BYTES_BAR) as bar:
        for path, stamp in zip(map(os.path.realpath, files), stamps, strict=True):
            if known.get(path, [])[:2] != stamp:
                known[path], is_new = [*stamp, file_hash(path, bar.update)], True
            else:
                bar.update(stamp[0])
            hashes.append(known[path][2])
            if time.time() - stamp[1] / 1e9 < FRESH_SECONDS:
                del known[path]
    if is_new:
        with suppress(OSError, ValueError):  # another process may write it now
            memory.parent.mkdir(parents=True, exist_ok=True)
            check_output(memory, lambda p: "checksum" in json.loads(p.read_text()), "ours")
            _write_json(memory, known)
    return hashes


# ---------------------------------------------------------------- the files of a cache


def _read_cache(folder, tokenizer):
    """Open a cache -> Tokens, or None if it is missing or damaged. Raises as `check_owner`."""
    check_owner(folder)
    try:
        meta = _read_json(folder / "meta.json")
        tokens = _open_arrays(folder, meta, tokenizer)
        whole = len(tokens.ids) == meta["n_tokens"] and tokens.n_documents == meta["n_documents"]
        whole = whole and all(check(folder / name, meta["checksums"][name]) for name in ARRAYS)
        for name, dtype, width in (("shard_lengths", np.int64, 3), ("hash_counts", np.uint64, 2)):
            vars(tokens)[name] = np.fromfile(folder / f"{name}.bin", dtype).reshape(-1, width)
    except DAMAGED:
        return None
    return tokens if whole else None


def check_owner(path):
    """Raise ValueError for what another user has written: it may be any text."""
    known = {os.getuid(), 0} if hasattr(os, "getuid") else set()  # Windows has no owners
    if known and os.path.exists(path) and os.stat(path).st_uid not in known:
        raise ValueError(f"{path} belongs to another user: give another --cache_dir=FOLDER")


def _open_arrays(folder, meta, tokenizer):
    """Map ids.bin and offsets.bin into memory -> Tokens."""
    ids = np.memmap(folder / "ids.bin", dtype=meta["dtype"], mode="r")
    offsets = np.memmap(folder / "offsets.bin", dtype=np.int64, mode="r")
    return Tokens(ids, offsets, *(meta[name] for name in COUNTS[:3]), folder.name, tokenizer)


def _write_json(path, content):
    """Write a dict with its checksum; the file is replaced as a whole."""
    write_whole(path, json.dumps({**content, "checksum": _checksum(content)}).encode())


def _read_json(path):
    """Read a dict that `_write_json` wrote. Raises an error of DAMAGED if it is damaged."""
    content = json.loads(path.read_text())
    if content.pop("checksum") != _checksum(content):
        raise ValueError(f"{path} is damaged")
    return content


def _checksum(content):
    """Compute the CRC-32 of a dict of plain types -> int."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def checksums(path, block_bytes, blocks=None):
    """Compute the CRC-32 of the blocks of a file, or of some of them -> list of int, at 1 GB/s."""
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
    """Whether the first and last block of a file, and some random others, have their checksums."""
    n = len(sums)
    if n != -(-os.path.getsize(path) // BLOCK_BYTES):
        return False
    some = {0, n - 1, *random.sample(range(1, n - 1), N_BLOCKS - 2)} if n > N_BLOCKS else range(n)
    return checksums(path, BLOCK_BYTES, sorted(some)) == [sums[i] for i in sorted(some)]


@contextmanager
def _hold(folder):
    """Wait until no other process writes this cache -> the temporary folder to write it into.

    Other processes are kept out. Without locks (`cli.hold`), the folder is this process's own, and
    none continues it. The file of the lock stays: others may wait for it.
    """
    with _open(folder.with_name(f"{folder.name}.lock")) as file:
        try:
            is_held = cli.hold(file)
        except BlockingIOError:
            print("another process tokenises the same text: waiting for it", file=sys.stderr)
            is_held = cli.hold(file, wait=True)
        own = "" if is_held else f".{uuid.uuid4().hex}"
        yield folder.with_name(f"{folder.name}{own}.tmp")


def _open(path):
    """Open a file of the cache folder for writing. Raises ValueError if that cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a")
    except OSError as error:
        found = f"{path.parent} cannot be written ({error.strerror})"
        raise ValueError(f"{found}: give --cache_dir=FOLDER for the tokenised text") from None


def _remove_stale(cache_dir):
    """Remove what runs that were killed have begun to write, and no later run has continued."""
    for old in cache_dir.glob("[0-9a-f]" * 32 + "*.tmp"):  # and nothing else that may be there
        with suppress(OSError):  # another process may finish just now
            newest = max((file.stat().st_mtime for file in [old, *old.iterdir()]), default=0)
            if time.time() - newest > STALE_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
                old.with_suffix(".lock").unlink(missing_ok=True)


def _write_cache(corpus, stamps, part, example, tokenizer, folder, temporary):
    """Tokenise into a temporary folder, which becomes `folder` at the end.

    stamps: of the files when they were hashed. What is complete in it stays there after an
    interruption, and is continued.
    """
    temporary.mkdir(exist_ok=True)
    check_owner(temporary)
    _remove_stale(folder.parent)
    try:
        with writing(folder):
            meta = _tokenize(corpus, part, example, tokenizer, temporary)
            tokens = _open_arrays(temporary, meta, tokenizer)
            tokens.shard_lengths.tofile(temporary / "shard_lengths.bin")
            tokens.hash_counts.tofile(temporary / "hash_counts.bin")
            for name in ARRAYS:
                with open(temporary / name, "r+b") as file:
                    os.fsync(file.fileno())
            sums = {name: checksums(temporary / name, BLOCK_BYTES) for name in ARRAYS}
            if file_stamps(corpus.files) != stamps:
                raise ValueError(f"{corpus} has changed while it was read: run again")
            _write_json(temporary / "meta.json", {**meta, "checksums": sums})
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():  # without locks, another process may have been faster
                raise
            shutil.rmtree(temporary, ignore_errors=True)
        (folder / "done.json").unlink(missing_ok=True)
    except BaseException as error:
        if isinstance(error, ValueError) or not (temporary / "done.json").exists():
            shutil.rmtree(temporary, ignore_errors=True)
        raise


# ---------------------------------------------------------------- tokenising


def _begin(folder, dtype):
    """Begin the files of a cache, or go on with them -> what is complete, see `_tokenize`.

    sums: CRC-32 of each file. position, n_examples: bytes and examples of the corpus that are read.
    """
    with suppress(*DAMAGED):
        done = _read_json(folder / "done.json")
        n_bytes = done["n_tokens"] * np.dtype(dtype).itemsize
        sizes = {"ids.bin": n_bytes, "offsets.bin": 8 * (done["n_documents"] + 1)}
        for name, size in sizes.items():
            os.truncate(folder / name, size)
        sums = {name: checksums(folder / name, max(1, size)) for name, size in sizes.items()}
        if sums == {name: [done["sums"][name]] for name in sizes}:
            return done
    (folder / "ids.bin").write_bytes(b"")
    (folder / "offsets.bin").write_bytes(bytes(8))
    names = *COUNTS, "document_end", "position", "n_examples"
    return dict.fromkeys(names, 0) | dict(sums={"ids.bin": 0, "offsets.bin": zlib.crc32(bytes(8))})


def _tokenize(corpus, part, example, tokenizer, folder):
    """Tokenise a part of a corpus on all cores into ids.bin and offsets.bin -> for meta.json.

    After each PART_BYTES of text, done.json says what is complete. Tokenising goes on from there.
    """
    dtype, n_cores = "uint16" if len(tokenizer) <= 1 << 16 else "uint32", os.cpu_count()
    done = _begin(folder, dtype)
    if n_complete := done["n_bytes"]:
        found = f"tokenising goes on after {n_complete / 1e6:,.0f} MB"
        print(f"{corpus} ({part}): {found}", file=sys.stderr)
    all_pieces = read_part(corpus, part, example, done["position"], done["n_examples"])
    batches = iter(lambda: list(islice(all_pieces, BATCH)), [])
    encoded = prefetch(partial(_encode, tokenizer=tokenizer), batches, 4 * n_cores, n_cores)
    what = f"tokenising {Path(corpus.path).name} ({part})"
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "ab")) for name in ARRAYS[:2]}
        bar = stack.enter_context(tqdm(desc=what, initial=n_complete, **BYTES_BAR))
        for pieces, ids, example_ends in encoded:
            ends = np.unique(done["n_tokens"] + example_ends)
            ends = ends[ends > done["document_end"]]  # an example without tokens is not a document
            for (name, file), array in zip(files.items(), (ids.astype(dtype), ends), strict=True):
                file.write(array.tobytes())
                done["sums"][name] = zlib.crc32(array.tobytes(), done["sums"][name])
            _count(done, pieces, ids, ends, tokenizer)
            bar.update(sum(piece.n_bytes for piece in pieces))
            if pieces[-1].last and done["n_bytes"] - n_complete >= PART_BYTES:
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                _write_json(folder / "done.json", done)
                n_complete = done["n_bytes"]
    if done["n_tokens"] == 0:
        short = "" if part == "all" else f" for the part {part!r}: it is too short"
        raise ValueError(f"{corpus} has no text{short}")
    return {name: done[name] for name in COUNTS} | dict(dtype=dtype)


def _count(done, pieces, ids, ends, tokenizer):
    """Add pieces to the counts of `_begin`: their tokens, and where their documents end."""
    done["n_tokens"] += len(ids)
    done["n_documents"] += len(ends)
    done["document_end"] = int(ends.max(initial=done["document_end"]))
    done["n_chars"] += sum(len(piece.text) for piece in pieces)
    done["n_bytes"] += sum(piece.n_bytes for piece in pieces)
    if tokenizer.unk in ids:
        unknown = "".join("".join(tokenizer.unknown_pieces(piece.text)) for piece in pieces)
        done["n_unknown_bytes"] += len(unknown.replace(SPACE, "").replace(JOIN, "").encode())
    done["position"], done["n_examples"] = pieces[-1].end, pieces[-1].number + 1


def _encode(pieces, tokenizer):
    """Tokenise pieces -> pieces, tokens with marks (n,), numbers of tokens up to examples' ends."""
    # a later piece begins with a space, and the tokenizer may add a second one
    strip = tokenizer.adds_prefix and tokenizer.encode(" a") != tokenizer.encode("a")
    texts = [p.text.removeprefix(" ") if strip and not p.first else p.text for p in pieces]
    labels = {None: [], **{label: [k] for label, k in tokenizer.labels.items()}}
    parts, example_ends, n_tokens = [], [], 0
    for piece, ids in zip(pieces, tokenizer.encode_all(texts), strict=True):
        if piece.label not in labels:
            known = "a tokenizer knows the labels of the text that it was trained on"
            raise ValueError(f"no token for the label {piece.label!r}: {known}")
        begin = tokenizer.add_marks(labels[piece.label], piece.first, end=False)
        end = tokenizer.add_marks([], begin=False, end=piece.last)
        parts += [np.array(begin, np.int32), ids, np.array(end, np.int32)]
        n_tokens += len(begin) + len(ids) + len(end)
        if piece.last:
            example_ends.append(n_tokens)
    return pieces, np.concatenate(parts), np.array(example_ends, np.int64)
