"Vectors of texts: transformers' last states, whatever the chunks, company, cache and interruptions; what cannot be had is refused by name."
import asyncio
import base64
import struct
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_idle, logits_tolerance

from nano_vllm import LLM, EmbeddingRequestOutput, EngineArgs, LLMEngine, LoRARequest, PoolingParams, SamplingParams, ScoringRequestOutput
from nano_vllm.async_llm import AsyncLLM
from nano_vllm.batch_invariance import keeps_rows_apart
from nano_vllm.cli import main, make_parser
from nano_vllm.cpu_kernels import can_build
from nano_vllm.cpu_products import TiledProduct
from nano_vllm.pooling import pool, to_base64
from nano_vllm.sampling_params import BeamSearchParams, RequestOutputKind
from nano_vllm.server import serving

NAME = "tiny"
TEXTS = ["Hi", "The cat sits on the mat.", "The cat sits on the sofa, and looks at the birds in the tree before the window.", "Stocks fell on Monday."]


def make(folder, **options): return LLM(folder, **dict(runner="pooling", num_kv_blocks=200, block_size=4, dtype="float32", device="cpu", max_model_len=256) | options)


@pytest.fixture(scope="module")
def llm(tiny): return make(tiny, hf_overrides={"is_matryoshka": True})


@pytest.fixture(autouse=True)
def idle(request):
    yield
    if "llm" in request.fixturenames: assert_idle(request.getfixturevalue("llm"))


@pytest.fixture(scope="module")
def states(tiny):
    "A function: transformers' normalized last state of some ids."
    import transformers
    model = transformers.AutoModel.from_pretrained(tiny, dtype=torch.float32).eval()
    return lambda ids: last_state(model, ids)


@torch.inference_mode()
def last_state(model, ids): return F.normalize(model(torch.tensor([ids])).last_hidden_state[0, -1], dim=0)


def embed(llm, prompts, **params):
    "(vectors, outputs)"
    outs = llm.embed(prompts, pooling_params=PoolingParams(**params), use_tqdm=False)
    return torch.tensor([o.outputs.embedding for o in outs]), outs


def limit(llm, ids, vectors): return logits_tolerance(llm.engine.runner.model.config, max(map(len, ids)), vectors)


def ids_of(*lengths):
    g = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, 49152, (n,), generator=g).tolist() for n in lengths]


def prepare(llm, budget=8192, keep=False):
    llm.engine.scheduler.budget = llm.engine.scheduler.max_tokens_per_sequence = budget
    if not keep: llm.engine.scheduler.manager.reset()


# ---- right, and the same whatever happens

@pytest.mark.parametrize("budget", [1, 7, 8192])
def test_vectors_are_transformers_last_states(llm, states, budget):
    ids = ids_of(1, 2, 5, 16, 17, 40)
    prepare(llm, budget)
    vectors, outs = embed(llm, ids)
    expected = torch.stack([states(i) for i in ids])
    assert (vectors - expected).abs().max() < limit(llm, ids, expected)
    assert [o.prompt_token_ids for o in outs] == ids and all(o.finished and o.error is None for o in outs)
    prepare(llm)


def test_the_demo_models(hf):
    llm = make("smollm2-135m", num_kv_blocks=60, block_size=16)
    vectors, outs = embed(llm, TEXTS)
    ids = [o.prompt_token_ids for o in outs]
    assert ids == [hf[1].encode(text) for text in TEXTS]
    expected = torch.stack([last_state(hf[0].model, i) for i in ids])
    assert (vectors - expected).abs().max() < limit(llm, ids, expected)
    assert_idle(llm)


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_fewer_bits(tiny, states, dtype):
    ids, llm = ids_of(3, 20), make(tiny, dtype=dtype)
    vectors, _ = embed(llm, ids)
    expected = torch.stack([states(i) for i in ids])
    finer = torch.finfo(torch.float32).eps / torch.finfo(getattr(torch, dtype)).eps
    assert (vectors - expected).abs().max() < limit(llm, ids, expected) / finer
    assert (vectors.norm(dim=1) - 1).abs().max() < 1e-5


def test_company_and_cache_change_nothing(llm):
    ids = ids_of(40, 3, 9)
    ids.append(ids[0][:24] + ids[1])          # shares six blocks with the first
    prepare(llm)
    alone = torch.cat([embed(llm, [i])[0] for i in ids])
    for budget, keep, skip in ((8192, False, None), (8192, True, None), (5, True, None), (5, False, None), (5, True, True)):
        prepare(llm, budget, keep)
        vectors, outs = embed(llm, ids, skip_reading_prefix_cache=skip)
        assert (vectors - alone).abs().max() < limit(llm, ids, alone)
        found = [o.num_cached_tokens for o in outs]
        if keep: assert (found[0] >= 36) == (skip is None) and all(n < len(i) for n, i in zip(found, ids))    # at least one token is computed
    prepare(llm)


@pytest.mark.skipif(not can_build() or not keeps_rows_apart(TiledProduct, torch.float32), reason="not to be had here")
def test_batch_invariance_gives_the_same_bits(tiny):
    llm, ids = make(tiny, batch_invariant=True), ids_of(30, 3, 18)
    alone = torch.cat([embed(llm, [i])[0] for i in ids])
    for budget, keep in ((8192, False), (8192, True), (7, False)):
        prepare(llm, budget, keep)
        assert torch.equal(embed(llm, ids)[0], alone)


def test_only_last_states_are_read(llm, monkeypatch):
    runner, rows = llm.engine.runner, []
    read = type(runner).read_out
    monkeypatch.setattr(type(runner), "read_out", lambda self, hidden: (rows.append(len(hidden)), read(self, hidden))[1])
    monkeypatch.setattr(runner.model, "compute_logits", None)       # nobody asks for logits
    prepare(llm, 10)
    embed(llm, ids_of(35, 12))
    prepare(llm)
    assert sum(rows) == 2 and len(rows) == 5 and rows[:3] == [0, 0, 0]


def test_texts_wait_for_blocks_and_are_never_preempted(tiny):
    llm, ids = make(tiny, num_kv_blocks=12, max_num_batched_tokens=16, enable_prefix_caching=False), ids_of(40, 38, 44, 20, 47)
    alone = torch.cat([embed(llm, [i])[0] for i in ids])
    vectors, outs = embed(llm, ids)
    assert (vectors - alone).abs().max() < limit(llm, ids, alone) and llm.engine.scheduler.num_preemptions == 0      # a text gets all its blocks when it is let in
    assert all(o.num_cached_tokens == 0 for o in outs)       # although all were asked before
    for _ in range(2): assert embed(llm, ids[:1])[1][0].num_cached_tokens == 0
    assert_idle(llm)


def test_steps_ahead(tiny):
    ids = ids_of(30, 3, 18)
    ahead, plain = (embed(make(tiny, async_scheduling=wish, max_num_batched_tokens=8), ids)[0] for wish in (True, False))
    assert torch.equal(ahead, plain)


def test_a_text_may_be_as_long_as_the_model(tiny):
    llm = make(tiny, max_model_len=32)
    assert embed(llm, ids_of(32))[0].shape == (1, 32)
    with pytest.raises(ValueError, match=r"prompts\[1\]: the prompt has 33 tokens, but max_model_len is 32"): llm.embed([[1], [1] * 33])
    small = make(tiny, num_kv_blocks=3)
    assert len(embed(small, ids_of(12))[0]) == 1
    with pytest.raises(ValueError, match="13 prompt tokens need 4 KV blocks, but num_kv_blocks is 3"): small.embed([1] * 13)
    assert_idle(small)


@pytest.mark.slow
def test_two_ranks(tiny):
    ids, llm = ids_of(20, 3), make(tiny, tensor_parallel_size=2)
    alone = embed(make(tiny), ids)[0]
    assert (embed(llm, ids)[0] - alone).abs().max() < limit(llm, ids, alone)


def test_adapters(tiny, tmp_path):
    from test_lora import make_adapter
    ids, llm = ids_of(9)[0], make(tiny, enable_lora=True)
    adapter = LoRARequest("a", 1, str(make_adapter(tiny, tmp_path/"a")))
    outs = llm.embed([ids, ids], lora_request=[None, adapter], use_tqdm=False)
    base, changed = (torch.tensor(o.outputs.embedding) for o in outs)
    assert (base - embed(make(tiny), [ids])[0][0]).abs().max() < limit(llm, [ids], base[None])
    assert (base - changed).abs().max() > 0.01
    fresh, = make(tiny, enable_lora=True).embed(ids, lora_request=adapter, use_tqdm=False)
    assert (torch.tensor(fresh.outputs.embedding) - changed).abs().max() < limit(llm, [ids], changed[None])     # no block of the other's is used


# ---- what is wanted of a vector

def test_pool_cuts_then_normalizes():
    states = torch.tensor([[3., 4, 12], [3, 4, 12], [3, 4, 12], [0, 0, 5]])
    vectors = pool(states, [PoolingParams(), PoolingParams(dimensions=2), PoolingParams(dimensions=2, use_activation=False), PoolingParams(dimensions=2)])
    assert torch.allclose(vectors, torch.tensor([[3/13, 4/13, 12/13], [.6, .8, 0], [3, 4, 0], [0, 0, 0]]))
    assert pool(states[:0], []).shape == (0, 3)


def test_parameters_of_each_prompt(llm, states):
    ids = ids_of(9, 9, 9)
    params = [PoolingParams(dimensions=5), PoolingParams(use_activation=False), PoolingParams(dimensions=32, task="embed")]
    short, raw, whole = (torch.tensor(o.outputs.embedding) for o in llm.embed(ids, pooling_params=params, use_tqdm=False))
    assert (len(short), len(raw), len(whole)) == (5, 32, 32) and float(raw.norm()) > 1.5
    for got, expected in ((short, F.normalize(states(ids[0])[:5], dim=0)), (F.normalize(raw, dim=0), states(ids[1])), (whole, states(ids[2]))):
        assert (got - expected).abs().max() < limit(llm, ids, expected)
    with pytest.raises(ValueError, match="a list of 3, one for each prompt, got a list of 2"): llm.embed(ids, pooling_params=params[:2])


@pytest.mark.parametrize("bad, said", [
    (dict(dimensions=0), "dimensions must be an integer of at least 1, got 0"), (dict(dimensions=1.5), "dimensions must be an integer"), (dict(use_activation="yes"), "use_activation must be bool"),
    (dict(task="classify"), "task must be 'embed' for vectors, got 'classify'"), (dict(step_tag_id=3), "step_tag_id is refused"), (dict(returned_token_ids=[1]), "returned_token_ids is refused"),
    (dict(late_interaction_params={"mode": "x"}), "late_interaction_params is refused"), (dict(extra_kwargs={"a": 1}), "extra_kwargs is refused"), (dict(requires_token_ids=True), "requires_token_ids is refused"),
    (dict(step_tag_id=0), "step_tag_id is refused"), (dict(returned_token_ids=[]), "returned_token_ids is refused"), (dict(output_kind=RequestOutputKind.DELTA), "output_kind must be"), (dict(skip_reading_prefix_cache=1), "skip_reading_prefix_cache must be bool")])
def test_bad_parameters(bad, said):
    with pytest.raises(ValueError, match=said): PoolingParams(**bad)


def test_dimensions_are_those_the_model_was_trained_for(tiny, llm):
    for overrides, good, bad in ((None, (), (4, 32)), ({"matryoshka_dimensions": [4, 16]}, (4, 16), (5, 32)), ({"is_matryoshka": True}, (1, 32), (33,))):
        other = make(tiny, hf_overrides=overrides)
        for n in good: assert embed(other, "Hi", dimensions=n)[0].shape == (1, n)
        for n in bad:
            with pytest.raises(ValueError, match=rf"prompts\[0\]: dimensions must be .*got {n}"): embed(other, "Hi", dimensions=n)
        assert_idle(other)


@pytest.mark.parametrize("sizes", [64, "64", [64, "x"], {"64": 1}])
def test_sizes_that_are_no_list_are_refused_at_the_start(tiny, sizes):
    with pytest.raises(ValueError, match="matryoshka_dimensions in config.json must be a list of integers, got"): make(tiny, hf_overrides={"matryoshka_dimensions": sizes})


# ---- who may ask for what

def test_text_and_vectors_are_told_apart(llm, tiny):
    asks = dict(generate=lambda: llm.generate("Hi"), params=lambda: llm.generate(["Hi"], [SamplingParams()]), stream=lambda: list(llm.stream("Hi")), enqueue=lambda: llm.enqueue("Hi"),
                chat=lambda: llm.chat([{"role": "user", "content": "Hi"}]), beams=lambda: llm.beam_search(["Hi"], BeamSearchParams(2, 2)))
    for ask in asks.values():
        with pytest.raises(ValueError, match="runner='pooling': it has embed and score; to generate text, leave runner out"): ask()
    writer = LLM(tiny, num_kv_blocks=20)
    for ask in (lambda: writer.embed("Hi"), lambda: writer.score("Hi", "Ho")):
        with pytest.raises(ValueError, match=r"needs LLM\(model, runner='pooling'\)"): ask()
    with pytest.raises(ValueError, match="sampling_params must be SamplingParams"): writer.generate("Hi", PoolingParams())
    with pytest.raises(ValueError, match="pooling"): llm.embed("Hi", pooling_params=SamplingParams())


def test_arguments():
    assert EngineArgs("x").runner == EngineArgs("x", runner="generate").runner == EngineArgs("x", convert="none").runner == "generate"
    assert EngineArgs("x", convert="embed").runner == EngineArgs("x", runner="pooling").runner == EngineArgs("x", runner="pooling", convert="embed").runner == "pooling"
    assert EngineArgs("x", runner="generate", convert="embed").runner == "generate"
    for bad in (dict(runner="draft"), dict(runner=None), dict(convert="classify"), dict(runner="pooling", convert="none")):
        with pytest.raises(ValueError, match=f"{list(bad)[-1]} must be"): EngineArgs("x", **bad)


@pytest.mark.parametrize("options", [dict(speculative_config={"method": "ngram", "num_speculative_tokens": 2}), dict(data_parallel_size=2), dict(pipeline_parallel_size=2),
                                     dict(logits_processors=["nano_vllm.model_runner:LogitsProcessor"])])
def test_what_cannot_be_combined(tiny, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be left out with runner='pooling'"): make(tiny, **options)


def test_one_bad_prompt_leaves_no_trace(llm):
    for bad in ([], [1, 10**9], 7):
        with pytest.raises(ValueError, match=r"prompts\[1\]"): llm.embed(["Hi", bad])
    assert llm.embed([]) == []


# ---- scores

def test_scores(llm):
    (a, b, c), _ = embed(llm, TEXTS[:3])
    def scores(*pair): return [s.outputs.score for s in llm.score(*pair, use_tqdm=False)]
    assert scores(TEXTS[0], TEXTS[1]) == pytest.approx([float(a @ b)], abs=1e-6)
    assert scores(TEXTS[0], TEXTS[:3]) == pytest.approx([1, float(a @ b), float(a @ c)], abs=1e-6)
    assert scores(TEXTS[:2], TEXTS[1:3]) == pytest.approx([float(a @ b), float(b @ c)], abs=1e-6)
    raw = llm.score(TEXTS[0], TEXTS[1], pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
    assert raw[0].outputs.score == pytest.approx(float(a @ b), abs=1e-6)
    out, = llm.score(TEXTS[0], TEXTS[1], use_tqdm=False)
    ids = [llm.tokenizer.encode(text) for text in TEXTS[:2]]
    assert isinstance(out, ScoringRequestOutput) and out.finished and out.prompt_token_ids == ids[0] + [llm.get_tokenizer().pad_token_id] + ids[1]
    for pair in ((TEXTS[:2], TEXTS[:3]), ([], TEXTS), (TEXTS[:3], TEXTS[0]), (TEXTS[0], [])):
        with pytest.raises(ValueError, match="data_1 and data_2 must be 1:1, 1:N or N:N"): llm.score(*pair)
    with pytest.raises(ValueError, match="chat_template is refused"): llm.score("a", "b", chat_template="{{ 1 }}")


# ---- nothing is lost

PLACES = ["runner.execute", "scheduler.schedule", "scheduler.update", "scheduler.finish", "output_processor.process", "output_processor.finish", "receive", "launch"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("nth", [1, 3])
def test_an_interrupted_step_loses_no_vector(llm, monkeypatch, place, after, nth):
    ids, engine = ids_of(14, 3, 22, 7), llm.llm_engine
    prepare(llm)
    expected = embed(llm, ids)[0]
    prepare(llm, 8)
    *path, name = place.split(".")
    owner, calls = getattr(llm.engine, path[0]) if path else llm.engine, []
    real = getattr(owner, name)

    def breaks(*args, **options):
        calls.append(0)
        if len(calls) == nth and not after: raise KeyboardInterrupt
        result = real(*args, **options)
        if len(calls) == nth: raise KeyboardInterrupt
        return result
    monkeypatch.setattr(owner, name, breaks)
    for i, prompt in enumerate(ids): engine.add_request(f"r{i}", {"prompt_token_ids": prompt}, PoolingParams())
    outs, interrupted = {}, 0
    while engine.has_unfinished_requests():
        try: news = engine.step()
        except KeyboardInterrupt:
            interrupted += 1
            continue
        for out in news:
            assert isinstance(out, EmbeddingRequestOutput) and out.request_id not in outs
            outs[out.request_id] = out
    prepare(llm)
    assert interrupted == 1 and len(outs) == 4
    vectors = torch.tensor([outs[f"r{i}"].outputs.embedding for i in range(4)])
    assert (vectors - expected).abs().max() < limit(llm, ids, expected)


def test_an_aborted_request_has_no_vector(llm):
    engine = llm.llm_engine
    prepare(llm, 8)
    engine.add_request("a", {"prompt_token_ids": ids_of(30)[0]}, PoolingParams())
    engine.step()
    engine.abort_request(["a"])
    prepare(llm)
    assert not engine.has_unfinished_requests()


# ---- over HTTP

@pytest.fixture(scope="module")
def server(tiny):
    llm = make(tiny, hf_overrides={"is_matryoshka": True})
    alone = AsyncLLM(llm.engine, max_open=48).start()
    with serving(alone, NAME) as url: yield SimpleNamespace(llm=llm, alone=alone, url=url)
    alone.shutdown()
    assert_idle(llm)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="-", max_retries=0) as c: yield c


def test_openais_client(client, server, llm):
    for given in (TEXTS[1], TEXTS, [5, 6, 7], [[5, 6, 7], [8]]):
        expected, outs = embed(llm, given)
        num_tokens = sum(len(o.prompt_token_ids) for o in outs)
        for form in ({}, dict(encoding_format="float")):     # by default the client asks for base64, and decodes it
            made = client.embeddings.create(model=NAME, input=given, **form)
            assert (torch.tensor([d.embedding for d in made.data]) - expected).abs().max() < 1e-5
            assert all(type(d.embedding) is list for d in made.data) and [d.index for d in made.data] == list(range(len(expected))) and made.model == NAME and made.object == "list"
            assert made.usage.prompt_tokens == made.usage.total_tokens == num_tokens
    coded = httpx.post(server.url + "/v1/embeddings", json=dict(input=[8], encoding_format="base64")).json()["data"][0]["embedding"]
    assert (torch.tensor(struct.unpack("<32f", base64.b64decode(coded))) - expected[1]).abs().max() < 1e-5
    short = client.embeddings.create(model=NAME, input="Hi", dimensions=5, encoding_format="float").data[0].embedding
    assert len(short) == 5 and sum(x * x for x in short) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("body, status, said", [
    (dict(), 400, "input must have a prompt"), (dict(input=[]), 400, "input must have"), (dict(input=""), 400, "at least 1 token"), (dict(input=["Hi", [10**9]]), 400, "token ids must be"),
    (dict(input="Hi", model="other"), 404, "is not served"), (dict(input="Hi", encoding_format="hex"), 400, "encoding_format must be one of float, base64"), (dict(input={"a": 1}), 400, "prompt"),
    (dict(input="Hi", dimensions=33), 400, "dimensions must be"), (dict(input="Hi", dimensions="5"), 400, "dimensions must be an integer"), (dict(input="Hi", temperature=1), 400, "temperature is not a field"),
    (dict(input=[1] * 257), 400, "max_model_len is 256"), (dict(input=["Hi"] * 49), 400, "at most 48")])
def test_bad_requests(server, body, status, said):
    answer = httpx.post(server.url + "/v1/embeddings", json=body)
    error = answer.json()["error"]
    assert answer.status_code == status and said in error["message"], answer.text
    assert error["param"] in ("input", *body) and error["param"] in error["message"]


def test_each_kind_of_server_has_its_own_routes(server, tiny):
    for path in ("/v1/completions", "/v1/chat/completions"): assert httpx.post(server.url + path, json=dict(prompt="Hi", messages=[])).status_code == 404
    assert httpx.get(server.url + "/v1/models").json()["data"][0]["id"] == NAME
    writer = AsyncLLM(LLM(tiny, num_kv_blocks=20).engine).start()
    with serving(writer, NAME) as url:
        for path in ("/v1/embeddings", "/score"): assert httpx.post(url + path, json=dict(input="Hi")).status_code == 404
    writer.shutdown()


@pytest.mark.parametrize("body, param, said", [
    (dict(), None, "text_1 and text_2 must be 1:1"), (dict(text_1=["a", "b"], text_2=["c"]), "text_1", "text_1 and text_2 must be 1:1, 1:N or N:N prompts, got 2:1"),
    (dict(text_1="", text_2="b"), "text_1", "text_1 and text_2: prompts[0]: prompt must have at least 1 token"),
    (dict(text_1="a", text_2=[[10**9]]), "text_1", "text_1 and text_2: prompts[1]: ")])
def test_bad_pairs(server, body, param, said):
    answer = httpx.post(server.url + "/score", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param and said in answer.json()["error"]["message"]


def test_scores_over_http(server, llm):
    for path in ("/score", "/v1/score"):
        made = httpx.post(server.url + path, json=dict(model=NAME, text_1=TEXTS[0], text_2=TEXTS[1:3])).json()
        expected = [s.outputs.score for s in llm.score(TEXTS[0], TEXTS[1:3], use_tqdm=False)]
        assert [d["score"] for d in made["data"]] == pytest.approx(expected, abs=1e-5) and made["data"][1]["index"] == 1
        assert made["usage"]["prompt_tokens"] == sum(len(llm.tokenizer.encode(t)) for t in TEXTS[:3])
    assert httpx.post(server.url + "/score", json=dict(text_1="a")).status_code == 400


def test_prompts_are_counted(server):
    def counted():
        lines = httpx.get(server.url + "/metrics").text.splitlines()
        return float(next(x for x in lines if x.startswith("vllm:prompt_tokens_total")).split()[-1])
    before = counted()
    httpx.post(server.url + "/v1/embeddings", json=dict(input=[5, 6, 7]))
    assert counted() == before + 3


def test_a_client_that_leaves_early_leaves_nothing(server):
    async def leave():
        async with httpx.AsyncClient() as c:
            with pytest.raises(httpx.TimeoutException): await c.post(server.url + "/v1/embeddings", json=dict(input=ids_of(*[200] * 40)), timeout=.02)
        for _ in range(500):
            if not server.alone.readers and not server.llm.engine.requests: return
            await asyncio.sleep(.01)
    asyncio.run(leave())
    assert not server.alone.readers and not server.llm.engine.requests and server.alone.num_open == 0


def test_base64_is_exact():
    vector = torch.randn(7).tolist()
    assert list(struct.unpack("<7f", base64.b64decode(to_base64(vector)))) == vector


def test_command_line(tiny, capsys):
    assert make_parser().parse_args(["serve", "x", "--runner", "pooling"]).runner == "pooling"
    assert main(["generate", "--model", str(tiny), "--runner", "pooling", "Hi"]) == 2
    assert "runner='pooling': it has embed and score" in capsys.readouterr().err
    assert main(["serve", str(tiny), "--runner", "drawing"]) == 2
    assert "runner must be one of auto, generate, pooling, got 'drawing'" in capsys.readouterr().err
