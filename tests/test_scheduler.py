"""The scheduler by itself; its laws under random work are in test_fuzz."""
from nano_vllm.kv_blocks import Sequence
from nano_vllm.prefix_cache import PrefixCachingPool
from nano_vllm.sampling import SamplingParams
from nano_vllm.scheduler import Scheduler


def test_long_prompts_go_in_pieces_and_nobody_stalls():
    "With a threshold several prompts are under way at once; each running sequence gets a token in every step."
    scheduler = Scheduler(PrefixCachingPool(1000, 16), max_num_seqs=8, max_num_batched_tokens=24, long_prefill_token_threshold=10)
    lengths = [100, 3, 200, 90, 5, 70]
    seqs = [Sequence(str(i), [10*i + j % 7 for j in range(n)], SamplingParams(max_tokens=50, ignore_eos=True)) for i, n in enumerate(lengths)]
    for seq in seqs: scheduler.add(seq)
    for step in range(60):
        running = list(scheduler.running)
        work = scheduler.schedule()
        granted = {chunk.seq.request_id: chunk.num_new_tokens for chunk in work}
        assert all(1 <= granted[s.request_id] <= 10 for s in running) and sum(granted.values()) <= 24
        scheduler.update(work, [5] * sum(chunk.samples for chunk in work))
    assert all(s.num_computed_tokens >= n for s, n in zip(seqs, lengths))
