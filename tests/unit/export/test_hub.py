"""Pushing to a hub: a small server speaks as much of its API as an upload needs, and keeps what it is sent."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import ModelCard

from stages.config.graph import Stage
from tests.answering import answering
from tests.places import REPOSITORY
from tests.unit.export.conftest import House

TOKEN = "hf_right"


class Hub:
    """Repositories with their files, uploaded directly (base64 in the commit) or by Git LFS."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[dict[str, Any]] = []
        self.uploads: dict[str, bytes] = {}
        self.forbidden = False
        self.url = ""

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        path = unquote(path).partition("?")[0]
        if path.startswith("/upload/"):
            self.uploads[path.removeprefix("/upload/")] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/repos/create":
            if self.forbidden:
                return 403, {"error": "You don't have the rights to create a model under this namespace"}
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.repositories.setdefault(name, {".gitattributes": b""})
            self.private[name] = asked.get("visibility", "private" if asked.get("private") else "public") == "private"
            return 200, {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return 200, {"transfer": "basic", "objects": [self._upload(entry) for entry in objects]}
        if path.startswith("/api/models/"):
            return self._model(method, path.removeprefix("/api/models/"), body)
        return 404, {"error": f"no such page: {path}"}

    def _upload(self, entry: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.url}/upload/{entry['oid']}"
        return {"oid": entry["oid"], "size": entry["size"], "actions": {"upload": {"href": href}}}

    def _model(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        owner, name, *rest = path.split("/")
        files = self.repositories.get(f"{owner}/{name}")
        if files is None:
            return 404, {"error": "Repository not found"}
        match rest:
            case [] | ["revision", _]:
                siblings = [{"rfilename": file} for file in sorted(files)]
                return 200, {"id": f"{owner}/{name}", "sha": "0" * 40, "siblings": siblings, "private": True}
            case ["tree", *_]:
                return 200, [
                    {"type": "file", "path": file, "size": len(data), "oid": "0"} for file, data in files.items()
                ]
            case ["preupload", _]:
                asked = json.loads(body)["files"]
                mode = {True: "lfs", False: "regular"}
                return 200, {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": mode[file["path"].endswith(".safetensors")],
                            "shouldIgnore": False,
                            "oid": None,
                        }
                        for file in asked
                    ]
                }
            case ["commit", _]:
                self._commit(files, [json.loads(line) for line in body.splitlines()])
                page = f"{self.url}/{owner}/{name}/commit/1"
                return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": page}
        return 404, {"error": f"no such page: {method} {path}"}

    def _commit(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    self.commits.append(value)
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    data = self.uploads[value["oid"]]
                    assert hashlib.sha256(data).hexdigest() == value["oid"]
                    files[value["path"]] = data
                case "deletedFile":
                    del files[value["path"]]
                case other:
                    raise AssertionError(other)


@pytest.fixture
def hub() -> Iterator[Hub]:
    fake = Hub()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, value = fake.answer(self.command, self.path, body, self.headers.get("Authorization", ""))
            payload = json.dumps(value).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(payload)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

        def log_message(self, format: str, *args: object) -> None:
            return None

    with answering(Handler) as url:
        fake.url = url
        yield fake


def run(hub: Hub, tmp_path: Path, *options: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, whose hub, home and token are those of the test."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",  # the test's hub takes uploads as Git LFS does
        "HF_TOKEN": token,
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "stages.export", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_pushed_model_is_the_exported_folder_in_one_commit(hub: Hub, house: House, tmp_path: Path):
    address = house.made[Stage.SFT].uri
    done = run(hub, tmp_path, address, "--to", str(tmp_path / "out"), "--push", "me/model", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub.url}/me/model" in done.stdout
    pushed = hub.repositories["me/model"]
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert pushed == {".gitattributes": b"", **local}
    assert hub.private["me/model"] is True
    assert len(hub.commits) == 1
    assert hub.commits[0]["summary"].startswith("sft-model ")
    card: Any = ModelCard(pushed["README.md"].decode())
    assert card.data.pipeline_tag == "text-generation"


def test_a_repository_with_other_files_is_replaced_only_when_asked(hub: Hub, house: House, tmp_path: Path):
    hub.repositories["me/model"] = {".gitattributes": b"", "model-00001-of-00002.safetensors": b"old"}
    options = (house.made[Stage.SFT].uri, "--push", "me/model")
    refused = run(hub, tmp_path, *options)
    assert refused.returncode == 2
    assert "the repository me/model is not empty: model-00001-of-00002.safetensors" in refused.stderr
    assert hub.commits == []
    assert run(hub, tmp_path, *options, "--overwrite").returncode == 0
    assert "model-00001-of-00002.safetensors" not in hub.repositories["me/model"]
    assert "model.safetensors" in hub.repositories["me/model"]


@pytest.mark.parametrize(
    ("token", "forbidden", "said"),
    [
        ("", False, "needs a token of the hub, and the environment has none"),
        ("hf_wrong", False, "refuses to let this token write to me/model"),
        (TOKEN, True, "refuses to let this token write to me/model"),
    ],
)
def test_a_push_that_is_not_allowed_says_what_to_do(
    token: str, forbidden: bool, said: str, hub: Hub, house: House, tmp_path: Path
):
    hub.forbidden = forbidden
    done = run(hub, tmp_path, house.made[Stage.SFT].uri, "--push", "me/model", token=token)
    assert done.returncode == 2
    assert said in done.stderr
    assert "HF_TOKEN" in done.stderr
    assert TOKEN not in done.stderr + done.stdout
    assert hub.commits == []


def test_a_hub_that_is_away_is_told_apart_from_a_refusal(hub: Hub, house: House, tmp_path: Path):
    hub.url = "http://127.0.0.1:9"
    done = run(hub, tmp_path, house.made[Stage.SFT].uri, "--push", "me/model")
    assert done.returncode == 2
    assert "the hub does not answer" in done.stderr
    assert "Check the network and HF_ENDPOINT" in done.stderr
