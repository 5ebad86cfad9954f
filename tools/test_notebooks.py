"""Test notebooks as `nbdev_test` does, two at a time, each in a process of its own: python tools/test_notebooks.py nbs/*.ipynb

What they measure is measured once and in short (short_runs.py); who wants the numbers executes them (`make notebooks`).

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
import nbdev.test
import torch  # noqa: F401
from fastcore import test  # noqa: F401
from nbdev.config import get_config
from nbdev.process import NBProcessor
from transformers import LlamaConfig, PreTrainedTokenizerFast  # noqa: F401

import warm
from quick_interpreter import remember_names
from short_runs import SHORT, name_of, shortened, timed_once

AT_ONCE = 2


def read_short(path: Path, **options) -> NBProcessor:
    "The notebook at `path`, whose cells are those that the tests run."
    made = NBProcessor(path, **options)
    for cell in made.nb.cells: cell.source = shortened(path, cell.get("id"), cell.source)
    return made


def run(path: Path, flags: list[str]):
    "Exit with 1 if a cell of the notebook at `path` fails, whose error has been printed."
    root = get_config().config_path
    sys.path.insert(0, str(root))
    from nano_vllm import parallel, workbench
    nbdev.test.NBProcessor, workbench.timed, parallel.subprocess = read_short, timed_once, warm
    remember_names()
    warm.fork_server()
    passed, seconds = nbdev.test.test_nb(path, skip_flags=flags, basepath=root)
    print(f"{os.path.relpath(path)}: {seconds:.0f} s{'' if passed else ', FAILED'}", flush=True)
    sys.exit(not passed)


def run_all(paths: list[Path], flags: list[str]) -> list[Path]:
    """The notebooks of which a cell failed, or whose process ended otherwise. The longest are first: those that are shortened, then the last.

    So there is something left for either core until the end."""
    fork, running, failed = multiprocessing.get_context("fork"), {}, []
    waiting = sorted(paths, key=lambda path: (name_of(path) in SHORT, path), reverse=True)
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
