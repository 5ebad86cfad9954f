"""The C++ kernels, built with AddressSanitizer and UndefinedBehaviorSanitizer: they read and write nothing but what they are given.

The compiler's name is taken over by a script that adds the flags, so the kernels are built as always, into a cache of their own;
then their tests run once more. Python itself is not instrumented: the runtime library is loaded before it."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nano_vllm.cpu_kernels import CAN_BUILD
from nano_vllm.workbench import cache_dir

ROOT = Path(__file__).parent.parent
LIBRARIES = "libasan.so", "libstdc++.so.6"       # the second, or the first cannot see exceptions being thrown
RUNTIME = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip() for name in LIBRARIES if CAN_BUILD]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (RUNTIME and all(map(os.path.isabs, RUNTIME))), reason="needs g++ and its libasan")]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
TESTS = ["cpu_kernels", "cpu_products", "cpu_attention", "cpu_steps", "bfloat16", "quantization", "int4"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    "What a process needs so that its kernels are watched."
    folder = tmp_path_factory.mktemp("sanitized")
    compiler = folder/"g++"
    compiler.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec {shutil.which("g++")} {FLAGS} "$@"\n')
    compiler.chmod(0o755)
    (folder/"cache").mkdir()
    for kept in cache_dir().iterdir() if cache_dir().exists() else ():      # models; the kernels are built anew
        if kept.name != "kernels": (folder/"cache"/kept.name).symlink_to(kept)
    return {**os.environ, "CXX": "", "PATH": f"{folder}:{os.environ['PATH']}", "LD_PRELOAD": ":".join(RUNTIME), "NANO_VLLM_CACHE": str(folder/"cache"),
            "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(ROOT)}


FAULTS = {"a read behind the end": ("return x[n];", "heap-buffer-overflow"), "a write before the beginning": ("x[-1] = 0; return 0;", "heap-buffer-overflow"),
          "an overflow": ("int big = 2147483647; return big + n;", "signed integer overflow")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_be_found(environment, fault):
    body, says = FAULTS[fault]
    script = f"""
import torch
from nano_vllm.cpu_kernels import call, load_library
call(load_library('extern "C" int f(int* x, int n) {{ {body} }}').f, torch.zeros(1000, dtype=torch.int32), 1000)
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode and says in done.stderr


@pytest.mark.parametrize("name", TESTS)
def test_kernels_keep_to_what_is_theirs(environment, name):
    # a kernel that is watched is slow, so one test of a choice by the clock is left out
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "--capture=no", "-p", "no:cacheprovider", f"tests/test_{name}.py",
                           "-k", "not test_what_does_not_fit_is_held_in_float32"],
                          cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
