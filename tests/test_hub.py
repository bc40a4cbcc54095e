"""The hub: models are read from it and written to it, here from a server on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common import cli, hub
from tools import export
from training.checkpoint import EXPORTED_FILES

TOY = cli.ROOT / "examples" / "toy"
COMMITS = {"main": "a" * 40, "old": "b" * 40}
library = pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.slow  # each starts processes


class Hub(http.server.BaseHTTPRequestHandler):
    """What the library asks of the hub for a model `we/toy`; `cut` breaks large files off."""

    cut = False

    def answer(self, content, **headers):
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            short = self.cut and len(content) > 1_000_000
            self.wfile.write(content[: len(content) // 2] if short else content)

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:4] == ["api", "models", "we", "toy"] and parts[5:] and parts[5] in COMMITS:
            siblings = [dict(rfilename=name) for name in [*EXPORTED_FILES, "other.bin"]]
            sha = COMMITS[parts[5]]
            about = dict(id="we/toy", modelId="we/toy", sha=sha, siblings=siblings)
            return self.answer(json.dumps(about).encode(), Content_Type="application/json")
        if parts[:5] == ["api", "models", "we", "toy", "tree"]:
            files = [(name, (TOY / name).stat().st_size) for name in EXPORTED_FILES]
            tree = [dict(type="file", path=name, size=n, oid="c" * 40) for name, n in files]
            return self.answer(json.dumps(tree).encode(), Content_Type="application/json")
        if parts[:3] == ["we", "toy", "resolve"] and parts[4] in EXPORTED_FILES:
            content = (TOY / parts[4]).read_bytes()
            tag = hashlib.sha256(content).hexdigest()
            return self.answer(content, ETag=f'"{tag}"', X_Repo_Commit=parts[3])
        return self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def sample(server, home, path):
    """Sample from a model of the hub in another process -> it, when it has ended."""
    environment = os.environ | dict(HF_ENDPOINT=server, HF_HOME=str(home), HF_HUB_DISABLE_XET="1")
    command = [sys.executable, "sample.py", f"-mdir={path}", "--num_samples=2", "--steps=4"]
    options = dict(capture_output=True, text=True, cwd=cli.ROOT, env=environment)
    return subprocess.run(command, check=False, **options)


@pytest.mark.parametrize("path", ["hf://we/toy", "hf://we/toy@old"])
def test_a_model_on_the_hub_writes_the_same_texts_as_its_folder(server, tmp_path, path):
    found = sample(server, tmp_path, path)
    assert found.returncode == 0, found.stderr
    assert found.stdout == sample(server, tmp_path, TOY).stdout
    commits = {path.name for path in tmp_path.glob("hub/*/snapshots/*")}
    assert commits == {COMMITS["old" if "@" in path else "main"]}
    names = {path.name for path in tmp_path.glob("hub/*/snapshots/*/*")}
    assert names == set(EXPORTED_FILES)


@pytest.mark.parametrize("path", ["hf://we/other", "hf://we/toy@none", "hf://", "hf://a b"])
def test_a_model_that_is_not_there_is_an_error_of_one_line(server, tmp_path, path):
    found = sample(server, tmp_path, path)
    assert found.returncode == 2 and "cannot be read from the hub" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_broken_download_leaves_nothing_half_and_is_repeated(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "cut", True)
    found = sample(server, tmp_path, "hf://we/toy")
    assert found.returncode == 2 and "cannot be read from the hub" in found.stderr
    assert not list(tmp_path.glob("hub/*/snapshots/*/model.safetensors"))
    monkeypatch.setattr(Hub, "cut", False)
    assert sample(server, tmp_path, "hf://we/toy").returncode == 0


def test_a_pushed_run_has_the_files_of_an_export_and_a_card_with_metadata(monkeypatch, capsys):
    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append((name, options))

        def upload_folder(self, **options):
            assert options["repo_id"] == "we/toy"
            assert options["allow_patterns"] == EXPORTED_FILES
            calls.append({path.name for path in options["folder_path"].iterdir()})
            assert "-mdir=hf://we/toy" in (options["folder_path"] / "README.md").read_text()

    monkeypatch.setattr(library, "HfApi", Api)
    export.main([str(TOY), "--push=we/toy", "--license=mit"])
    assert calls == [("we/toy", dict(exist_ok=True)), set(EXPORTED_FILES)]
    printed = capsys.readouterr().out
    assert "toy: model.safetensors" in printed and "-mdir=hf://we/toy" in printed
    for words in ([], ["hf://we/toy"]):
        with pytest.raises(ValueError, match="nowhere to write to"):
            export.main([str(TOY), *words])
    with pytest.raises(ValueError, match="is no name on the hub"):
        export.main([str(TOY), "--push=we/"])
    metadata = library.ModelCard.load(TOY / "README.md").data
    assert metadata.license == "mit" and metadata.library_name == "bayesian-flow-lm"


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        hub.local_folder("hf://we/toy", EXPORTED_FILES)
    assert hub.local_folder(Path("runs/a"), EXPORTED_FILES) == Path("runs/a")
