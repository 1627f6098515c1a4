"""An export is sent to the hub; what goes wrong is one sentence. The hub is a stub on this machine."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from distlora.errors import UserError
from distlora.models.hub_upload import check_upload, upload


class Hub(BaseHTTPRequestHandler):
    """What the hub answers to the making of a repository, and to a commit of small files."""

    def log_message(self, *arguments):
        """Nothing: the test's output is its own."""

    def do_GET(self):
        """Of a repository, where the hub has it."""
        private = self.server.there
        if private is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            found = {"id": "me/adapter", "private": private, "siblings": [], "sha": "0" * 40}
            self._answer(200, found)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub = self.server
        hub.asked.append((self.path, self.headers.get("Authorization"), body))
        if hub.status != 200:
            self._answer(hub.status, {"error": "no"})
        elif self.path.endswith("/repos/create"):
            self._answer(200, {"url": f"{hub.address}/me/adapter", "name": "me/adapter"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answers = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self._answer(200, {"files": answers})
        elif "/commit/" in self.path:
            oid = {"commitUrl": f"{hub.address}/me/adapter/commit/1", "commitOid": "1" * 40}
            self._answer(200, {"success": True, **oid})
        else:
            self._answer(200, {})

    def _answer(self, status, content, headers=None):
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.status, server.there = [], 200, None
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _at(monkeypatch, server.address)
    yield server
    server.shutdown()
    server.server_close()


def _at(monkeypatch, address):
    """HF_ENDPOINT is read when the hub's library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def _sent(hub) -> dict[str, bytes]:
    """The files of the only commit."""
    (commit,) = (body for path, _, body in hub.asked if "/commit/" in path)
    files = [line["value"] for line in map(json.loads, commit.splitlines()) if line["key"] == "file"]
    return {file["path"]: base64.b64decode(file["content"]) for file in files}


@pytest.fixture
def export(tmp_path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(("private", "there"), [(False, None), (False, False), (True, None), (True, True)])
def test_all_files_are_sent(hub, export, private, there):
    hub.there = there
    assert upload(export, "me/adapter", private).endswith("/me/adapter")
    (_, token, made), *_ = hub.asked
    assert token == "Bearer hf_" + "x" * 30
    asked = json.loads(made)
    assert (
        asked["name"] == "adapter"
        and bool(asked.get("private") or asked.get("visibility") == "private") == private
    )
    sent = _sent(hub)
    assert sent.keys() == {"README.md", "adapter_config.json"} and sent["adapter_config.json"] == b"{}"


def test_what_shall_be_private_does_not_become_public(hub, export):
    hub.there = False
    with pytest.raises(UserError, match="me/adapter --private: this repository exists and is public"):
        upload(export, "me/adapter", private=True)
    assert not hub.asked


@pytest.mark.parametrize(
    ("base", "sent"),
    [
        ("/home/me/models/llama", "llama"),
        ("../models/llama/", "llama"),
        ("me/llama", "me/llama"),
        (None, None),
    ],
)
def test_no_directory_of_this_machine_is_sent(hub, export, base, sent):
    config = export / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": base, "r": 8}))
    (export / "deep").mkdir()
    (export / "deep" / "file.txt").write_text("x")
    before = config.read_bytes()
    upload(export, "me/adapter")
    files = _sent(hub)
    assert json.loads(files["adapter_config.json"]) == {"base_model_name_or_path": sent, "r": 8}
    assert files["deep/file.txt"] == b"x" and config.read_bytes() == before


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "does not accept the token; run `hf auth login`"),
        (403, "may not write there"),
        (404, "knows no such owner or repository"),
        (500, "answers 500"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub, export, status, said):
    hub.status = status
    with pytest.raises(UserError, match=said) as error:
        upload(export, "me/adapter")
    assert str(error.value).endswith(f"the export is in {export}") and "\n" not in str(error.value)


def test_a_hub_that_is_not_there(hub, export, monkeypatch):
    _at(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached"):
        upload(export, "me/adapter")


def test_what_is_known_before_anything_is_asked(hub, export, monkeypatch):
    for name in ("a/b/c", "me/..", "me/a b"):
        with pytest.raises(UserError, match="no repository can have this name"):
            check_upload(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        upload(export, "me/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("distlora.models.hub_upload.get_token", lambda: None)
    with pytest.raises(UserError, match="there is no token for the hub"):
        upload(export, "me/adapter")
    assert not hub.asked
