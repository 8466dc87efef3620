"""An OpenAI client completes and chats against vLLM's server, as docs/serving.md shows."""

from __future__ import annotations

import pytest
from references import NEW
from servers import serving


@pytest.fixture(scope="module")
def client(made, tmp_path_factory):
    with serving(made["biases"].directory, tmp_path_factory.mktemp("server") / "log") as found:
        yield found


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
