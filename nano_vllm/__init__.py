"nano_vllm: an LLM inference engine, one notebook at a time."
__version__ = "0.1.0"

# The chapters, in the book's order: what a later one adds to an earlier one's tables is added here.
from . import workbench, sampling_params, tiny, tokenizer, sampler, kv_blocks, prefix_cache, attention  # noqa: F401
try: from . import triton_attention  # noqa: F401
except ModuleNotFoundError as e:  # where Triton is not to be had, attention is PyTorch's
    if e.name != "triton": raise
from . import (layers, model, weights, model_runner, cuda_graphs, scheduler, engine, llm, benchmark,  # noqa: F401
               latency, cli, cpu_kernels, cpu_products, bfloat16, quantization, cpu_attention, cpu_steps,
               fusions, parallel, moe, speculative)
from .engine import CompletionOutput, RequestMetrics, RequestOutput
from .llm import LLM
from .sampling_params import Logprob, SamplingParams

__all__ = ["LLM", "SamplingParams", "RequestOutput", "CompletionOutput", "RequestMetrics", "Logprob"]
