"""Settings for all tests: no hub, kernels interpreted where there is no GPU, the cheap checks of the book first; and what they share.

Two workers take turns at the files (pytest -n 2 --dist loadfile). A file stays with one of them, so that what its tests share is made once."""
import os
import time

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on a download from a hub
if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported

# the book, and then what takes longest: so no worker begins a long file when the other has nothing left to do
FIRST = [f"test_{name}.py" for name in ("book", "tensor_parallel", "greedy", "tiny", "triton_attention", "families", "api", "gpu_suite", "weights")]


def pytest_configure(config):
    if config.pluginmanager.hasplugin("xdist"): config.option.loadscopereorder = False  # it would go by the number of tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def pytest_terminal_summary(terminalreporter):
    start = os.environ.get("NANO_VLLM_TEST_START")
    if start: terminalreporter.write_line(f"make test took {time.time() - int(start):.0f} s in all")


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
