"Three ways to ask, every question checked before any work, and nothing left behind whatever becomes of the asker."

# %%
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from fastcore.basics import patch
from tqdm import tqdm
from nano_vllm.engine import Engine, EngineArgs, Request, RequestOutput, make_engine
from nano_vllm.model_runner import ModelRunner
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.weights import resolve_model

# %%
@contextmanager
def running(engine: Engine, requests: list[Request]):
    "Add `requests`; at the end of the block, abort those that have not finished."
    try:
        for request in requests: engine.add(request)
        yield
    finally:
        for request in requests: engine.abort(request.request_id)

# %%
def progress(engine: Engine, requests: list[Request], streams: bool = False):
    "Step, and give each request when it ends; with `streams`, whenever it goes on."
    news, unfinished = {}, set(requests)
    for request in requests: request.news, request.streams = news, streams
    with running(engine, requests):
        while unfinished:
            # texts that an interrupted step left half made are whole after the next
            while not (news and engine.is_consistent): engine.step()
            request = next(iter(news))
            del news[request]
            if request.finished: unfinished.discard(request)
            yield request


def new_outputs(engine: Engine, requests: list[Request]):
    "RequestOutputs with what is new in each of `requests`, to their very ends."
    for request in progress(engine, requests, streams=True):
        if request.finished or request.has_new_text: yield request.new_output()

# %%
def tell_other_scripts(engine: Engine, output):
    "The output, sent to the ranks that made the same call."
    group = engine.runner.group
    if group.shares_script: group.broadcast(output)
    return output


def outputs_for_all(engine: Engine, requests: list[Request]):
    "The `new_outputs`, each told to the ranks that made the same call; None ends them."
    try:
        for output in new_outputs(engine, requests):
            yield tell_other_scripts(engine, output)
    finally: tell_other_scripts(engine, None)


def followed_outputs(runner: ModelRunner):
    "The outputs that rank 0 tells; a reader who leaves early computes on to the end."
    output = None
    try:
        while (output := runner.worker_loop()) is not None: yield output
    finally:
        while output is not None: output = runner.worker_loop()

# %%
class LLM:
    """A model, ready to answer; the options are the fields of `EngineArgs`.

    Raises ValueError, naming field, value and limit, for anything that cannot work."""
    def __init__(self, model, **options):
        args = EngineArgs(model, **options)
        self.model_path: Path = resolve_model(args.model)
        args.model = self.model_path       # a folder, from here on
        self.engine = make_engine(args)
        self.tokenizer = self.engine.input_processor.tokenizer
        self.vocab_size = self.engine.input_processor.vocab_size

# %%
@patch
def generate(self: LLM, prompts, sampling_params=None, *,
             use_tqdm=True) -> list[RequestOutput]:
    "A RequestOutput for each prompt (string, token ids, or dict), in order."
    requests = self.engine.input_processor.make_requests(prompts, sampling_params)
    runner = self.engine.runner
    if runner.group.rank: return runner.worker_loop()
    bar = tqdm(total=len(requests), desc="requests", disable=not use_tqdm)
    with closing(progress(self.engine, requests)) as ended, bar:
        for _ in ended: bar.update()
    return tell_other_scripts(self.engine, [r.output() for r in requests])

# %%
@patch
def chat(self: LLM, messages, sampling_params=None, *, use_tqdm=True):
    "The same for a conversation (dicts of 'role', 'content') or a list of them."
    return self.generate(self.render(messages), sampling_params, use_tqdm=use_tqdm)

# %%
@patch
def stream(self: LLM, prompts, sampling_params=None):
    "Iterate over RequestOutputs that hold only what is new, as the text comes."
    requests = self.engine.input_processor.make_requests(prompts, sampling_params)
    runner = self.engine.runner
    if runner.group.rank: return followed_outputs(runner)
    return outputs_for_all(self.engine, requests)

# %%
@patch
def render(self: LLM, messages) -> list[dict]:
    "Prompts made of one conversation or several by the model's chat template."
    several = isinstance(messages, list) and isinstance((messages or [0])[0], list)
    conversations = messages if several else [messages]
    return [{"prompt_token_ids": self.tokenizer.apply_chat_template(m)}
            for m in conversations]

# %%
@patch
def get_tokenizer(self: LLM):
    "The Hugging Face tokenizer."
    return self.tokenizer.hf

# %%
@patch
def get_default_sampling_params(self: LLM) -> SamplingParams:
    "A copy of what a call without parameters uses."
    return replace(self.engine.input_processor.default_params)
