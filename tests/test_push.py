"""`lillama push` against a stand-in of the hub's API: what is uploaded, and what is said where it cannot be."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny
from huggingface_hub import ModelCard, constants

from lillama.base.files import write_json
from lillama.checkpoint import push
from lillama.checkpoint.quantizer import factorise_
from lillama.cli import main as cli


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload asks for: every file is a regular one, in the commit itself."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.refuse = 0
        self.tokens: set[str | None] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(404, {"error": "nothing here"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.refuse:
            return self.answer(self.server.refuse, {"error": "You may not."})
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.answer(200, {"url": f"{self.server.address}/me/small", "id": "x", "name": "me/small"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path.startswith("/api/models/me/small/preupload/"):
            names = [file["path"] for file in json.loads(body)["files"]]
            found = [{"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for n in names]
            return self.answer(200, {"files": found})
        if self.path.startswith("/api/models/me/small/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(200, {"commitOid": "1", "commitUrl": f"{self.server.address}/me/small/commit/1"})
        return self.answer(404, {"error": self.path})

    def answer(self, status: int, what: dict[str, Any]) -> None:
        text = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with all that `push` reads of one."""
    model = factorise_(tiny(), {"model.layers.0.mlp.up_proj": {"kind": "linear", "storage": "pivoted", "rank": 6}})
    model.save_pretrained(tmp_path / "run" / "model")
    card = '---\nbase_model: org/original\n---\n\n# small\n\n```python\nfrom_pretrained("PATH_OR_ID")\n```\n'
    (tmp_path / "run" / "model" / "README.md").write_text(card)
    after = {"wiki/perplexity": 13.25, "wiki/perplexity_stderr": 0.5, "speed/decode_tokens_per_second": 70.0}
    write_json(tmp_path / "run" / "metrics.json", {"before": {"wiki/perplexity": 11.5}, "after": after})
    (tmp_path / "run" / "recipe.resolved.yaml").write_text(
        "model: {id: org/original}\ncompress: {reduction: 0.1}\ncalibration: {dataset: some/text}\nrun: {out: x}\n"
        "evaluate:\n  perplexity/wiki: {dataset: Salesforce/wikitext, config: wikitext-2-raw-v1, split: test}\n"
        "  speed: {}\n"
    )
    return tmp_path / "run"


def test_of_a_run_the_last_checkpoint_goes_with_its_own_numbers(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    for name, value in (("finetuned", 12.75), ("quantized", 12.875)):
        shutil.copytree(run / "model", run / name)
        write_json(run / "metrics.json", metrics := metrics | {name: {"wiki/perplexity": value}})
        assert push._checkpoint(run) == run / name
        assert push._measured(run / name)[1] == {"wiki/perplexity": value}
    assert push._checkpoint(run / "model") == run / "model"


def test_a_run_goes_to_the_hub_with_what_it_measured(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert cli.main(["push", str(run), "me/small", "--private"]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == f"wrote {hub.address}/me/small\n"
    assert hub.created[0]["name"] == "small" and hub.created[0]["visibility"] == "private"
    assert hub.tokens == {"Bearer hf_secret"}
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    for name in ("model.safetensors", "config.json"):
        assert hub.files[name] == (run / "model" / name).read_bytes()
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.base_model == "org/original" and card.data.model_name == "small"
    found = {result.metric_name: result for result in card.data.eval_results}
    assert found.keys() == {"wiki/perplexity", "speed/decode_tokens_per_second"}
    wiki = found["wiki/perplexity"]
    assert (wiki.metric_type, wiki.metric_value, wiki.dataset_type) == ("perplexity", 13.25, "Salesforce/wikitext")
    assert (wiki.dataset_config, wiki.dataset_split) == ("wikitext-2-raw-v1", "test")
    assert 'from_pretrained("me/small")' in card.text and "| wiki/perplexity | 11.5 | 13.25 |" in card.text
    # What was uploaded is whole by its own manifest.
    manifest = json.loads(hub.files["lillama.manifest.json"])["files"]
    assert {name: one["bytes"] for name, one in manifest.items()} == {
        name: len(held) for name, held in hub.files.items() if name != "lillama.manifest.json"
    }


def test_a_standalone_checkpoint_goes_to_the_hub(hub: Hub, run: Path) -> None:
    assert cli.main(["push", str(run / "model"), "me/small", "--standalone"]) == 0
    assert hub.created[0].get("visibility") != "private"
    assert "class LlamaForCausalLM(LowRankModel" in hub.files["modeling_lillama.py"].decode()
    assert "auto_map" in json.loads(hub.files["config.json"])
    card = ModelCard(hub.files["README.md"].decode())
    assert 'from_pretrained("me/small", trust_remote_code=True)' in card.text and "custom_code" in card.data.tags


def refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["push", *given]) == 2
    return capsys.readouterr().err


def test_what_keeps_a_model_from_the_hub_is_said(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no name of a repository" in refused([str(run), "me/small/er"], capsys)
    assert "no checkpoint here" in refused([str(run.parent), "me/small"], capsys)
    secret = run.parent / "secret.json"
    secret.write_text("{}")
    (run / "model" / "tokenizer.json").symlink_to(secret)
    assert "a link leads out of the directory" in refused([str(run), "me/small", "--standalone"], capsys)
    (run / "model" / "tokenizer.json").unlink()
    hub.refuse = 403
    said = refused([str(run), "me/small"], capsys)
    assert "the hub refuses (403)" in said and "You may not." in said and "hf auth login" in said
    assert "hf_secret" not in said
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    said = refused([str(run), "me/small"], capsys)
    assert said.startswith("lillama: push me/small: the hub cannot be reached") and "Traceback" not in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused([str(run), "me/small"], capsys)
    monkeypatch.setattr("lillama.checkpoint.push.get_token", lambda: None)
    assert "there is no token for the hub" in refused([str(run), "me/small"], capsys)
    assert not hub.files
