"""The model card of an exported folder: how to use it, samples, figures, data and flags."""

import math
import shlex

import parallel
import sample
from checkpoint import load
from text import ONE_LINE

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
    export = f"python checkpoint.py export RUN_DIR {shlex.quote(str(folder))}"
    return f"{export} --dtype={name_of(dtype)}"
