"""The token cache: a corpus is tokenised once, into files that are mapped into memory.

    document    an example of the corpus as tokens, for example a line: [bos] ids [eos], each mark only where the tokenizer has one
    Tokens.ids  (N,)  all documents, one after another
"""

import hashlib
import json
import os
import shutil
import time
import zlib
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

import cli
from data import prefetch
from text import add_marks, adds_prefix, file_hash, load_tokenizer, read_part, unknown_bytes

CACHE_FORMAT = 2
STALE_SECONDS = 3600  # a cache that was begun and not written to for so long belongs to a run that was killed

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


def load_corpus(path, tokenizer_path, cache_dir, part="all", example="line"):
    """Tokenise a part of a corpus, or open the cache of an earlier call with the same content -> Tokens.

    Raises ValueError for a missing file, an empty part, or text that is not UTF-8.
    """
    if not os.path.isfile(path):
        raise ValueError(f"no text file at {path}")
    key = f"{file_hash(path)} {file_hash(tokenizer_path)} {part} {CACHE_FORMAT}" + f" {example}" * (example != "line")
    key = hashlib.sha256(key.encode()).hexdigest()[:32]
    folder = Path(cache_dir) / key
    if (tokens := _read_cache(folder, key)) is None:
        shutil.rmtree(folder, ignore_errors=True)
        _write_cache(path, part, example, load_tokenizer(tokenizer_path), folder)
        tokens = _read_cache(folder, key)
    if tokens is None:
        raise ValueError(f"{folder} is damaged and cannot be replaced: delete it")
    return tokens


def _read_cache(folder, key):
    """Open a cache -> Tokens, or None if it is missing or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        ids = np.memmap(folder / "ids.bin", dtype=meta["dtype"], mode="r")
        offsets = np.memmap(folder / "offsets.bin", dtype=np.int64, mode="r")
        whole = len(ids) == meta["n_tokens"] and meta["checksums"] == checksums(folder)
        tokens = Tokens(ids, offsets, meta["n_chars"], meta["n_bytes"], meta["n_unknown_bytes"], key)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return tokens if whole else None


def checksums(folder):
    """Compute the CRC-32 of both arrays of a cache, at about 1 GB/s -> {name: int}."""
    sums = {}
    for name in ("ids.bin", "offsets.bin"):
        sums[name] = 0
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 24):
                sums[name] = zlib.crc32(block, sums[name])
    return sums


def _remove_stale(folder):
    """Remove what runs that were killed have begun to write for the same cache."""
    for old in folder.parent.glob(f"{folder.name}.*.tmp"):
        newest = max((file.stat().st_mtime for file in [old, *old.iterdir()]), default=0)
        if time.time() - newest > STALE_SECONDS:
            shutil.rmtree(old, ignore_errors=True)


def _write_cache(path, part, example, tokenizer, folder):
    """Tokenise into a temporary folder and rename it to `folder` at the end, so that no cache is ever incomplete."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    try:
        with cli.writing(folder):
            meta = _tokenize(path, part, example, tokenizer, temporary)
            meta["checksums"] = checksums(temporary)
            (temporary / "meta.json").write_text(json.dumps(meta))
        for name in ("ids.bin", "offsets.bin", "meta.json"):
            with open(temporary / name, "r+b") as file:
                os.fsync(file.fileno())
        if not folder.exists():
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tokenize(path, part, example, tokenizer, folder):
    """Tokenise a part of a corpus on all cores and write ids.bin and offsets.bin -> the content of meta.json."""
    meta = dict(n_chars=0, n_bytes=0, n_unknown_bytes=0, n_documents=0)
    meta["dtype"] = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    n_tokens = document_end = 0
    all_pieces, n_cores = read_part(path, part, example), os.cpu_count()
    batches = iter(lambda: list(islice(all_pieces, 1000)), [])
    with (
        open(folder / "ids.bin", "wb") as ids_file,
        open(folder / "offsets.bin", "wb") as offsets_file,
        tqdm(desc=f"tokenising {Path(path).name} ({part})", unit="B", unit_scale=True, disable=None) as bar,
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
        raise ValueError(f"{path} has no text" + ("" if part == "all" else f" for the part {part!r}: it is too short"))
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
    parts, example_ends, n_tokens = [], [], 0
    for piece, ids in zip(pieces, encoded, strict=True):
        marked = [bos if piece.first else nothing, ids, eos if piece.last else nothing]
        parts += marked
        n_tokens += sum(map(len, marked))
        if piece.last:
            example_ends.append(n_tokens)
    return pieces, np.concatenate(parts), np.array(example_ends, np.int64)
