"What the started ranks of test_tensor_parallel.py, test_batch_invariance.py and test_graphs_on_ranks.py run."
from pathlib import Path

import torch

from nano_vllm.batch_invariance import ordered_all_reduce
from nano_vllm.cuda_graphs import make_graphs
from nano_vllm.layers import Ops
from nano_vllm.model import ModelConfig
from nano_vllm.model_runner import ModelRunner
from nano_vllm.weights import load_model


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


def ranked_runner(group, folder, recorder=None):
    "This rank's part of the model in `folder`, with Triton's attention; with a recorder, its decode steps are recorded."
    from nano_vllm.triton_attention import TritonAttention    # here: Triton is not everywhere
    config = ModelConfig.from_folder(Path(folder))
    model = load_model(Path(folder), config, torch.float32, torch.device("cpu"), "auto", group, Ops(attention=TritonAttention))
    runner = ModelRunner(model, 60, 4, 4, 40, group=group)
    if recorder: runner.graphs = make_graphs(runner, 40, recorder)
    return runner


class Again:
    "Records by remembering."
    def record(self, step):
        step()
        return step


def serve_graphs(group, folder):
    "A rank with recorded steps that follows rank 0."
    ranked_runner(group, folder, Again()).worker_loop()
