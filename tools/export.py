"""Write what is needed to sample from a model into a new folder, with a model card.

    python -m tools.export RUN_DIR OUT_DIR --dtype=bfloat16
"""

import json
import math
import shlex
import shutil
from pathlib import Path

import torch

import sample
from common import cli, parallel
from common.files import file_hash
from text.reading import ONE_LINE
from training.checkpoint import EXPORTED_FILES, import_safetensors, load, read_figures, without_folders

N_SAMPLES = 2
CARD = """\
# {name}

A Bayesian flow language model of {n_parameters:,} parameters and {K:,} tokens of vocabulary. It refines all words of a text
at once. In the folder of the code that wrote it:

    python sample.py -mdir={folder}
    python evaluate.py -mdir={folder} -d=TEXT.txt

`python sample.py -mdir={folder} --num_samples={n_samples}` prints

{samples}

## Figures

{figures}

## Training

{data}

{commands}

## Files

`model.safetensors` holds the averaged weights of step {step:,} as {dtype}, `config.json` what the commands need to know of
the training, `tokenizer.model` the SentencePiece tokenizer. Nothing in them is executed.
"""


def model_card(folder, dtype):
    """Describe the model of an exported folder -> markdown. Samples from it."""
    model, tokenizer, run = load(folder, device=parallel.find_device("auto"))
    shown = folder.name if folder.is_absolute() else folder  # no paths of this machine
    return CARD.format(
        name=folder.name,
        folder=shlex.quote(str(shown)),
        n_parameters=sum(p.numel() for p in model.parameters()),
        K=model.config.K,
        n_samples=N_SAMPLES,
        samples=indent(draw_samples(model, tokenizer, run)),
        figures="\n".join(figure_lines(run["figures"])),
        data="\n".join(data_lines(run)),
        commands=indent([training_command(run["args"]), export_command(shown, dtype)]),
        step=run["step"],
        dtype=name_of(dtype),
    )


def name_of(dtype):
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def indent(texts):
    """Write texts as a block of code."""
    return "\n".join(f"    {line}".rstrip() for text in texts for line in text.split("\n"))


def draw_samples(model, tokenizer, run):
    """Sample as sample.py does without a prompt -> lines as it prints them."""
    separator = [] if run["args"]["example"] in ONE_LINE else [sample.SEPARATOR]
    return [line for text in sample.Sampler(model, tokenizer, run)(n=N_SAMPLES) for line in (text, *separator)]


def figure_lines(figures):
    """Lay out the figures of a validation as a table -> lines."""
    rows = [
        ("bound on -log P", "bound", "monte_carlo_error", "text_error", "bits_per_char", "n_tokens_scored"),
        ("exact -log P under `commit`", "exact", "", "exact_text_error", "exact_bits_per_char", "exact_n_tokens_scored"),
    ]
    lines = [
        "| | nats per token | error: noise | error: choice of text | bits per token | bits per character | tokens scored |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, name, noise, choice, per_char, n_scored in rows:
        nats = [figures.get(f"{key}_nats_per_token", math.nan) for key in (name, noise, choice)]
        cells = [*nats, nats[0] / math.log(2), figures.get(per_char, math.nan)]
        cells = ["" if math.isnan(value) else f"{value:.4f}" for value in cells]
        lines.append(f"| {' | '.join([label, *cells])} | {figures.get(n_scored, '')} |")
    return [*lines, "", "On the validation text, given the lengths, with float32 weights, while the model was trained."]


def data_lines(run):
    """Say what the model was trained and validated on -> lines."""
    path = run["args"]["data_path"]
    lines = [f"Trained on `{path}`." if path else "Trained on the built-in language (`toy.py`)."]
    for name, sizes in run.get("sizes", {}).items():
        lines.append(f"The {name} text has {', '.join(f'{n:,} {unit}' for unit, n in sizes.items())}.")
    return lines


def training_command(args):
    """Write the flags of a run as a command that trains the same model, with file names instead of paths."""
    left_out = {"model_dir", "cache_dir", "device", "epochs", "minutes", "val_tokens"}  # max_steps says how long
    if args["data_path"] is None:
        left_out |= {"tokenizer", "vocab_size", "example"}  # which the built-in language sets
    if args["init_from"]:
        left_out |= {"spm_model"}
    words = ["python train.py -mdir=RUN_DIR"]
    for name, value in args.items():
        if not (name in left_out or value is None or value is False):
            value = ",".join(map(str, value)) if isinstance(value, list) else value
            words.append(f"--{name}" if value is True else shlex.quote(f"--{name}={value}"))
    return " \\\n    ".join(" ".join(words[i : i + 5]) for i in range(0, len(words), 5))


def export_command(folder, dtype):
    """Write the command that made an exported folder."""
    export = f"python -m tools.export RUN_DIR {shlex.quote(str(folder))}"
    return f"{export} --dtype={name_of(dtype)}"


def export(run_dir, out_dir, dtype=torch.float32):
    """Write what is needed to sample, evaluate and fine-tune into a new folder, with a model card. Weights become `dtype`.

    Raises ValueError if the run is damaged or out_dir exists.
    """
    if out_dir.exists():
        raise ValueError(f"{out_dir} exists already: give another folder")
    library = import_safetensors()
    model, _, run = load(run_dir)
    out_dir.mkdir(parents=True)
    try:
        weights = {name: w.to(dtype if w.is_floating_point() else w.dtype) for name, w in model.state_dict().items()}
        weights = {name: weight.clone().contiguous() for name, weight in weights.items()}  # no two share memory
        (out_dir / "model.safetensors").write_bytes(library.save(weights))
        shutil.copyfile(run_dir / "tokenizer.model", out_dir / "tokenizer.model")
        run |= dict(args=without_folders(run["args"]), weights_hash=file_hash(out_dir / "model.safetensors"))
        run["figures"] = read_figures(run_dir, run["step"]) or run.get("figures", {})
        kept = {name: value for name, value in run.items() if name not in ("times", "times_history")}
        (out_dir / "config.json").write_text(json.dumps(kept, indent=1, allow_nan=False), encoding="utf-8")
        (out_dir / "README.md").write_text(model_card(out_dir, dtype), encoding="utf-8")
    except BaseException:
        shutil.rmtree(out_dir)
        raise


# ---------------------------------------------------------------- the command


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    p.add_argument("run_dir", type=cli.path, help="run folder")
    p.add_argument("out_dir", type=cli.path,
        help="new folder; sample.py, evaluate.py and --init_from take it as a run folder")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights (float32)")
    return p


def main(argv=None):
    args = flags().parse_args(argv)
    out_dir = Path(args.out_dir)
    export(Path(args.run_dir), out_dir, getattr(torch, args.dtype))
    size = (out_dir / "model.safetensors").stat().st_size
    print(f"{out_dir}: {', '.join(EXPORTED_FILES)} ({size / 1e6:.1f} MB of weights)")


if __name__ == "__main__":
    cli.run(main)
