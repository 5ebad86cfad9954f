"nano_vllm: an LLM inference engine, one notebook at a time."
__version__ = "0.1.0"

# The chapters, in the book's order: what a later one adds to an earlier one's tables is added here.
from . import workbench, tiny, tokenizer, sampling, kv_blocks, prefix_cache, attention  # noqa: F401
try: from . import triton_attention  # noqa: F401
except ModuleNotFoundError as e:  # where Triton is not to be had, attention is PyTorch's
    if e.name != "triton": raise
from . import (layers, model, weights, model_runner, scheduler, engine, llm, benchmark, latency, cli,  # noqa: F401
               cpu_kernels, cpu_products, quantization, cpu_steps, moe, parallel, overlap, fusions)
try: from . import fused_rows  # noqa: F401
except ModuleNotFoundError as e:
    if e.name != "triton": raise
from .engine import CompletionOutput, RequestMetrics, RequestOutput
from .llm import LLM
from .sampling import Logprob, SamplingParams

__all__ = ["LLM", "SamplingParams", "RequestOutput", "CompletionOutput", "RequestMetrics", "Logprob"]
