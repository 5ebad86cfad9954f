"""Settings for all tests: no hub, kernels interpreted where there is no GPU, the cheap checks of the book first; and what they share.

Two workers take turns at the files. A file stays with one of them, so that what its tests share is made once; a test that needs nothing
of its file may be marked with a group of its own (xdist_group)."""
import os
import time

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on a download from a hub
if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported

FIRST = ["test_book.py", "test_families.py"]  # and the longest, so that no worker begins one when the other is done


def pytest_configure(config):
    if config.pluginmanager.hasplugin("xdist"): config.option.loadscopereorder = False  # the order is made below


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
    if not config.pluginmanager.hasplugin("xdist"): return
    for item in items:
        if item.get_closest_marker("xdist_group") is None: item.add_marker(pytest.mark.xdist_group(item.path.name))


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
