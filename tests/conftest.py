"""Settings for all tests: no hub, kernels interpreted where there is no GPU, the cheap checks of the book first; and what they share.

Two workers take turns at the files (pytest -n 2 --dist loadfile). A file stays with one of them, so that what its tests share is made once."""
import copy
import gc
import os
import time
from pathlib import Path

import pytest
import torch
import warm
from quick_interpreter import remember_names

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on a download from a hub
if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported
remember_names()

# the book, and then what takes longest: so no worker begins a long file when the other has nothing left to do
FIRST = [f"test_{name}.py" for name in (
    "book", "exactly_once", "exercises", "replicas", "kv_transfer", "pipeline", "tensor_parallel", "triton_attention", "scripts", "gpu_suite", "greedy",
    "course", "weights", "families", "api")]


def pytest_configure(config):
    if config.pluginmanager.hasplugin("xdist"): config.option.loadscopereorder = False  # it would go by the number of tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def pytest_unconfigure(): gc.unfreeze()     # see garbage_is_of_this_file


def pytest_terminal_summary(terminalreporter):
    start = os.environ.get("NANO_VLLM_TEST_START")
    if start: terminalreporter.write_line(f"make test took {time.time() - int(start):.0f} s in all")


@pytest.fixture(autouse=True, scope="session")
def tokenizers_are_read_once():
    """Reading one takes a third of a second, which is nearly all that a small engine takes to begin.

    Folders whose files are the same, byte for byte, have copies of one tokenizer that share the library's own part of it."""
    from nano_vllm import tokenizer
    load, known = tokenizer.load_hf, {}
    def load_once(path):
        files = sorted(Path(path).iterdir()) if tokenizer.has_tokenizer(path) else []
        if not files or not all(f.is_file() for f in files): return load(path)     # to be refused, or a pipe that nobody may open
        unread = "*.safetensors", "*.bin", "*.gguf", "*.index.json", "generation_config.json"     # by tokenizers
        key = tuple((f.name, f.read_bytes()) for f in files if not any(map(f.match, unread)))
        if key not in known:
            known[key] = load(path)
            while len(known) > 8: del known[next(iter(known))]
        mine = copy.copy(known[key])
        mine.__dict__ = {name: value if name == "_tokenizer" else copy.deepcopy(value) for name, value in vars(mine).items()}
        mine.name_or_path = str(path)
        return mine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "load_hf", load_once)
        yield


@pytest.fixture(autouse=True, scope="module")
def garbage_is_of_this_file():
    """A collection looks at what a file's tests have made, and not at all modules and at what earlier files keep.

    That would be a million objects and more, half a second each time that a test asks for one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def ranks_begin_warm():
    "The ranks that tests start need not import everything anew."
    from nano_vllm import parallel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "subprocess", warm)
        yield


# ---- What tests only read, made once for all files of a worker, and imported by those who need it ----

@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "The folder of a small random model."
    from helpers import tiny_folder
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def hf():
    "The demo model and its tokenizer, as transformers has them."
    from greedy_reference import load_hf
    return load_hf()


@pytest.fixture(scope="session")
def smol():
    "An LLM with the demo model, for those who leave it idle, as they found it."
    from nano_vllm import LLM
    return LLM("smollm2-135m", dtype="float32", device="cpu", max_model_len=2048, num_kv_blocks=512)
