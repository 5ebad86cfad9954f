"nano_vllm: an LLM inference engine, one notebook at a time."
__version__ = "0.1.0"

# The chapters, in the book's order: what a later one adds to an earlier one's tables is added here.
from . import workbench, sampling_params, drawing, tiny, tokenizer, sampler, kv_blocks, prefix_cache, attention  # noqa: F401
try: from . import triton_kernels, triton_attention  # noqa: F401
except ModuleNotFoundError as e:  # where Triton is not to be had, attention is PyTorch's
    if e.name != "triton": raise
from . import (layers, model, weights, model_runner, cuda_graphs, scheduler, request, engine, engine_args, llm,  # noqa: F401
               benchmark, latency, cli, cpu_kernels, cpu_products, bfloat16, quantization, cpu_attention, cpu_steps, int4, fp8,
               fusions, sampling_kernels, parallel, moe, async_llm, server, structured_output, openai_api, pooling, speculative, lora,
               sliding_windows, latent_attention, pipeline, routing, replicas, kv_transfer, batch_invariance)
from .async_llm import AsyncLLM  # noqa: F401
from .engine_args import EngineArgs
from .llm import LLM, LLMEngine, PromptType, TextPrompt, TokensPrompt  # noqa: F401
from .lora import LoRARequest
from .pooling import (EmbeddingOutput, EmbeddingRequestOutput, PoolingParams, PoolingRequestOutput, ScoringOutput,  # noqa: F401
                      ScoringRequestOutput)
from .request import CompletionOutput, RequestMetrics, RequestOutput
from .sampling_params import Logprob, SamplingParams

llm.add_paths(__name__, llm.PATHS)   # nano_vllm.inputs and others, as in vLLM
cli.refuse_names(__name__, cli.REFUSED_NAMES)
__all__ = ["LLM", "SamplingParams", "PoolingParams", "RequestOutput", "CompletionOutput", "RequestMetrics", "Logprob", "EngineArgs",
           "LLMEngine", "TextPrompt", "TokensPrompt", "LoRARequest"]
