"""The server: what clients of OpenAI's protocol see, whatever they send and however they leave, and that nothing of it stays in the engine."""
import asyncio
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from helpers import assert_idle
from nano_vllm import LLM, SamplingParams, openai_api
from nano_vllm.async_llm import AsyncLLM
from nano_vllm.cli import main, make_parser
from nano_vllm.engine_args import EngineArgs
from nano_vllm.openai_api import CALL, CallFilter, post_lines, run_all
from nano_vllm.server import API, CHAT, COMPLETION, Ask, Choice, make_app, read_json, serving
from nano_vllm.workbench import fetch

NAME = "tiny"
HI = [{"role": "user", "content": "Hi"}]


def wait_until(true, seconds=20):
    end = time.time() + seconds
    while not true():
        assert time.time() < end, "it has not come true"
        time.sleep(.005)


# ---- what is read and written

@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"n": NaN}', b'{"n": Infinity}', b"[]", b"1", b'"x"', b"[" * 10**5, b'{"n": ' + b"9" * 5000 + b"}"])
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(ValueError, match="the body"): read_json(body)


CALLS = {
    'Well. <tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>': ("Well. ", [("f", {"a": "é"})]),
    '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"name": "g"}</tool_call>': ("", [("f", {}), ("g", {})]),
    '<tool_call>{"name": "f"}': ("", [("f", {})]), "a <tool_caller>": ("a <tool_caller>", []), "a <tool": ("a <tool", []),
    '<tool_call>{"name": 3}</tool_call>': ('<tool_call>{"name": 3}</tool_call>', []), "": ("", []),
    '<tool_call>{"name": "f", "arguments": {"a": NaN}}': ('<tool_call>{"name": "f", "arguments": {"a": NaN}}', []),
    '<tool_call>{"name": "\\ud800"}': ('<tool_call>{"name": "\\ud800"}', []), '<tool_call>{"name": "f", "arguments": "\\ud800"}': ('<tool_call>{"name": "f", "arguments": "\\ud800"}', []),
    "<tool_call>" + "[" * 5000: ("<tool_call>" + "[" * 5000, []),
    'a <tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name": "g"}</tool_call> b': ("a ", [("f", {}), ("g", {})]),      # what stands between and behind is dropped
    '<tool_call>{"name": "f"}</tool_call><tool_call>oops</tool_call>': ('<tool_call>{"name": "f"}</tool_call><tool_call>oops</tool_call>', [])}


@pytest.mark.parametrize("text", CALLS)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_calls_of_tools_are_found_however_the_text_is_cut(text, size):
    made, shown = CallFilter(), ""
    pieces = [text[i:i + size] for i in range(0, len(text), size)] or [""]
    for i, piece in enumerate(pieces):
        new, calls = made.add(piece, last=i == len(pieces) - 1)
        shown += new
        assert CALL not in shown or not calls
    assert (shown, [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]) == CALLS[text]
    assert len({c["id"] for c in calls}) == len(calls) and [c["index"] for c in calls] == list(range(len(calls)))


# ---- over HTTP, with a tiny model

@pytest.fixture(scope="module")
def llm(tiny): return LLM(tiny, num_kv_blocks=200, max_num_seqs=8)


@pytest.fixture(scope="module")
def server(llm):
    alone = AsyncLLM(llm.engine, max_open=48).start()
    with serving(alone, NAME, max_body=2**20, body_seconds=.5, shutdown_timeout=1) as url: yield SimpleNamespace(llm=alone, url=url)
    alone.shutdown()


@pytest.fixture(autouse=True)
def idle(request):
    "After each test nothing of it is left."
    yield
    if "server" not in request.fixturenames: return
    server, llm = request.getfixturevalue("server"), request.getfixturevalue("llm")
    wait_until(lambda: not server.llm.readers and not llm.engine.requests)
    assert_idle(llm)
    assert server.llm.num_open == 0


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="-", max_retries=0, _strict_response_validation=True) as c: yield c


@pytest.fixture(scope="module")
def other(tiny): return LLM(tiny, num_kv_blocks=200)


def bare(other, prompt, **params): return other.generate(prompt, SamplingParams(**params), use_tqdm=False)


def test_a_completion_is_the_engines(client, other):
    for prompt in ("One, two,", [5, 6, 7]):
        for params in (dict(temperature=0, max_tokens=8), dict(seed=3, max_tokens=9, stop=["e"]), dict(seed=2, n=3, top_p=.9, max_tokens=4)):
            made = client.completions.create(model=NAME, prompt=prompt, **params)
            outs = bare(other, prompt, **params)[0].outputs
            assert [(c.index, c.text, c.finish_reason) for c in made.choices] == [(o.index, o.text, o.finish_reason) for o in outs]
            assert made.usage.completion_tokens == sum(len(o.token_ids) for o in outs)
            assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens and made.model == NAME


def test_vllms_fields_pass(client, other):
    params = dict(top_k=3, min_tokens=4, ignore_eos=True, repetition_penalty=1.2, stop_token_ids=[7], min_p=.01)
    made = client.completions.create(model=NAME, prompt="Hi", seed=1, max_tokens=9, extra_body=params, user="me")
    assert made.choices[0].text == bare(other, "Hi", seed=1, max_tokens=9, **params)[0]["text"]


def test_a_bias_has_strings_for_ids_as_json_has_it(client, other):
    "And on any other entry of a table, bad ids and numbers are refused by name."
    made = client.completions.create(model=NAME, prompt="Hi", temperature=0, max_tokens=3, logit_bias={"100": 100, "7": -100})
    assert made.choices[0].text == bare(other, "Hi", temperature=0, max_tokens=3, logit_bias={100: 100, 7: -100})[0]["text"]
    assert made.choices[0].text == other.get_tokenizer().decode([100] * 3)
    said = client.chat.completions.create(model=NAME, messages=HI, temperature=0, max_tokens=2, logit_bias={"100": 100})
    assert said.choices[0].message.content == other.get_tokenizer().decode([100] * 2)


def test_usage_in_each_chunk(server):
    body = dict(prompt="One,", max_tokens=6, temperature=0, stream=True, ignore_eos=True)
    def usages(**options):
        lines = httpx.post(server.url + "/v1/completions", json=body | dict(stream_options=options)).text.splitlines()
        return [json.loads(line[6:]).get("usage") for line in lines if line.startswith("data: {")]
    counts = [u["completion_tokens"] for u in usages(include_usage=True, continuous_usage_stats=True)]
    assert counts == sorted(counts) and counts[-2:] == [6, 6] and counts[0] < 6
    *nothing, last = usages(include_usage=True, include_obfuscation=False)
    assert set(nothing) == {None} and last["completion_tokens"] == 6
    for options in ({}, dict(include_usage=False), dict(include_usage=None), dict(continuous_usage_stats=True)): assert set(usages(**options)) == {None}


def test_several_prompts_are_answered_in_order(client, other):
    prompts = ["One,", "Two and", "Three"]
    made = client.completions.create(model=NAME, prompt=prompts, n=2, seed=1, max_tokens=4)
    assert [c.index for c in made.choices] == list(range(6))
    assert [c.text for c in made.choices] == [o.text for out in bare(other, prompts, n=2, seed=1, max_tokens=4) for o in out.outputs]


def test_echo_and_logprobs_of_a_completion(server, other):
    body = dict(model=NAME, prompt="One, two,", temperature=0, max_tokens=3, echo=True, logprobs=2)
    made = httpx.post(server.url + "/v1/completions", json=body).json()["choices"][0]      # the first token has no log-probability
    out = bare(other, "One, two,", temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=2)[0]
    lists = made["logprobs"]
    assert made["text"] == "One, two," + out["text"] and lists["token_logprobs"][0] is None
    ids = out.prompt_token_ids + out["token_ids"]
    entries = out.prompt_logprobs + out["logprobs"]
    assert lists["token_logprobs"][1:] == pytest.approx([e[t].logprob for t, e in zip(ids[1:], entries[1:])], abs=1e-4)
    assert {len(v) for v in lists.values()} == {len(ids)} and lists["tokens"][0] == "One"
    for token, offset in zip(lists["tokens"], lists["text_offset"]): assert made["text"][offset:].startswith(token)


def test_chat_is_the_same_in_every_form(client, other):
    content = [{"type": "text", "text": "One, two"}, {"type": "text", "text": "three?"}]
    options = dict(model=NAME, messages=[{"role": "system", "content": "Count."}, {"role": "user", "content": content}],
                   max_completion_tokens=6, seed=1, logprobs=True, top_logprobs=2)
    made = client.chat.completions.create(**options)
    out, = other.chat([{"role": "system", "content": "Count."}, {"role": "user", "content": "One, two\nthree?"}],
                      SamplingParams(max_tokens=6, seed=1, logprobs=2), use_tqdm=False)
    choice = made.choices[0]
    assert (choice.message.content, choice.finish_reason, choice.message.role) == (out["text"], out["finish_reason"], "assistant")
    assert [t.logprob for t in choice.logprobs.content] == pytest.approx([e[t].logprob for t, e in zip(out["token_ids"], out["logprobs"])], abs=1e-4)
    assert all(len(t.top_logprobs) == 2 and bytes(t.bytes).decode() == t.token for t in choice.logprobs.content)
    pieces = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    deltas = [p.choices[0] for p in pieces if p.choices]
    assert "".join(d.delta.content for d in deltas) == out["text"] and deltas[0].delta.role == "assistant"
    assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + [out["finish_reason"]]
    assert [t.token for d in deltas for t in d.logprobs.content] == [t.token for t in choice.logprobs.content]
    assert pieces[-1].usage.completion_tokens == made.usage.completion_tokens and not pieces[-1].choices


def test_a_streamed_completion_joins_to_the_whole(server, client):
    "OpenAI's own type has no place for the null that its streams hold as finish_reason, so this client is not strict."
    body = dict(model=NAME, prompt=["One,", "Two"], n=3, seed=1, max_tokens=30, stop=["e"])
    texts = [c.text for c in client.completions.create(**body).choices]
    with openai.OpenAI(base_url=server.url + "/v1", api_key="-") as loose: chunks = list(loose.completions.create(**body, stream=True))
    found, ends = [""] * 6, []
    for choice in (c for chunk in chunks for c in chunk.choices):
        found[choice.index] += choice.text
        if choice.finish_reason: ends.append(choice.index)
    assert found == texts and sorted(ends) == list(range(6))
    assert len({len(text) for text in texts}) > 2                  # they ended one after the other


def test_async_clients(server):
    async def go():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="-", _strict_response_validation=True) as c:
            options = dict(model=NAME, messages=HI, temperature=0, max_tokens=5)
            asked = [c.chat.completions.create(**options) for _ in range(20)]
            texts = {made.choices[0].message.content for made in await asyncio.gather(*asked)}
            streamed = "".join([chunk.choices[0].delta.content async for chunk in await c.chat.completions.create(**options, stream=True)])
            assert texts == {streamed}
            assert [m.id for m in (await c.models.list()).data] == [NAME]
            with pytest.raises(openai.BadRequestError): await c.completions.create(model=NAME, prompt="", max_tokens=-1)
    asyncio.run(go())


@pytest.mark.parametrize("path, body", [("tokenize", dict(prompt="a")), ("detokenize", dict(tokens=[5]))])
def test_another_models_tokens_are_not_told(server, path, body):
    for name, status in ((NAME, 200), (None, 200), ("another", 404)): assert httpx.post(f"{server.url}/{path}", json=body | dict(model=name)).status_code == status


def test_tokens_are_counted_beside_the_event_loop(server, llm, monkeypatch):
    tokenizer, threads = llm.engine.input_processor.tokenizer, []
    for name in ("encode", "decode"):
        monkeypatch.setattr(tokenizer, name, lambda *args, do=getattr(tokenizer, name), **options: threads.append(threading.current_thread().name) or do(*args, **options))
    for path, body in (("tokenize", dict(prompt="a")), ("detokenize", dict(tokens=[5]))): assert httpx.post(f"{server.url}/{path}", json=body).status_code == 200
    assert len(threads) == 2 and all(name.startswith("input") for name in threads)
    answer = httpx.post(server.url + "/tokenize", json={})
    assert answer.status_code == 400 and "prompt must be given" in answer.text


def test_small_routes(server):
    get, post = (lambda path: httpx.get(server.url + path)), (lambda path, **body: httpx.post(server.url + path, json=body).json())
    made = post("/tokenize", prompt="One, two")
    assert made["count"] == len(made["tokens"]) == 3 and made["max_model_len"] == 512
    assert post("/detokenize", tokens=made["tokens"]) == {"prompt": "One, two"}
    assert post("/tokenize", messages=HI)["count"] > 10
    assert get("/health").status_code == 200 and get("/version").json()["version"] and "<!doctype html>" in get("/").text
    with httpx.stream("GET", server.url + "/events") as events:
        event = json.loads(next(line for line in events.iter_lines() if line)[6:])
    assert event["blocks"] == 200 and event["running"] == 0


def test_metrics_have_vllms_names_and_count(server, client):
    def figures():
        lines = [line.rsplit(" ", 1) for line in httpx.get(server.url + "/metrics").text.splitlines() if line[0] != "#"]
        return {name: float(value) for name, value in lines}
    before = figures()
    client.completions.create(model=NAME, prompt=[5] * 40, max_tokens=3, n=2, seed=1)
    after = figures()
    def grown(name, more=""): return after[f'vllm:{name}{{{more}model_name="{NAME}"}}'] - before.get(f'vllm:{name}{{{more}model_name="{NAME}"}}', 0)
    assert (grown("prompt_tokens_total"), grown("generation_tokens_total")) == (40, 6)
    assert grown("request_success_total", 'finished_reason="length",') == 2
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds", "request_time_per_output_token_seconds"):
        assert grown(f"{name}_count") == 1 and grown(f"{name}_sum") >= 0
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"): assert after[f'vllm:{name}{{model_name="{NAME}"}}'] == 0


def test_the_gap_between_tokens_is_that_of_one_answer(server):
    def sums():
        lines = httpx.get(server.url + "/metrics").text.splitlines()
        return {name: next(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}_seconds_sum"))
                for name in ("e2e_request_latency", "time_to_first_token", "request_time_per_output_token")}
    before = sums()
    httpx.post(server.url + "/v1/completions", json=dict(prompt="a", n=3, seed=1, max_tokens=5, ignore_eos=True))
    total, first, gap = (now - old for now, old in zip(sums().values(), before.values()))
    assert 4 * gap == pytest.approx(total - first, rel=1e-3)


# ---- what is refused

TALK, ASK = dict(messages=HI), dict(prompt="a")


def schema_format(schema): return dict(type="json_schema", json_schema=dict(name="made", schema=schema))


REFUSED = [  # (path, body, status, param, words of the message)
    ("completions", ASK | {"\ud800": 1}, 400, None, "? is not a field"), ("completions", ASK | {"\ud800": 1, "stream": True}, 400, None, "? is not a field"),
    ("chat/completions", TALK | dict(max_completion_tokens=0), 400, "max_completion_tokens", "at least 1, got 0"),
    ("chat/completions", TALK | dict(max_completion_tokens="x"), 400, "max_completion_tokens", "an integer of at least 1, got 'x'"),
    ("chat/completions", TALK | dict(response_format=dict(type="json_object"), structured_outputs=dict(regex="a")), 400, "structured_outputs", "left out"),
    ("chat/completions", TALK | dict(tool_choice="required", tools=[dict(function=dict(name="f"))], structured_outputs=dict(regex="a")), 400, "structured_outputs", "left out"),
    ("completions", dict(prompt=[]), 400, "prompt", "must not be an empty list"), ("completions", dict(prompt=[[]]), 400, "prompt", "at least 1 token"),
    ("chat/completions", TALK | dict(chat_template_kwargs=dict(messages=1)), 400, "chat_template_kwargs", "must not have messages"),
    ("chat/completions", TALK | dict(chat_template_kwargs=dict(self=1)), 400, "chat_template_kwargs", "must not have self"),
    ("chat/completions", TALK | dict(top_logprobs=3), 400, "top_logprobs", "unless logprobs is true, got 3"),
    ("chat/completions", TALK | dict(add_generation_prompt=True, continue_final_message=True), 400, "add_generation_prompt", "with continue_final_message"),
    ("completions", dict(), 400, "prompt", "prompt must be given"), ("completions", dict(prompt=""), 400, "prompt", "at least 1 token"),
    ("completions", dict(prompt="a", max_tokens=0), 400, "max_tokens", "at least 1, got 0"),
    ("completions", dict(prompt="a", temprature=1), 400, "temprature", "not a field"),
    ("completions", dict(prompt="a", temperature="hot"), 400, "temperature", "a number"),
    ("completions", dict(prompt="a", n=10**5), 400, "n", "from 1 to"), ("completions", dict(prompt="a", n=49, seed=1), 400, "n", "at most 48"),
    ("completions", dict(prompt=[1, -1]), 400, "prompt", "token ids"), ("completions", dict(prompt=[10**6]), 400, "prompt", "from 0 to 49151"),
    ("completions", dict(prompt=[1] * 600), 400, "prompt", "max_model_len is 512"), ("completions", dict(prompt={"a": 1}), 400, "prompt", "prompt"),
    ("completions", dict(prompt="a", stop=[1]), 400, "stop", "non-empty string"), ("completions", dict(prompt="a", suffix="b"), 400, "suffix", "not a field"),
    ("completions", dict(prompt="a", best_of=3), 400, "best_of", "not a field"), ("completions", dict(prompt="a", stream=1), 400, "stream", "true or false"),
    ("completions", ASK | dict(logit_bias={"x": 1}), 400, "logit_bias", "from token ids"), ("completions", ASK | dict(logit_bias={"-1": 1}), 400, "logit_bias", "from token ids"),
    ("completions", ASK | dict(logit_bias={"9" * 5000: 1}), 400, "logit_bias", "from token ids"), ("completions", ASK | dict(logit_bias=[1]), 400, "logit_bias", "from token ids"),
    ("completions", ASK | dict(logit_bias={"1": "x"}), 400, "logit_bias", "a number"), ("completions", ASK | dict(logit_bias={"49152": 1}), 400, "logit_bias", "from 0 to 49151"),
    ("completions", ASK | dict(stream_options=dict(include_usage=True)), 400, "stream_options", "unless stream is true"),
    ("completions", ASK | dict(stream=True, stream_options=3), 400, "stream_options", "an object"),
    ("chat/completions", TALK | dict(stream=True, stream_options=dict(include_usage="yes")), 400, "stream_options", "true or false, got 'yes'"),
    ("chat/completions", TALK | dict(stream=True, stream_options=dict(usage=True)), 400, "stream_options", "usage is not a field"),
    ("completions", dict(prompt="a", model="gpt-4"), 404, "model", "is not served"), ("completions", dict(prompt="a", model=3), 400, "model", "a string"),
    ("completions", dict(prompt=[[1]] * 10**5), 400, "prompt", "at most 48"), ("completions", dict(prompt="a", logprobs=99999999), 400, "logprobs", "logprobs"), ("chat/completions", dict(), 400, "messages", "at least 1 message"),
    ("chat/completions", dict(messages="Hi"), 400, "messages", "a list"), ("chat/completions", dict(messages=[1]), 400, "messages", "an object"),
    ("chat/completions", dict(messages=[dict(role="user", content=[dict(type="image_url", image_url={})])]), 400, "messages", "must be text"),
    ("chat/completions", TALK | dict(logprobs=5), 400, "logprobs", "true or false"), ("chat/completions", TALK | dict(top_logprobs=21), 400, "top_logprobs", "0 to 20"),
    ("chat/completions", TALK | dict(response_format=dict(type="xml")), 400, "response_format", "one of text"),
    ("chat/completions", TALK | dict(response_format=dict(type="json_schema")), 400, "response_format", "schema must be a JSON schema, got None"),
    ("chat/completions", TALK | dict(response_format=schema_format({"type": "strin"})), 400, "response_format", "Invalid type: strin"),
    ("chat/completions", TALK | dict(structured_outputs=dict(regex="(")), 400, "structured_outputs", "unclosed group"),
    ("chat/completions", TALK | dict(structured_outputs=dict(regexp="a")), 400, "structured_outputs", "got 'regexp'"),
    ("completions", ASK | dict(structured_outputs="a"), 400, "structured_outputs", "must be a StructuredOutputsParams"),
    ("chat/completions", TALK | dict(response_format=dict(type=["x"])), 400, "response_format", "one of text"),
    ("chat/completions", TALK | dict(tool_choice="always"), 400, "tool_choice", "one of auto, none"),
    ("chat/completions", TALK | dict(tool_choice="required"), 400, "tool_choice", "at least 1 entry"),
    ("chat/completions", TALK | dict(tool_choice=dict(type="function")), 400, "tool_choice", "must name one of the tools, got None"),
    ("chat/completions", TALK | dict(tool_choice=dict(type="function", function=dict(name="f")), tools=[3]), 400, "tools", "a function with a name each, got 3"),
    ("chat/completions", TALK | dict(tools=[dict(type="function")]), 400, "tools", "no place for them"),
    ("chat/completions", TALK | dict(chat_template="x"), 400, "chat_template", "not a field"),
    ("chat/completions", TALK | dict(chat_template_kwargs=dict(tokenize=True)), 400, "chat_template_kwargs", "must not have tokenize"),
    ("chat/completions", TALK | dict(modalities=["audio"]), 400, "modalities", "not a field")]


@pytest.mark.parametrize("path, body, status, param, words", REFUSED, ids=lambda v: str(v)[:40])
def test_refusals_name_the_field_before_any_work(server, llm, path, body, status, param, words):
    made = llm.engine.input_processor.num_made
    answer = httpx.post(f"{server.url}/v1/{path}", content=json.dumps(body), headers={"content-type": "application/json"})      # httpx writes no lone surrogates
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param) and words in error["message"]
    assert error["code"] == status and error["type"] in ("invalid_request_error", "not_found_error")
    assert llm.engine.input_processor.num_made == made
    assert "messages" not in body or "Hi" not in error["message"] or isinstance(body["messages"], str)


def test_http_errors_have_openais_form(server):
    for method, path, options, status in (
            ("GET", "/v1/nothing", {}, 404), ("GET", "/v1/completions", {}, 405), ("POST", "/v1/completions", dict(content=b"{}"), 415),
            ("POST", "/v1/completions", dict(content=b"prompt=a", headers={"content-type": "text/plain"}), 415),
            ("POST", "/v1/completions", dict(content=b"\xff\xfe", headers={"content-type": "application/json"}), 400),
            ("POST", "/v1/completions", dict(content=b'{"prompt": "\\ud800"}', headers={"content-type": "application/json"}), 400),
            ("POST", "/v1/completions", dict(content=b" " * (10 * 2**20), headers={"content-type": "application/json"}), 413)):
        answer = httpx.request(method, server.url + path, **options)
        assert answer.status_code == status and answer.json()["error"]["message"], (method, path, status)


@pytest.mark.parametrize("kind", ["Application/JSON", "application/json;charset=utf-8", "application/json ; charset=utf-8"])
def test_the_type_of_a_body_is_written_in_several_ways(server, kind):
    answer = httpx.post(server.url + "/v1/completions", content=b'{"prompt": "a", "max_tokens": 1}', headers={"content-type": kind})
    assert answer.status_code == 200, answer.text


def test_a_prompt_of_a_million_tokens_is_refused_and_disturbs_nobody(llm, server):
    alone = server.llm
    with serving(alone, NAME, max_body=2**24, shutdown_timeout=1) as url:
        def ask(found): found.append(httpx.post(url + "/v1/completions", json=dict(prompt=[7] * 10**6), timeout=60))
        found = []
        thread = threading.Thread(target=ask, args=(found,))
        thread.start()
        waits = []
        while thread.is_alive():
            start = time.perf_counter()
            assert httpx.get(url + "/health", timeout=10).status_code == 200
            waits.append(time.perf_counter() - start)
        assert found[0].status_code == 400 and "max_model_len is 512" in found[0].json()["error"]["message"]
        assert max(waits) < 5


# ---- clients that misbehave

def raw(server, *parts):
    "A connection that has sent these bytes."
    url = urlsplit(server.url)
    s = socket.create_connection((url.hostname, url.port), timeout=10)
    for part in parts: s.sendall(part)
    return s


def http_post(body, length=None):
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length or len(body)}\r\n\r\n"
    return head.encode() + body


LONG = json.dumps(dict(prompt="One", max_tokens=400, ignore_eos=True)).encode()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_leaves_nothing(server, llm, stream):
    body = json.dumps(json.loads(LONG) | dict(stream=stream)).encode()
    connections = [raw(server, http_post(body)) for _ in range(5)]
    wait_until(lambda: len(llm.engine.requests) == 5)
    if stream: assert b"200 OK" in connections[0].recv(100)
    for c in connections: c.close()
    wait_until(lambda: not llm.engine.requests and not server.llm.readers, seconds=2)


def test_half_a_body_is_given_up(server, caplog):
    with raw(server, http_post(b'{"prompt": ', length=100)) as s: assert b"408" in s.recv(1000)
    caplog.set_level(logging.INFO)
    with raw(server, http_post(b'{"prompt": ', length=100)): pass           # and one that hangs up
    wait_until(lambda: any('"status": 499' in r.getMessage() for r in caplog.records))
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    with raw(server, b"nonsense\r\n\r\n") as s: assert b"400" in s.recv(1000)


def test_many_idle_connections_are_nobodys_business(server):
    idle = [raw(server) for _ in range(150)] + [raw(server, b"POST /v1/comp") for _ in range(50)]
    start = time.perf_counter()
    assert httpx.post(server.url + "/v1/completions", json=dict(prompt="a", max_tokens=2)).status_code == 200
    assert time.perf_counter() - start < 5
    for s in idle: s.close()


def test_a_full_queue_answers_429_and_when_to_come_back(server):
    held = [raw(server, http_post(LONG)) for _ in range(48)]
    wait_until(lambda: server.llm.num_open == 48)
    answer = httpx.post(server.url + "/v1/completions", json=dict(prompt="a"))
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1 and answer.json()["error"]["type"] == "rate_limit_error"
    for s in held: s.close()


def test_a_failing_engine_fails_every_open_request(server, llm, caplog):
    execute, count = llm.engine.runner.execute, []

    def fails(output):
        count.append(len(output.scheduled))
        if len(count) > 5 and len(llm.engine.requests) == 4: raise RuntimeError("secret words")
        return execute(output)
    llm.engine.runner.execute = fails
    try:
        body, answers = json.loads(LONG), []
        def ask(stream): answers.append(httpx.post(server.url + "/v1/completions", json=body | dict(stream=stream), timeout=20))
        threads = [threading.Thread(target=ask, args=(s,)) for s in (True, True, False, False)]
        for t in threads: t.start()
        for t in threads: t.join(20)
    finally: llm.engine.runner.execute = execute
    assert len(answers) == 4 and all("the engine failed: RuntimeError" in a.text and "secret" not in a.text for a in answers)
    assert sorted(a.status_code for a in answers)[-2:] == [500, 500]
    assert httpx.post(server.url + "/v1/completions", json=dict(prompt="a", max_tokens=2)).status_code == 200


def test_a_failure_amid_a_stream_is_in_the_log(server, monkeypatch, caplog):
    def fails(choice, made, piece, out):
        if choice.begun: raise KeyError("secret words")
    monkeypatch.setitem(COMPLETION.writers, "fails", fails)
    answer = httpx.post(server.url + "/v1/completions", json=dict(prompt="a", max_tokens=5, ignore_eos=True, stream=True))
    assert answer.status_code == 200 and "the engine failed: KeyError" in answer.text and "secret" not in answer.text
    assert "secret words" in caplog.text


def test_a_slow_reader_is_not_waited_for(server, llm):
    "It sends its request and reads nothing: the engine goes on to the end, and others are served meanwhile."
    body = json.dumps(json.loads(LONG) | dict(stream=True, n=4, seed=1, logprobs=20)).encode()
    with raw(server, http_post(body)) as slow:
        wait_until(lambda: llm.engine.requests)
        assert httpx.post(server.url + "/v1/completions", json=dict(prompt="a", max_tokens=2)).status_code == 200
        wait_until(lambda: not llm.engine.requests, seconds=60)
        assert all(len(r.new) <= 1 for r in server.llm.readers.values())
        data = b""
        while b"[DONE]" not in data: data += slow.recv(2**16)
    assert data.count(b'"finish_reason": "length"') == 4


# ---- keys, origins, logs

@contextmanager
def served(llm, **options):
    alone = AsyncLLM(llm.engine).start()
    with serving(alone, NAME, **options) as url: yield url
    alone.shutdown()


def test_a_key_is_asked_for_where_it_matters(other):
    with served(other, api_key="s3cret") as url:
        for path in ("/v1/models", "/events"):
            for headers in ({}, {"authorization": "Bearer s3cre"}, {"authorization": "s3cret"}, {"authorization": "Bearer s3cretx"}):
                assert httpx.get(url + path, headers=headers).status_code == 401
        assert httpx.post(url + "/tokenize", json={}).status_code == 401 and httpx.get(url + "/health").status_code == 200
        with openai.OpenAI(base_url=url + "/v1", api_key="s3cret") as c: assert c.models.list().data[0].id == NAME
        with openai.OpenAI(base_url=url + "/v1", api_key="no") as c, pytest.raises(openai.AuthenticationError): c.models.list()


def test_an_option_that_no_layer_has_is_refused(other):
    with pytest.raises(TypeError, match="no option 'api_keys'"): make_app(API(AsyncLLM(other.engine), NAME), api_keys="s3cret")


def test_other_sites_may_not_ask_unless_they_are_named(other):
    ask = {"origin": "https://a.example", "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    with served(other) as url: assert "access-control-allow-origin" not in httpx.options(url + "/v1/completions", headers=ask).headers
    with served(other, allowed_origins=["https://a.example"], api_key="k") as url:
        answer = httpx.options(url + "/v1/completions", headers=ask)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-origin" not in httpx.options(url + "/v1/completions", headers=ask | {"origin": "https://b.example"}).headers


def test_the_log_has_ids_and_numbers_and_no_words(server, caplog):
    caplog.set_level(logging.INFO, "nano_vllm.access")
    answer = httpx.post(server.url + "/v1/completions", json=dict(prompt="SECRET words", max_tokens=3), headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1" and answer.json()["id"] == "cmpl-mine-1"
    httpx.post(server.url + "/v1/completions", json=dict(prompt="SECRET", max_tokens=-1), headers={"x-request-id": "x" * 100})
    wait_until(lambda: len(caplog.records) >= 2)
    first, second = (json.loads(r.getMessage()) for r in caplog.records[:2])
    assert first["id"] == "mine-1" and first["status"] == 200 and first["completion_tokens"] == 3 and first["seconds"] > 0
    assert second["status"] == 400 and re.fullmatch("[0-9a-f]{32}", second["id"]) and "SECRET" not in caplog.text


# ---- the commands

def nano_vllm(*words, **options):
    code = "import sys; from nano_vllm.cli import main; sys.exit(main())"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stderr=subprocess.PIPE, text=True,
                            env=os.environ | dict(OMP_NUM_THREADS="1"), **options)


@contextmanager
def command(tiny, *words):
    "A server process; yields it and its address."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = nano_vllm("serve", tiny, "--port", port, "--num-kv-blocks", 200, "--served-model-name", NAME, *words)
    try:
        for line in process.stderr:
            if line.startswith("serving"): break
        url = f"http://127.0.0.1:{port}"
        def up():
            try: return httpx.get(url + "/health").status_code == 200
            except httpx.TransportError: return process.poll() is not None
        wait_until(up)
        yield SimpleNamespace(process=process, url=url)
    finally:
        process.kill()
        process.wait()


def test_sigterm_lets_answers_end_and_is_an_ordinary_exit(tiny):
    with command(tiny) as s:
        found = []
        def ask(stream): found.append(httpx.post(s.url + "/v1/completions", timeout=30, json=json.loads(LONG) | dict(stream=stream)))
        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
        events = threading.Thread(target=lambda: httpx.get(s.url + "/events", timeout=30))
        for t in (*threads, events): t.start()
        time.sleep(.3)
        s.process.send_signal(signal.SIGTERM)
        for t in (*threads, events): t.join(30)
        assert s.process.wait(30) == 0
        assert [a.status_code for a in found] == [200, 200] and any('"length"' in a.text for a in found)
        assert all("length" in a.text for a in found)


def test_the_command_counts_the_places_of_all_engines(monkeypatch):
    "And asks nothing of a scheduler that engines in other processes do not have."
    made = SimpleNamespace(shutdown=lambda: None)
    idle = SimpleNamespace(config=SimpleNamespace(host="h", port=1), run=lambda: None)
    monkeypatch.setattr(openai_api.AsyncLLM, "from_engine_args", lambda args: made)
    monkeypatch.setattr(openai_api, "API", lambda llm, name: None)
    monkeypatch.setattr(openai_api, "make_server", lambda api, **options: idle)
    monkeypatch.setattr(openai_api.signal, "signal", lambda *handler: None)
    assert main(["serve", "m", "--data-parallel-size", "2", "--max-num-seqs", "4", "--max-queue", "3"]) == 0
    assert made.max_open == 11


def test_what_does_not_end_in_time_is_cut(tiny):
    with command(tiny, "--shutdown-timeout", 1) as s:
        raw(s, http_post(b'{"prompt": ', length=100))         # half a body, whose 30 seconds are longer
        time.sleep(.3)
        s.process.send_signal(signal.SIGTERM)
        assert s.process.wait(10) == 0


def test_bench_serve_speaks_to_a_server(server, capsys, tmp_path):
    words = ["bench", "serve", "--base-url", server.url, "--model", NAME, "--num-prompts", "4", "--request-rate", "50", "--vocab-size", "100"]
    assert main([*words, "--output-json", str(tmp_path/"f.json")]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((tmp_path/"f.json").read_text()) and figures["completed"] == 4 and figures["request_rate"] == 50
    assert main([*words[:5], "nobody", *words[6:]]) == 2 and "404" in capsys.readouterr().err
    assert main([*words[:-2], "--request-rate", "-1"]) == 2
    capsys.readouterr()
    assert main([*words[:-1], "0"]) == 2 and "vocab_size must be an integer from 1" in capsys.readouterr().err


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("answer, lines", [
    (HEAD + b"3\r\nab\n\r\n1\r\nc\r\n2\r\n\nd\r\n0\r\n\r\n", [b"ab", b"c", b"d"]),       # lines that chunks cut
    (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\na\n\nbc", [b"a", b"", b"bc"]), (b"HTTP/1.1 200 OK\r\n\r\n", []),
    (HEAD + b"3\r\nab", "/path: "), (b"HTTP/1.1 200", "/path: "), (b"HTTP/1.1 503 Busy\r\n\r\nlater", "/path: status 503, b'later'")])
def test_the_benchmarks_client_reads_what_a_server_sends(answer, lines):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve_once():
            connection, _ = listener.accept()
            with connection:
                asked = connection.recv(2**16)
                for i in range(len(answer)): connection.sendall(answer[i:i + 1])
                return asked
        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(serve_once)
            async def read(): return [line async for line in post_lines(f"http://127.0.0.1:{listener.getsockname()[1]}/my", "/path", dict(a="é"), "key")]
            if isinstance(lines, list): assert run_all([read()]) == [lines]
            else:
                with pytest.raises(RuntimeError, match=re.escape(lines)): run_all([read()])
    head, body = asked.result().split(b"\r\n\r\n")
    assert head.startswith(b"POST /my/path HTTP/1.1\r\nHost: 127.0.0.1:") and b"\r\nAuthorization: Bearer key" in head and json.loads(body) == {"a": "é"}
    assert b"\r\nContent-Length: %d\r\n" % len(body) in head


def test_serve_refuses_what_it_cannot_do(tiny, capsys):
    assert main(["serve", str(tiny), "--max-queue", "-1"]) == 2 and "max_queue" in capsys.readouterr().err
    for option in ("port", "max-body", "shutdown-timeout"):
        assert main(["serve", str(tiny), f"--{option}", "-1"]) == 2 and f"{option.replace('-', '_')} must be" in capsys.readouterr().err
    assert main(["serve", "/nowhere"]) == 2
    capsys.readouterr()


def test_serve_takes_what_an_engine_takes(tiny, capsys):
    "Every argument of EngineArgs that a shell can give, and the model by either way."
    read = make_parser().parse_args
    for words in (["m"], ["--model", "m"], ["n", "--model", "m"], ["--model", "n", "m"]): assert read(["serve", *words]).model == "m"
    assert read(["serve"]).model == "smollm2-135m"
    args = EngineArgs.from_cli_args(read(["serve", "m", "--gpu-memory-utilization", ".5", "--enforce-eager", "-q", "int8", "--speculative-config", '{"method": "ngram"}']))
    assert (args.gpu_memory_utilization, args.enforce_eager, args.quantization, args.speculative_config) == (.5, True, "int8", {"method": "ngram"})
    assert main(["serve", str(tiny), "--gpu-memory-utilization", "2"]) == 2 and "gpu_memory_utilization must be" in capsys.readouterr().err


def test_what_the_server_needs_is_imported_when_it_is_needed():
    code = "import sys, nano_vllm; print([m for m in ('starlette', 'uvicorn', 'prometheus_client', 'openai', 'aiohttp') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---- long ones

@pytest.mark.slow
def test_a_soak_with_random_clients(server, llm):
    "Minutes of clients who stay, leave or send nonsense: every request is accounted for, and no block is lost."
    counts, end = {}, time.time() + float(os.environ.get("NANO_VLLM_SOAK", 60))

    def client(seed):
        rng = random.Random(seed)
        while time.time() < end:
            body = dict(prompt=[rng.randint(0, 9) for _ in range(rng.randint(1, 300))], max_tokens=rng.randint(1, 100), stream=rng.random() < .5,
                        n=rng.choice([1, 1, 3]), seed=1, ignore_eos=rng.random() < .5)
            if rng.random() < .2: body["temperature"] = -1
            if rng.random() < .4:
                with raw(server, http_post(json.dumps(body).encode())) as s:
                    s.settimeout(rng.random())
                    try: s.recv(rng.choice([1, 10**4]))
                    except OSError: pass
                status = "left"
            else:
                answer = httpx.post(server.url + "/v1/completions", json=body, timeout=60)
                status = answer.status_code
                assert status == (400 if "temperature" in body else 200) or status == 429, answer.text
                if status == 200 and body["stream"]: assert answer.text.endswith("data: [DONE]\n\n") and 'data: {"error"' not in answer.text
            counts[status] = counts.get(status, 0) + 1
    with ThreadPoolExecutor(24) as threads: list(threads.map(client, range(24)))
    print(counts)
    assert counts[200] > 20 and counts["left"] > 20


@pytest.mark.slow
def test_no_body_makes_the_server_fail(server, llm):
    "Schemathesis makes bodies from a schema of the fields, right and wrong ones: no answer is a 5xx."
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    kinds = {bool: "boolean", str: "string", dict: "object", list: "array"}
    def schema(fields, **more):
        properties = {n: {"type": kinds[fields[n]]} if fields[n] else {} for n in sorted(fields.keys() - {"model"})} | more
        return {"type": "object", "properties": properties, "additionalProperties": False}
    message = {"type": "object", "properties": {"role": {"enum": ["user", "assistant", "tool"]}, "content": {}, "tool_calls": {}}, "required": ["role"]}
    bodies = {"/v1/completions": schema(COMPLETION.fields, max_tokens={"type": "integer", "maximum": 5}),
              "/v1/chat/completions": schema(CHAT.fields, messages={"type": "array", "items": message}, max_tokens={"type": "integer", "maximum": 5}),
              "/tokenize": {"type": "object"}, "/detokenize": schema({"tokens": list})}
    paths = {path: {"post": {"requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
                             "responses": {"default": {"description": "any"}}}} for path, body in bodies.items()}
    api = schemathesis.openapi.from_dict({"openapi": "3.0.3", "info": {"title": "x", "version": "1"}, "paths": paths})
    seen = {}
    for operation in api.get_all_operations():
        @given(case=operation.ok().as_strategy())
        @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate], database=None)
        def holds(case):
            answer = case.call(base_url=server.url, timeout=30)
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (case.body, answer.text)
        holds()
    print(seen)
    assert seen[400] > 20


@pytest.fixture
def page(server):
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium: pytest.skip("no Chromium on the PATH")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        opened = browser.new_page()
        problems = []
        opened.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
        opened.on("pageerror", lambda e: problems.append(str(e)))
        opened.on("request", lambda r: None if r.url.startswith(server.url) else problems.append(f"another host: {r.url}"))
        opened.goto(server.url, wait_until="domcontentloaded")
        yield opened
        browser.close()
    refused = "Failed to load resource: the server responded with a status of 400 (Bad Request)"     # Chromium's own line, which no page can help
    assert [p for p in problems if p != refused] == []


def say(page, text, max_tokens=20):
    if not page.locator("#max_tokens").is_visible(): page.locator("summary").click()
    page.fill("#max_tokens", str(max_tokens))
    page.fill("#text", text)
    page.press("#text", "Enter")


@pytest.mark.slow
def test_the_page_holds_a_conversation(page):
    for i in range(2):
        say(page, f"Hello {i}")
        page.wait_for_function("document.querySelector('#stop').disabled && document.querySelector('#found').textContent != '–'")
    assert page.locator(".message.user").all_text_contents() == ["Hello 0", "Hello 1"] and page.locator(".message.assistant").count() == 2
    assert page.locator("#ttft").text_content().endswith(" ms") and float(page.locator("#rate").text_content()) > 0
    page.wait_for_function("document.querySelector('#blocks').textContent == '200' && document.querySelector('#cached').textContent != '0'")
    assert page.locator("#model").text_content() == NAME
    page.click("#new")
    assert page.locator(".message").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["click", "key"])
def test_the_page_stops_in_the_middle(page, llm, how):
    say(page, "Hello", 450)
    page.wait_for_function("document.querySelector('.assistant') && document.querySelector('.assistant').textContent.length > 20")
    page.wait_for_function("document.querySelector('#running').textContent == '1'")
    page.click("#stop") if how == "click" else page.keyboard.press("Escape")
    wait_until(lambda: not llm.engine.requests, seconds=5)
    page.wait_for_function("document.querySelector('#stop').disabled")
    said = page.locator(".assistant").text_content()
    say(page, "And now?", 5)
    page.wait_for_function("document.querySelectorAll('.assistant').length == 2 && document.querySelector('#stop').disabled")
    assert page.locator(".assistant").first.text_content() == said


@pytest.mark.slow
def test_the_page_tells_an_error_and_goes_on(page):
    say(page, "Hello " * 600)
    page.wait_for_selector(".error")
    assert "max_model_len" in page.locator(".error").text_content()


@pytest.mark.slow
def test_the_page_on_a_phone_in_the_dark_by_keyboard(page):
    page.set_viewport_size({"width": 360, "height": 740})
    page.emulate_media(color_scheme="dark")
    say(page, "x" * 300)
    page.wait_for_function("document.querySelector('#stop').disabled && document.querySelector('.assistant')")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    colors = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    dark, light = (sum(map(int, re.findall(r"\d+", c)[:3])) for c in colors)
    assert dark < 150 < 500 < light
    page.focus("#text")
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"send", "new", "SUMMARY", "temperature"} <= set(reached)


# ---- tools, with a template that has a place for them

def test_tools_go_into_the_template_and_calls_come_back(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path/"tools")
    (folder/"chat_template.jinja").write_text("{% for t in tools or [] %}T:{{ t.function.name }} {% endfor %}{% for m in messages %}"
                                              "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.a }}{% endfor %}|{% endfor %}")
    llm = LLM(folder, num_kv_blocks=50)
    tools = [dict(type="function", function=dict(name="add", parameters={}))]
    messages = [*HI, dict(role="assistant", content=None, tool_calls=[dict(id="1", type="function", function=dict(name="add", arguments='{"a": 77}'))]),
                dict(role="tool", tool_call_id="1", content="78")]
    ask = CHAT.read(dict(messages=messages, tools=tools), llm.engine)
    assert llm.tokenizer.decode(ask.prompts[0]["prompt_token_ids"]) == "T:add Hi|77|78|"
    with pytest.raises(ValueError, match="tool_calls must have JSON arguments"):
        CHAT.read(dict(messages=[dict(role="assistant", tool_calls=[dict(function=dict(name="f", arguments="{"))])]), llm.engine)
    out = SimpleNamespace(text='<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', finish_reason="stop", logprobs=None, token_ids=[1], stop_reason=None)
    piece = SimpleNamespace(prompt_logprobs=None)
    for stream, key in ((True, "delta"), (False, "message")):
        made = Choice(Ask(CHAT, [], None, dict(stream=stream, tools=tools)), 0).entry(piece, out)
        assert made["finish_reason"] == "tool_calls" and made[key]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    made = Choice(Ask(CHAT, [], None, dict(tools=tools, tool_choice="none")), 0).entry(piece, out)
    assert made["finish_reason"] == "stop" and made["message"]["content"] == out.text


def adding(*names):
    "Tools of these names, whose arguments are a number and a color."
    schema = dict(type="object", properties=dict(a=dict(type="integer", minimum=0, maximum=99), color=dict(enum=["red", "blue"])),
                  required=["a", "color"], additionalProperties=False)
    return [dict(type="function", function=dict(name=name, parameters=schema)) for name in names]


@pytest.mark.ci
@pytest.mark.parametrize("choice, called", [("required", {"add", "sub"}), (dict(type="function", function=dict(name="sub")), {"sub"})])
def test_a_call_that_is_asked_for_is_made(tiny, tmp_path, choice, called):
    folder = shutil.copytree(tiny, tmp_path/"tools")
    (folder/"chat_template.jinja").write_text("{% for t in tools %}{{ t.function.name }} {% endfor %}{{ messages[0].content }}")
    llm, names = LLM(folder, num_kv_blocks=200), set()
    for seed in range(8):
        ask = CHAT.read(dict(messages=HI, tools=adding("add", "sub"), tool_choice=choice, seed=seed), llm.engine)
        piece, = llm.generate(ask.prompts, ask.params, use_tqdm=False)
        made = Choice(ask, 0).entry(piece, piece.outputs[0])
        if made["finish_reason"] == "length": continue        # a tiny model may write spaces to the end
        call, = made["message"]["tool_calls"]
        assert made["message"]["content"] == "" and made["finish_reason"] == "tool_calls"
        names.add(call["function"]["name"])
        arguments = json.loads(call["function"]["arguments"])
        assert set(arguments) == {"a", "color"} and arguments["color"] in ("red", "blue") and 0 <= arguments["a"] <= 99
    assert names == called


def test_references_in_a_tools_parameters_lead_into_them(llm):
    "As pydantic writes nested types: two tools may use one name for different ones."
    def tool(name, kind):
        parameters = {"type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, "required": ["p"], "additionalProperties": False, "$defs": {"P": {"type": kind}}}
        return dict(type="function", function=dict(name=name, parameters=parameters))
    params = SamplingParams(**openai_api.call_form([tool("f", "integer"), tool('sag "é"', "boolean")]))
    for name, value, fits in (("f", "1", True), ("f", "true", False), ('sag "é"', "true", True), ('sag "é"', "1", False)):
        text = f'<tool_call>\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {{"p": {value}}}}}\n</tool_call>'
        ids = llm.tokenizer.encode(text)
        assert llm.engine.input_processor.make_mask(params).move_to(ids) == fits, text
        assert [c["function"]["name"] for c in openai_api.read_calls(text)] == [name]


def test_an_answer_has_the_form_that_a_client_asks_for(client):
    form, texts = schema_format(dict(enum=["red", "blue"])), set()
    for seed in range(6):
        made = client.chat.completions.create(model=NAME, messages=HI, response_format=form, seed=seed).choices[0]
        streamed = client.chat.completions.create(model=NAME, messages=HI, response_format=form, seed=seed, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
        assert text == made.message.content and made.finish_reason == "stop"
        assert json.loads(text) in ("red", "blue")
        texts.add(text)
    assert texts <= {'"red"', '"blue"'}
    made = client.chat.completions.create(model=NAME, messages=HI, response_format=dict(type="json_object"), max_tokens=5)
    assert made.choices[0].message.content.startswith("{")
    tag = dict(begin="<f>", schema=dict(enum=[7]), end="</f>")
    for tags, status in (([tag], 200), ([dict(tag, begin="g")], 400)):
        body = dict(messages=HI, response_format=dict(type="structural_tag", structures=tags, triggers=["<f"]), max_tokens=3)
        assert httpx.post(f"{client.base_url}chat/completions", json=body).status_code == status
    for extra, allowed in ((dict(choice=["yes", "no"]), "yes|no"), (dict(regex="[0-9]{4}"), "[0-9]{4}")):
        made = client.completions.create(model=NAME, prompt="Hi", max_tokens=20, extra_body=dict(structured_outputs=extra))
        assert re.fullmatch(allowed, made.choices[0].text) and made.choices[0].finish_reason == "stop"
