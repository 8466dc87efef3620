"""An OpenAI client completes and chats against vLLM's server, as docs/serving.md shows."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from openai import OpenAI
from references import NEW

START = 240  # seconds


@pytest.fixture(scope="module")
def client(made, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(made["biases"].directory)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "64", "--served-model-name", "small"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO"})
    try:
        end = time.monotonic() + START
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(0.5)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    finally:
        server.terminate()
        server.wait(60)


def test_it_completes_as_transformers_does(client, made):
    one = made["biases"]
    more = {"ignore_eos": True, "return_token_ids": True}
    for prompt, tokens in zip(one.prompts[:3], one.tokens):
        answer = client.completions.create(model="small", prompt=prompt, max_tokens=NEW, temperature=0, extra_body=more)
        assert answer.choices[0].token_ids == tokens
        assert answer.usage.completion_tokens == NEW


def test_it_chats(client):
    said = [{"role": "user", "content": "the cat sat on a mat"}]
    answer = client.chat.completions.create(model="small", messages=said, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content.strip()
    assert answer.choices[0].message.role == "assistant"
