"""What a server costs over its bare engine, here and with vLLM: `python tools/serve_peers.py` writes results/<machine>-server-peers.json.

Two bare engines and two servers take turns at the same work; each is stopped while another one runs, as in tools/peers.py, which also makes
the environment for vLLM. Both servers are asked by one client, that of `nano-vllm bench serve`. With --toy: a tiny work, once, and no record."""
import atexit
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from statistics import median
from urllib.error import URLError
from urllib.request import urlopen

import peers
from nano_vllm import SamplingParams
from nano_vllm.benchmark import Workload
from nano_vllm.openai_api import bench_http, post_lines, run_all, timed_request
from nano_vllm.workbench import fetch, record

TOY = "--toy" in sys.argv
ROUNDS = 1 if TOY else peers.ROUNDS
FRESH = "--no-enable-prefix-caching"     # a server gets each work twice, once for each way to answer
MANY = dict(requests=3, prompt=[8, 8], output=[4, 8]) if TOY else peers.WORK["32 requests"]
ONE = dict(requests=1, prompt=[20, 20], output=[1, 1])
OPTIONS = dict(dtype="float32")


def work_of(seed: int, requests: int, prompt: list[int], output: list[int], vocab_size: int = 49152) -> Workload:
    "The prompts and lengths that tools/peer_worker.py draws for these sizes and this seed."
    rng = random.Random(seed)
    def tokens(n): return [rng.randrange(100, vocab_size) for _ in range(n)]
    prompts = [tokens(rng.randint(*prompt)) for _ in range(requests)]
    return Workload(prompts, [SamplingParams(temperature=0.6, max_tokens=rng.randint(*output), ignore_eos=True) for _ in prompts])


class Server:
    "A server of OpenAI's protocol in processes of its own, which end with this one."

    def __init__(self, name: str, command: list, **environment):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.name, self.url = name, f"http://127.0.0.1:{port}"
        command = [*command, "--served-model-name", "m", "--max-model-len", "8192", "--port", port]
        for option, value in OPTIONS.items(): command += [f"--{option}", value]
        self.process = subprocess.Popen(list(map(str, command)), env=os.environ | environment, stdout=subprocess.DEVNULL,
                                        stderr=open(peers.PEERS/f"{name}.log", "w"), start_new_session=True)
        atexit.register(self.close)
        start = time.perf_counter()
        while not self.is_up(): time.sleep(.2)
        self.whole(work_of(10**6, 2, [8, 8], [4, 4]))
        print(f"{name}: ready in {time.perf_counter() - start:.0f} s", flush=True)
        self.signal(signal.SIGSTOP)

    def is_up(self) -> bool:
        if self.process.poll() is not None: raise RuntimeError(f"{self.name} ended; see {peers.PEERS}/{self.name}.log")
        try: return urlopen(f"{self.url}/health").status == 200
        except (URLError, ConnectionError): return False

    def signal(self, number: int): os.killpg(self.process.pid, number)

    def whole(self, work: Workload):
        async def answer(prompt, p):
            body = dict(model="m", prompt=prompt, max_tokens=p.max_tokens, temperature=p.temperature, ignore_eos=True)
            lines = [line async for line in post_lines(self.url, "/v1/completions", body)]
            assert json.loads(b"".join(lines))["usage"]["completion_tokens"] == p.max_tokens
        run_all([answer(*asked) for asked in zip(*work)])

    def streams(self, work: Workload):
        assert bench_http(self.url, "m", work)["total_output_tokens"] == work.num_output_tokens

    def rate(self, how, seed: int) -> float:
        "Output tokens per second of the work."
        work = work_of(seed, **MANY)
        self.signal(signal.SIGCONT)
        start = time.perf_counter()
        how(work)
        seconds = time.perf_counter() - start
        self.signal(signal.SIGSTOP)
        return work.num_output_tokens / seconds

    def first_token(self, seed: int) -> float:
        "Seconds to the first token of a lonely request."
        self.signal(signal.SIGCONT)
        body = dict(model="m", prompt=work_of(seed, **ONE).prompts[0], max_tokens=1, ignore_eos=True)
        line, = run_all([timed_request(partial(post_lines, self.url), body, 0., time.perf_counter())])
        self.signal(signal.SIGSTOP)
        return line.ttft

    def close(self):
        if self.process.poll() is not None: return
        self.signal(signal.SIGCONT)
        self.process.terminate()
        try: self.process.wait(30)
        except subprocess.TimeoutExpired: self.signal(signal.SIGKILL)


def bare_rate(engine: peers.Engine, seed: int) -> float:
    engine.run("many", MANY, seed)
    return engine.results["runs"]["many"][-1]["output_tokens_per_second"]


def bare_first_token(engine: peers.Engine, seed: int) -> float:
    engine.run("one", ONE, seed)
    return engine.results["runs"]["one"][-1]["seconds"]


def main():
    folder, vllm, cores = fetch(), peers.make_vllm(), len(os.sched_getaffinity(0))
    threads = dict(OMP_NUM_THREADS=str(cores))
    alone = threads | dict(VLLM_CPU_OMP_THREADS_BIND=f"0-{cores - 1}", VLLM_CPU_KVCACHE_SPACE="2")
    of_ours = "from nano_vllm.cli import main; main()"
    of_theirs = [vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--disable-uvicorn-access-log", FRESH]
    servers = {"nano_vllm": Server("nano_vllm serve", [sys.executable, "-c", of_ours, "serve", folder, FRESH], **threads),
               "vllm": Server("vllm serve", of_theirs + ["--enforce-eager"] * TOY, **alone)}
    bare = {"nano_vllm": peers.Engine("nano_vllm", sys.executable, "nano_vllm", folder, "dtype=float32", **threads),
            "vllm": peers.Engine("vllm", vllm, "vllm", folder, "dtype=float32", *["enforce_eager=1"] * TOY, **alone)}
    ways = {}
    for name, server in servers.items():
        ways |= {(name, "bare engine"): partial(bare_rate, bare[name]), (name, "HTTP, whole answers"): partial(server.rate, server.whole),
                 (name, "HTTP, streams"): partial(server.rate, server.streams), (name, "first token, bare engine"): partial(bare_first_token, bare[name]),
                 (name, "first token, HTTP"): server.first_token}
    data = {name: {} for name in servers}
    for seed in range(ROUNDS):
        for (name, kind), measure in ways.items():
            times = 4 if kind.startswith("first") else 1
            data[name].setdefault(kind, []).extend(measure(seed * 1000 + i) for i in range(times))
    for it in (*bare.values(), *servers.values()): it.close()
    if not TOY:
        os.environ["NANO_VLLM_RECORD"] = "1"
        record("server-peers", data)
    for name, found in data.items():
        base = median(found["bare engine"])
        for kind, values in found.items():
            shown = f"{1e3*median(values):.1f} ms" if kind.startswith("first") else f"{median(values):.0f} tokens/s, {median(values)/base:.0%}"
            print(f"{name:12s} {kind:26s} {shown}")


if __name__ == "__main__": main()
