"""Write a text in a simpler form.

    python -m tools.normalize TEXT OUT.txt   --lower, --digits, --strip=symbols or --text8
"""

import os
import re
import unicodedata
from functools import lru_cache, partial
from pathlib import Path

from common import cli  # isort: skip - first, because of Ctrl-C
from tqdm import tqdm

from common.files import replacing
from text.reading import BYTES_BAR, PACKED, Corpus, is_json, read_pieces
from text.tables import is_table

NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")  # 1,234 or 1234 or 12.5
LONGEST_NUMBER = 15  # digits; a longer one is read digit by digit
DIGITS = "zero one two three four five six seven eight nine".split()
STRIPPED = {"symbols": "SC", "punctuation": "SCP"}  # first letters of the Unicode categories
TEXT8 = {ord(c): c.lower() for c in map(chr, range(ord("A"), ord("Z") + 1))}
TEXT8 |= {ord("0") + i: f" {word} " for i, word in enumerate(DIGITS)}


@lru_cache(maxsize=1 << 16)
def number_in_words(number, language):
    """Write a number in words: "12.5" -> "twelve point five".

    Raises ValueError if num2words is missing or does not know the language.
    """
    library = cli.import_optional("num2words", "--digits needs a package that is missing")
    try:
        return library.num2words(number, lang=language)
    except NotImplementedError:
        message = f"num2words has no numbers for the language {language!r}: give another one"
        raise ValueError(message) from None


def in_words(text, language="en"):
    """Write numbers in words, apart from letters: "12.5km" -> "twelve point five km"."""

    def words(match):
        number = match[0].replace(",", "")
        parts = number.replace(".", "") if len(number) > LONGEST_NUMBER else [number]
        name = " ".join(number_in_words(part, language) for part in parts)
        begin, end = match.span()
        before = " " if text[:begin][-1:].isalpha() else ""
        return before + name + (" " if text[end : end + 1].isalpha() else "")

    return NUMBER.sub(words, text)


def strip(text, kind):
    """Write a space for each symbol, or also for punctuation. Apostrophes and hyphens stay."""
    characters = set(text) - set("\n'\u2019-")
    drop = (c for c in characters if unicodedata.category(c)[0] in STRIPPED[kind])
    return text.translate(dict.fromkeys(map(ord, drop), " "))


def text8(text):
    """Write a to z and spaces, digits as words, as text8 [Mahoney, "About the test data"]."""
    return re.sub(r"[^a-z\n]+", " ", text.translate(TEXT8))


def tidy(texts):
    """Yield the parts of a text with single spaces, and none at the ends of lines."""
    held, starts_line = "", True  # held: a space that may be followed by another one
    for text in texts:
        text = re.sub(r" ?\n ?", "\n", re.sub(r"[^\S\n]+", " ", held + text))
        text = text.removeprefix(" ") if starts_line else text
        held, text = " " * text.endswith(" "), text.removesuffix(" ")
        starts_line = text.endswith("\n") if text else starts_line
        yield text


def normalize(corpus, out, changes):
    """Write a text with all `changes`, functions of text, to a new file. Raises ValueError."""
    if os.path.lexists(out):
        raise ValueError(f"{out} exists already: give another name")
    is_packed = out.suffix.lower().removeprefix(".") in PACKED
    if is_packed or is_json(out.name) or is_table(out.name, "text"):
        raise ValueError(f"{out} would be plain text: give a name that ends in .txt")

    def changed():
        with tqdm(desc="writing", total=corpus.n_bytes, **BYTES_BAR) as bar:
            for piece in read_pieces(corpus, "file"):
                text = piece.text
                for change in changes:
                    text = change(text)
                yield text + "\n" * piece.last
                bar.update(piece.n_bytes)

    parts = changed() if set(changes) == {str.lower} else tidy(changed())
    with replacing(out) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(parts)


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("text", type=cli.path, help="text file, folder, 'pattern*.txt', or several with commas")
    add("out", type=cli.path, help="new file")
    p.add_flags("--text_field")
    add("--lower", action="store_true", help="lower case")
    add("--digits", action="store_true", help="numbers in words (needs the package num2words)")
    add("--language", default="en", help="of the numbers in words (en)")
    add("--strip", choices=STRIPPED, help="a space for each symbol, or for punctuation too")
    add("--text8", action="store_true", help="a to z and spaces only, digits as words, as in text8")
    return p


def main(argv=None):
    args = flags().parse_args(argv)
    known = dict(lower=str.lower, digits=partial(in_words, language=args.language))
    known |= dict(strip=partial(strip, kind=args.strip), text8=text8)
    changes = [change for flag, change in known.items() if getattr(args, flag)]
    if not changes:
        raise ValueError("give one or more of --lower, --digits, --strip, --text8")
    normalize(Corpus(args.text, args.text_field), Path(args.out), changes)


if __name__ == "__main__":
    cli.run(main)
