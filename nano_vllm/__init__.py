"nano_vllm: an LLM inference engine, one notebook at a time."
__version__ = "0.1.0"

# The chapters, in the book's order: what a later one adds to an earlier one's tables is added here.
from . import (workbench, tiny, tokenizer, sampling, kv_blocks, prefix_cache, attention, layers,  # noqa: F401
               model, weights, model_runner, scheduler, engine, benchmark, cli, cpu_kernels,
               quantization, moe, parallel)
from .engine import LLM, CompletionOutput, RequestMetrics, RequestOutput
from .sampling import Logprob, SamplingParams

__all__ = ["LLM", "SamplingParams", "RequestOutput", "CompletionOutput", "RequestMetrics", "Logprob"]
