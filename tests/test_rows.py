"""Persistent rows: after every replay the device holds what the host's mirror says, a steady step sends what is new and nothing else,
and the tokens are those of each text alone. The model is a fake, which stores and reads a hash of the text in every slot."""
import random
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import test_exactly_once
import torch
from fake_engine import LetterTokenizer, assert_all_free, check_books
from helpers import assert_idle, tiny_folder
from nano_vllm import LLM, SamplingParams, attention, cuda_graphs, engine_args as engine_module, model_runner, sampler
from nano_vllm.cuda_graphs import SEED, SEQ_LEN, TEMPERATURE, TOKEN, UNKNOWN, DecodeGraphs, make_graphs
from nano_vllm.engine import Engine
from nano_vllm.request import InputProcessor, OutputProcessor
from nano_vllm.kv_blocks import Sequence, blocks_needed
from nano_vllm.layers import Ops
from nano_vllm.model_runner import InputBatch, ModelRunner
from nano_vllm.prefix_cache import KVCacheManager
from nano_vllm.sampler import SamplingMetadata, sample
from nano_vllm.scheduler import Scheduler
from test_exactly_once import Injected, Interrupt
from test_graphs import make_config, own_tables, receive, schedule

triton_attention = pytest.importorskip("nano_vllm.triton_attention")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for the GPU")
VOCAB, EOS = 5, 0


class StandIn:
    "Records by remembering."
    def record(self, step):
        step()
        return step


# ---- a fake model: no attention, but every slot of the cache holds a hash of the text up to it

class FakeAttention(triton_attention.TritonAttention):
    def __init__(self, batch, kv_cache, scale, window=None, metadata=None): self.batch, self.metadata = batch, metadata


class FakeModel:
    "In slot i of a text: the hash of its first i + 1 tokens. Logits are a function of the hashes of all that is read."
    def __init__(self, num_slots, block_size):
        self.config = self.kv_config = make_config(vocab_size=VOCAB, num_layers=1, num_heads=1, num_kv_heads=1)
        self.ops, self.size, self.kv = Ops(attention=FakeAttention), block_size, [None] * num_slots

    def parameters(self): return iter([torch.zeros(1)])

    def __call__(self, ids, positions, attention):
        b = attention.batch
        if b is None:                              # recorded: all from the metadata's tensors
            m = attention.metadata
            tables, slots, new = m.block_tables, m.slot_mapping, [1] * len(ids)
            assert torch.equal((positions + 1).where(m.context_lens > 0, 0), m.context_lens.long()), "position and length disagree"
        else: tables, slots, new = b.block_tables, b.slot_mapping, b.query_lens
        rows = [row for row, n in enumerate(new) for _ in range(n)]
        return torch.tensor([self.store(*x) for x in zip(tables[rows].tolist(), slots.tolist(), positions.tolist(), ids.tolist())])[:, None]

    def store(self, table, slot, position, token):
        if slot < 0: return 0                      # padding
        assert slot == table[position // self.size] * self.size + position % self.size, "a key goes to a wrong slot"
        past = [self.kv[table[p // self.size] * self.size + p % self.size] for p in range(position)]
        self.kv[slot] = hash((past[-1] if past else 0, token))
        return hash((*past, self.kv[slot])) >> 1

    def compute_logits(self, hidden): return torch.stack([logits_of(h) for h in hidden[:, 0].tolist()]) if len(hidden) else torch.zeros(0, VOCAB)


def logits_of(state):
    logits = torch.tensor([random.Random(state + i).gauss(0, 2) for i in range(VOCAB)])
    logits[EOS] -= 2
    return logits


def alone(seq):
    "What a sequence says if it is alone in the world."
    hashes, text = [], []
    def read(token):
        hashes.append(hash((hashes[-1] if hashes else 0, token)))
        text.append(token)
    for token in seq.prompt_token_ids: read(token)
    row = SimpleNamespace(params=seq.params, seed=seq.seed, output_token_ids=[], prompt_token_ids=seq.prompt_token_ids, stop_token_ids={EOS})
    while True:
        token = sample(logits_of(hash(tuple(hashes)) >> 1)[None], SamplingMetadata.of([row])).item()
        row.output_token_ids.append(token)
        if token == EOS or len(text) + 1 == seq.max_len: return row.output_token_ids
        read(token)


class Watched(DecodeGraphs):
    "Checks after every replay; counts what is sent."
    replays = numbers = 0

    def send(self, changes):
        super().send(changes)
        Watched.numbers += changes.shape[1]

    def run(self, output):
        n = len(output.scheduled)
        sampled, logits, ids = super().run(output)
        wanted, held = self.mirror[:, :n], self.fields[:, :n].numpy()
        assert np.array_equal(wanted[SEQ_LEN:], held[SEQ_LEN:]), "the device holds something else than the host believes"
        ends = {s.seq: s.end for s in output.scheduled}
        assert wanted[SEQ_LEN].tolist() == [ends[seq] + 1 for seq in sampled] and (wanted[TOKEN] == UNKNOWN).all()
        assert not self.fields[SEQ_LEN, n:self.size_for(n)].any() and torch.equal(ids, self.fields[TOKEN, :n])
        Watched.replays += 1
        return sampled, logits, ids


class WatchedRows(InputBatch):
    "Checks that the tables of host and device are equal where they are read, and that nobody is moved without need."
    def update(self, output):
        before = dict(self.row_of)
        super().update(output)
        stayed = set(before) - set(output.removed)
        for seq in stayed: assert self.row_of[seq] == before[seq] or before[seq] >= len(stayed), "a sequence was moved without need"
        device = self.device.block_tables.numpy()
        for s in output.scheduled:
            row, n = self.row_of[s.seq], blocks_needed(s.end, self.block_size)
            assert device[row, :n].tolist() == s.seq.block_table[:n], "a block was not sent"


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "DecodeGraphs", Watched)
    monkeypatch.setattr(model_runner, "InputBatch", WatchedRows)
    monkeypatch.setattr(Watched, "replays", 0)
    monkeypatch.setattr(Watched, "numbers", 0)


def fake_runner(num_blocks, size, max_num_seqs, max_model_len):
    "A runner of the fake model with graphs, whose device has block tables of its own."
    runner = own_tables(ModelRunner(FakeModel(num_blocks * size, size), num_blocks, size, max_num_seqs, max_model_len))
    runner.graphs = make_graphs(runner, max_model_len, StandIn())
    return runner


class Workload:
    "A random engine with everything in it but a model, and its requests."
    def __init__(self, seed):
        rng = self.rng = random.Random(seed)
        size, num_blocks, most = rng.choice([1, 2, 3, 4, 8]), rng.randint(2, 30), rng.randint(1, 6)
        longest = rng.randint(4, 60)
        tokenizer, manager = LetterTokenizer(), KVCacheManager(num_blocks, size)
        self.engine = Engine(
            InputProcessor(tokenizer, VOCAB, longest, num_blocks, size, {EOS}, enable_prefix_caching=rng.random() < 0.8),
            Scheduler(manager, most, rng.choice([1, 2, 5, 16, 64]), rng.choice([0, 0, 0, 1, 3, 10])),
            fake_runner(num_blocks, size, most, longest), OutputProcessor(tokenizer, {EOS}), num_in_flight=1 + seed % 2)
        self.prompts = [[rng.randint(1, 3) for _ in range(rng.randint(1, 40))] for _ in range(3)]
        self.to_come, self.made, self.num_steps, self.aborted = rng.randint(1, 8), [], 0, set()

    def arrive(self):
        rng, self.to_come = self.rng, self.to_come - 1
        base = rng.choice(self.prompts)
        prompt = base[:rng.randint(1, len(base))] + [rng.randint(1, 3) for _ in range(rng.randint(0, 3))]
        temperature = rng.choice([0, 1, .7])
        params = SamplingParams(n=rng.choice([1, 1, 1, 3]) if temperature else 1, max_tokens=rng.randint(1, 20), temperature=temperature,
                                seed=rng.randrange(4), top_k=2 if rng.random() < .1 else 0)     # top_k is sampled outside of the graph
        if rng.random() < .05: params.logprobs = 0
        try: requests = self.engine.input_processor.make_requests([prompt], params)
        except ValueError: return
        for request in requests:
            self.engine.add(request)
            self.made.append(request)

    def run(self):
        engine = self.engine
        while self.to_come or engine.requests:
            while self.to_come and self.rng.random() < 0.4: self.arrive()
            engine.step()
            if engine.is_consistent: check_books(engine)
            if engine.requests and self.rng.random() < 0.02:
                self.aborted.add(chosen := self.rng.choice(list(engine.requests)))
                engine.abort(chosen)
            self.num_steps += 1
            assert self.num_steps < 5000, "no end in sight"
        while engine.in_flight or not engine.is_consistent: engine.step()
        assert_all_free(engine)
        for request in self.made:
            for c in request.completions:
                told, said = c.seq.output_token_ids, alone(c.seq)
                if request.request_id in self.aborted: assert told == said[:len(told)]
                else: assert told == said, "not what it says alone"


def run_workload(seed):
    w = Workload(seed)
    try: w.run()
    except AssertionError as e: raise AssertionError(f"workload {seed}: {e}") from e
    return dict(steps=w.num_steps, finished=len(w.made) - len(w.aborted), preempted=w.engine.scheduler.num_preemptions)


@pytest.fixture
def quiet(monkeypatch): monkeypatch.setattr(cuda_graphs, "tqdm", lambda x, **_: x)


def test_rows_equal_the_mirror_under_random_workloads(quiet):
    total = Counter()
    for seed in range(150): total.update(run_workload(seed))
    print(dict(total), "replays", Watched.replays, "numbers sent", Watched.numbers)
    assert Watched.replays > 1000 and total["preempted"] > 10 and total["finished"] > 150


def caught(seeds=60):
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError, TypeError)):
        for seed in range(seeds): run_workload(seed)


# The fuzz bites.

def change(monkeypatch, name, old, new):
    "Plant a bug in a method of DecodeGraphs."
    import inspect
    import textwrap
    source = textwrap.dedent(inspect.getsource(getattr(DecodeGraphs, name))).removeprefix("@patch\n")
    assert source.count(old) == 1
    space = dict(vars(cuda_graphs))
    exec(source.replace(old, new), space)
    monkeypatch.setattr(DecodeGraphs, name, space[name])


@pytest.mark.parametrize("name,old,new", [
    ("run", "advance(wanted)", "pass"),                                # the host does not go on
    ("step", "advance(fields)", "pass"),                               # the device does not
    ("step", "advance(fields)", "fields[[SEQ_LEN, NUM_OUTPUT]] += 1"), # padding goes on, too
    ("run", "self.mirror[:, :size] = wanted", "pass"),                 # what was sent is not noted
    ("wanted_fields", "wanted[SEQ_LEN] = 0", "pass"),                  # padding is not told
    ("wanted_fields", "np.where(tokens < 0, wanted[TOKEN, :n], tokens)", "np.where(tokens < 0, 1, tokens)"),   # a token is sent that nobody knows
    ("wanted_fields", "np.where(tokens < 0, wanted[TOKEN, :n], tokens)", "wanted[TOKEN, :n]"),                 # a known one is not
    ("send", "self.fields[field, row] = value", "pass"),               # nothing is sent
    ("run", "ids.copy_(", "print("),                                   # what was sampled outside is lost
], ids=["mirror", "device", "padding", "unnoted", "untold", "unknown", "known", "unsent", "outside"])
def test_catches(monkeypatch, quiet, name, old, new):
    change(monkeypatch, name, old, new)
    caught()


def test_catches_a_forgotten_block(monkeypatch, quiet):
    send = InputBatch.send_new_cells
    def forget_the_newest(self):
        del self.new_cells[-1:]
        send(self)
    monkeypatch.setattr(InputBatch, "send_new_cells", forget_the_newest)
    caught()


def test_catches_a_token_that_does_not_move_with_its_row(monkeypatch, quiet):
    remove = InputBatch.remove
    def leave_the_token(self, seq):
        before = self.device.last_token.clone()
        remove(self, seq)
        self.device.last_token.copy_(before)
    monkeypatch.setattr(InputBatch, "remove", leave_the_token)
    caught()


def test_catches_nothing_where_nothing_is_planted(monkeypatch, quiet):
    for name in ("run", "step", "send", "wanted_fields"): change(monkeypatch, name, f"def {name}", f"def {name}")
    for seed in range(20): run_workload(seed)


# ---- what is sent

class Steady:
    "Texts that decode without their tokens being known, as with two steps in flight; `sent` holds what the last step sent."
    def __init__(self, monkeypatch, num_texts, size=4):
        self.size, self.sent, self.free_blocks = size, [], list(range(400))
        self.runner = fake_runner(400, size, num_texts, 100)
        self.seqs = [Sequence(str(i), [1] * (3 + i), SamplingParams(), seed=i) for i in range(num_texts)]
        for module in (sampler, attention, model_runner, cuda_graphs):
            monkeypatch.setattr(module, "to_device", lambda x, device: self.sent.append(x) or x.clone())

    def step(self, removed=()):
        for seq in self.seqs:
            while len(seq.block_table) * self.size < seq.num_tokens + seq.num_output_placeholders: seq.block_table.append(self.free_blocks.pop(0))
        output = schedule(self.runner, self.seqs, removed)
        self.sent.clear()
        return self.runner.execute(output)

    def begun(self):
        "The rows whose next token begins a block."
        rows = self.runner.input_batch.row_of
        return {rows[q] for q in self.seqs if q in rows and (q.num_tokens + q.num_output_placeholders) % self.size == 1}


def test_a_steady_step_sends_new_blocks_and_nothing_else(monkeypatch):
    s = Steady(monkeypatch, 6)
    s.step()                                              # prompts
    begun = s.begun()
    s.step()                                              # the rows go up
    assert len(s.sent) == bool(begun) + 1
    for _ in range(20):
        begun = s.begun()
        s.step()
        assert len(s.sent) == bool(begun)                 # one copy, or none
        if not begun: continue
        rows, columns, values = s.sent[0].tolist()
        assert rows == sorted(begun) and s.sent[0].nbytes == len(begun) * 3 * 8
        assert columns == [len(s.seqs[r].block_table) - 1 for r in rows]
        assert values == [s.seqs[r].block_table[-1] for r in rows]


def test_a_sequence_that_ends_costs_one_row(monkeypatch):
    "The last one moves to its row and is sent, and so is the length 0 of the row it left. The others stay."
    s = Steady(monkeypatch, 6)
    for _ in range(3): s.step()
    gone = s.seqs.pop(2)
    begun = s.begun()
    s.step(removed=[gone])
    assert [q.request_id for q in s.runner.input_batch.seqs] == list("01534")
    (cell_rows, *_), (fields, rows, _) = s.sent
    assert {2} <= set(cell_rows.tolist()) <= {2} | begun and (cell_rows == 2).sum() == len(s.seqs[-1].block_table)
    assert set(rows.tolist()) == {2, 5} and fields[rows == 5].tolist() == [SEQ_LEN] and SEED in fields[rows == 2] and TOKEN not in fields
    begun = s.begun()
    s.step()
    assert len(s.sent) == bool(begun)


def test_a_text_that_was_longer_leaves_nothing_to_send(monkeypatch):
    "Entries beyond a text's own blocks are not read, so what the last text left there is not cleared. Its one token is known, and sent."
    s = Steady(monkeypatch, 3)
    s.seqs[1].prompt_token_ids = [1] * 40
    s.seqs[2].prompt_token_ids = [1] * 40
    s.step(), s.step()
    gone, s.seqs[2] = s.seqs[2], Sequence("new", [3], SamplingParams(), seed=9)
    begun, before = s.begun(), Watched.replays
    s.step(removed=[gone])
    assert Watched.replays == before + 1
    cells, (fields, rows, values) = s.sent
    assert [column for row, column, _ in cells.T.tolist() if row == 2] == [0] and len(s.seqs[2].block_table) == 1
    assert set(cells[0].tolist()) == {2} | begun and set(rows.tolist()) == {2}
    assert values[fields == TOKEN].tolist() == [3] and values[fields == SEQ_LEN].tolist() == [1]


def test_sending_everything_gives_the_same(monkeypatch):
    "The rows that send everything and those that send changes: the same tokens, from the same fake model."
    tokens = []
    for everything in (False, True):
        s = Steady(monkeypatch, 5)
        for q, t in zip(s.seqs, (0, .5, 1, 1.5, 1)): q.params.temperature = t
        handles = []
        for _ in range(12):
            if everything: s.runner.graphs.forget()
            handles.append(s.step())
        tokens.append([handle.result().token_ids for handle in handles])
        assert s.runner.graphs.fields[TEMPERATURE, 0] == 0
    assert tokens[0] == tokens[1]


# ---- steps that are broken off

@pytest.mark.parametrize("done_first", [False, True])
def test_after_a_broken_step_everything_is_sent(monkeypatch, done_first):
    "Whether or not the device had done its part: the same step again gives the same logits."
    s = Steady(monkeypatch, 3)
    receive(s.step()), receive(s.step())
    graphs, before = s.runner.graphs, [vars(seq).copy() for seq in s.seqs]
    replay = dict(graphs.replay)
    def interrupted(n):
        if done_first: replay[n]()
        raise KeyboardInterrupt
    graphs.replay = {n: partial(interrupted, n) for n in replay}
    with pytest.raises(KeyboardInterrupt): s.step()
    assert (graphs.mirror[:, :3] == UNKNOWN).all()
    graphs.replay = replay
    for seq, old in zip(s.seqs, before): vars(seq).update(old)
    s.step()
    expected = torch.stack([logits_of(hash(tuple(s.runner.model.kv[q.block_table[p // 4]*4 + p % 4] for p in range(q.num_tokens))) >> 1) for q in s.seqs])
    assert torch.equal(graphs.logits[:3], expected)
    fields, rows, _ = s.sent[-1]
    assert sorted(zip(fields.tolist(), rows.tolist())) == sorted([(f, r) for f in range(5) for r in range(3)] + [(SEQ_LEN, 3)] * (graphs.size_for(3) > 3))


class Interrupted(Workload):
    "The same, and now and then a step is broken off at some line, wherever that is."
    def __init__(self, seed):
        super().__init__(seed)
        step, self.thrown = self.engine.step, 0
        def broken():
            if self.rng.random() < 0.7: return step()
            interrupt = Interrupt(self.rng.randint(1, self.rng.choice([30, 300, 1500])))
            try:
                with interrupt: step()
            except Injected: self.thrown += 1
        self.engine.step = broken


def test_interrupted_steps(monkeypatch, quiet):
    monkeypatch.setattr(test_exactly_once, "MODULES", test_exactly_once.MODULES | {"nano_vllm.cuda_graphs"})
    thrown = 0
    for seed in range(100):
        w = Interrupted(seed)
        try: w.run()
        except AssertionError as e: raise AssertionError(f"workload {seed}: {e}") from e
        thrown += w.thrown
    assert thrown > 300 and Watched.replays > 500


# ---- the engine, with the kernels

@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tiny_folder(tmp_path_factory.mktemp("tiny"))


def test_the_engine_in_both_loops(folder, monkeypatch):
    monkeypatch.setattr(engine_module, "make_graphs", lambda runner, max_model_len: make_graphs(own_tables(runner), max_model_len, StandIn()))
    options = dict(num_kv_blocks=14, block_size=4, attention_backend="triton", max_num_seqs=3, max_model_len=40, max_num_batched_tokens=12)
    params = [SamplingParams(temperature=t, seed=i, max_tokens=4 + i % 5, ignore_eos=True, **more)
              for i, (t, more) in enumerate([(0, {}), (1, {}), (.7, dict(top_k=9)), (.9, {}), (0, dict(logprobs=1)), (1, dict(n=2))])]
    prompts = ["A cat", "A cat sat on the mat and", "The", "One two", "Once", "A cat sat on the"]
    def answers(**more):
        llm = LLM(folder, **options, **more)
        outs = llm.generate(prompts, params, use_tqdm=False)
        assert_idle(llm)
        return [c.token_ids for o in outs for c in o.outputs]
    expected = answers(enforce_eager=True, async_scheduling=False)
    for ahead in (False, True):
        before = Watched.replays
        assert answers(async_scheduling=ahead) == expected
        assert Watched.replays > before + 5
