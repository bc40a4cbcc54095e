"""Write what is needed to sample from a model into a new folder, with a model card.

    python -m tools.export RUN_DIR OUT_DIR --dtype=bfloat16
    python -m tools.export RUN_DIR --push=USER/MODEL     to the Hugging Face hub
"""

import json
import math
import re
import shlex
import shutil
import tempfile
from pathlib import Path

from common import cli  # isort: skip - first, because of Ctrl-C
import torch

import sample
from common import hub, parallel
from common.files import file_hash
from text.reading import ONE_LINE
from training import checkpoint

N_SAMPLES = 2
EXPORT = "python -m tools.export RUN_DIR"
CARD = """\
---
library_name: bayesian-flow-lm
pipeline_tag: text-generation
tags: [bayesian-flow-network, non-autoregressive, text-generation]
license: {license}
---

# {name}

A Bayesian flow language model of {n_parameters:,} parameters and {K:,} tokens of vocabulary. It
refines all words of a text at once. In the folder of the code that wrote it:

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

`model.safetensors` holds the averaged weights of step {step:,} as {dtype}, `config.json` what the
commands need to know of the training, `tokenizer.model` the SentencePiece tokenizer. Nothing in
them is executed.
"""


def model_card(folder, dtype, license, name=None):
    """Describe the model of an exported folder -> markdown. Samples from it.

    name: USER/MODEL on the hub, which the commands of the card then read.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    model, tokenizer, run = checkpoint.load(folder, device=parallel.find_device("auto"))
    texts = sample.Sampler(model, tokenizer, run)(n=N_SAMPLES)
    separator = [] if run["args"]["example"] in ONE_LINE else [sample.SEPARATOR]  # as it prints
    path = f"{hub.HUB}{name}" if name else folder.name if folder.is_absolute() else str(folder)
    quoted = shlex.quote(path)  # no paths from here
    again = f"{EXPORT} {f'--push={name}' if name else quoted} --dtype={dtype_name}"
    return CARD.format(
        license=license,
        name=name or folder.name,
        folder=quoted,
        n_parameters=sum(p.numel() for p in model.parameters()),
        K=model.config.K,
        n_samples=N_SAMPLES,
        samples=indent(line for text in texts for line in (text, *separator)),
        figures="\n".join(figure_lines(run["figures"])),
        data="\n".join(data_lines(run)),
        commands=indent([training_command(run["args"]), again]),
        step=run["step"],
        dtype=dtype_name,
    )


def indent(texts):
    """Write texts as a block of code."""
    return "\n".join(f"    {line}".rstrip() for text in texts for line in text.split("\n"))


def figure_lines(figures):
    """Lay out the figures of a validation as a table -> lines."""
    rows = ("bound on -log P", "bound", ""), ("exact -log P under `commit`", "exact", "exact_")
    columns = "nats per token|error: noise|error: choice of text|bits per token|bits per character"
    lines = [f"| | {columns.replace('|', ' | ')} | tokens scored |", "|---" * 7 + "|"]
    for label, name, prefix in rows:
        noise = f"{prefix}monte_carlo_error"  # only the bound has it
        keys = [f"{key}_nats_per_token" for key in (name, noise, f"{prefix}text_error")]
        nats, *errors = (figures.get(key, math.nan) for key in keys)
        per_char = figures.get(f"{prefix}bits_per_char", math.nan)
        values = nats, *errors, nats / math.log(2), per_char
        cells = ["" if math.isnan(value) else f"{value:.4f}" for value in values]
        n_scored = figures.get(f"{prefix}n_tokens_scored", "")
        lines.append(f"| {' | '.join([label, *cells])} | {n_scored} |")
    measured = "On the validation text, given the lengths, with float32 weights"
    return [*lines, "", f"{measured}, while the model was trained."]


def data_lines(run):
    """Say what the model was trained and validated on -> lines."""
    path = run["args"]["data_path"]
    text = f"`{path}`" if path else "the built-in language (`text/toy.py`)"
    yield f"Trained on {text}."
    for name, sizes in run.get("sizes", {}).items():
        listed = ", ".join(f"{n:,} {unit}" for unit, n in sizes.items())
        yield f"The {name} text has {listed}."


def training_command(args):
    """Write the flags of a run, without folders, as a command that trains the same model."""
    left_out = {"model_dir", "cache_dir", "device", "val_tokens"}
    left_out |= {"epochs", "minutes"}  # max_steps says how long
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


def export(run_dir, out_dir, dtype=torch.float32, license="other", name=None):
    """Write what sampling, evaluating and fine-tuning need into a new folder, with a model card.

    Weights become `dtype`. license: an identifier of the hub, such as mit. name: see `model_card`.
    Raises ValueError if the run is damaged or out_dir exists.
    """
    if out_dir.exists():
        raise ValueError(f"{out_dir} exists already: give another folder")
    library = cli.import_optional(*checkpoint.SAFETENSORS)
    model, _, run = checkpoint.load(run_dir)
    out_dir.mkdir(parents=True)
    try:
        weights = model.to(dtype).state_dict().items()
        weights = {key: w.clone().contiguous() for key, w in weights}  # no two share memory
        (out_dir / "model.safetensors").write_bytes(library.save(weights))
        shutil.copyfile(run_dir / "tokenizer.model", out_dir / "tokenizer.model")
        run["args"] = checkpoint.without_folders(run["args"])
        run["weights_hash"] = file_hash(out_dir / "model.safetensors")
        run["figures"] = checkpoint.read_figures(run_dir, run["step"]) or run.get("figures", {})
        config = json.dumps(run, indent=1, allow_nan=False)
        (out_dir / "config.json").write_text(config, encoding="utf-8")
        card = model_card(out_dir, dtype, license, name)
        (out_dir / "README.md").write_text(card, encoding="utf-8")
    except BaseException:
        shutil.rmtree(out_dir)
        raise


def flags():
    p = cli.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("run_dir", type=cli.path, help="run folder")
    add("out_dir", nargs="?", type=cli.path,
        help="new folder; sample.py, evaluate.py and --init_from take it as a run folder")
    add("--dtype", choices=["float32", "bfloat16"], default="float32",
        help="of the weights (float32)")
    add("--push", help="USER/MODEL: upload it to the Hugging Face hub")
    add("--license", default="other", help="of the model, an identifier of the hub (other)")
    return p


def main(argv=None):
    args = flags().parse_args(argv)
    if args.run_dir.startswith(hub.HUB):
        raise ValueError(f"{args.run_dir} is exported already")
    if not (args.out_dir or args.push) or (args.out_dir or "").startswith(hub.HUB):
        raise ValueError("nowhere to write to: give a new folder or --push=USER/MODEL")
    if args.push:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push):
            raise ValueError(f"--push={args.push} is no name on the hub: give --push=USER/MODEL")
        cli.import_optional(*hub.LIBRARY)  # before the work
    with tempfile.TemporaryDirectory() as temporary:
        out_dir = Path(args.out_dir or Path(temporary, args.push.split("/")[-1]))
        export(Path(args.run_dir), out_dir, getattr(torch, args.dtype), args.license, args.push)
        size = (out_dir / "model.safetensors").stat().st_size
        files = f"{', '.join(checkpoint.EXPORTED_FILES)} ({size / 1e6:.1f} MB of weights)"
        print(f"{args.out_dir or out_dir.name}: {files}")
        if args.push:
            hub.push(out_dir, args.push, checkpoint.EXPORTED_FILES)
            print(f"hf://{args.push}: python sample.py -mdir=hf://{args.push}")


if __name__ == "__main__":
    cli.run(main)
