"""Recorded decode steps: the tokens of eager ones, for every batch size, from static tensors alone.

The recorder is a stand-in that remembers the step and calls it again; Triton's kernels run in the interpreter."""
import random
from contextlib import contextmanager

import pytest
import torch

from helpers import tiny_folder
from nano_vllm import LLM, SamplingParams
from nano_vllm.attention import TorchAttention, make_batch
from nano_vllm.kv_blocks import BlockPool, Chunk, Sequence
from nano_vllm.layers import Ranks
from nano_vllm.model_runner import GRAPHS, RECORDERS, TABLE, DecodeGraphs, GpuRecorder, ModelRunner, bucket_sizes
from test_model_runner import make_config, make_runner

triton_attention = pytest.importorskip("nano_vllm.triton_attention")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for the GPU")


class StandIn:
    "Records by remembering; counts what is replayed."
    made = []
    def __init__(self):
        self.recorded, self.replayed = [], []
        StandIn.made.append(self)

    def record(self, step):
        self.recorded.append(step.args[0])
        step()
        return lambda: (self.replayed.append(step.args[0]), step())


@pytest.fixture
def recorder(monkeypatch):
    "The stand-in, and the graphs of chapter 08, which send everything in every step (the others: test_rows.py)."
    monkeypatch.setitem(RECORDERS, "cpu", StandIn)
    monkeypatch.setitem(GRAPHS, "decode", DecodeGraphs)
    return StandIn


def graph_runner(max_num_seqs=5, max_len=40, **changes):
    "Two equal runners, one of them with recorded steps."
    config = make_config(num_layers=1, **changes)
    eager = make_runner(triton_attention.TritonAttention, config, num_blocks=60)
    graphs = ModelRunner(eager.model, triton_attention.TritonAttention, 60, 4, max_num_seqs=max_num_seqs)
    graphs.capture_graphs(max_len)
    return eager, graphs


def sequences(n, rng, vary):
    "`n` sequences with blocks for 20 tokens, prompts of 1 to 9."
    pool, seqs = BlockPool(60, 4), []
    for i in range(n):
        seqs.append(Sequence(str(i), [rng.randrange(37) for _ in range(rng.randint(1, 9))], SamplingParams(**vary(i)),
                             seed=rng.getrandbits(62), stop_token_ids={1, 2}))
    for seq in rng.sample(seqs, n): assert pool.grow(seq, 20)
    return seqs


def run(runner, seqs, steps=3, before=lambda: None):
    for seq in seqs: seq.num_computed_tokens, seq.output_token_ids = 0, []
    for step in range(steps):
        work = [Chunk(seq, seq.num_tokens - seq.num_computed_tokens) for seq in seqs]
        before()
        for seq, token in zip(seqs, runner.sample(make_batch(work, 4), seqs).tolist()):
            seq.num_computed_tokens = seq.num_tokens
            seq.output_token_ids.append(token)
    return [list(seq.output_token_ids) for seq in seqs]


@torch.inference_mode()
def poison(graphs):
    "Legal values, all wrong, in every tensor that a step must fill in."
    graphs.rows[:, :TABLE] = torch.tensor([3, 30, 5, 5, torch.tensor(50.).view(torch.int32)])
    graphs.rows[:, TABLE:] = 59
    graphs.logits.fill_(torch.nan)


PLAIN = [dict(temperature=0), dict(temperature=1), dict(temperature=.6), dict(temperature=0, stop="x")]
MORE = PLAIN + [dict(top_k=3), dict(top_p=.5, temperature=1.2), dict(repetition_penalty=1.5), dict(min_tokens=3), dict(min_p=.2)]


@pytest.mark.parametrize("largest", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 30, 64, 255, 256])
def test_every_batch_size_has_a_bucket(largest):
    sizes = bucket_sizes(largest)
    assert sizes == sorted(set(sizes)) and sizes[-1] == largest and sizes[0] == 1
    for n in range(1, largest + 1): assert min(s for s in sizes if s >= n) - n < 8


@pytest.mark.parametrize("changes", [{}, dict(sliding_window=6), dict(num_heads=3, num_kv_heads=3, tied=True)], ids=str)
def test_graph_equals_eager_at_every_batch_size(recorder, changes):
    eager, graphs = graph_runner(**changes)
    used = recorder.made[-1]
    assert used.recorded == [5, 4, 2, 1]                    # the largest first
    for n in range(1, 6):
        rng = random.Random(n)
        seqs = sequences(n, rng, lambda i: rng.choice(PLAIN))
        expected, before = run(eager, seqs), len(used.replayed)
        assert run(graphs, seqs, before=lambda: poison(graphs.graphs)) == expected
        replays = used.replayed[before:]
        assert 2 <= len(replays) <= 3 and set(replays) == {min(s for s in (1, 2, 4, 5) if s >= n)}
        torch.testing.assert_close(graphs.kv_cache, eager.kv_cache)


def test_rows_that_ask_for_more_are_sampled_outside(recorder):
    eager, graphs = graph_runner()
    for seed in range(3):
        rng = random.Random(seed)
        seqs = sequences(rng.randint(2, 5), rng, lambda i: rng.choice(MORE))
        expected, before = run(eager, seqs), len(recorder.made[-1].replayed)
        assert run(graphs, seqs, before=lambda: poison(graphs.graphs)) == expected
        assert len(recorder.made[-1].replayed) - before >= 2


def test_padding_writes_nothing(recorder):
    _, graphs = graph_runner()
    seqs = [seq for seq in sequences(4, random.Random(0), lambda i: {}) if 0 not in seq.block_table]
    assert len(seqs) == 3      # in the bucket of 4; block 0 is where the padded row would write, were it not for slot -1
    graphs.kv_cache.fill_(7.)
    run(graphs, seqs, steps=3, before=lambda: poison(graphs.graphs))
    written = (graphs.kv_cache != 7.).any(-1).any(-1).all(0).all(0).flatten().nonzero().flatten().tolist()
    mine = [s.block_table[p // 4] * 4 + p % 4 for s in seqs for p in range(s.num_computed_tokens)]
    assert written == sorted(mine)


def test_the_logits_of_a_step_outlive_the_next(recorder):
    eager, graphs = graph_runner()
    seqs = sequences(3, random.Random(1), lambda i: dict(temperature=0))
    run(graphs, seqs, steps=1), run(eager, seqs, steps=1)
    batch = make_batch([Chunk(seq, 1) for seq in seqs], 4)
    kept, expected = graphs.execute(batch), eager.execute(batch)
    poison(graphs.graphs)
    torch.testing.assert_close(kept, expected)


def test_the_last_tokens_feed_the_next_step(recorder):
    "A batch that names rows of the last step gives what the tokens themselves give, eager and recorded, in another order."
    for runner in graph_runner():
        seqs = sequences(4, random.Random(2), lambda i: dict(temperature=.8))
        run(runner, seqs, steps=2)
        again, rows = [seqs[i] for i in (2, 0, 3)], (2, 0, 3)
        tokens = [seq.output_token_ids[-1] for seq in again]
        for seq, row in zip(again, rows): seq.output_token_ids[-1] = -1 - row
        named = runner.execute(make_batch([Chunk(s, 1) for s in again], 4))
        for seq, token in zip(again, tokens): seq.output_token_ids[-1] = token
        torch.testing.assert_close(named, runner.execute(make_batch([Chunk(s, 1) for s in again], 4)))


def test_static_tensors_stay_where_they_are(recorder):
    _, graphs = graph_runner()
    def addresses(): return [x.data_ptr() for x in (*(v for v in vars(graphs.graphs).values() if isinstance(v, torch.Tensor)), graphs.last_ids)]
    before = addresses()
    run(graphs, sequences(5, random.Random(3), lambda i: {}))
    assert addresses() == before


def test_nothing_is_recorded_where_it_cannot_work(recorder):
    def recorded(backend, ranks=Ranks(), **changes):
        runner = make_runner(backend, make_config(**changes))
        runner.ranks, runner.last_ids = ranks, runner.last_ids[:2]
        runner.capture_graphs(40)
        return runner.graphs is not None
    assert recorded(triton_attention.TritonAttention)
    assert not recorded(TorchAttention) and not recorded(triton_attention.TritonAttention, Ranks(0, 2))
    del RECORDERS["cpu"]
    assert not recorded(triton_attention.TritonAttention)


def test_a_gpu_records_after_a_first_run(monkeypatch):
    "Kernels are compiled and loaded before the recording, never in it; all records share a pool and a stream."
    events = []
    class Graph:
        def replay(self): events.append("replay")
    @contextmanager
    def graph(g, pool, stream):
        events.append(f"begin {pool} {stream}")
        yield
        events.append("end")
    for name, fake in dict(graph_pool_handle=lambda: "pool", Stream=lambda: "stream", CUDAGraph=Graph, graph=graph).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    replay = GpuRecorder().record(lambda: events.append("step"))
    assert events == ["step", "begin pool stream", "step", "end"]
    replay()
    assert events[-1] == "replay"


def test_steps_run_on_the_runners_own_device(recorder, monkeypatch):
    "An engine on cuda:1 launches there, whatever the current device: when it records, and when it computes eagerly."
    current = []
    @contextmanager
    def device_of(x):
        current.append(x.data_ptr())
        yield
        current.pop()
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    eager, graphs = graph_runner()
    def watch(runner):
        "Does every launch of attention, from here on, happen on the device of the runner's cache?"
        seen, backend = [], runner.backend
        class Watched(backend):
            def __call__(self, *args):
                seen.append(current == [runner.kv_cache.data_ptr()])
                return super().__call__(*args)
        runner.backend = Watched
        return seen
    seen = watch(eager)
    run(eager, sequences(2, random.Random(0), lambda i: {}))
    assert seen and all(seen)
    seen = watch(graphs)
    graphs.capture_graphs(40)
    assert seen and all(seen)
    assert not current


# ---- the engine

@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tiny_folder(tmp_path_factory.mktemp("tiny"))


def test_the_engine_with_graphs_in_both_loops(recorder, folder, capsys):
    options = dict(num_kv_blocks=20, attention_backend="triton", max_num_seqs=3, max_model_len=64, block_size=16)
    params = [SamplingParams(temperature=t, seed=i, max_tokens=3 + i % 3, ignore_eos=True, **more)
              for i, (t, more) in enumerate([(0, {}), (1, {}), (.7, dict(top_k=9)), (.9, {}), (0, dict(logprobs=1))])]
    prompts = ["A cat", "A dog and", "The", "One two", "Once"]
    eager = LLM(folder, enforce_eager=True, **options)
    assert eager.runner.graphs is None
    expected = [o["token_ids"] for o in eager.generate(prompts, params, use_tqdm=False)]
    for overlap in (False, True):
        llm = LLM(folder, overlap=overlap, **options)
        assert "recording graphs" in capsys.readouterr().err and sorted(llm.runner.graphs.replay) == [1, 2, 3]
        assert [o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)] == expected
        assert len(recorder.made[-1].replayed) > 3


def test_the_bite_a_forgotten_input(recorder, monkeypatch):
    "The poison shows: leave one input out, and the tokens differ."
    eager, graphs = graph_runner()
    seqs = sequences(5, random.Random(0), lambda i: dict(temperature=0))
    expected = run(eager, seqs)
    @torch.inference_mode()
    def write(wanted): graphs.graphs.rows[:len(wanted), :TABLE] = wanted[:, :TABLE]
    monkeypatch.setattr(graphs.graphs, "write", write)
    assert run(graphs, seqs, before=lambda: poison(graphs.graphs)) != expected
