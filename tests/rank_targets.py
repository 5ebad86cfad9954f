"What the started ranks of test_tensor_parallel.py and test_batch_invariance.py run."
import torch

from nano_vllm.batch_invariance import ordered_all_reduce


def echo(group, payload):
    "Add up the numbers of each message; all ranks' sums side by side go to rank 0."
    while (message := group.receive()) is not None:
        group.gather(torch.tensor([int(message.token_ids.sum()), int(message.query_lens.sum())]))


def partial_sums(rank, num_rows, hidden=37, dtype=torch.float32):
    "The first rows of what a rank has; the later the rank, the larger its numbers."
    x = torch.randn(64, hidden, generator=torch.Generator().manual_seed(rank)) * 3.**rank
    return x[:num_rows].to(dtype)


def add_in_order(group, cases):
    "Of each case (rows, hidden size, dtype), the ranks' sums go to rank 0: [ordered, the group's own] of each."
    for case in cases:
        group.collect([add(group, partial_sums(group.rank, *case)).float() for add in (ordered_all_reduce, type(group).all_reduce)])
