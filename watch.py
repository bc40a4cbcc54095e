"""Show a text at each network call of a sampler.

    p      (B, L, K)  float32  the network's output
    given  (B, L)     bool     positions that are given
"""

import shutil
import sys
import time

from text import decode, one_line


class Trace:
    """Show a text at each network call on standard error.

    A terminal shows it in place, at a readable pace, with certain tokens bold and uncertain ones dim. Other files get one
    line per call, without control codes.
    """

    BOLD, DIM, NORMAL = 1, 2, 22

    def __init__(self, tokenizer, file=None, unknown=()):
        self.tokenizer, self.unknown, self.file = tokenizer, unknown, file or sys.stderr
        self.is_terminal, self.n_calls, self.n_breaks = self.file.isatty(), 0, 0

    def decode(self, ids):
        """Turn ids into text on one line, with a space for each line break."""
        return one_line(decode(self.tokenizer, ids, self.unknown))

    def __call__(self, t, p, given):
        """Show the likeliest tokens of the first row: p (B, L, K), given (B, L)."""
        self.n_calls += 1
        certainty = p[0].amax(-1).masked_fill(given[0], 1.0).tolist()
        self.show(f"call {self.n_calls}", p[0].argmax(-1).tolist(), certainty)

    def show(self, label, ids, certainty):
        """Show a text. In a terminal it replaces the last one."""
        text = self.decode(ids)
        if not self.is_terminal:
            print(f"{label}  {text}", file=self.file)
            return
        clear = (f"\x1b[{self.n_breaks}A" if self.n_breaks else "") + "\r\x1b[J"  # go back to the start, erase the last text
        print(f"{clear}{self.shade(ids, certainty)}\x1b[0m", end="", file=self.file, flush=True)
        self.n_breaks = max(0, len(text) - 1) // shutil.get_terminal_size().columns
        time.sleep(0.08)

    def shade(self, ids, certainty):
        """Style each token by how certain it is -> text with control codes."""
        text, shaded = "", ""
        for i, c in enumerate(certainty):
            longer = self.decode(ids[: i + 1])  # what a token reads as depends on the tokens before it
            style = self.BOLD if c > 0.9 else self.DIM if c < 0.4 else self.NORMAL
            text, shaded = longer, f"{shaded}\x1b[0;{style}m{longer[len(text) :]}"
        return shaded

    def close(self, ids):
        """Show the finished text."""
        self.show("sample", ids, [1.0] * len(ids))
        if self.is_terminal:
            print(file=self.file)
