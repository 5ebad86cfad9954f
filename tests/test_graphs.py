"""Recorded decode steps: the tokens of eager ones, for every batch size, from static tensors alone.

The recorder is a stand-in that remembers the step and calls it again; Triton's kernels run in the interpreter. The block tables of the
device are its own, as they are on a GPU."""
import gc
import random
import weakref
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch

from helpers import tiny_folder
from nano_vllm import LLM, SamplingParams, engine_args as engine_module
from nano_vllm.attention import TorchAttention
from nano_vllm.cuda_graphs import SEQ_LEN, TEMPERATURE, GpuRecorder, bucket_sizes, make_graphs, prepare_for_capture
from nano_vllm.kv_blocks import ScheduledSequence, SchedulerOutput, Sequence
from nano_vllm.layers import Ops
from nano_vllm.model import ModelConfig
from nano_vllm.model_runner import ModelRunner
from nano_vllm.weights import load_model

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


def make_config(**changed):
    shape = dict(vocab_size=37, hidden_size=24, intermediate_size=40, num_layers=1, num_heads=6, num_kv_heads=2,
                 head_dim=10, rms_norm_eps=1e-5, max_position=64,
                 rope=dict(rope_type="default", rope_theta=100.0, original_max_position_embeddings=64))
    return ModelConfig(**(shape | changed))


def make_model(config, attention=triton_attention.TritonAttention):
    "A model with random weights, not too small ones, on a CPU."
    model = load_model("unused", config, torch.float32, torch.device("cpu"), "dummy", ops=Ops(attention=attention))
    rng = torch.Generator().manual_seed(1)
    for p in model.parameters(): p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3, generator=rng)
    return model


def own_tables(runner):
    "Let the device have block tables of its own, as a GPU has."
    runner.input_batch.device.block_tables = runner.input_batch.device.block_tables.clone()
    return runner


def graph_runner(max_num_seqs=5, max_len=40, recorder=None, **changes):
    "Two equal runners, one of them with recorded steps."
    eager = ModelRunner(make_model(make_config(**changes)), 60, 4, max_num_seqs, max_len)
    graphs = own_tables(ModelRunner(eager.model, 60, 4, max_num_seqs, max_len))
    graphs.graphs = make_graphs(graphs, max_len, recorder or StandIn())
    return eager, graphs


def sequences(n, rng, vary):
    "`n` sequences with blocks for 20 tokens, prompts of 1 to 9."
    blocks, seqs = list(range(60)), []
    for i in range(n):
        seqs.append(Sequence(str(i), [rng.randrange(37) for _ in range(rng.randint(1, 9))], SamplingParams(**vary(i)),
                             seed=rng.getrandbits(62), stop_token_ids=frozenset({1, 2})))
    for seq in rng.sample(seqs, n): seq.block_table = [blocks.pop(0) for _ in range(5)]
    return seqs


def schedule(runner, seqs, removed=()):
    "The step in which each of `seqs` computes all that it has not, known or not, and samples."
    scheduled = []
    for seq in seqs:
        known = seq.num_tokens + seq.num_output_placeholders
        scheduled.append(ScheduledSequence(seq, seq.num_computed_tokens, known - seq.num_computed_tokens, samples=True))
        seq.num_computed_tokens = known
        seq.num_output_placeholders += 1
    scheduled.sort(key=lambda s: s.seq not in runner.input_batch.row_of)     # who is admitted stands at the end
    num_admitted = sum(s.seq not in runner.input_batch.row_of for s in scheduled)
    return SchedulerOutput(tuple(scheduled), num_admitted, tuple(removed))


def receive(handle):
    "Let the sequences of a step have their tokens."
    for s, token in zip(handle.output.sampled, handle.result().token_ids):
        s.seq.num_output_placeholders -= 1
        s.seq.output_token_ids.append(token)


def forget(runner, seqs):
    "Back to the prompts, and to a runner that knows nobody."
    runner.clear()
    for seq in seqs: seq.num_computed_tokens, seq.num_output_placeholders, seq.output_token_ids = 0, 0, []


def run(runner, seqs, steps=3, before=lambda: None, in_flight=1):
    "The output tokens of each, `in_flight` steps being asked for before the first one's tokens are known."
    forget(runner, seqs)
    handles = []
    for step in range(steps):
        before()
        handles.append(runner.execute(schedule(runner, seqs)))
        if len(handles) >= in_flight: receive(handles.pop(0))
    for handle in handles: receive(handle)
    return [list(seq.output_token_ids) for seq in seqs]


@torch.inference_mode()
def poison(graphs):
    "Legal values, all wrong, in every tensor that a step must fill in."
    graphs.fields[:] = torch.tensor([3, 30, 5, 5, torch.tensor(50.).view(torch.int32)])[:, None]
    for metadata in graphs.metadata.values(): metadata.slot_mapping.fill_(59), metadata.context_lens.fill_(7)
    graphs.logits.fill_(torch.nan)
    graphs.forget()


PLAIN = [dict(temperature=0), dict(temperature=1), dict(temperature=.6), dict(temperature=0, stop="x")]
MORE = PLAIN + [dict(top_k=3), dict(top_p=.5, temperature=1.2), dict(repetition_penalty=1.5), dict(min_tokens=3), dict(min_p=.2)]


@pytest.mark.parametrize("largest", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 30, 64, 255, 256])
def test_every_batch_size_has_a_bucket(largest):
    sizes = bucket_sizes(largest)
    assert sizes == sorted(set(sizes)) and sizes[-1] == largest and sizes[0] == 1
    for n in range(1, largest + 1): assert min(s for s in sizes if s >= n) - n < 8


@pytest.mark.ci
@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("changes", [{}, dict(sliding_window=6), dict(num_heads=3, num_kv_heads=3, tied=True)], ids=str)
def test_graph_equals_eager_at_every_batch_size(changes, in_flight):
    used = StandIn()
    eager, graphs = graph_runner(recorder=used, **changes)
    assert used.recorded == [5, 4, 2, 1]                    # the largest first
    for n in range(1, 6):
        rng = random.Random(n)
        seqs = sequences(n, rng, lambda i: rng.choice(PLAIN))
        expected, before = run(eager, seqs), len(used.replayed)
        wrong = partial(poison, graphs.graphs) if in_flight == 1 else lambda: None    # else a token would be lost
        assert run(graphs, seqs, before=wrong, in_flight=in_flight) == expected
        replays = used.replayed[before:]
        assert 2 <= len(replays) <= 3 and set(replays) == {min(s for s in (1, 2, 4, 5) if s >= n)}
        torch.testing.assert_close(graphs.kv_cache, eager.kv_cache)


def test_rows_that_ask_for_more_are_sampled_outside():
    used = StandIn()
    eager, graphs = graph_runner(recorder=used)
    for seed in range(3):
        rng = random.Random(seed)
        seqs = sequences(rng.randint(2, 5), rng, lambda i: rng.choice(MORE))
        expected, before = run(eager, seqs), len(used.replayed)
        assert run(graphs, seqs, before=lambda: poison(graphs.graphs)) == expected
        assert len(used.replayed) - before >= 2


def test_padding_writes_nothing():
    _, graphs = graph_runner()
    seqs = [seq for seq in sequences(4, random.Random(0), lambda i: {}) if 0 not in seq.block_table]
    assert len(seqs) == 3      # in the bucket of 4; block 0 is where the padded row would write, were it not for slot -1
    graphs.kv_cache.fill_(7.)
    run(graphs, seqs, steps=3, before=lambda: poison(graphs.graphs))
    written = (graphs.kv_cache != 7.).any(-1).any(-1).all(0).all(0).flatten().nonzero().flatten().tolist()
    mine = [s.block_table[p // 4] * 4 + p % 4 for s in seqs for p in range(s.num_computed_tokens)]
    assert written == sorted(mine)


def test_the_results_of_a_step_outlive_the_next():
    "Ids and log-probabilities that are read after other steps have overwritten what they came from."
    eager, graphs = graph_runner()
    seqs = sequences(3, random.Random(1), lambda i: dict(temperature=0, logprobs=3))
    found = []
    for runner in (eager, graphs):
        forget(runner, seqs)
        handles = [runner.execute(schedule(runner, seqs)) for _ in range(3)]
        if runner is graphs: poison(graphs.graphs)
        results = [handle.result() for handle in handles]
        found.append(([r.token_ids for r in results], [[(t, x.rank) for (e,) in r.logprobs for t, x in e.items()] for r in results],
                      torch.tensor([[x.logprob for (e,) in r.logprobs for x in e.values()] for r in results])))
    assert found[0][:2] == found[1][:2]
    torch.testing.assert_close(found[0][2], found[1][2])


def test_the_last_tokens_feed_the_next_step():
    "A step that names the tokens of the last one by their rows gives what the tokens themselves give, eager and recorded; in other rows."
    for runner in graph_runner():
        found = []
        for known in (True, False):
            seqs = sequences(4, random.Random(2), lambda i: dict(temperature=.8))
            run(runner, seqs, steps=2)
            handles = []
            for chosen, removed in ((seqs[:3], ()), (seqs, ()), ([seqs[i] for i in (3, 0, 2)], [seqs[1]]), ([seqs[2], seqs[3]], ()), ([seqs[0], seqs[3]], [])):
                handles.append(runner.execute(schedule(runner, chosen, removed)))
                if known: receive(handles[-1])
            found.append([handle.result().token_ids for handle in handles])
        assert found[0] == found[1]


def test_static_tensors_stay_where_they_are():
    _, graphs = graph_runner()
    def addresses():
        held = [*vars(graphs.graphs).values(), *vars(graphs.input_batch.device).values(),
                *(x for m in graphs.graphs.metadata.values() for x in (*vars(m).values(), *m.splits))]
        return [x.data_ptr() for x in held if isinstance(x, torch.Tensor)]
    before = addresses()
    run(graphs, sequences(5, random.Random(3), lambda i: {}))
    assert addresses() == before and len(before) > 30


def test_splits_have_one_memory_for_all_sizes():
    _, graphs = graph_runner()
    assert len({id(m.splits) for m in graphs.graphs.metadata.values()}) == 1


def test_a_step_with_more_splits_than_there_is_memory_for_is_eager(monkeypatch):
    "Room is made by the size of the cache, and not for as many texts of full length as there are rows."
    used = StandIn()
    eager, graphs = graph_runner(recorder=used)
    metadata = graphs.graphs.metadata
    assert all(m.capacity == n for n, m in metadata.items())     # of 40 tokens there is one split
    seqs = sequences(4, random.Random(0), lambda i: {})
    expected = run(eager, seqs)
    metadata[4].capacity = 3
    before = len(used.replayed)
    assert run(graphs, seqs) == expected and len(used.replayed) == before
    _, graphs = graph_runner(max_len=4096, max_position=4096)
    assert [m.capacity for m in graphs.graphs.metadata.values()] == [5 + 7, 4 + 7, 2 + 7, 1 + 7]    # 8 * 240 slots / 256


@pytest.mark.parametrize("rows, longest", [(256, 4096), (256, 40960), (1024, 131072)])
def test_memory_for_splits_is_bounded_by_the_cache(rows, longest):
    """In the shape of Qwen3-0.6B with a cache of 2**20 tokens: not by so many texts of full length, but by one split of each row and 8 times those
    of all slots, which is less than 0.3% of the cache, however many rows and however long."""
    tiles, slots = triton_attention.Tiles(8, 2, 128), 2**20
    found = prepare_for_capture([1, rows], torch.zeros(rows, longest // 16, dtype=torch.int64, device="meta"), tiles, longest, slots)
    most = -(-longest // 256)
    assert found[1].splits is found[rows].splits and found[1].capacity == most
    assert found[rows].capacity == min(rows * most, rows + 8 * slots // 256) == len(found[rows].splits.out)
    cache = slots * 2 * 28 * 8 * 128 * 2
    assert sum(x.nbytes for x in found[rows].splits) < .003 * cache


def test_nothing_is_recorded_where_it_cannot_work():
    def recorded(attention=triton_attention.TritonAttention, recorder=StandIn, mlp=None):
        runner = ModelRunner(make_model(make_config(), attention), 16, 4, 2, 40)
        runner.model.config = replace(runner.model.config, mlp=mlp)
        return make_graphs(runner, 40, recorder and recorder()) is not None
    assert recorded()
    assert not recorded(attention=TorchAttention)
    assert not recorded(mlp=len) and not recorded(recorder=None)


def test_a_gpu_records_after_a_first_run(monkeypatch):
    "Kernels are compiled and loaded before the recording, never in it; all records share a pool and a stream."
    events = []
    class Graph:
        def replay(self): events.append("replay")
    @contextmanager
    def graph(g, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"      # or NCCL's own thread would break it off
        events.append(f"begin {pool} {stream}")
        yield
        events.append("end")
    for name, fake in dict(graph_pool_handle=lambda: "pool", Stream=lambda: "stream", CUDAGraph=Graph, graph=graph).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    replay = GpuRecorder().record(lambda: events.append("step"))
    assert events == ["step", "begin pool stream", "step", "end"]
    replay()
    assert events[-1] == "replay"


def test_steps_run_on_the_runners_own_device(monkeypatch):
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
        seen = []
        class Watched(runner.ops.attention):
            def __call__(self, *args):
                seen.append(current == [runner.kv_cache.data_ptr()])
                return super().__call__(*args)
        runner.ops = replace(runner.ops, attention=Watched)
        return seen
    seen = watch(eager)
    run(eager, sequences(2, random.Random(0), lambda i: {}))
    assert seen and all(seen)
    seen = watch(graphs)
    make_graphs(graphs, 40, StandIn())
    assert seen and all(seen)
    assert not current


def test_a_runner_goes_when_nobody_wants_it():
    "Graphs do not hold the runner that holds them, which would keep its memory until a garbage collection."
    class Nothing:
        def record(self, step): return None
    _, graphs = graph_runner(recorder=Nothing())
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(graphs.graphs)
        del graphs
        assert gone() is None
    finally: gc.enable()


# ---- the engine

@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def recorder(monkeypatch):
    "Engines on a CPU record by the stand-in, and their device has block tables of its own."
    def stand_in(runner, max_model_len): return make_graphs(own_tables(runner), max_model_len, StandIn())
    monkeypatch.setattr(engine_module, "make_graphs", stand_in)
    return StandIn


def test_the_engine_with_graphs_in_both_loops(recorder, folder, capsys):
    options = dict(num_kv_blocks=20, attention_backend="triton", max_num_seqs=3, max_model_len=64, block_size=16)
    params = [SamplingParams(temperature=t, seed=i, max_tokens=3 + i % 3, ignore_eos=True, **more)
              for i, (t, more) in enumerate([(0, {}), (1, {}), (.7, dict(top_k=9)), (.9, {}), (0, dict(logprobs=1))])]
    prompts = ["A cat", "A dog and", "The", "One two", "Once"]
    eager = LLM(folder, enforce_eager=True, **options)
    assert eager.engine.runner.graphs is None
    expected = [o["token_ids"] for o in eager.generate(prompts, params, use_tqdm=False)]
    for ahead in (False, True):
        llm = LLM(folder, async_scheduling=ahead, **options)
        assert "recording graphs" in capsys.readouterr().err and sorted(llm.engine.runner.graphs.replay) == [1, 2, 3]
        assert [o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)] == expected
        assert len(recorder.made[-1].replayed) > 3


def test_the_bite_a_forgotten_input(monkeypatch):
    "The poison shows: leave one input out, and the tokens differ."
    eager, graphs = graph_runner()
    seqs = sequences(5, random.Random(0), lambda i: dict(temperature=i / 3))
    expected = run(eager, seqs)
    send = graphs.graphs.send
    for left_out in range(SEQ_LEN, TEMPERATURE + 1):
        monkeypatch.setattr(graphs.graphs, "send", lambda changes: send(changes[:, changes[0] != left_out]))
        assert run(graphs, seqs, before=lambda: poison(graphs.graphs)) != expected


def test_the_bite_a_forgotten_block():
    eager, graphs = graph_runner()
    seqs = sequences(5, random.Random(0), lambda i: dict(temperature=0))
    expected = run(eager, seqs)
    assert run(graphs, seqs) == expected
    graphs.input_batch.send_new_cells = graphs.input_batch.new_cells.clear
    graphs.input_batch.device.block_tables.fill_(59)
    assert run(graphs, seqs) != expected
