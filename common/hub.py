"""Models on the Hugging Face hub: hf://USER/MODEL, or hf://USER/MODEL@REVISION.

huggingface_hub is imported where it is needed.
"""

from contextlib import contextmanager

from common.cli import import_optional

HUB = "hf://"
# for cli.import_optional
LIBRARY = "huggingface_hub", "models on the hub need huggingface_hub"


@contextmanager
def _library(failure):
    """Yield huggingface_hub. What goes wrong is a ValueError that begins with `failure`."""
    library = import_optional(*LIBRARY)
    try:
        yield library
    except Exception as error:  # noqa: BLE001 - the library raises many kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise ValueError(f"{failure} ({reason})") from None


def local_folder(path, files):
    """Download these files of a model on the hub -> their folder. Any other path stays as it is.

    They are kept in the library's own cache, whole or not at all. Raises ValueError for a model
    that cannot be read.
    """
    if not str(path).startswith(HUB):
        return path
    name, _, revision = str(path).removeprefix(HUB).partition("@")
    with _library(f"{path} cannot be read from the hub") as library:
        return library.snapshot_download(name, revision=revision or None, allow_patterns=files)


def push(folder, name, files):
    """Upload these files of a folder as the model USER/MODEL, which is made, public, if missing.

    Raises ValueError if that fails.
    """
    with _library(f"{name} cannot be written to the hub") as library:
        api = library.HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=name, allow_patterns=files)
