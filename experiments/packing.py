"""Measure how fast a corpus is tokenised, how full its packed rows are, and how fast batches are made.

python -m experiments.packing -d=CORPUS.txt -spm=TOKENIZER.model
"""

import tempfile
import time

import numpy as np

import data
from common import cli
from text import cache

LENGTHS = (64, 128, 256)


def best_fit(lengths, row_length):
    """Compute the fill that the textbook's best-fit decreasing reaches with documents of at most `row_length` tokens."""
    rows_with = np.zeros(row_length + 1, dtype=np.int64)  # number of rows by how many positions are free
    n_rows = 0
    for length in np.sort(lengths)[::-1]:
        fits = np.flatnonzero(rows_with[length:])
        if len(fits):
            free = length + fits[0]
            rows_with[free] -= 1
        else:
            free = row_length
            n_rows += 1
        rows_with[free - length] += 1
    return lengths.sum() / (n_rows * row_length)


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("-d", "--data_path", type=cli.path, required=True, help="text file, one document per line")
    add("-spm", "--spm_model", type=cli.path, required=True, help="SentencePiece model")
    return p


def main(argv=None):
    args = flags().parse_args(argv)
    with tempfile.TemporaryDirectory() as cache_dir:
        begin = time.perf_counter()
        tokens = cache.load_corpus(args.data_path, args.spm_model, cache_dir)
        seconds = time.perf_counter() - begin
        print(f"tokenised {tokens.n_bytes / 1e6:.1f} MB in {seconds:.1f} s: {tokens.n_bytes / 1e6 / seconds:.1f} MB/s")
        begin = time.perf_counter()
        cache.load_corpus(args.data_path, args.spm_model, cache_dir)
        print(f"found it in the cache in {time.perf_counter() - begin:.2f} s\n")
        print("| length | one window per row | best fit, uncut lines | packed | tokens in 128 rows | plan, s | tokens/s |")
        print("|---|---|---|---|---|---|---|")
        for row_length in LENGTHS:
            begin = time.perf_counter()
            loader = data.Loader(tokens, row_length, 128, seed=0)
            plan = loader.plan(0)
            planned = time.perf_counter()
            n_tokens = sum(int((loader.batch(n)[1] > 0).sum()) for n in range(50))
            speed = n_tokens / (time.perf_counter() - planned)
            unpacked = tokens.lengths.sum() / ((-(-tokens.lengths // row_length)).sum() * row_length)
            short = tokens.lengths[tokens.lengths <= row_length]
            print(
                f"| {row_length} | {unpacked:.1%} | {best_fit(short, row_length):.1%} "
                f"| {plan.fill(row_length):.2%} | {n_tokens / 50:.0f} | {planned - begin:.2f} | {speed:,.0f} |"
            )


if __name__ == "__main__":
    cli.run(main)
