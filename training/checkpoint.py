"""What is saved: checkpoints, how they are read and written, and exported folders.

A checkpoint is one file of plain types and tensors: the description of the run, made when training
starts or resumes, and its state:

    args, identity, config, tokenizer_hash, sizes, lengths, word_lengths             `describe_run`
    step, best, model, emas, optimizers, loss_by_time                                `State`

last.pt is the newest, best.pt the one of the lowest validation bound, and older/ holds those that
last.pt was before. An exported folder (tools/export.py) holds the last of the emas as
model.safetensors. Its config.json has the rest, without model and optimizers, and the figures of
the validation.
"""

import json
import math
import os
import shlex
import shutil
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType

import torch

import bfn
from common import hub, parallel
from common.cli import import_optional
from common.files import file_hash, replacing
from model import BFNTransformer, Config
from text.tokenizer import load_tokenizer
from training import shards

FORMAT = 5  # of the checkpoint file and the network in it
RUN_FILES = (
    "tokenizer.model corpus.txt last.pt best.pt metrics.jsonl samples.txt curves.png times.png "
    "report.html training.lock"
).split()
EXPORTED_FILES = "model.safetensors config.json tokenizer.model README.md".split()
TOY_SENTENCES = 60_000
# What a record must have, see `fault`: of any run, of one that resumes, of an exported one.
SIZES = "model_dim num_layers num_heads batch_size sequence_length".split()
ARGS = dict.fromkeys(SIZES, int) | dict(ema_rate=[float], beta=(float, str))
ARGS |= dict.fromkeys(["example", "preset"], str)
ARGS |= dict.fromkeys("text_field data_path val_path".split(), (str, NoneType))
RUN = dict(step=int, args=ARGS, config={field.name: field.type for field in fields(Config)})
RUN |= dict(tokenizer_hash=str, lengths=[int], word_lengths=[int], emas=[dict])
RUN |= dict(loss_by_time=([float], NoneType))
RESUMED = dict(model=dict, optimizers=[dict], best=float, identity=dict)
RESUMED |= dict(args=dict(tokenizer=(str, NoneType), init_from=(str, NoneType),
    vocab_size=(int, NoneType), max_steps=int, val_tokens=int))  # fmt: skip
EXPORTED = dict(format=int, weights_hash=str)
PATH_FLAGS = "data_path spm_model model_dir val_path init_from cache_dir".split()


# ---------------------------------------------------------------- files


def save_checkpoint(path, checkpoint):
    """Write a checkpoint whole or not at all. Raises OSError where it cannot."""
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **checkpoint}, file)  # given a path, it would write that
    except OSError as error:
        way = "Earlier checkpoints are intact: make room, run again"
        raise OSError(f"cannot write {path} ({error.strerror or error}). {way}") from error


def read_checkpoint(path):
    """Read a checkpoint -> dict of plain types and of tensors on the CPU.

    Raises ValueError for a missing or damaged file, or one of another format.
    """
    if not os.path.isfile(path):
        hint = "train first, or give another run folder"
        if Path(path).with_name("last.pt").is_file():
            hint = "nothing is validated yet, use --checkpoint=last"
        raise ValueError(f"no checkpoint at {path}: {hint}")
    try:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:  # torch.load checks no sums
                raise zipfile.BadZipFile(part)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        version = int(checkpoint["format"])
        if version == FORMAT:
            check_run(checkpoint)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # noqa: BLE001 - a damaged file raises anything
        hint = "use another"
        if Path(path).name == "last.pt":
            nothing = "there is no other that can be read, give another run folder"
            hint = way_back(Path(path).parent) or nothing
        damaged = f"{path} is damaged or not a checkpoint ({type(error).__name__}: {error})"
        raise ValueError(f"{damaged}: {hint}") from None
    if version != FORMAT:
        differs = f"{path} has format {version}, this code reads {FORMAT}"
        raise ValueError(f"{differs}: use the code that wrote it, or another run folder")
    return checkpoint


def check_run(run):
    """Raise ValueError if a record is not that of a run: see RUN. Adds flags of newer versions."""
    for part in ("args", "identity"):
        if isinstance(run.get(part), dict):
            run[part].setdefault("example", "line")  # runs of before --example
            run[part].setdefault("text_field", None)
    if wrong := fault(run, RUN):
        raise ValueError(f"{wrong} is missing or of another type")
    config, args = Config(**run["config"]), run["args"]
    sizes = [config.K, config.d_model, config.n_heads, config.n_layers, *map(args.get, SIZES)]
    enough = min(sizes) > 0 and args["sequence_length"] > 1 and args["ema_rate"]
    enough = enough and config.n_layers <= len(run["emas"][0])
    if not (enough and 0 < config.beta1 < math.inf and 0 <= config.dropout < 1):
        raise ValueError("a size is not that of a network")
    losses = run["loss_by_time"] or []
    for name in ("figures", "sizes"):
        figures = run.get(name, {})
        if fault(figures, dict) or fault(figures, dict.fromkeys(figures, (float, dict))):
            raise ValueError(f"{name} is missing or of another type")
        losses = losses + [x for x in figures.values() if isinstance(x, float)]
    if not all(map(math.isfinite, losses)) or math.isnan(run.get("best", 0.0)):
        raise ValueError("a figure is not finite")
    if min(run["lengths"] + run["word_lengths"], default=0) < 0 or not sum(run["lengths"]):
        raise ValueError("lengths are not those of a text")


def fault(value, kind, name="it"):
    """Find what is missing or of another type -> its name, or None.

    kind: a type; (kind, ...), one of several; [kind], a list of it; {name: kind}. A number of type
    float may be whole; True is no number.
    """
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            return name
        wrong = (fault(value[key], k, key) if key in value else key for key, k in kind.items())
        return next(filter(None, wrong), None)
    if isinstance(kind, tuple):
        is_right = not all(fault(value, k, name) for k in kind)
    elif isinstance(kind, list):
        is_right = isinstance(value, list) and not any(fault(x, kind[0], name) for x in value)
    else:
        kinds = (int, float) if kind is float else kind
        is_right = isinstance(value, kinds) and not isinstance(value, bool)
    return None if is_right else name


def older_checkpoints(run_dir):
    """List the checkpoints that last.pt was before, the newest first -> paths."""
    return sorted((Path(run_dir) / "older").glob(f"step-{'[0-9]' * 10}.pt"), reverse=True)


def older_path(run_dir, step):
    """Name the file that keeps the checkpoint of a step. The names sort as the steps do."""
    return Path(run_dir) / "older" / f"step-{step:010}.pt"


def way_back(run_dir):
    """Find the latest checkpoint besides last.pt that can be read -> what to type, or None."""
    found = []
    for path in [run_dir / "best.pt", *older_checkpoints(run_dir)]:
        with suppress(ValueError, OSError):
            found.append((read_checkpoint(path)["step"], path))
    if not found:
        return None
    step, path = max(found)
    source, last = (shlex.quote(str(x)) for x in (path, run_dir / "last.pt"))
    # last.pt may be a link to best.pt, which cp without rm would overwrite.
    return f"to go on from step {step}, type: rm -f {last} && cp {source} {last}"


def load(run_dir, which="best", device="cpu", ema=-1):
    """Load a model from a run folder or an exported one: `model, tokenizer, run = load("runs/a")`.

    run_dir: also hf://USER/MODEL[@REVISION], an exported folder on the Hugging Face hub.
    which: "best" by validation or "last". ema: index of the weight average, by default the last.
    run is the rest of the checkpoint: "args" of the training, "step", "lengths" and "word_lengths"
    of the text. Raises ValueError for a missing or damaged checkpoint, or another tokenizer than
    the model was trained with.
    """
    if which not in ("best", "last"):
        raise ValueError(f"there is no checkpoint {which!r}: best or last")
    run_dir = Path(hub.local_folder(run_dir, EXPORTED_FILES))
    path = run_dir / f"{which}.pt"
    exported = any((run_dir / name).is_file() for name in EXPORTED_FILES[:2])
    is_exported = which == "best" and exported and not path.is_file()
    run = read_exported(run_dir) if is_exported else read_checkpoint(path)
    path = run_dir / "tokenizer.model"
    if not path.is_file() or file_hash(path) != run["tokenizer_hash"]:
        raise ValueError(f"{path} is missing or not the tokenizer of {run_dir}: put that one back")
    averages = run["emas"]
    if not -len(averages) <= ema < len(averages):
        known = f"{run_dir} has {len(averages)} weight averages, counted from 0"
        raise ValueError(f"{known}: there is no {ema}")
    with refuse_other_network():
        weights = {
            name: weight.to(torch.float32, copy=True) if weight.is_floating_point() else weight
            for name, weight in averages[ema].items()
        }
        with torch.device("meta"):  # no memory, whatever a foreign file says
            model = BFNTransformer(Config(**run["config"]))
            model.load_state_dict(weights, assign=True)
    for name in ("model", "emas", "optimizers"):
        run.pop(name, None)
    model, tokenizer = model.to(device).eval(), load_tokenizer(path)
    if len(tokenizer) != model.config.K:
        raise ValueError(f"{path} has {len(tokenizer)} tokens, the network {model.config.K}")
    check_answer(model, run_dir)
    return model, tokenizer, run


@torch.no_grad()
def check_answer(model, run_dir):
    """Raise ValueError for a network that answers with what is no number."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    t, config = torch.full(ids.shape, 0.5, device=ids.device), model.config
    eps = torch.zeros(*ids.shape, config.K, device=ids.device)
    theta = bfn.flow(ids, t, config.s1, config.K, eps).softmax(-1)
    if not model(theta, t, torch.ones_like(ids)).isfinite().all():
        raise ValueError(f"the network of {run_dir} answers with what is no number: train it again")


@contextmanager
def refuse_other_network():
    """Raise ValueError where weights are put into a network that they do not fit."""
    try:
        yield
    except (RuntimeError, AttributeError, TypeError, KeyError, ValueError):
        message = "the weights do not fit the network in model.py, or the optimizers: edited since"
        raise ValueError(f"{message}; undo the edit, or give another -mdir") from None


# ---------------------------------------------------------------- exported folders


# for cli.import_optional
SAFETENSORS = "safetensors.torch", "exported models are read and written with safetensors"


def read_exported(folder):
    """Read an exported folder -> dict as of `read_checkpoint`, with one average.

    Raises ValueError for a damaged or foreign file, or one of another format.
    """
    library = import_optional(*SAFETENSORS)
    try:
        run = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if wrong := fault(run, EXPORTED):
            raise ValueError(f"{wrong} is missing or of another type")
        if run["format"] != FORMAT:
            raise ValueError(f"format {run['format']}, this code reads {FORMAT}")
        if file_hash(folder / "model.safetensors") != run["weights_hash"]:
            raise ValueError("config.json was written for another model.safetensors")
        run["emas"] = [library.load_file(folder / "model.safetensors")]
        check_run(run)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # noqa: BLE001 - a damaged file raises anything
        reason = f"{folder} is damaged or not an exported model ({type(error).__name__}: {error})"
        raise ValueError(f"{reason}: copy or export it again") from None
    return run


def without_folders(args):
    """Reduce the paths among the flags to names of files, to be shown to others -> dict."""
    named = dict(args)
    for flag in filter(args.get, PATH_FLAGS):
        if not str(args[flag]).startswith(hub.HUB):
            named[flag] = ",".join(Path(path).name for path in str(args[flag]).split(","))
    return named


# ---------------------------------------------------------------- the state of a run


@dataclass
class State:
    """What training changes."""

    model: BFNTransformer
    optimizers: list
    emas: list  # averaged copies of the model, one per rate
    step: int = 0
    best: float = math.inf  # lowest validation bound so far, nats per token
    loss_by_time: list | None = None  # of the last validation, in even bins
    saved_step: int | None = None  # of last.pt


def restore(state, saved):
    """Put a checkpoint back into a new state."""
    with refuse_other_network():
        own, whole = state.model.state_dict(), saved["model"]
        state.model.load_state_dict({k: shards.like(x, own.get(k)) for k, x in whole.items()})
        for optimizer, moments in zip(state.optimizers, saved["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]  # today's: weight decay may change
            optimizer.load_state_dict({**moments, "param_groups": groups})
            for p, kept in optimizer.state.items():
                kept |= {name: shards.like(x, p) for name, x in kept.items()}
        for ema, weights in zip(state.emas, saved["emas"], strict=True):
            ema.load_state_dict(weights)
    state.step, state.best, state.loss_by_time = saved["step"], saved["best"], saved["loss_by_time"]
    state.saved_step = state.step


def save(state, run, run_dir, is_best=False):
    """Write last.pt, if it is not of this step yet. The best so far is best.pt, linked as last.pt.

    The last.pt from before stays in older/, as one of --keep. A crash at any moment leaves the old
    last.pt or the new one: with the old one, the run repeats its last steps and writes best.pt
    again. Raises ValueError if the weights are not finite.
    """
    if state.saved_step == state.step:
        return
    networks = [shards.collect(network.state_dict()) for network in (state.model, *state.emas)]
    optimizers = [shards.collect(optimizer.state_dict()) for optimizer in state.optimizers]
    write(state, run, run_dir, is_best, networks, optimizers)
    state.saved_step = state.step


@parallel.first_only
def write(state, run, run_dir, is_best, networks, optimizers):
    """Write what `save` has collected."""
    if not all(bool(w.isfinite().all()) for weights in networks for w in weights.values()):
        way = "Run again, with a lower -lr, to resume from last.pt"
        raise ValueError(f"the weights are not finite: nothing is saved. {way}")
    now = dict(
        model=networks[0],
        emas=networks[1:],
        optimizers=optimizers,
        step=state.step,
        best=state.best,
        loss_by_time=state.loss_by_time,
    )
    keep = run["args"]["keep"]
    last = run_dir / "last.pt"
    if keep and state.saved_step is not None and last.exists():
        older = older_path(run_dir, state.saved_step)
        older.parent.mkdir(exist_ok=True)
        link(last, older)
    path = run_dir / "best.pt" if is_best else last
    save_checkpoint(path, {**run, **now})
    if is_best:
        link(path, last)
    delete_older(run_dir, state.step, keep)


def link(source, target):
    """Make the file `target` the same as `source`: a link, or a copy where there are none."""
    with replacing(target) as temporary:
        try:
            temporary.unlink()
            os.link(source, temporary)  # checkpoints are only ever replaced, never changed
        except OSError:
            shutil.copyfile(source, temporary)


def delete_older(run_dir, step, keep):
    """Delete the checkpoints in older/ but the `keep` newest from before a step.

    A run that went back repeats those from after it.
    """
    paths = older_checkpoints(run_dir)
    kept = [path for path in paths if path < older_path(run_dir, step)][:keep]
    for path in set(paths).difference(kept):
        path.unlink(missing_ok=True)


def count_checkpoints(run_dir):
    """Count the checkpoints of a run folder. Links to one file count once."""
    paths = run_dir / "last.pt", run_dir / "best.pt", *older_checkpoints(run_dir)
    return len({path.stat().st_ino for path in paths if path.exists()})


def read_metrics(run_dir):
    """Read metrics.jsonl -> list of dicts, one per line, without a last line that is not whole.

    Raises ValueError if there is none, or it is not of a run.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"no {path}: give the folder of a run that has begun to train")
    try:
        return [parse_figures(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not of a run: give a run folder") from None


def parse_figures(line):
    """Read a line of metrics.jsonl -> {name: number}, with a step. Raises ValueError."""
    figures = json.loads(line.decode())
    if fault(figures, {"step": int}) or fault(figures, dict.fromkeys(figures, float)):
        raise ValueError(f"{line[:60]!r} has no figures")
    return figures


def read_figures(run_dir, step):
    """Read the figures of the validation at a step from metrics.jsonl -> dict, or {}."""
    figures = {}
    for line in read_metrics(run_dir) if (run_dir / "metrics.jsonl").is_file() else []:
        if line["step"] == step:
            figures |= {name[4:]: x for name, x in line.items() if name.startswith("val_")}
    return {name: x for name, x in figures.items() if math.isfinite(x)}
