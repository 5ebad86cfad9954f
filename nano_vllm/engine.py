"The loop that joins the chapters, and what comes out of it."

# %%
import os, time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from random import Random
import torch
from fastcore.basics import patch
from nano_vllm.cuda_graphs import make_graphs
from nano_vllm.kv_blocks import SchedulerOutput, Sequence, blocks_needed
from nano_vllm.layers import LAUNCHERS, Ops, Target, TensorParallelGroup, choose_ops
from nano_vllm.model import ModelConfig, read_json, shard_heads
from nano_vllm.model_runner import (ModelRunner, StepHandle, device_memory,
                                    kv_block_bytes, profile_memory)
from nano_vllm.prefix_cache import KVCacheManager
from nano_vllm.sampling_params import Logprob, SamplingParams, check_number
from nano_vllm.scheduler import Scheduler, check_fits
from nano_vllm.tokenizer import Detokenizer, NoTokenizer, Tokenizer, has_tokenizer
from nano_vllm.weights import load_model, resolve_model

# %%
@dataclass
class CompletionOutput:
    "One answer."
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None           # of the answer, if asked for
    logprobs: list[dict[int, Logprob]] | None = None  # for each token: it and the best
    finish_reason: str | None = None                  # "stop", "length" or "abort"
    stop_reason: int | str | None = None              # stop token or string; None: EOS

# %%
def since(start: float | None, end: float | None) -> float | None:
    "Seconds from `start` to `end`; None if one of them has not happened."
    return None if start is None or end is None else end - start


@dataclass
class RequestMetrics:
    "Readings of `time.perf_counter` in seconds, and what follows from them."
    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_generated_tokens: int = 0

    @property
    def queue_time(self): return since(self.arrival_time, self.first_scheduled_time)
    @property
    def time_to_first_token(self):
        return since(self.arrival_time, self.first_token_time)
    @property
    def tokens_per_second(self):
        seconds = since(self.first_scheduled_time, self.finished_time)
        return seconds and self.num_generated_tokens / seconds

# %%
@dataclass
class RequestOutput:
    "What a request has given: all of it, or, from `stream`, what is new."
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0        # prompt tokens found in the prefix cache
    metrics: RequestMetrics | None = None
    prompt_logprobs: list | None = None   # None, then a dict for each further token

    def __getitem__(self, key: str): return getattr(self.outputs[0], key)

# %%
class Completion:
    "A sequence of a request, and the text made of its tokens."
    def __init__(self, seq: Sequence, tokenizer: Tokenizer):
        self.seq, self.tokenizer = seq, tokenizer
        self.num_shown_tokens, self.num_shown_chars = 0, 0   # by `new_output`
        self.logprobs = None if seq.params.logprobs is None else []
        self.restart()

    def restart(self):
        "Make the text anew: none of the tokens has been read."
        p = self.seq.params
        self.num_read, self.num_chars = 0, 0
        self.detokenizer = Detokenizer(
            self.tokenizer, self.seq.prompt_token_ids, p.stop, p.skip_special_tokens,
            p.min_tokens)

# %%
@patch
def read_token(self: Completion, eos_token_ids: set[int]) -> tuple | None:
    "Turn the next token into text; (finish_reason, stop_reason) if it is the last."
    token = self.seq.output_token_ids[self.num_read]
    self.num_read += 1
    if token in self.seq.stop_token_ids:
        return "stop", None if token in eos_token_ids else token
    self.num_chars += len(self.detokenizer.add([token]))
    if self.detokenizer.stop_reason: return "stop", self.detokenizer.stop_reason
    length = len(self.seq.prompt_token_ids) + self.num_read
    return ("length", None) if length == self.seq.max_len else None

# %%
@patch
def finish(self: Completion):
    "Release the text that was held back."
    self.num_chars += len(self.detokenizer.finish())

# %%
@patch
def output(self: Completion) -> CompletionOutput:
    "The answer so far."
    return self.output_from(0, 0)

# %%
@patch
def new_output(self: Completion) -> CompletionOutput:
    "What is new since the last call."
    output = self.output_from(self.num_shown_tokens, self.num_shown_chars)
    self.num_shown_tokens, self.num_shown_chars = self.num_read, self.num_chars
    return output

# %%
@patch
def output_from(self: Completion, token: int, char: int) -> CompletionOutput:
    "The answer so far, without its first tokens and characters."
    seq, ids, logprobs, total = self.seq, self.seq.output_token_ids, None, None
    if self.logprobs is not None:
        read = self.logprobs[:self.num_read]
        total = sum(entry[t].logprob for entry, t in zip(read, ids))
        logprobs = read[token:]
    return CompletionOutput(seq.index, self.detokenizer.text_from(char),
                            ids[token:self.num_read], total, logprobs,
                            seq.finish_reason, seq.stop_reason)

# %%
@dataclass(eq=False)
class Request:
    "A prompt on its way through the engine."
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    completions: list[Completion]
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    prompt_logprobs: list | None = None
    # who waits for it: `news` gets the request when there is something new, which is
    # every token (`streams`) or only the end
    news: dict["Request", None] = field(default_factory=dict)
    streams: bool = False

    @property
    def finished(self): return all(c.seq.finish_reason for c in self.completions)

    @property
    def has_new_text(self): return any(c.num_chars > c.num_shown_chars
                                       for c in self.completions)

# %%
@patch
def output(self: Request) -> RequestOutput:
    "All that the user is handed."
    return self.output_of([c.output() for c in self.completions])

# %%
@patch
def new_output(self: Request) -> RequestOutput:
    "What is new since the last call."
    return self.output_of([c.new_output() for c in self.completions])

# %%
@patch
def output_of(self: Request, outputs: list[CompletionOutput]) -> RequestOutput:
    return RequestOutput(self.request_id, self.prompt, self.prompt_token_ids,
                         outputs, self.finished, self.num_cached_tokens,
                         self.metrics, self.prompt_logprobs)

# %%
def is_token_list(prompt) -> bool:
    is_list = isinstance(prompt, (list, tuple))
    return is_list and all(isinstance(t, Integral) for t in prompt)


def split_prompts(prompts) -> list:
    "The list of prompts, where a single one stands for a list of one."
    single = isinstance(prompts, (str, dict)) or is_token_list(prompts) and len(prompts)
    if single: return [prompts]
    if isinstance(prompts, (list, tuple)): return list(prompts)
    raise ValueError(f"prompts must be one prompt or a list of them, got {prompts!r}")

# %%
def unwrap(prompt):
    "What a prompt given as a dict holds; any other prompt is what it is."
    if not isinstance(prompt, dict): return prompt
    for key, kind in dict(prompt=str, prompt_token_ids=(list, tuple)).items():
        if list(prompt) == [key] and isinstance(prompt[key], kind): return prompt[key]
    raise ValueError("a prompt given as a dict must have one of prompt (a string) and "
                     f"prompt_token_ids (a list), got {prompt!r}")


def read_prompt(prompt, tokenizer: Tokenizer, vocab_size: int) -> tuple:
    "(text or None, token ids) of one prompt; ValueError says what is wrong with it."
    prompt = unwrap(prompt)
    text = prompt if isinstance(prompt, str) else None
    ids = prompt if text is None else tokenizer.encode(text)
    if not is_token_list(ids):
        raise ValueError(f"prompt must be a string or token ids, got {prompt!r}")
    if not ids: raise ValueError(f"prompt must have at least 1 token, got {prompt!r}")
    for t in ids:
        if isinstance(t, bool) or not 0 <= t < vocab_size:
            raise ValueError(f"token ids must be from 0 to {vocab_size - 1}, got {t!r}")
    return text, [int(t) for t in ids]

# %%
def read_params(sampling_params, num_prompts: int,
                default=SamplingParams()) -> list[SamplingParams]:
    "One checked copy of SamplingParams for each prompt."
    params = default if sampling_params is None else sampling_params
    if not isinstance(params, (list, tuple)): params = [params] * num_prompts
    if len(params) != num_prompts:
        raise ValueError(f"sampling_params must be one or a list of {num_prompts}, "
                         f"one for each prompt, got a list of {len(params)}")
    for p in params:
        if not isinstance(p, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {p!r}")
    return [replace(p) for p in params]

# %%
def read_default_params(path: Path) -> SamplingParams:
    "What `generation_config.json` of a model folder recommends; else the defaults."
    file = path/"generation_config.json"
    given = read_json(file) if file.exists() else {}
    given["max_tokens"] = given.get("max_new_tokens")
    names = "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens"
    found = {n: given[n] for n in names if given.get(n) is not None}
    try: return SamplingParams(**found)
    except ValueError as e: raise ValueError(f"{file}: {e}") from None

# %%
@dataclass
class InputProcessor:
    "Prompts in, requests out; everything is checked before anything is made."
    tokenizer: Tokenizer
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    eos_token_ids: set[int]
    default_params: SamplingParams = field(default_factory=SamplingParams)
    enable_prefix_caching: bool = True
    random: Random = field(default_factory=Random)   # gives seeds where none is given
    num_made: int = 0

# %%
@patch
def make_requests(self: InputProcessor, prompts, sampling_params=None) -> list[Request]:
    "A request for each prompt; if one is bad, none: ValueError says which and why."
    prompts, checked = split_prompts(prompts), []
    params = read_params(sampling_params, len(prompts), self.default_params)
    for i, (prompt, p) in enumerate(zip(prompts, params)):
        try: checked.append((*self.check(prompt, p), p))
        except ValueError as e: raise ValueError(f"prompts[{i}]: {e}") from None
    return [self.make_request(*c) for c in checked]

# %%
@patch
def check(self: InputProcessor, prompt, params: SamplingParams) -> tuple:
    "(text or None, token ids) of a prompt that can be answered; else ValueError."
    text, ids = read_prompt(prompt, self.tokenizer, self.vocab_size)
    check_fits(len(ids), params.max_tokens, self.max_model_len, self.num_blocks,
               self.block_size)
    return text, ids

# %%
@patch
def make_request(self: InputProcessor, text, ids: list[int],
                 params: SamplingParams) -> Request:
    "A request with its `n` sequences, from a prompt's text (or None) and tokens."
    number, self.num_made = self.num_made, self.num_made + 1
    seed = self.random.getrandbits(63) if params.seed is None else params.seed
    eos = set() if params.ignore_eos else self.eos_token_ids
    longest = len(ids) + (params.max_tokens or self.max_model_len)
    shared = dict(stop_token_ids=eos | set(params.stop_token_ids),
                  max_len=min(longest, self.max_model_len),
                  cache_salt=0 if self.enable_prefix_caching else number + 1)
    others = replace(params, prompt_logprobs=None)
    seqs = [Sequence(str(number), ids, others if i else params, i,
                     (seed + i) % 2**63, **shared) for i in range(params.n)]
    rated = None if params.prompt_logprobs is None else [None] * len(ids)
    completions = [Completion(seq, self.tokenizer) for seq in seqs]
    return Request(str(number), text, ids, completions,
                   RequestMetrics(time.perf_counter()), prompt_logprobs=rated)

# %%
def with_text(entries: list[dict[int, Logprob]], tokenizer: Tokenizer) -> list[dict]:
    "The same entries, with each token's text filled in."
    for entry in entries:
        for token, logprob in entry.items():
            logprob.decoded_token = tokenizer.decode([token], skip_special_tokens=False)
    return entries

# %%
@dataclass
class OutputProcessor:
    "New tokens in; text, log-probabilities, and who has come to an end out."
    tokenizer: Tokenizer
    eos_token_ids: set[int]

# %%
@patch
def keep_logprobs(self: OutputProcessor, completion: Completion,
                  entry: dict[int, Logprob]):
    "Note how likely the next token of `completion` is, before it is appended."
    next_token = len(completion.seq.output_token_ids)
    completion.logprobs[next_token:] = with_text([entry], self.tokenizer)

# %%
@patch
def keep_prompt_logprobs(self: OutputProcessor, request: Request, first: int,
                         entries: list[dict]):
    "The same for the prompt tokens from position `first` on."
    place = slice(first, first + len(entries))
    request.prompt_logprobs[place] = with_text(entries, self.tokenizer)

# %%
@patch
def process(self: OutputProcessor, request: Request, completion: Completion):
    "Read the tokens of `completion` not read yet; how it ends, if it does."
    metrics, ids, end = request.metrics, completion.seq.output_token_ids, None
    while end is None and completion.num_read < len(ids):
        if metrics.first_token_time is None:
            metrics.first_token_time = time.perf_counter()
        metrics.num_generated_tokens += 1
        end = completion.read_token(self.eos_token_ids)
    if request.streams: request.news[request] = None
    return end

# %%
@patch
def finish(self: OutputProcessor, request: Request, completion: Completion):
    "Release the last text of a sequence that has ended."
    completion.finish()
    if not request.finished: return
    request.metrics.finished_time = time.perf_counter()
    request.news[request] = None

# %%
@patch
def restart(self: OutputProcessor, request: Request):
    "Make the text of an interrupted request anew, from its tokens."
    request.metrics.num_generated_tokens = 0
    for completion in request.completions:
        seq, ended = completion.seq, completion.seq.finish_reason
        completion.restart()
        end = self.process(request, completion)
        if end and not ended: seq.finish_reason, seq.stop_reason = end
        if seq.finish_reason: self.finish(request, completion)

# %%
class Engine:
    """Requests go in by `add`; each `step` brings them forward by about a batch.

    What is certain are `requests` and their tokens. All else (blocks, rows, texts) can
    be made anew from these: so it is, if an exception comes in the middle of a step."""
    def __init__(self, input_processor: InputProcessor, scheduler: Scheduler,
                 runner: ModelRunner, output_processor: OutputProcessor,
                 num_in_flight: int = 1):
        self.input_processor, self.output_processor = input_processor, output_processor
        self.scheduler, self.runner = scheduler, runner
        self.num_in_flight = num_in_flight    # 2: a step is prepared while one computes
        self.requests: dict[str, Request] = {}    # those that have not finished
        self.in_flight: deque[tuple[SchedulerOutput, StepHandle]] = deque()
        self.is_consistent = True    # False while something is changing
        self.is_busy = False         # True only while something is changing
        self.must_recover = False    # a call came amid a change of something else

# %%
@patch
@contextmanager
def changing(self: Engine):
    "Nothing is consistent in this block, nor after it if it ends by an exception."
    self.is_consistent, self.is_busy = False, True
    try: yield
    finally: self.is_busy = False
    self.is_consistent = True

# %%
@patch
def add(self: Engine, request: Request):
    "Queue a request."
    if not self.is_consistent:
        self.must_recover = True     # which queues it
        self.requests[request.request_id] = request
        return
    with self.changing():
        self.requests[request.request_id] = request
        for c in request.completions: self.scheduler.add(c.seq)

# %%
@patch
def step(self: Engine):
    "Launch the next step; receive the oldest one once enough are in flight."
    if self.must_recover or not self.is_consistent: self.recover()
    with self.changing():
        output = self.scheduler.schedule()
        if output: self.launch(output)
        if not output or len(self.in_flight) >= self.num_in_flight: self.receive()

# %%
@patch
def launch(self: Engine, output: SchedulerOutput):
    "Ask for a step."
    for s in output.admitted: self.note_start(self.requests[s.seq.request_id], s)
    self.in_flight.append((output, self.runner.execute(output)))

# %%
@patch
def note_start(self: Engine, request: Request, s):
    "Read the clock when a request computes its first tokens."
    if request.metrics.first_scheduled_time is not None: return
    request.metrics.first_scheduled_time = time.perf_counter()
    request.num_cached_tokens = s.start

# %%
@patch
def receive(self: Engine):
    "Wait for the oldest step in flight, and hand its tokens to their requests."
    if not self.in_flight: return
    output, handle = self.in_flight.popleft()
    result = handle.result()
    self.receive_logprobs(output, result)
    self.scheduler.update(output, result.token_ids)
    for s in output.sampled:
        if s.seq.finish_reason: continue     # it ended while the step was in flight
        request = self.requests[s.seq.request_id]
        completion = request.completions[s.seq.index]
        end = self.output_processor.process(request, completion)
        if end: self.finish(request, completion, *end)

# %%
@patch
def receive_logprobs(self: Engine, output: SchedulerOutput, result):
    "Note the log-probabilities of a step, before its tokens."
    keep = self.output_processor.keep_prompt_logprobs
    for seq, first, entries in result.prompt_logprobs:
        request = self.requests.get(seq.request_id)
        if request: keep(request, first, entries)
    for s, entry in zip(output.sampled, result.logprobs):
        if entry is None or s.seq.finish_reason: continue
        completion = self.requests[s.seq.request_id].completions[s.seq.index]
        self.output_processor.keep_logprobs(completion, entry)

# %%
@patch
def finish(self: Engine, request: Request, completion: Completion, finish_reason: str,
           stop_reason=None):
    "End a sequence and free its blocks."
    self.scheduler.finish(completion.seq, finish_reason, stop_reason)
    self.output_processor.finish(request, completion)
    if request.finished: self.requests.pop(request.request_id, None)

# %%
@patch
def abort(self: Engine, request_id: str):
    "End a request now, with what it has so far; no effect once it has finished."
    request = self.requests.get(request_id)
    if request is None: return
    if self.is_busy: return self.abort_later(request)
    if self.must_recover or not self.is_consistent: self.recover()
    with self.changing():
        for completion in request.completions:
            if completion.seq.finish_reason: continue
            self.finish(request, completion, "abort")

# %%
@patch
def abort_later(self: Engine, request: Request):
    "Abort what may be in other hands: Python closes an abandoned stream when it likes."
    self.must_recover = True      # which does the rest
    for completion in request.completions:
        completion.seq.finish_reason = completion.seq.finish_reason or "abort"

# %%
@patch
def recover(self: Engine):
    "Begin anew from what is certain: the requests, and the tokens they have."
    with self.changing():
        self.must_recover = False
        self.in_flight.clear()
        for request in list(self.requests.values()):
            self.output_processor.restart(request)
            if request.finished: self.requests.pop(request.request_id, None)
        self.scheduler.reset([c.seq for request in self.requests.values()
                              for c in request.completions if not c.seq.finish_reason])
        self.runner.clear()

# %%
ENGINE_LIMITS = dict(
    tensor_parallel_size=(int, 1, 2**10), block_size=(int, 1, 2**20),
    max_num_seqs=(int, 1, 2**20), max_num_batched_tokens=(int, 1, 2**30),
    gpu_memory_utilization=(float, 0.01, 1.0),
    num_kv_blocks=(int, 1, 2**40), max_model_len=(int, 2, 2**40),
    seed=(int, -2**63, 2**63 - 1), enable_prefix_caching=(bool, False, True),
    enforce_eager=(bool, False, True), async_scheduling=(bool, False, True),
    compile=(bool, False, True), long_prefill_token_threshold=(int, 0, 2**30))

# %%
@dataclass
class EngineArgs:
    "What an engine is made of; ValueError names a bad field, its value and the limit."
    model: str | Path                     # a folder, a hub id, or "smollm2-135m"
    tokenizer: str | Path | None = None   # a folder, if not the model's
    dtype: str | torch.dtype = "auto"     # "auto" is the checkpoint's
    kv_cache_dtype: str | torch.dtype = "auto"   # of keys and values; "auto" is dtype
    device: str = "auto"                  # a GPU if there is one
    tensor_parallel_size: int = 1         # processes that share the model
    block_size: int = 16                  # tokens in a KV block
    max_model_len: int | None = None      # longest prompt plus output
    max_num_seqs: int = 256               # sequences that may hold KV at a time
    max_num_batched_tokens: int = 8192    # tokens in a step
    long_prefill_token_threshold: int = 0 # of them, most for one prompt; 0: no limit
    gpu_memory_utilization: float | None = None   # default: see memory_budget
    num_kv_blocks: int | None = None      # default: what memory allows
    enable_prefix_caching: bool = True
    enforce_eager: bool = False           # no CUDA graphs
    async_scheduling: bool | None = None  # prepare a step while one is computed
    compile: bool = False                 # join small operations in fewer kernels
    ops: str = "auto"                     # implementations, by name: see `OPS`
    attention_backend: str = "auto"
    load_format: str = "auto"             # "dummy": random weights, for benchmarks
    quantization: str | None = None       # how the weights are held
    seed: int = 0                         # of requests that bring none

    def __post_init__(self):
        for name, limits in ENGINE_LIMITS.items():
            value = getattr(self, name)
            if value is None and getattr(EngineArgs, name) is None: continue
            setattr(self, name, check_number(name, value, *limits))

# %%
DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)


def choose_dtype(field: str, value, auto: torch.dtype) -> torch.dtype:
    "The torch dtype that `value` of `field` stands for: 'auto', a name, or a dtype."
    for name, known in dict(auto=auto, **DTYPES).items():
        if value is known or value == name: return known
    raise ValueError(f"{field} must be one of auto, {', '.join(DTYPES)}, got {value!r}")


def choose_device(device) -> torch.device:
    "The torch device that 'auto', 'cpu', 'cuda' or 'cuda:1' stands for, if it exists."
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if device == "auto": device = "cuda" if gpus else "cpu"
    here = ["cpu", *gpus] + ["cuda"] * bool(gpus)
    if str(device) in here: return torch.device(device)
    raise ValueError(f"device must be one of auto, {', '.join(here)}, got {device!r}")

# %%
@dataclass
class EngineConfig:
    "The arguments, resolved: what all parts of an engine agree on."
    args: EngineArgs
    model_path: Path
    model: ModelConfig
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    max_model_len: int
    ops: Ops

# %%
def choose_kv_dtype(args: EngineArgs, dtype: torch.dtype, device) -> torch.dtype:
    "The number type of keys and values; ValueError if the device cannot have it."
    kv_dtype = choose_dtype("kv_cache_dtype", args.kv_cache_dtype, dtype)
    if device.type == "cpu" or kv_dtype == dtype: return kv_dtype
    raise ValueError(f"kv_cache_dtype must be 'auto' or the dtype {dtype} on device "
                     f"{device.type}, got {kv_dtype}")

# %%
def resolve_args(args: EngineArgs) -> EngineConfig:
    "ValueError names the field that cannot be had with this model and device."
    device, path = choose_device(args.device), resolve_model(args.model)
    model = ModelConfig.from_folder(path)
    shard_heads(model, TensorParallelGroup(0, args.tensor_parallel_size))
    dtype = choose_dtype("dtype", args.dtype, model.dtype)
    kv_dtype = choose_kv_dtype(args, dtype, device)
    longest = model.max_position
    max_model_len = check_number("max_model_len", args.max_model_len or longest, int, 2,
                                 longest)
    target = Target(model, device, dtype, kv_dtype, args.quantization, args.compile,
                    args.tensor_parallel_size, args.block_size)
    ops = choose_ops(target, args.ops, args.attention_backend)
    return EngineConfig(args, path, model, device, dtype, kv_dtype, max_model_len, ops)

# %%
UTILIZATION = 0.92     # of a device's memory, as in vLLM
OF_FREE_MEMORY = 0.4   # on a CPU, whose memory is for other programs, too


def memory_budget(config: EngineConfig) -> int:
    "Bytes of the device's memory that may still be taken."
    free, total = device_memory(config.device)
    share = config.args.gpu_memory_utilization
    if share is None and config.device.type == "cpu": return int(OF_FREE_MEMORY * free)
    return int(total * (share or UTILIZATION)) - (total - free)


def kv_memory(config: EngineConfig, group: TensorParallelGroup) -> int:
    "Bytes for a KV cache: what may still be taken, less room for activations."
    args = config.args
    sharers = group.size if config.device.type == "cpu" else 1     # ranks on one host
    activations = profile_memory(
        config.model, config.dtype, args.max_num_batched_tokens,
        min(args.max_num_seqs, args.max_num_batched_tokens), group)
    return memory_budget(config) // sharers - activations


def count_blocks(config: EngineConfig, kv_config: ModelConfig,
                 group: TensorParallelGroup) -> int:
    "How many KV blocks the engine gets; ValueError if memory has no room for one."
    args = config.args
    if args.num_kv_blocks is not None: return args.num_kv_blocks
    block_bytes = kv_block_bytes(kv_config, args.block_size, config.kv_dtype)
    room = kv_memory(config, group) // block_bytes
    most = args.max_num_seqs * blocks_needed(config.max_model_len, args.block_size)
    if room >= 1: return min(room, most)
    raise ValueError(f"gpu_memory_utilization={args.gpu_memory_utilization} leaves no "
                     f"memory for a KV block of {block_bytes} bytes")

# %%
def make_group(args: EngineArgs, device: torch.device) -> TensorParallelGroup:
    "The processes that compute the model; each other one runs `serve_rank`."
    if args.tensor_parallel_size == 1: return TensorParallelGroup()
    return LAUNCHERS["processes"](args.tensor_parallel_size, device.type,
                                  "nano_vllm.engine.serve_rank", args)


def rank_device(device: torch.device, group: TensorParallelGroup) -> torch.device:
    "The device of this rank, if the engine is to run on `device`."
    if group.size == 1 or device.type == "cpu": return device
    return choose_device(f"cuda:{os.environ.get('LOCAL_RANK', group.rank)}")

# %%
def make_runner(config: EngineConfig, group: TensorParallelGroup) -> ModelRunner:
    "The model, or this rank's part, with as many KV blocks as all have room for."
    args = config.args
    model = load_model(config.model_path, config.model, config.dtype,
                       rank_device(config.device, group), args.load_format, group,
                       config.ops)
    num_blocks = group.minimum(count_blocks(config, model.kv_config, group))
    return ModelRunner(model, num_blocks, args.block_size, args.max_num_seqs,
                       config.max_model_len, config.kv_dtype, group)


def serve_rank(group: TensorParallelGroup, args: EngineArgs):
    "What a process started for one of the ranks runs: it follows rank 0."
    make_runner(resolve_args(args), group).worker_loop()

# %%
def load_tokenizer(config: EngineConfig) -> Tokenizer:
    "The tokenizer; none for a dummy model whose folder has none."
    args = config.args
    folder = config.model_path if args.tokenizer is None else args.tokenizer
    bare = args.tokenizer is None and args.load_format == "dummy"
    return (NoTokenizer if bare and not has_tokenizer(folder) else Tokenizer)(folder)

# %%
def make_scheduler(config: EngineConfig, num_blocks: int) -> Scheduler:
    "The scheduler and its blocks."
    args = config.args
    manager = KVCacheManager(num_blocks, args.block_size, config.model.sliding_window)
    return Scheduler(manager, args.max_num_seqs, args.max_num_batched_tokens,
                     args.long_prefill_token_threshold)


def count_in_flight(config: EngineConfig, group: TensorParallelGroup) -> int:
    "2 if a step is to be prepared while one is computed; the default on a GPU."
    wanted = config.args.async_scheduling
    if wanted is None: wanted = config.device.type == "cuda"
    return 2 if wanted and group.size == 1 else 1

# %%
def make_engine(args: EngineArgs) -> Engine:
    "An engine and all its parts; ValueError, naming the field, if it cannot be had."
    config = resolve_args(args)
    default_params = read_default_params(config.model_path)
    tokenizer = load_tokenizer(config)
    eos = config.model.eos_token_ids | {tokenizer.eos_token_id} - {None}
    group = make_group(args, config.device)
    with group.collective_guard(): runner = make_runner(config, group)
    if not args.enforce_eager: runner.graphs = make_graphs(runner, config.max_model_len)
    num_blocks = runner.kv_cache.shape[2]
    inputs = InputProcessor(tokenizer, config.model.vocab_size, config.max_model_len,
                            num_blocks, args.block_size, eos, default_params,
                            args.enable_prefix_caching, Random(args.seed))
    return Engine(inputs, make_scheduler(config, num_blocks), runner,
                  OutputProcessor(tokenizer, eos), count_in_flight(config, group))
