"""Vectors and checkpoints on a hub: a server on this machine that answers the client's calls."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import steerlens as sl
from steerlens.errors import InputError
from steerlens.steering import Calibration

COMMIT = "0" * 40
HOOK = "blocks.1.hook_resid_post"


@dataclass
class Hub:
    """What was uploaded, by repository and path; whether the next request is refused."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refuses: bool = False
    tokens: set[str] = field(default_factory=set)

    def card(self, repo: str) -> str:
        return self.files[repo]["README.md"].decode()


class Answers(BaseHTTPRequestHandler):
    """The calls of huggingface_hub that make a repository, commit to it, and fetch a file."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def answer(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        self.hub.tokens.add(self.headers["Authorization"])
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url = f"http://{self.headers['Host']}"
        if self.hub.refuses:
            return self.answer(403, b"{}")
        if self.path == "/api/validate-yaml":
            return self.answer(200, b'{"warnings": [], "errors": []}')
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            self.hub.files.setdefault(repo, {})
            return self.answer(200, json.dumps({"url": f"{url}/{repo}"}).encode())
        repo = self.path.removeprefix("/api/models/").partition("/preupload")[0]
        if "/preupload/" in self.path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self.answer(200, json.dumps({"files": files}).encode())
        repo = repo.partition("/commit/")[0]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.hub.files[repo][line["value"]["path"]] = content
        done = {"commitUrl": f"{url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT}
        return self.answer(200, json.dumps({**done, "hookOutput": ""}).encode())

    def do_GET(self) -> None:
        repo, _, path = self.path[1:].partition("/resolve/main/")
        content = self.hub.files.get(repo, {}).get(path)
        if content is None:
            return self.answer(404, b"", X_Error_Code="RepoNotFound")
        return self.answer(200, content, ETag='"1"', X_Repo_Commit=COMMIT)

    def do_HEAD(self) -> None:
        self.do_GET()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    known = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (Answers,), {"hub": known}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield known
    server.shutdown()
    server.server_close()


@pytest.fixture
def vector(llama: Any) -> sl.SteeringVector:
    made = sl.SteeringVector.from_vectors(
        {HOOK: torch.linspace(-1, 2, 32)}, origin=sl.steering.Origin.of_model(llama)
    )
    known = [torch.tensor([number]) for number in (50.0, -4.0, 8.25)]
    return replace(made, calibration=Calibration(*known, "kl=0.1", "neutral"))


def test_a_vector_goes_to_the_hub_and_comes_back(
    hub: Hub, vector: sl.SteeringVector, llama: Any
) -> None:
    effects = pd.DataFrame({"method": ["pca"], "effect": [1.234567], "effect_ci_low": [0.5]})
    address = vector.push_to_hub("me/cheerful", effects=effects)
    assert address.endswith(f"/me/cheerful/commit/{COMMIT}")
    assert hub.tokens == {"Bearer hf_test"}
    assert set(hub.files["me/cheerful"]) == {"vector.safetensors", "README.md"}
    assert sl.SteeringVector.from_hub("me/cheerful", model=llama) == vector
    card = hub.card("me/cheerful")
    assert card.startswith("---\nlibrary_name: steerlens\n")
    told = "kl=0.1 neutral 8.25 -4 1.235 effect_ci_low Add() from_hub('me/cheerful'".split()
    for text in (*told, HOOK, vector.origin.model, vector.origin.weights):
        assert text in card, text


def test_a_card_says_what_a_recommendation_found(
    hub: Hub, vector: sl.SteeringVector, tmp_path: Path
) -> None:
    path = tmp_path / "recommendation.json"
    sign = {"hook_name": HOOK, "effect": 0.6334, "ci_low": 0.49, "ci_high": 0.747, "p": 0.002}
    found: dict[str, Any] = {"steer": True, "signs": {"positive": sign, "negative": None}}
    path.write_text(json.dumps({**found, "reasons": ["negative: no room"]}))
    vector.push_to_hub("me/found", effects=path)
    card = hub.card("me/found")
    assert "| sign | hook_name | effect | ci_low | ci_high | p |" in card
    assert f"| positive | {HOOK} | 0.6334 | 0.49 | 0.747 | 0.002 |" in card
    assert "- negative: no room" in card
    assert "not to steer" not in card
    with pytest.raises(InputError, match="is of another vector"):
        replace(vector, hook_names=("blocks.2.hook_resid_post",)).push_to_hub("me/x", effects=path)
    path.write_text(json.dumps({"steer": False, "signs": {"positive": None}, "reasons": ["x"]}))
    vector.push_to_hub("me/found", effects=path)
    assert "recommended not to steer with it" in hub.card("me/found")
    for text in ("{}", "[]", "no json"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"expected the recommendation\.json"):
            vector.push_to_hub("me/found", effects=path)


def test_a_card_says_what_is_not_known_and_obeys_no_text(hub: Hub) -> None:
    origin = sl.steering.Origin(
        model="owner/model", dataset="<script>alert(1)</script>\n---\n# head | [a](b) \\[c\\](d)"
    )
    plain = sl.SteeringVector.from_vectors({HOOK: torch.ones(4)}, origin=origin)
    plain.push_to_hub("me/plain")
    card = hub.card("me/plain")
    assert "what a coefficient costs is not known" in card
    assert "## Effect\n\nNot recorded." in card
    assert "base_model: owner/model" in card
    assert "<script" not in card
    assert not re.search(r"^# head", card, flags=re.MULTILINE)
    assert "[a](b)" not in card
    assert "&#92;\\[c&#92;\\](d)" in card


@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_a_checkpoint_goes_with_a_card(
    library: str, hub: Hub, vector: sl.SteeringVector, llama: Any, tmp_path: Path
) -> None:
    write = {"transformers": sl.export.bake, "peft": sl.export.to_peft}[library]
    folder = write(llama, vector, 4, tmp_path / "out")
    (folder / "templates").mkdir()
    (folder / "templates" / "tools.jinja").write_text("{{ messages }}")
    expected = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    (tmp_path / "secret").write_text("not of the folder")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").touch()
    sl.export.push_checkpoint(folder, "me/steered")
    sent = hub.files["me/steered"]
    assert {*expected, "README.md"} == set(sent)
    for name, path in expected.items():
        assert sent[name] == path.read_bytes()
    card = hub.card("me/steered")
    for told in (f"library_name: {library}", "Coefficient 4", "kl=0.1", HOOK):
        assert told in card, told


def test_what_the_hub_refuses(hub: Hub, vector: sl.SteeringVector, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot fetch vector\.safetensors of 'me/none'"):
        sl.SteeringVector.from_hub("me/none")
    with pytest.raises(InputError, match=r"with its steerlens\.json"):
        sl.export.push_checkpoint(tmp_path, "me/none")
    for bad, told in (("a/b/c", "expected OWNER"), ("me", "expected OWNER"), ("me/a b", "upload")):
        with pytest.raises(InputError, match=told):
            vector.push_to_hub(bad)
    hub.refuses = True
    with pytest.raises(InputError, match="cannot upload to 'me/cheerful'"):
        vector.push_to_hub("me/cheerful")
    assert hub.files == {}
