"""The server: what clients of OpenAI's protocol see, whatever they send, and that nothing of it is left in the engine."""
import asyncio
import json
import socket
import threading
import time

import httpx
import openai
import pytest

from helpers import assert_idle
from nano_vllm import LLM, SamplingParams
from nano_vllm.server import API, AsyncLLM, serving

NAME = "tiny"


@pytest.fixture(scope="module")
def llm(tiny): return LLM(tiny, num_kv_blocks=200, max_num_seqs=8)


@pytest.fixture(scope="module")
def server(llm):
    with serving(llm.engine, NAME, max_queue=40, max_body=2**20, body_seconds=1) as s: yield s


@pytest.fixture(autouse=True)
def idle(request):
    "After each test nothing of it is left."
    yield
    if "server" not in request.fixturenames: return
    llm, s = request.getfixturevalue("llm"), request.getfixturevalue("server")
    wait_until(lambda: not s.llm.readers and not llm.engine.requests)
    assert_idle(llm)
    assert s.llm.num_open == 0


def wait_until(true, seconds=10):
    end = time.time() + seconds
    while not true():
        assert time.time() < end, "it has not come true"
        time.sleep(.005)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="-", max_retries=0, _strict_response_validation=True) as c: yield c


def test_a_completion_is_the_engines(client, llm):
    made = client.completions.create(model=NAME, prompt="One, two,", max_tokens=8, temperature=0)
    out = llm_answer(llm, "One, two,", max_tokens=8, temperature=0)
    print(made)
    assert made.choices[0].text == out.text and made.choices[0].finish_reason == out.finish_reason


def llm_answer(llm, prompt, **params):
    "What the tiny model says, by an engine of its own: that of the server belongs to its thread."
    other = LLM(llm.model_path, num_kv_blocks=200)
    return other.generate(prompt, SamplingParams(**params), use_tqdm=False)[0].outputs[0]


def test_chat_and_streams(client):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    made = client.chat.completions.create(model=NAME, messages=messages, max_tokens=5, seed=1, logprobs=True, top_logprobs=2)
    print(made)
    pieces = list(client.chat.completions.create(model=NAME, messages=messages, max_tokens=5, seed=1, logprobs=True, top_logprobs=2,
                                                 stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content for p in pieces if p.choices) == made.choices[0].message.content
    assert pieces[-1].usage == made.usage
