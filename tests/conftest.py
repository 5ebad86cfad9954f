"Settings for all tests: no hub, kernels interpreted where there is no GPU, the cheap checks of the book first."
import os
import time

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on a download from a hub
if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_book.py")


def pytest_terminal_summary(terminalreporter):
    start = os.environ.get("NANO_VLLM_TEST_START")
    if start: terminalreporter.write_line(f"make test took {time.time() - int(start):.0f} s in all")
