"""Recorded decode steps on several ranks: the tokens of one rank's eager steps, in both loops.

The recorder is a stand-in, the ranks are processes that talk over gloo, and Triton's kernels run in the interpreter."""
import random

import pytest
import torch

from helpers import tiny_folder
from nano_vllm import LLM, SamplingParams
from nano_vllm.layers import TensorParallelGroup
from nano_vllm.parallel import StartedGroup
from rank_targets import ranked_runner
from test_graphs import PLAIN, StandIn, graph_runner, receive, run, schedule, sequences

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for the GPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"), tokenizer=False, vocab_size=97, hidden_size=48, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=1, head_dim=16)


def some_sequences(n, seed=0, **more):
    rng = random.Random(seed)
    return sequences(n, rng, lambda i: rng.choice(PLAIN) | more)


@pytest.mark.ci
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_replay_what_one_rank_computes(folder, size):
    "Rows come and go; tokens known to the host or only to the devices; more is asked than is recorded; for four ranks, KV heads in copies."
    alone, group = ranked_runner(TensorParallelGroup(), folder), StartedGroup(size, "cpu", "rank_targets.serve_graphs", str(folder))
    with group.collective_guard(): runner = ranked_runner(group, folder, StandIn())
    heard = []
    broadcast = group.broadcast
    group.broadcast = lambda message: heard.append(message) or broadcast(message)
    try:
        for n, in_flight, more in ((3, 1, {}), (4, 2, {}), (2, 2, dict(top_k=3))):
            seqs = some_sequences(n, n, **more)
            expected, before = run(alone, seqs, steps=4), len(StandIn.made[-1].replayed)
            assert run(runner, seqs, steps=4, in_flight=in_flight) == expected
            assert len(StandIn.made[-1].replayed) >= before + 2
        found = []
        for one in (alone, runner):                          # rows that move: who leaves is followed by the last
            seqs = some_sequences(4, 7, temperature=.8)
            run(one, seqs, steps=2)
            handles = [one.execute(schedule(one, chosen, removed)) for chosen, removed in
                       ((seqs, ()), ([seqs[i] for i in (3, 0, 2)], [seqs[1]]), ([seqs[2], seqs[3]], [seqs[0]]), ([seqs[2], seqs[3]], ()))]
            for handle in handles: receive(handle)
            found.append([list(seq.output_token_ids) for seq in seqs])
        assert found[0] == found[1]
        steady = [call.args[2].shape[1] for call in heard if getattr(call, "method", None) == "repeat_graph"]
        assert min(steady) == 0 and len(steady) > 8, "tables are sent when they change, and only then"
    finally: group.close()


def test_a_rank_whose_replay_fails_is_named(folder):
    group = StartedGroup(2, "cpu", "rank_targets.serve_graphs", str(folder))
    with group.collective_guard(): runner = ranked_runner(group, folder, StandIn())
    send = group.broadcast
    def garble(call): return send(call if not hasattr(call, "args") else type(call)(call.method, (10**6, *call.args[1:]), wants_answer=False))
    group.broadcast = garble
    with pytest.raises(RuntimeError, match="(?s)rank 1 failed:.*KeyError: 1000000"): run(runner, some_sequences(2), steps=3)
    assert not group.close.alive


def test_one_rank_sends_no_tables():
    _, runner = graph_runner()
    assert runner.graphs.new_cells(4).shape == (3, 0)


def test_the_engine_overlaps_on_two_ranks(folder):
    "Without recorded steps as well: then rank 0 reads the tokens before it sends them."
    params = [SamplingParams(temperature=t, seed=i, max_tokens=6 + i, ignore_eos=True) for i, t in enumerate((0, 1, .7))]
    prompts = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (3, 20, 9)]
    options = dict(skip_tokenizer_init=True, device="cpu", num_kv_blocks=12, block_size=4, max_num_seqs=3, max_num_batched_tokens=8)
    found = []
    for size in (1, 2):
        llm = LLM(folder, tensor_parallel_size=size, async_scheduling=True, **options)
        assert llm.engine.num_in_flight == 2
        found.append([o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)])
    assert found[0] == found[1]
