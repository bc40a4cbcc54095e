"""Draw text that emerges from noise, as an animation.

    python experiments/emerging.py -mdir=runs/demo --output=pictures/emerging.gif
"""

import os
import sys
from pathlib import Path

import torch
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bfn
import cli
import plot
from checkpoint import load
from generation import Options, sample_batch
from prompts import make_template
from text import SPACE

HOLD = 12  # frames that the finished text is shown for


def emerging(path, frames, title):
    """Draw an animation (GIF) of texts: frames[i][row] = [(text of a token, certainty in [0, 1]), ...].

    Uncertain tokens are pale, certain ones dark. Raises what matplotlib raises.
    """
    columns = max(len("".join(text for text, _ in row)) for frame in frames for row in frame)
    n_rows = len(frames[0])
    figure = Figure(figsize=(0.095 * columns + 0.3, 0.24 * n_rows + 0.5), dpi=100)

    def draw(temporary, _kind):
        writer = PillowWriter(fps=6)
        with writer.saving(figure, str(temporary) + ".gif", dpi=100):
            for i, frame in enumerate(frames + frames[-1:] * HOLD):
                figure.clear()
                call = min(i + 1, len(frames))
                figure.text(0.02, 0.97, f"{title}, call {call} of {len(frames)}", va="top", fontsize=8, color="0.45")
                for j, row in enumerate(frame):
                    draw_row(figure, row, y=0.97 - (j + 1.9) / (n_rows + 1.6), columns=columns)
                writer.grab_frame()
        os.replace(str(temporary) + ".gif", temporary)

    plot.write(Path(path), draw)


def draw_row(figure, row, y, columns):
    """Draw the tokens of one text from left to right in a font of fixed width."""
    column = 0
    for text, certainty in row:
        shade = 0.88 * (1 - certainty) ** 0.7  # 0 is black
        x = 0.02 + 0.96 * column / columns
        figure.text(x, y, text, va="baseline", family="monospace", fontsize=9, color=str(round(shade, 2)))
        column += len(text)


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("-mdir", "--model_dir", default="runs/demo", help="run folder (runs/demo)")
    add("--sampler", "--solver", choices=bfn.SAMPLERS, default="sde2", help="(sde2)")
    add("--steps", type=cli.count, default=24, help="steps (24)")
    add("--num_samples", type=cli.count, default=6, help="texts (6)")
    add("--length", type=cli.several, default=12, help="tokens of a text, bos and eos included (12)")
    add("--device", default="auto", help="cpu, cuda, ... (cuda if there is one)")
    add("--output", default="emerging.gif", help="picture to write, a .gif (emerging.gif)")
    return p


def main():
    args = flags().parse_args()
    if not args.output.endswith(".gif"):
        raise ValueError(f"--output={args.output} must end in .gif")
    model, tokenizer, run = load(args.model_dir, device=cli.device(args.device))
    frames, marks = [], (tokenizer.bos_id(), tokenizer.eos_id())

    def add_frame(ids, certainty):
        """Note the tokens of each text and how certain they are: both (B, L)."""
        frames.append([])
        for row in zip(ids.tolist(), certainty.tolist(), strict=True):
            pieces = [(tokenizer.id_to_piece(k).replace(SPACE, " "), c) for k, c in zip(*row, strict=True) if k not in marks]
            frames[-1].append(pieces)

    def watch(t, p, given):
        certainty, ids = p.max(-1)
        add_frame(ids, certainty)

    templates = [make_template("", tokenizer, run, i, args.length) for i in range(args.num_samples)]
    options = Options(args.sampler, args.steps, watch=watch)
    drawn = torch.tensor([ids for ids, _ in sample_batch(model, tokenizer, templates, range(args.num_samples), options)])
    frames.pop()  # of the last call, whose tokens were drawn
    add_frame(drawn, torch.ones(drawn.shape))
    emerging(args.output, frames, f"{args.sampler}, {args.model_dir}")
    print(f"{args.output}: {len(frames)} network calls, {os.path.getsize(args.output) / 1000:.0f} KB")


if __name__ == "__main__":
    cli.run(main)
