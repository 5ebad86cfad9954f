"""Persistent rows: after every replay the device holds what the host's mirror says, a steady step sends what is new and nothing else,
and the tokens are those of each text alone. The model is a fake, which stores and reads a hash of the text in every slot."""
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from fuzz import run_workload
from helpers import assert_idle, tiny_folder
from nano_vllm import LLM, SamplingParams, overlap
from nano_vllm.attention import make_batch
from nano_vllm.kv_blocks import BlockPool, Chunk, Sequence
from nano_vllm.model_runner import GRAPHS, HEAT, LENGTH, RECORDERS, SEED, TABLE, DecodeGraphs, ModelRunner
from nano_vllm.overlap import PersistentRows, keep_seats
from nano_vllm.sampling import sample
from test_model_runner import make_config
from test_overlap import EOS, OverlappedWorkload

triton_attention = pytest.importorskip("nano_vllm.triton_attention")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for the GPU")
VOCAB = 5


class StandIn:
    def record(self, step):
        step()
        return step


# ---- a fake model: no attention, but every slot of the cache holds a hash of the text up to it

class FakeAttention(triton_attention.TritonAttention):
    def __init__(self, batch, kv_cache, scale, window=None, plan=None): self.batch, self.plan = batch, plan


class FakeModel(torch.nn.Module):
    "In slot i of a text: the hash of its first i + 1 tokens. Logits are a function of the hashes of all that is read."
    def __init__(self, num_slots, block_size):
        super().__init__()
        self.config = self.kv_config = make_config(vocab_size=VOCAB, num_layers=1, num_heads=1, num_kv_heads=1)
        self.weight, self.size = torch.nn.Parameter(torch.zeros(1)), block_size
        self.kv = [None] * num_slots

    def forward(self, ids, positions, attend):
        b = attend.batch
        if b is None:                              # recorded: all from the plan's tensors
            p = attend.plan
            tables, slots, new = p.block_tables, p.slot_mapping, [1] * len(ids)
            assert torch.equal((positions + 1).where(p.context_lens > 0, 0), p.context_lens.long()), "position and length disagree"
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
        token = sample(logits_of(hash(tuple(hashes)) >> 1)[None], [row]).item()
        row.output_token_ids.append(token)
        if token == EOS or len(text) + 1 == seq.max_len: return row.output_token_ids
        read(token)


class Watched(PersistentRows):
    "Checks after every replay; counts what is sent."
    replays = numbers = 0

    def write(self, wanted):
        self.at_first = self.mirror.clone()
        super().write(wanted)
        before = self.mirror[:len(wanted), :wanted.shape[1]]
        for now, want in zip(before.tolist(), wanted.tolist()):    # what is read of a row
            end = TABLE - (-want[LENGTH] // self.runner.kv_cache.shape[3])
            assert now[:end] == want[:end]
        Watched.numbers += int((self.mirror != self.at_first).sum())

    def run(self, batch, rows=()):
        logits = super().run(batch, rows)
        assert torch.equal(self.rows, self.mirror), "the device holds something else than the host believes"
        Watched.replays += 1
        return logits


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setitem(RECORDERS, "cpu", StandIn)
    monkeypatch.setitem(GRAPHS, "decode", Watched)
    monkeypatch.setattr(Watched, "replays", 0)
    monkeypatch.setattr(Watched, "numbers", 0)


class RowsWorkload(OverlappedWorkload):
    "The workloads of the overlapped loop on a runner with graphs and a fake model; every second one takes turns."
    def __init__(self, seed):
        super().__init__(seed)
        size, most = self.pool.block_size, self.scheduler.max_running
        model = FakeModel(len(self.kv), size)
        self.kv, self.in_turn = model.kv, seed % 2
        self.runner = ModelRunner(model, FakeAttention, self.pool.num_blocks, size, max_num_seqs=most)
        self.runner.capture_graphs(self.max_model_len)
        if self.in_turn: self.loop = lambda engine: engine.compute_step()

    def arrive(self):
        known = set(self.live)
        super().arrive()
        for seq in set(self.live) - known:
            seq.params.temperature = self.rng.choice([0, 1, .7])
            if self.rng.random() < .1: seq.params.top_k = 2     # sampled outside of the graph
            seq.stop_token_ids = {EOS}

    def step(self):
        before = [] if self.in_turn else self.loop.seats
        super().step()
        now = [] if self.in_turn else self.loop.seats
        for i, seq in enumerate(before[:len(now)]): assert now[i] is seq or seq not in now, "a sequence was moved without need"

    def drain(self):
        if not self.in_turn: super().drain()

    def expected(self, seq): return alone(seq)


def test_rows_equal_the_mirror_under_random_workloads():
    total = Counter()
    for seed in range(300): total.update(run_workload(seed, RowsWorkload))
    print(dict(total), "replays", Watched.replays, "numbers sent", Watched.numbers)
    assert Watched.replays > 2000 and total["preempted"] > 20 and total["finished"] > 300


def caught(seeds=60):
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError, TypeError)):
        for seed in range(seeds): run_workload(seed, RowsWorkload)


# The fuzz bites.

def change(monkeypatch, name, old, new):
    "Plant a bug in a method of PersistentRows."
    import inspect
    import textwrap
    source = textwrap.dedent(inspect.getsource(getattr(PersistentRows, name)))
    assert source.count(old) == 1
    space = dict(vars(overlap))
    exec(source.replace(old, new).replace("super()", "super(PersistentRows, self)"), space)
    monkeypatch.setattr(PersistentRows, name, space[name])


@pytest.mark.parametrize("name,old,new", [
    ("run", "advance(self.mirror[:len(logits)])", "pass"),                       # the host does not go on
    ("step", "advance(self.rows[:n])", "pass"),                                  # the device does not
    ("step", "advance(self.rows[:n])", "self.rows[:n, LENGTH:DRAWN + 1:2] += 1"),  # padding goes on, too
    ("write", "known[at] = wanted[at]", "pass"),                                 # what was sent is not noted
    ("write", "< TABLE + blocks", "< TABLE + blocks - 1"),                       # the newest block is forgotten
    ("write", "self.rows[row, column] = value", "pass"),                         # nothing is sent
], ids=["mirror", "device", "padding", "unnoted", "newest block", "unsent"])
def test_catches(monkeypatch, name, old, new):
    change(monkeypatch, name, old, new)
    caught()


def test_catches_nothing_where_nothing_is_planted(monkeypatch):
    for name in ("run", "step", "write"): change(monkeypatch, name, '"\n', '"\n')
    for seed in range(20): run_workload(seed, RowsWorkload)


# ---- what is sent

class Steady:
    "Texts that decode by placeholders, as in the overlapped loop; `sent` holds what the last step sent."
    def __init__(self, monkeypatch, num_texts, size=4):
        self.pool, self.size, self.sent = BlockPool(400, size), size, []
        self.runner = ModelRunner(FakeModel(400 * size, size), FakeAttention, 400, size, max_num_seqs=num_texts)
        self.runner.capture_graphs(100)
        self.seqs = [Sequence(str(i), [1] * (3 + i), SamplingParams(), seed=i) for i in range(num_texts)]
        monkeypatch.setattr(overlap, "send", lambda x, device: self.sent.append(x) or x.clone())

    def step(self):
        for seq in self.seqs: assert self.pool.grow(seq, seq.num_tokens)
        work = [Chunk(s, s.num_tokens - s.num_computed_tokens) for s in self.seqs]
        self.sent.clear()
        self.runner.sample(make_batch(work, self.size), self.seqs)
        for i, (seq, n) in enumerate(work):
            seq.num_computed_tokens += n
            seq.output_token_ids += [-1 - i]

    def begun(self):
        "The rows whose next token begins a block."
        return {row for row, seq in enumerate(self.seqs) if seq.num_tokens % self.size == 1}


def test_a_steady_step_sends_new_blocks_and_nothing_else(monkeypatch):
    s = Steady(monkeypatch, 6)
    s.step()                                              # prompts
    s.step()                                              # the rows go up
    assert len(s.sent) == 1
    for _ in range(20):
        begun = s.begun()
        s.step()
        assert len(s.sent) == bool(begun)                 # one copy, or none
        if not begun: continue
        rows, columns, values = s.sent[0].tolist()
        assert rows == sorted(begun) and s.sent[0].nbytes == len(begun) * 3 * 8
        assert columns == [TABLE + len(s.seqs[r].block_table) - 1 for r in rows]
        assert values == [s.seqs[r].block_table[-1] for r in rows]


def test_a_sequence_that_ends_costs_one_row(monkeypatch):
    "The last one moves to its seat and is sent, and so is the length 0 of the row it left. The others stay."
    s = Steady(monkeypatch, 6)
    for _ in range(3): s.step()
    s.seqs = [c.seq for c in keep_seats([Chunk(q, 1) for q in s.seqs[:2] + s.seqs[3:]], s.seqs)]
    assert [q.request_id for q in s.seqs] == list("01534")
    begun = s.begun()
    s.step()
    (rows, columns, _), = s.sent
    assert {2, 5} <= set(rows.tolist()) <= {2, 5} | begun
    assert LENGTH in columns[rows == 5] and SEED in columns[rows == 2] and columns[rows == 5].max() < TABLE
    s.step()
    assert not s.sent or 5 not in s.sent[0][0]


def test_a_text_that_was_longer_leaves_nothing_to_send(monkeypatch):
    "Entries beyond a text's own blocks are not read, so the zeros that pad the batch's tables are not sent."
    s = Steady(monkeypatch, 3)
    s.seqs[0].prompt_token_ids = [1] * 40
    s.seqs[1].prompt_token_ids = [1] * 40
    s.step(), s.step()
    new = s.seqs[0] = Sequence("new", [1], SamplingParams(), seed=9)
    s.step()
    rows, columns, _ = s.sent[0]
    assert columns[rows == 0].tolist() == [c for c in range(TABLE + 1) if c in columns[rows == 0]] and len(new.block_table) == 1


def test_keep_seats():
    rng, seqs = random.Random(0), [Sequence(str(i), [1], SamplingParams()) for i in range(12)]
    for _ in range(300):
        seats, now = (rng.sample(seqs, rng.randint(0, 12)) for _ in range(2))
        work = [Chunk(seq, 1) for seq in now]
        placed = [c.seq for c in keep_seats(work, seats)]
        assert Counter(placed) == Counter(now)
        for i, seq in enumerate(seats[:len(now)]): assert placed[i] is seq or seq not in now


# ---- steps that are broken off

@pytest.mark.parametrize("done_first", [False, True])
def test_after_a_broken_step_everything_is_sent(monkeypatch, done_first):
    "Whether or not the device had done its part: the same step again gives the same logits."
    s = Steady(monkeypatch, 3)
    s.step(), s.step()
    for seq in s.seqs: assert s.pool.grow(seq, seq.num_tokens)
    for i, seq in enumerate(s.seqs): seq.output_token_ids[-1] = s.runner.last_ids[i].item()
    batch, graphs = make_batch([Chunk(seq, 1) for seq in s.seqs], 4), s.runner.graphs
    replay = dict(graphs.replay)
    def interrupted(n):
        if done_first: replay[n]()
        raise KeyboardInterrupt
    graphs.replay = {n: lambda n=n: interrupted(n) for n in replay}
    with pytest.raises(KeyboardInterrupt): s.runner.execute(batch)
    graphs.replay = replay
    monkeypatch.setattr(Watched, "run", PersistentRows.run)   # rows out of use are unknown now
    got = s.runner.execute(batch)
    expected = torch.stack([logits_of(hash(tuple(s.runner.model.kv[q.block_table[p // 4]*4 + p % 4] for p in range(q.num_tokens))) >> 1) for q in s.seqs])
    assert torch.equal(got, expected)
    used = TABLE + 1
    assert torch.equal(graphs.rows[:3, :used], graphs.mirror[:3, :used])


# ---- the engine, with the kernels

@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tiny_folder(tmp_path_factory.mktemp("tiny"))


def test_the_engine_in_both_loops(folder):
    options = dict(num_kv_blocks=14, block_size=4, attention_backend="triton", max_num_seqs=3, max_model_len=40, max_num_batched_tokens=12)
    params = [SamplingParams(temperature=t, seed=i, max_tokens=4 + i % 5, ignore_eos=True, **more)
              for i, (t, more) in enumerate([(0, {}), (1, {}), (.7, dict(top_k=9)), (.9, {}), (0, dict(logprobs=1)), (1, dict(n=2))])]
    prompts = ["A cat", "A cat sat on the mat and", "The", "One two", "Once", "A cat sat on the"]
    def answers(**more):
        llm = LLM(folder, **options, **more)
        outs = llm.generate(prompts, params, use_tqdm=False)
        assert_idle(llm)
        return [c.token_ids for o in outs for c in o.outputs]
    expected = answers(enforce_eager=True, overlap=False)
    for overlapped in (False, True):
        before = Watched.replays
        assert answers(overlap=overlapped) == expected
        assert Watched.replays > before + 5


def test_both_kinds_of_graphs_are_registered_and_equal(monkeypatch):
    "The rows that send everything and those that send changes: the same tokens, from the same fake model."
    tokens = []
    for kind in (DecodeGraphs, PersistentRows):
        monkeypatch.setitem(GRAPHS, "decode", kind)
        s = Steady(monkeypatch, 5)
        for q, t in zip(s.seqs, (0, .5, 1, 1.5, 1)): q.params.temperature = t
        run = []
        for _ in range(12):
            s.step()
            run.append(s.runner.last_ids.tolist())
        tokens.append(run)
        assert type(s.runner.graphs) is kind and s.runner.graphs.rows[0, HEAT] == 0
    assert tokens[0] == tokens[1]
