"""The model runner: its KV cache fits or is refused with a reason, its rows are what lists would say, and a step is the forward
pass that one would write by hand."""
import gc
import random
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fake_engine import FakeRunner, answer
from helpers import weight_views
from nano_vllm import attention, engine_args, model_runner, sampler
from nano_vllm.attention import ReferenceAttention, TorchAttention
from nano_vllm.kv_blocks import ScheduledSequence, SchedulerOutput, Sequence, blocks_needed
from nano_vllm.layers import Ops, TensorParallelGroup
from nano_vllm.model import ModelConfig
from nano_vllm.model_runner import (InputBatch, ModelRunner, NoAttention, PeakMemory, StepHandle, allocate_kv_cache,
                                    device_memory, kv_block_bytes, profile_memory)
from nano_vllm.sampler import SamplingMetadata, compute_logprobs, gather_logprobs
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.weights import load_model

CPU = torch.device("cpu")


def make_config(**changed):
    shape = dict(vocab_size=37, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=6, num_kv_heads=2,
                 head_dim=10, rms_norm_eps=1e-5, max_position=64,
                 rope=dict(rope_type="default", rope_theta=100.0, original_max_position_embeddings=64))
    return ModelConfig(**(shape | changed))


def make_runner(backend=TorchAttention, config=None, dtype=torch.float32, num_blocks=16, block_size=4, max_num_seqs=8,
                kv_dtype=None):
    model = load_model("unused", config or make_config(), dtype, CPU, load_format="dummy", ops=Ops(attention=backend))
    rng = torch.Generator().manual_seed(1)
    for p in model.parameters(): p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3, generator=rng)
    return ModelRunner(model, num_blocks, block_size, max_num_seqs, kv_dtype=kv_dtype)


def output_of(input_batch, work, removed=()):
    "The SchedulerOutput of `work`, (sequence, number of tokens) each, booked as the scheduler does. New ones come last, too."
    gone, scheduled = set(removed), []
    work = sorted(work, key=lambda item: item[0] not in input_batch.row_of or item[0] in gone)
    for seq, n in work:
        known = seq.num_tokens + seq.num_output_placeholders
        scheduled.append(ScheduledSequence(seq, seq.num_computed_tokens, n, seq.num_computed_tokens + n == known))
        seq.num_computed_tokens += n
        seq.num_output_placeholders += scheduled[-1].samples
    new = sum(seq not in input_batch.row_of or seq in gone for seq, _ in work)
    return SchedulerOutput(tuple(scheduled), new, tuple(removed))


def receive(output, result):
    for s, token in zip(output.sampled, result.token_ids, strict=True):
        s.seq.num_output_placeholders -= 1
        s.seq.output_token_ids.append(token)


def step(runner, work, removed=()):
    "A step, done and booked: (the output, its result, {sequence: logits}); each takes its best token."
    seen, ops = {}, runner.ops
    def best(logits, metadata):
        seen.update(zip(metadata.sequences, logits))
        assert logits.dtype == torch.float32 and len(logits) == len(metadata)
        return logits.argmax(-1)
    output = output_of(runner.input_batch, work, removed)
    runner.ops = replace(ops, sample=best)
    try: result = runner.execute(output).result()
    finally: runner.ops = ops
    receive(output, result)
    return output, result, seen


def with_blocks(seqs, num_tokens, block_size=4, free=None):
    "The sequences, each with blocks for so many tokens."
    free = list(range(1000))[::-1] if free is None else free
    for seq in seqs: seq.block_table = [free.pop() for _ in range(blocks_needed(num_tokens, block_size))]
    return seqs


# ---- memory

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_block_bytes_are_those_of_the_tensor(dtype, block_size):
    config = make_config(num_kv_heads=3, num_heads=9)
    cache = allocate_kv_cache(config, 7, block_size, dtype, CPU)
    assert cache.shape == (3, 2, 7, block_size, 3, 10) and cache.dtype == dtype and cache.is_contiguous()
    assert cache.nbytes == 7 * kv_block_bytes(config, block_size, dtype)
    assert not cache.any()


@pytest.mark.parametrize("num_blocks", [10**9, 2**40])
def test_a_cache_that_cannot_fit_is_refused_by_name(num_blocks):
    with pytest.raises(ValueError) as e: make_runner(ReferenceAttention, num_blocks=num_blocks)
    needed = num_blocks * kv_block_bytes(make_config(), 4, torch.float32) / 2**30
    for part in (f"num_kv_blocks is {num_blocks}", f"{needed:,.2f} GiB", "GiB free", "for at most"): assert part in str(e.value)


def test_the_advice_in_the_message_works(monkeypatch):
    block = kv_block_bytes(make_config(), 4, torch.float32)
    monkeypatch.setattr(model_runner, "device_memory", lambda device: (5*block + 1, 100*block))
    with pytest.raises(ValueError, match="num_kv_blocks is 6.* at most 5 blocks"): make_runner(num_blocks=6)
    assert make_runner(num_blocks=5).kv_cache.nbytes == 5*block


def test_what_the_system_refuses_is_reported_likewise(monkeypatch):
    def refuse(*args, **kwargs): raise OSError(12, "Cannot allocate memory")
    monkeypatch.setattr(model_runner.mmap, "mmap", refuse)
    with pytest.raises(ValueError, match="num_kv_blocks is 3.*GiB"): make_runner(num_blocks=3)


def test_reserving_touches_nothing():
    config, blocks = make_config(), 2**30 // kv_block_bytes(make_config(), 4, torch.float32)
    if device_memory(CPU)[0] < 2**31: pytest.skip("less than 2 GiB are free")
    before = resident()
    cache = allocate_kv_cache(config, blocks, 4, torch.float32, CPU)
    assert resident() - before < 2**26 and cache[-1, -1, -1].sum() == 0


def resident():
    try: pages = int(open("/proc/self/statm").read().split()[1])
    except OSError: pytest.skip("no /proc here")
    return pages * model_runner.os.sysconf("SC_PAGE_SIZE")


def test_memory_of_a_device(monkeypatch):
    free, total = device_memory(CPU)
    assert 0 < free <= total and total == model_runner.os.sysconf("SC_PHYS_PAGES") * model_runner.os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(model_runner, "read_meminfo", lambda name: None)
    assert device_memory(CPU) == (total // 2, total)      # where nobody knows
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 10_000))
    assert device_memory(torch.device("cuda")) == (1000, 10_000)


ACTIVATIONS = 30


def kv_memory(monkeypatch, free, total, share, device="cuda", group=TensorParallelGroup()):
    "Bytes for a KV cache, if a step's activations take ACTIVATIONS."
    asked = []
    def profile(config, dtype, num_tokens, num_rows, group, device_type, workspace):
        asked.append((config, dtype, num_tokens, num_rows, device_type, workspace))
        return ACTIVATIONS
    monkeypatch.setattr(engine_args, "device_memory", lambda device: (free, total))
    monkeypatch.setattr(engine_args, "profile_memory", profile)
    args = SimpleNamespace(speculative_config=None, data_parallel_size=1, pipeline_parallel_size=1, kv_cache_memory_bytes=None, gpu_memory_utilization=share, max_num_batched_tokens=64, max_num_seqs=256)
    model, ops = make_config(num_kv_heads=2, head_dim=8), SimpleNamespace(attention=TorchAttention, hidden_dtype=None)
    config = SimpleNamespace(args=args, device=torch.device(device), model=model, dtype=torch.float32, kv_dtype=torch.bfloat16,
                             max_model_len=5000, ops=ops)
    found = engine_args.kv_memory(config, group)
    workspace = TorchAttention.workspace(64, 5000, 2 * 2 * 8 * (4 + 2))
    assert asked == [(model, torch.float32, 64, 64, device, workspace)]          # no more rows than tokens
    return found


def test_kv_memory_is_what_the_share_leaves(monkeypatch):
    "Of 10,000 bytes 9,000 are in use, and 9,500 may be."
    assert kv_memory(monkeypatch, 1000, 10_000, 0.95) == 500 - ACTIVATIONS
    assert kv_memory(monkeypatch, 10_000, 10_000, 0.5) == 5000 - ACTIVATIONS
    assert kv_memory(monkeypatch, 1000, 10_000, 0.5) < 0                       # they are in use by others already
    assert kv_memory(monkeypatch, 1000, 10_000, None) == int(10_000 * engine_args.UTILIZATION) - 9000 - ACTIVATIONS
    assert kv_memory(monkeypatch, 1000, 10_000, 0.95, group=TensorParallelGroup(0, 2)) == 500 - ACTIVATIONS     # a GPU each


def test_kv_memory_of_a_cpu_is_shared_by_the_ranks(monkeypatch):
    assert kv_memory(monkeypatch, 1000, 10_000, 0.95, "cpu") == 500 - ACTIVATIONS
    assert kv_memory(monkeypatch, 1000, 10_000, 0.95, "cpu", TensorParallelGroup(1, 2)) == 250 - ACTIVATIONS
    assert kv_memory(monkeypatch, 1000, 10_000, None, "cpu") == engine_args.OF_FREE_MEMORY * 1000 - ACTIVATIONS


def test_peak_memory_counts_what_is_alive():
    with PeakMemory() as memory:
        x = torch.zeros(1000)
        views = x.view(10, 100), x[5:], x[None]              # the same memory
        assert memory.alive == memory.peak == 4000
        y = x + 1
        y.mul_(2)
        assert memory.alive == 8000
        del y
        z = torch.zeros(10, dtype=torch.int64)
        assert memory.alive == 4080 and memory.peak == 8000
        del x
        assert memory.alive == 4080                        # a view keeps it
        del views
        assert memory.alive == 80
    assert z.nbytes == 80


def no_attention(batch, kv_cache, scale, window=None): return NoAttention()


def peak_of_a_step(runner, work):
    "Bytes that a real step takes at its peak, besides what is there all the time."
    memory, rows = PeakMemory(), vars(runner.input_batch.device).values()
    for x in (*runner.model.parameters(), *runner.model.buffers(), runner.kv_cache, *rows): memory.add(x.untyped_storage())
    before = memory.peak = memory.alive
    output = output_of(runner.input_batch, work)
    with memory: runner.execute(output)
    return memory.peak - before


ALL_STAGES = dict(top_k=3, top_p=.5, min_p=.01, temperature=2, repetition_penalty=2, min_tokens=1)
SHAPES = [[300], [1] * 64, [100, 1, 50, 1, 1], [1]]


@pytest.mark.parametrize("params", [dict(temperature=0), {}, dict(top_p=.9), ALL_STAGES], ids=["greedy", "plain", "top_p", "all"])
@pytest.mark.parametrize("lens", SHAPES, ids=["prompt", "decode", "mixture", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [500, 20_000])
def test_a_profile_is_an_upper_bound_of_a_real_step(monkeypatch, vocab_size, dtype, lens, params):
    "Attention and the rating of prompts aside, and the batch itself: some integers for each token."
    monkeypatch.setattr(model_runner, "PROMPT_PIECE", 0)
    config = make_config(vocab_size=vocab_size, hidden_size=96, intermediate_size=256, max_position=512)
    runner = make_runner(no_attention, config, dtype, num_blocks=200, max_num_seqs=64)
    seqs = [Sequence(str(i), [1] * n, SamplingParams(**params), stop_token_ids={2}) for i, n in enumerate(lens)]
    free = list(range(200))
    for seq, n in zip(seqs, lens): with_blocks([seq], n, free=free)
    bound = profile_memory(config, dtype, sum(lens), len(lens), TensorParallelGroup())
    peak = peak_of_a_step(runner, list(zip(seqs, lens)))
    batch = 8 * 16 * sum(lens)
    assert peak <= bound + batch
    if params == ALL_STAGES and sum(lens) > 1: assert bound <= 2 * peak  # nor is it far away


def prompts_of(lens, computed, **params):
    "Texts of `lens` tokens of which some are computed, with blocks in a pool of their own: (sequence, tokens missing)."
    work, free = [], list(range(4100))[::-1]
    for i, (n, done) in enumerate(zip(lens, computed)):
        seq, = with_blocks([Sequence(str(i), [1] * n, SamplingParams(**params))], n, 16, free=free)
        seq.num_computed_tokens = done
        work.append((seq, n - done))
    return work


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [500, 50_000])
def test_a_profile_has_room_for_the_rating_of_prompts(monkeypatch, vocab_size, dtype):
    monkeypatch.setattr(model_runner, "PROMPT_LOGITS", 2**21)
    config = make_config(vocab_size=vocab_size, hidden_size=96, intermediate_size=256, max_position=512)
    runner = make_runner(no_attention, config, dtype, num_blocks=200, block_size=16)
    work = prompts_of([300], [0], prompt_logprobs=1)
    bound = profile_memory(config, dtype, 300, 1, TensorParallelGroup())
    peak = peak_of_a_step(runner, work)
    assert peak <= bound + 8 * 16 * 300
    if vocab_size == 50_000: assert bound <= 2 * peak
    assert model_runner.prompt_piece(vocab_size) == {500: 1024, 50_000: 41}[vocab_size]


CONTEXTS = {"decodes": ([1000] * 64, [999] * 64), "a chunk": ([1000], [300]), "chunks": ([1000] * 3, [700] * 3),
            "long and short": ([1000, *range(2, 60)], [600, *range(1, 59)])}


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CONTEXTS)
def test_a_profile_has_room_for_what_attention_gathers(monkeypatch, case, kv_dtype):
    "The decodes' rectangles and the chunks' masks, in a model where they are larger than anything else."
    monkeypatch.setattr(attention, "MAX_GATHERED", 2000)
    config = make_config(vocab_size=50, hidden_size=32, intermediate_size=32, num_heads=4, num_kv_heads=4, head_dim=64,
                         max_position=1024)
    runner = make_runner(TorchAttention, config, kv_dtype=kv_dtype, num_blocks=4100, max_num_seqs=64, block_size=16)
    work = prompts_of(*CONTEXTS[case])
    slot_bytes = 2 * 4 * 64 * (4 + (2 if kv_dtype == torch.bfloat16 else 0))
    workspace = TorchAttention.workspace(len(work), 1024, slot_bytes)
    num_tokens = sum(n for _, n in work)
    bound = profile_memory(config, torch.float32, num_tokens, len(work), TensorParallelGroup(), workspace=workspace)
    peak = peak_of_a_step(runner, work)
    assert peak <= bound + 8 * 16 * num_tokens
    assert bound <= 3 * peak


@pytest.mark.parametrize("num_tokens", [256, 300])
def test_attention_to_a_whole_prompt_needs_no_more(num_tokens):
    "Its queries and outputs are smaller than what an MLP has in hand."
    config = make_config(vocab_size=500, hidden_size=96, intermediate_size=256, max_position=512)
    runner = make_runner(TorchAttention, config, num_blocks=200)
    seq, = with_blocks([Sequence("a", [1] * num_tokens, SamplingParams())], num_tokens)
    bound = profile_memory(config, torch.float32, num_tokens, 1, TensorParallelGroup())
    assert peak_of_a_step(runner, [(seq, num_tokens)]) <= bound + 8 * 16 * num_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("params", [dict(temperature=0), {}, dict(top_p=.9), dict(top_k=9), dict(min_p=.1), ALL_STAGES],
                         ids=["greedy", "plain", "top_p", "top_k", "min_p", "all"])
def test_a_profile_has_room_for_what_a_gpu_samples_at_once(monkeypatch, params, dtype):
    "All rows at a time, in float32; the meta device stands for a GPU, as it knows every size."
    R, config, memory = 64, make_config(vocab_size=5000), PeakMemory()
    bound = profile_memory(config, dtype, R, R, TensorParallelGroup(), "cuda")
    monkeypatch.setattr(sampler, "to_device", lambda x, device: x.to(device))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.device.type == "meta"))
    seq = Sequence("a", [1, 2], SamplingParams(**params), output_token_ids=[3], stop_token_ids={2})
    with memory:
        logits = torch.zeros(R, 5000, device="meta", dtype=dtype).float()
        sampler.sample(logits, SamplingMetadata.of([seq] * R))
    assert logits.nbytes <= memory.peak <= bound


def test_a_deleted_runner_frees_its_model_at_once():
    "By reference counts alone, also after steps."
    gc.collect()
    gc.disable()
    try:
        runner = make_runner()
        seq, = with_blocks([Sequence("a", [5, 6, 7], SamplingParams(logprobs=1))], 8)
        for n in (3, 1): step(runner, [(seq, n)])
        kept = [weakref.ref(x) for x in (runner, runner.model, runner.kv_cache, runner.input_batch)]
        del runner
        assert [ref() for ref in kept] == [None] * 4
    finally: gc.enable()


# ---- rows

@pytest.fixture(params=[False, True], ids=["shared tables", "own tables"])
def own_tables(request): return request.param


def make_rows(own_tables=False, max_num_seqs=8, max_model_len=40, block_size=4):
    rows = InputBatch(max_num_seqs, max_model_len, block_size, CPU)
    if own_tables: rows.device.block_tables = rows.device.block_tables.clone()
    return rows


class RandomSchedules:
    "Steps that no scheduler would think of: any rows, any order, any number of tokens, of texts that come, go and come again."

    def __init__(self, seed, own_tables):
        rng = self.rng = random.Random(seed)
        self.size, self.window = rng.choice([1, 2, 4, 7]), rng.choice([None, None, 5])
        self.free, self.max_num_seqs = list(range(300)), rng.randint(1, 7)
        rng.shuffle(self.free)
        self.runner = FakeRunner(300, self.size, self.max_num_seqs, 40, self.window, own_tables)
        self.resident, self.outside, self.removed, self.pending = [], [], [], []
        self.late, self.counts = rng.random() < 0.5, dict(moved=0, again=0, unknown=0, steps=0)

    def come(self):
        "A new text, or one that was here before."
        rng = self.rng
        if self.outside and rng.random() < 0.6:
            seq = self.outside.pop(rng.randrange(len(self.outside)))
            self.counts["again"] += 1
        else:
            params = SamplingParams(temperature=rng.choice([0, 1, .5]), top_k=rng.choice([-1, 0, 7, 10**9]),
                                    top_p=rng.choice([1, .5]), min_p=rng.choice([0, .5]), max_tokens=None,
                                    frequency_penalty=rng.choice([0, 0, 0, 1]),
                                    min_tokens=rng.choice([0, 3]), prompt_logprobs=rng.choice([None, None, 1]))
            prompt = [rng.randint(1, 3) for _ in range(rng.randint(1, 15))]
            seq = Sequence("r", prompt, params, seed=rng.getrandbits(63), max_len=40)
        self.resident.append(seq)

    def go(self):
        "A text loses its blocks and its row; it may come again, with all that it has to compute."
        seq = self.resident.pop(self.rng.randrange(len(self.resident)))
        if seq in self.runner.input_batch.row_of and seq not in self.removed:
            self.counts["moved"] += self.runner.input_batch.row_of[seq] + 1 < len(self.runner.input_batch.seqs)
            self.removed.append(seq)
        self.free += seq.block_table[seq.num_released_blocks:]
        seq.reset()
        if seq.num_tokens < 38: self.outside.append(seq)

    def work(self):
        "(sequence, number of tokens) for some of those that are here."
        chosen = []
        for seq in self.rng.sample(self.resident, self.rng.randint(0, len(self.resident))):
            if seq.params.has_penalty and seq.num_output_placeholders: continue
            missing = min(seq.num_tokens + seq.num_output_placeholders, 39) - seq.num_computed_tokens
            if missing: chosen.append((seq, self.rng.choice([missing, self.rng.randint(1, missing)])))
        return chosen

    def step(self):
        rng = self.rng
        # who is preempted while one of its tokens is on its way waits for it: so does the scheduler's loop
        while self.resident and rng.random() < 0.2 and not self.pending: self.go()
        while len(self.resident) < self.max_num_seqs and rng.random() < 0.5: self.come()
        if not (work := self.work()): return self.receive()
        for seq, n in work:
            if self.window is not None: self.release(seq)
            need = blocks_needed(seq.num_computed_tokens + n + rng.randint(0, 2), self.size)
            while len(seq.block_table) < min(need, blocks_needed(40, self.size)): seq.block_table.append(self.free.pop(0))
        output = output_of(self.runner.input_batch, work, self.removed)
        self.removed = []
        self.pending.append((output, self.runner.execute(output)))
        self.counts["steps"] += 1
        if not self.late or len(self.pending) > 1: self.receive()

    def release(self, seq):
        "Blocks behind the window are given back."
        for i in range(seq.num_released_blocks, max(0, seq.num_computed_tokens + 1 - self.window) // self.size):
            self.free.append(seq.block_table[i])
            seq.block_table[i], seq.num_released_blocks = 0, i + 1

    def receive(self):
        if self.pending: receive(self.pending[0][0], self.pending[0][1].result())
        del self.pending[:1]

    def run(self, num_steps=60):
        for _ in range(num_steps): self.step()
        while self.pending: self.receive()
        for seq in self.resident + self.outside:
            text = list(seq.prompt_token_ids)
            for token in seq.output_token_ids:
                assert token == answer(text, seq.seed), "not its text's token"
                text.append(token)
        return self.counts | dict(unknown=self.runner.num_unknown)


def test_rows_are_the_oracles_over_random_schedules(own_tables):
    "FakeRunner compares each batch with `make_batch` and each metadata with `SamplingMetadata.of`."
    total = dict(moved=0, again=0, unknown=0, steps=0)
    for seed in range(120):
        try: counts = RandomSchedules(seed, own_tables).run()
        except AssertionError as e: raise AssertionError(f"schedules {seed}: {e}") from e
        for name in total: total[name] += counts[name]
    assert total["steps"] > 4000 and total["moved"] > 300 and total["again"] > 200 and total["unknown"] > 1000, total


def test_rows_have_no_gaps_and_the_last_one_moves():
    rows, seqs = make_rows(), with_blocks([Sequence(str(i), [1] * 9, SamplingParams(temperature=i / 4), seed=i) for i in range(5)], 9)
    rows.update(output_of(rows, [(s, 9) for s in seqs[:4]]))
    assert [s.request_id for s in rows.seqs] == list("0123")
    rows.device.last_token[:4] = torch.tensor([10, 11, 12, 13])
    for seq in seqs[:4]: seq.output_token_ids.append(9)
    output = output_of(rows, [(seqs[2], 1), (seqs[3], 1), (seqs[4], 9)], removed=[seqs[1], seqs[0]])
    rows.update(output)
    assert [s.request_id for s in rows.seqs] == list("234") and rows.row_of == {seqs[2]: 0, seqs[3]: 1, seqs[4]: 2}
    assert rows.device.last_token[:2].tolist() == [12, 13]
    assert (rows.params["temperature"][:3] * 4).tolist() == rows.seeds[:3].tolist() == [2, 3, 4]
    assert [rows.block_tables[i, :3].tolist() for i in range(3)] == [s.block_table for s in rows.seqs]
    rows.clear()
    assert rows.seqs == [] and rows.row_of == {} and rows.num_blocks == []
    with pytest.raises(KeyError): rows.update(output_of(rows, [], removed=[seqs[2]]))     # it is known no more


def test_tables_are_a_view_where_they_can_be(own_tables):
    "A steady decode copies no table; a step of some rows copies those rows."
    rows, seqs = make_rows(own_tables), with_blocks([Sequence(str(i), [1] * 9, SamplingParams()) for i in range(3)], 20)
    for chosen, is_view in (([0, 1, 2], True), ([1, 0], True), ([0], True), ([2, 0], False), ([1], False)):
        output = output_of(rows, [(seqs[i], 1) for i in chosen])
        rows.update(output)
        batch, inputs = rows.prepare(output)
        assert (batch.block_tables.data_ptr() == rows.device.block_tables.data_ptr()) == is_view
        assert batch.block_tables.tolist() == [seqs[i].block_table for i in sorted(chosen)]
        assert inputs.rows.tolist() == sorted(chosen)


def test_what_is_sent_is_new_and_names_no_cell_twice(monkeypatch):
    "A GPU writes a cell that is named twice in any order."
    sent = []
    def send(x, device):
        sent.append(x.clone())
        return x.clone()
    monkeypatch.setattr(model_runner, "to_device", send)
    rows, free = make_rows(True), list(range(100))
    seqs = [with_blocks([Sequence(str(i), [1] * 9, SamplingParams())], 9, free=free)[0] for i in range(6)]
    def update(chosen, removed=()):
        sent.clear()
        rows.update(output_of(rows, [(seqs[i], 1) for i in chosen], [seqs[i] for i in removed]))
        assert len(sent) <= 1
        cells = [tuple(cell) for cell in sent[0].T.tolist()] if sent else []
        assert len({cell[:2] for cell in cells}) == len(cells)
        for i in chosen:
            row, table = rows.row_of[seqs[i]], seqs[i].block_table
            assert rows.device.block_tables[row, :len(table)].tolist() == table
        return cells
    assert len(update([0, 1, 2, 3])) == 4 * 3
    assert update([0, 1, 2, 3]) == []                             # nothing is new
    seqs[1].block_table.append(free.pop())
    assert update([1, 2]) == [(1, 3, seqs[1].block_table[3])]
    update([1, 4, 5], removed=[0, 3])                             # row 0: first 3's, then 2's; row 2: 3's, then 4's
    assert [s.request_id for s in rows.seqs] == list("2145")
    update([1], removed=[2, 5, 4])                                # row 0 changes hands three times
    assert [s.request_id for s in rows.seqs] == list("1")


def test_numbers_beyond_a_row_are_cut():
    "More than any vocabulary or text has is as much as all."
    rows = make_rows()
    seq, = with_blocks([Sequence("a", [1], SamplingParams(top_k=2**80, min_tokens=2**70, max_tokens=None), seed=2**63 - 1)], 4)
    output = output_of(rows, [(seq, 1)])
    rows.update(output)
    _, inputs = rows.prepare(output)
    assert inputs.metadata.top_k.item() == inputs.metadata.min_tokens.item() == 2**62
    assert inputs.metadata.seeds.item() == 2**63 - 1


# ---- handles

def test_a_handle_gives_tokens_in_the_schedulers_order():
    "Whatever the order of the rows, and whatever is written over the ids afterwards."
    a, b, c, d = (Sequence(name, [1, 2], SamplingParams(logprobs=rated)) for name, rated in zip("abcd", (None, 1, None, 0)))
    output = SchedulerOutput(tuple(ScheduledSequence(s, 0, 2, s is not c) for s in (d, a, c, b)))
    ids, logits = torch.tensor([7, 8, 9]), torch.randn(3, 20)                # rows: a, b, d
    rated = {1: gather_logprobs(logits[1:2], ids[1:2], 1), 2: gather_logprobs(logits[2:], ids[2:], 0)}
    handle = StepHandle(output, [a, b, d], ids, rated, [(c, 1, ["entry"])])
    ids.zero_()
    result = handle.result()
    assert result.token_ids == [9, 7, 8] and result.prompt_logprobs == [(c, 1, ["entry"])]
    assert result.logprobs == [compute_logprobs(logits[2:], [9], 0), None, compute_logprobs(logits[1:2], [8], 1)]


def test_a_steps_result_does_not_change_when_the_next_one_is_computed():
    runner = make_runner()
    params = SamplingParams(temperature=0, logprobs=2)
    seqs = with_blocks([Sequence(str(i), [3, 1, 4][:n], params) for i, n in enumerate((3, 2))], 12)
    alone = []
    for n in ((3, 2), (1, 1), (1, 1)):
        output, result, _ = step(runner, list(zip(seqs, n)))
        alone.append((result.token_ids, result.logprobs))
    for seq in seqs: seq.output_token_ids, seq.num_computed_tokens = [], 0
    runner.clear()
    outputs, handles = [], []
    for n in ((3, 2), (1, 1), (1, 1)):                                       # nothing is received in between
        outputs.append(output_of(runner.input_batch, list(zip(seqs, n))))
        handles.append(runner.execute(outputs[-1]))
    found = [handle.result() for handle in handles]
    assert [(r.token_ids, r.logprobs) for r in found] == alone


# ---- computing

def by_hand(model, ids):
    "Logits (N, vocab_size) of the text `ids`: no cache, no batch, no module; float64."
    c = model.config
    w = {name: p.double() for name, p in weight_views(model).items()}

    def norm(x, name): return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[name + ".weight"]

    def linear(x, name): return x @ w[name + ".weight"].T

    half = c.head_dim // 2
    angles = torch.outer(torch.arange(len(ids)).double(), c.rope["rope_theta"] ** -(torch.arange(half).double() / half))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotated(x):
        z = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([z.real, z.imag], -1)

    x = w["model.embed_tokens.weight"][torch.tensor(ids)]
    for i in range(c.num_layers):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm")
        q, k, v = (linear(h, f"{at}self_attn.{n}_proj").unflatten(-1, (-1, c.head_dim)) for n in "qkv")
        q, k, heads = rotated(q), rotated(k), []
        for head in range(c.num_heads):
            kv = head // (c.num_heads // c.num_kv_heads)
            scores = q[:, head] @ k[:, kv].T / c.head_dim**0.5
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, kv])
        x = x + linear(torch.cat(heads, -1), at + "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm")
        x = x + linear(F.silu(linear(h, at + "mlp.gate_proj")) * linear(h, at + "mlp.up_proj"), at + "mlp.down_proj")
    head = "model.embed_tokens" if c.tied else "lm_head"
    return linear(norm(x, "model.norm"), head)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("backend", [ReferenceAttention, TorchAttention])
def test_execute_equals_a_forward_by_hand(backend, tied):
    runner = make_runner(backend, make_config(tied=tied))
    texts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 9, 7], [36]]
    seqs = with_blocks([Sequence(str(i), t, SamplingParams()) for i, t in enumerate(texts)], 16)
    steps = [[(0, 4), (1, 3)], [(0, 7), (2, 1)], [(0, 1), (2, 1), (1, 1)], [(2, 1), (0, 1)]]
    for chosen in steps:                                         # chunks, mixtures, decodes, in changing order
        output, result, logits = step(runner, [(seqs[i], n) for i, n in chosen])
        sampled = [s.seq for s in output.sampled]
        assert set(logits) == set(sampled) and all(row.shape == (37,) for row in logits.values())
        for seq, token in zip(sampled, result.token_ids):
            expected = by_hand(runner.model, seq.tokens(0, seq.num_tokens - 1))[-1]
            torch.testing.assert_close(logits[seq].double(), expected, atol=1e-4, rtol=1e-4)
            assert token == int(logits[seq].argmax()) == seq.output_token_ids[-1]


def test_tokens_that_nobody_has_seen_are_computed_with(own_tables):
    "Two steps are asked for before the first one's tokens are known; the rows move in between."
    runner = make_runner()
    if own_tables: runner.input_batch.device.block_tables = runner.input_batch.device.block_tables.clone()
    texts = [[3, 1, 4], [8, 9, 7], [36]]
    seqs = with_blocks([Sequence(str(i), t, SamplingParams(temperature=0)) for i, t in enumerate(texts)], 12)
    first = output_of(runner.input_batch, [(seq, len(seq.prompt_token_ids)) for seq in seqs])
    handle = runner.execute(first)
    second = output_of(runner.input_batch, [(seqs[2], 1), (seqs[1], 1)], removed=[seqs[0]])
    later = runner.execute(second)
    receive(first, handle.result()), receive(second, later.result())
    for seq in seqs:
        for i, token in enumerate(seq.output_token_ids):
            logits = by_hand(runner.model, seq.prompt_token_ids + seq.output_token_ids[:i])[-1]
            assert token == int(logits.argmax())
    assert [len(seq.output_token_ids) for seq in seqs] == [1, 2, 2]


def by_hand_logprobs(model, ids, k):
    return [None, *compute_logprobs(by_hand(model, ids)[:-1], ids[1:], k)]


def check_prompt_logprobs(found, expected):
    assert [entry and list(entry) for entry in found] == [entry and list(entry) for entry in expected]
    for entry, wanted in zip(found[1:], expected[1:]):
        assert [p.rank for p in entry.values()] == [p.rank for p in wanted.values()]
        close = torch.tensor([[p.logprob for p in e.values()] for e in (entry, wanted)])
        torch.testing.assert_close(close[0], close[1], atol=1e-4, rtol=1e-4)


def test_every_wanted_row_comes_back():
    runner, ids = make_runner(), [5, 6, 7, 8, 9]
    seq, = with_blocks([Sequence("a", ids, SamplingParams(prompt_logprobs=1))], 5)
    _, result, logits = step(runner, [(seq, 5)])
    torch.testing.assert_close(logits[seq].double(), by_hand(runner.model, ids)[-1], atol=1e-4, rtol=1e-4)
    (who, first, entries), = result.prompt_logprobs
    assert who is seq and first == 1
    check_prompt_logprobs([None, *entries], by_hand_logprobs(runner.model, ids, 1))


class Spy:
    "Notes of how many positions logits were computed at a time."
    def __init__(self, model):
        self.compute, self.sizes = model.compute_logits, []
        model.compute_logits = self

    def __call__(self, hidden):
        self.sizes.append(len(hidden))
        return self.compute(hidden)


def test_prompts_are_rated_in_pieces():
    "At most 1,024 positions have logits at a time, as many as there are; the pieces join without a seam."
    config = make_config(num_layers=1, max_position=3000)
    runner = make_runner(config=config, num_blocks=200, block_size=16)
    seq, = with_blocks([Sequence("a", [i * i % 37 for i in range(2500)], SamplingParams(prompt_logprobs=2))], 2501, 16)
    spy = Spy(runner.model)
    _, result, _ = step(runner, [(seq, 2500)])
    assert model_runner.PROMPT_PIECE == 1024 and spy.sizes == [1, 1024, 1024, 451]
    found, at = [None], 1
    for who, first, entries in result.prompt_logprobs:
        assert who is seq and first == at
        found, at = found + entries, at + len(entries)
    check_prompt_logprobs(found, by_hand_logprobs(runner.model, seq.prompt_token_ids, 2))


@pytest.mark.parametrize("piece", [1, 3, 7, 1024])
def test_pieces_of_several_prompts_go_to_their_own(monkeypatch, piece):
    "Over chunks, prompts that nobody rates, and pieces with the end of one prompt and the beginning of the next."
    monkeypatch.setattr(model_runner, "PROMPT_PIECE", piece)
    rng, runner = random.Random(piece), make_runner(num_blocks=40)
    seqs = [Sequence(str(i), [rng.randrange(37) for _ in range(n)], SamplingParams(prompt_logprobs=k))
            for i, (n, k) in enumerate([(9, 1), (7, None), (12, 0), (1, 2), (10, 3), (2, 1)])]
    with_blocks(seqs, 16)
    found = {seq: [None] * len(seq.prompt_token_ids) for seq in seqs}
    spy = Spy(runner.model)
    while unfinished := [s for s in seqs if not s.output_token_ids]:
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        _, result, _ = step(runner, [(s, rng.randint(1, s.num_tokens - s.num_computed_tokens)) for s in chosen])
        for seq, first, entries in result.prompt_logprobs:
            for i, entry in enumerate(entries):
                assert found[seq][first + i] is None, "rated twice"
                found[seq][first + i] = entry
    assert max(spy.sizes) <= max(piece, len(seqs))
    for seq in seqs:
        k = seq.params.prompt_logprobs
        if k is None: assert not any(found[seq])
        else: check_prompt_logprobs(found[seq], by_hand_logprobs(runner.model, seq.prompt_token_ids, k))


def test_a_step_writes_its_own_slots_and_no_others():
    runner = make_runner()
    runner.kv_cache.fill_(7.)
    seq, = with_blocks([Sequence("a", [5, 6, 7, 8, 9], SamplingParams())], 5, free=[9, 3])
    step(runner, [(seq, 5)])
    written = (runner.kv_cache != 7.).any(-1).any(-1).all(0).all(0).flatten()
    assert written.nonzero().flatten().tolist() == sorted(seq.block_table[p//4]*4 + p % 4 for p in range(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_float32_in_any_dtype(dtype):
    runner = make_runner(dtype=dtype)
    seq, = with_blocks([Sequence("a", [5, 6, 7], SamplingParams())], 3)
    assert runner.kv_cache.dtype == dtype
    logits = step(runner, [(seq, 3)])[2][seq]
    assert logits.dtype == torch.float32 and logits.isfinite().all() and not logits.requires_grad
