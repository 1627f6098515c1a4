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
        self._answer(200, {"id": "me/adapter", "siblings": [], "sha": "0" * 40})

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

    def _answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.status = [], 200
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


@pytest.fixture
def export(tmp_path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("private", [False, True])
def test_all_files_are_sent(hub, export, private):
    assert upload(export, "me/adapter", private).endswith("/me/adapter")
    (_, token, made), *_ = hub.asked
    assert token == "Bearer hf_" + "x" * 30
    asked = json.loads(made)
    assert (
        asked["name"] == "adapter"
        and bool(asked.get("private") or asked.get("visibility") == "private") == private
    )
    commit = next(body for path, _, body in hub.asked if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
    assert sent.keys() == {"README.md", "adapter_config.json"}
    assert base64.b64decode(sent["adapter_config.json"]) == b"{}"


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
