"""Test notebooks as `nbdev_test` does, two at a time, each in a process of its own: python tools/test_notebooks.py nbs/*.ipynb

Half of a short notebook's time is the import of PyTorch and its like. Here they are imported once, and each notebook runs
in a fork of the process that has them; nothing of them has computed yet, so no thread is lost. The package itself is not
imported before, nor is a notebook's process used for another, since it would hold all engines of both.
"""
import multiprocessing
import os
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import matplotlib.pyplot  # noqa: F401
import torch  # noqa: F401
from fastcore import test  # noqa: F401
from nbdev.config import get_config
from nbdev.test import test_nb
from transformers import PreTrainedTokenizerFast  # noqa: F401

AT_ONCE = 2


def run(path: Path, flags: list[str]):
    "Exit with 1 if a cell of the notebook at `path` fails, whose error has been printed."
    passed, seconds = test_nb(path, skip_flags=flags, basepath=get_config().config_path)
    print(f"{os.path.relpath(path)}: {seconds:.0f} s{'' if passed else ', FAILED'}", flush=True)
    sys.exit(not passed)


def run_all(paths: list[Path], flags: list[str]) -> list[Path]:
    "The notebooks of which a cell failed, or whose process ended otherwise. The last are first: they have the largest engines."
    fork, waiting, running, failed = multiprocessing.get_context("fork"), sorted(paths, reverse=True), {}, []
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            process = fork.Process(target=run, args=(path := waiting.pop(0), flags))
            process.start()
            running[process.sentinel] = process, path
        for sentinel in wait(list(running)):
            process, path = running.pop(sentinel)
            process.join()
            if process.exitcode: failed.append(path)
    return failed


if __name__ == "__main__":
    start, paths = time.time(), [Path(name).absolute() for name in sys.argv[1:]]
    failed = run_all(paths, get_config().tst_flags.split())
    print(f"{len(paths)} notebooks in {time.time() - start:.0f} s")
    if failed: sys.exit("these notebooks failed: " + ", ".join(path.name for path in failed))
