"""Names to folders: what is here is used, what is not is fetched, and whatever goes wrong leaves nothing half-made."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError

from swarm.errors import DiskFull, ModelCorrupt, ModelNotFound, UsageError
from swarm.files import embedded, hub
from swarm.files.checkpoint import SINGLE

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = json.dumps({"model_type": "llama"}).encode()
WEIGHTS = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
WEIGHTS = len(WEIGHTS).to_bytes(8, "little") + WEIGHTS + bytes(8)
WHOLE = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "tokenizer.json": b"{}"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of ours, an empty one of the hub, no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# --- local folders and names ------------------------------------------------------------------------------------------


def test_a_local_folder_is_itself(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(home / "model", WHOLE)
    assert hub.resolve(str(folder)) == folder
    monkeypatch.chdir(home)
    assert hub.resolve("model") == folder
    monkeypatch.setenv("HOME", str(home))
    assert hub.resolve("~/model") == folder


def test_a_local_folder_goes_before_a_short_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(home / hub.DEFAULT_MODEL, WHOLE)
    monkeypatch.chdir(home)
    assert hub.resolve(hub.DEFAULT_MODEL) == folder


def test_a_file_is_no_model_and_a_folder_may_have_no_tokenizer(home: Path) -> None:
    folder = write(home / "model", {name: content for name, content in WHOLE.items() if name != "tokenizer.json"})
    with pytest.raises(UsageError, match="is a file; a model is a folder"):
        hub.resolve(str(folder / "model.safetensors"))
    with pytest.raises(UsageError, match=r"there is no tokenizer in .*model that can be used"):
        hub.tokenizer_in(folder)


def test_a_damaged_local_folder_is_told_of(home: Path) -> None:
    folder = write(home / "model", WHOLE | {"model.safetensors": WEIGHTS[:-1]})
    with pytest.raises(ModelCorrupt, match="cut short"):
        hub.resolve(str(folder))


def test_a_name_that_the_hub_forbids() -> None:
    with pytest.raises(UsageError, match="cannot be the name of a repository"):
        hub.resolve("org--x/y..z")


@pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "~nobody/nowhere", "a/b/c", "../x"])
def test_paths_that_do_not_exist(name: str) -> None:
    with pytest.raises(ModelNotFound, match="there is no folder"):
        hub.resolve(name)


@pytest.mark.parametrize("name", ["", " ", "a b", "org/", "-x", "a\0b", "a" * 5000, "órg/x"])
def test_what_cannot_be_a_name(name: str) -> None:
    with pytest.raises(UsageError, match="neither a folder nor the name of a model"):
        hub.resolve(name)


# --- the hub's cache --------------------------------------------------------------------------------------------------


def cached(home: Path, repository: str, files: dict[str, bytes]) -> Path:
    """What huggingface_hub leaves behind: blobs by hash, a snapshot of links, a reference."""
    root = home / "hf" / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    (root / "blobs").mkdir()
    for name, content in files.items():
        digest = hashlib.sha256(content).hexdigest()
        (root / "blobs" / digest).write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / digest)
    return snapshot


def test_what_the_cache_holds_is_used_offline(home: Path) -> None:
    snapshot = cached(home, "org/model", WHOLE)
    assert hub.resolve("org/model") == snapshot


def test_a_cached_model_costs_no_round_trip(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_ask", lambda repository: pytest.fail("the network was asked"))
    snapshot = cached(home, hub.SHORT_NAMES[hub.DEFAULT_MODEL], WHOLE)
    assert hub.resolve(hub.DEFAULT_MODEL) == hub.resolve(hub.DEFAULT_MODEL.upper()) == snapshot


def test_what_the_cache_holds_half_is_not_taken_for_whole(home: Path) -> None:
    snapshot = cached(home, "org/model", WHOLE)
    (snapshot / SINGLE).unlink()
    with pytest.raises(ModelNotFound, match="not whole on this machine"):
        hub.resolve("org/model")


def test_a_model_that_is_not_here_offline() -> None:
    with pytest.raises(ModelNotFound, match=r"org/model is not whole.*offline mode.*local folder"):
        hub.resolve("org/model")


# --- a hub ------------------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a hub as a download needs. Repositories: name -> files, or the error code that the hub would send."""

    repositories: ClassVar[dict[str, dict[str, bytes] | str]] = {}
    asked: ClassVar[list[str]] = []

    def log_message(self, format: str, *arguments: Any) -> None:
        self.asked.append(self.path)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        parts = parts[2:] if parts[0] == "api" else parts
        content = self.repositories.get("/".join(parts[:2]), "RepoNotFound")
        if isinstance(content, str):
            status = {"RepoNotFound": 404, "GatedRepo": 403}.get(content, 500)
            return self.answer(status, b"{}", {"X-Error-Code": content, "X-Error-Message": content})
        if parts[2:3] == ["resolve"]:
            return self.file(content["/".join(parts[4:])])
        return self.answer(
            200, json.dumps(self.tree(content) if "tree" in parts else self.info(parts, content)).encode()
        )

    def info(self, parts: list[str], files: dict[str, bytes]) -> Any:
        return {"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}

    def tree(self, files: dict[str, bytes]) -> Any:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]

    def file(self, content: bytes) -> None:
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    monkeypatch.setattr(Hub, "repositories", {})
    monkeypatch.setattr(Hub, "asked", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        point_to(f"http://127.0.0.1:{server.server_port}", monkeypatch)
        yield Hub
        server.shutdown()


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


def test_a_model_is_downloaded_once_and_without_its_pickles(online: type[Hub], home: Path) -> None:
    unwanted = {"pytorch_model.bin": b"\x80", "onnx/model.safetensors": b"", "run.py": b"", "README.md": b""}
    online.repositories["org/model"] = WHOLE | unwanted
    told: list[tuple[str, int, int]] = []
    folder = hub.resolve("org/model", lambda *said: told.append(said))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == WHOLE
    size = sum(map(len, WHOLE.values()))
    assert told[-1] == ("downloading", size, size)
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert (folder / SINGLE).resolve().name == digest
    online.asked.clear()
    assert hub.resolve("org/model") == folder
    assert online.asked == []


def test_the_short_name_is_the_hubs_model_where_there_is_a_hub(online: type[Hub], home: Path) -> None:
    online.repositories[hub.SHORT_NAMES[hub.DEFAULT_MODEL]] = WHOLE
    assert hub.resolve(hub.DEFAULT_MODEL).is_relative_to(home / "hf")


def test_a_model_that_was_converted_is_kept_to_without_asking(online: type[Hub], home: Path) -> None:
    folder = write(embedded.folder(), WHOLE)
    assert hub.resolve(hub.DEFAULT_MODEL) == folder
    assert online.asked == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("RepoNotFound", r"the hub has no org/model: check the spelling.*hf auth login"),
        ("GatedRepo", r"org/model is gated: accept its terms"),
        ("Broken", r"fails to hand out org/model .*try again later"),
        ({"config.json": CONFIG, "pytorch_model.bin": b"\x80"}, "no weights in safetensors"),
        ({"config.json": CONFIG, "onnx/model.safetensors": b""}, "no weights in safetensors"),
        ({"model.safetensors": WEIGHTS}, r"no config\.json"),
    ],
)
def test_why_a_repository_cannot_be_had(online: type[Hub], content: dict[str, bytes] | str, message: str) -> None:
    online.repositories["org/model"] = content
    with pytest.raises(ModelNotFound, match=message):
        hub.resolve("org/model")


def test_a_repository_that_is_damaged_at_the_hub(online: type[Hub]) -> None:
    online.repositories["org/model"] = WHOLE | {"model.safetensors": WEIGHTS[:-1]}
    with pytest.raises(ModelCorrupt, match="cut short"):
        hub.resolve("org/model")


def test_a_full_disk_in_a_download(online: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*arguments: Any, **options: Any) -> str:
        raise OSError(28, os.strerror(28))

    online.repositories["org/model"] = WHOLE
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_room)
    with pytest.raises(DiskFull, match="make room, or set HF_HOME"):
        hub.resolve("org/model")


def test_a_hub_that_does_not_answer_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(hub, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        point_to(f"http://127.0.0.1:{deaf.getsockname()[1]}", monkeypatch)
        start = time.monotonic()
        with pytest.raises(ModelNotFound, match="hub cannot be reached"):
            hub.resolve("org/model")
    assert time.monotonic() - start < 2


def test_a_connection_that_breaks_in_a_download(online: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> str:
        raise HTTPError("connection reset")

    online.repositories["org/model"] = WHOLE
    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(ModelNotFound, match=r"connection reset.*what was downloaded is kept"):
        hub.resolve("org/model")
