"""What only a GPU can show, in one command: `make gpu`, at most eight minutes on a data-centre GPU.

    python tools/gpu_suite.py [--toy] [--force] [--out FOLDER] [--minutes N] [PART ...]

Each part (tests, kernels, throughput, ablations, peers) writes one JSON file with the GPU's name, versions and date. A part is
made of jobs, each in a process of its own, so one that crashes or hangs leaves the others their GPU. A job whose result
for this GPU and this source code is there already is skipped: run the command again and it goes on where it stopped.

Exit code 0: all is well; 1: a job failed; 3: there is no GPU. `--toy` runs every job on the processor, with the kernels
interpreted and all sizes tiny, so that nothing in here is untried but the hardware.

Needs torch, triton, transformers, safetensors, xxhash, numpy, fastcore, and tqdm, which transformers brings."""
import argparse
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from datetime import date
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = "tests", "kernels", "throughput", "ablations", "peers"


def parse(argv=None):
    p = argparse.ArgumentParser(description="Measure and test what only a GPU can show.")
    p.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    p.add_argument("--toy", action="store_true", help="everything tiny, on the processor, in Triton's interpreter")
    p.add_argument("--force", action="store_true", help="repeat what is there already")
    p.add_argument("--out", type=Path, help="folder of the JSON files; default: results/, for --toy a temporary one")
    p.add_argument("--minutes", type=float, default=7.8, help="start nothing, and wait for nothing, after these (default 7.8)")
    args = p.parse_args(argv)
    args.out = args.out or (Path(tempfile.mkdtemp(prefix="gpu-suite-toy-")) if args.toy else ROOT/"results")
    return args


def source() -> str:
    "A name for the code that is measured: it changes when the package or this suite does."
    files = sorted((ROOT/"nano_vllm").glob("*.py")) + sorted((ROOT/"tools").glob("gpu_*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


def commit() -> str | None:
    "The commit that is checked out, where git can tell."
    done = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


# ---- jobs in processes of their own: forked before anything has touched the GPU, so that imports are paid once. If an
# import has touched it after all, a forked process cannot use it, and they are started afresh ("spawn"), a few seconds each

METHOD = "fork"


class Job:
    "`function(*args)` under way in a process of its own."
    def __init__(self, name, function, *args, seconds: float):
        self.name, self.start, self.end = name, time.monotonic(), time.monotonic() + seconds
        context = multiprocessing.get_context(METHOD)
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=self.work, args=(sender, function, args))
        self.process.start()
        sender.close()

    @staticmethod
    def work(sender, function, args):
        try: sender.send((function(*args), None))
        except BaseException: sender.send((None, traceback.format_exc()))

    def result(self) -> tuple:
        "(what the function returned, None) or (None, what went wrong)."
        try: answer = self.receiver.recv() if self.receiver.poll() else (None, f"stopped after {self.seconds:.0f} s")
        except EOFError:
            self.process.join(5)
            answer = None, f"the process died with exit code {self.process.exitcode}"
        self.process.kill()
        self.process.join()
        return answer

    @property
    def seconds(self) -> float: return time.monotonic() - self.start


def run_jobs(jobs: list[tuple], at_once: int, deadline: float):
    "Yield (name, seconds, result, error) of each (name, function, args, seconds) as they end, `at_once` at a time."
    waiting, running = list(jobs), []
    while waiting or running:
        while waiting and len(running) < at_once:
            name, function, args, seconds = waiting.pop(0)
            left = deadline - time.monotonic()
            if left > 5: running.append(Job(name, function, *args, seconds=min(seconds, left)))
            else: yield name, 0., None, "not started: no time left, run the suite again"
        if not running: continue
        ready = wait([j.receiver for j in running], timeout=max(0, min(j.end for j in running) - time.monotonic()))
        for job in [j for j in running if j.receiver in ready or time.monotonic() >= j.end]:
            running.remove(job)
            yield job.name, job.seconds, *job.result()


def describe(toy: bool) -> dict | None:
    "The machine and its versions; None if it has no GPU and needs one."
    import platform, torch, transformers, triton
    from nano_vllm.workbench import machine
    if not (toy or torch.cuda.is_available()): return None
    versions = dict(python=platform.python_version(), torch=torch.__version__, triton=triton.__version__,
                    transformers=transformers.__version__, cuda=torch.version.cuda)
    about = machine()
    if not toy:
        p = torch.cuda.get_device_properties(0)
        about |= dict(memory=p.total_memory, multiprocessors=p.multi_processor_count, capability=f"{p.major}.{p.minor}")
    return dict(machine=about, versions=versions)


def touch_gpu(toy: bool):
    "Fails where this process cannot use the GPU."
    import torch
    torch.zeros(1, device="cpu" if toy else "cuda")


# ---- parts

def parts() -> dict[str, tuple]:
    "Part -> (jobs at once, {job: (function, seconds)}); a function takes the scale and returns its data."
    import gpu_checks as checks, gpu_timings as timings
    return dict(zip(PARTS, (
        (4, {**{f"kernels_{d}": (getattr(checks, f"kernels_{d}"), 150) for d in ("bfloat16", "float16", "float32")},
             "static_metadata": (checks.static_metadata, 100), "fusions": (checks.fusions, 200), "sampler": (checks.sampler, 100),
             "graphs": (checks.graphs, 150), "overlap": (checks.overlap, 150),
             "demo_model": (checks.demo_model, 150), "fp8_products": (checks.fp8_products, 100), "fp8_cache": (checks.fp8_cache, 100),
             "fp8_engine": (checks.fp8_engine, 120)}),
        (1, {"decode": (timings.decode, 120), "prefill": (timings.prefill, 60), "rope_and_cache": (timings.rope_and_cache, 60),
             "sampler": (timings.sampler, 60), "fp8_products": (timings.fp8_products, 60), "fp8_decode": (timings.fp8_decode, 60)}),
        (1, {"launches": (timings.launches, 60), "throughput": (timings.throughput, 120), "host_gap": (timings.host_gap, 90)}),
        (1, dict(eager=(timings.eager, 120), graphs=(timings.graphs, 120), overlap=(timings.overlapped, 120),
                 compile=(timings.compiled, 120))),
        (1, dict(nano_vllm=(timings.peer_nano_vllm, 90), nanovllm=(timings.peer_nanovllm, 150), vllm=(timings.peer_vllm, 200))))))


def run_part(name: str, about: dict, args, deadline: float) -> bool:
    "Run the jobs of a part that have no result yet, and store each as it comes; whether all have one now."
    at_once, jobs = parts()[name]
    slug = re.sub(r"[^a-z0-9]+", "-", about["machine"]["name"].lower()).strip("-")
    file = args.out/f"{slug}-gpu-{name}.json"
    entry = dict(benchmark=f"gpu-{name}", **about, toy=args.toy, date=str(date.today()), commit=commit(), source=source(),
                 seconds={}, data={}, failed={})
    old = json.loads(file.read_text()) if file.exists() else {}
    same = all(old.get(k) == entry[k] for k in ("benchmark", "source", "versions", "toy"))
    if same and not args.force: entry |= dict(data=old["data"], seconds=old["seconds"])
    todo = [(j, function, (args.toy,), seconds) for j, (function, seconds) in jobs.items() if j not in entry["data"]]
    if not todo: print(f"{name}: already in {file} (--force repeats it)", flush=True)
    for job, seconds, result, error in run_jobs(todo, 2 if args.toy else at_once, deadline):
        print(f"{name}: {job}: {'FAILED' if error else 'done'} in {seconds:.1f} s", flush=True)
        if error: print(error, flush=True)
        entry["seconds"][job] = round(seconds, 1)
        if error: entry["failed"][job] = error.strip().splitlines()[-1]
        else: entry["data"][job] = result
        args.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(entry, indent=1) + "\n")
    return not entry["failed"]


def main(argv=None) -> int:
    args = parse(argv)
    start = time.monotonic()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ |= dict(TRITON_INTERPRET="1", OMP_NUM_THREADS="1") if args.toy else dict(TRITON_INTERPRET="0")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"       # so that asking for a GPU does not touch it
    warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork.*")
    sys.path[:0] = [str(ROOT), str(ROOT/"tools")]
    if odd := [p for p in args.parts if p not in PARTS]:
        print(f"PART is {odd[0]!r}, must be one of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    try: import nano_vllm  # noqa: F401 (here, and so once for all jobs)
    except ModuleNotFoundError as e:
        print(f"make gpu: {sys.executable} has no {e.name}; nothing was run", file=sys.stderr)
        return 3
    (_, _, about, error), = run_jobs([("machine", describe, (args.toy,), 60)], 1, start + 60)
    if error: print(error, file=sys.stderr)
    if about is None:
        print("make gpu: this machine has no GPU that PyTorch can use; nothing was run", file=sys.stderr)
        return 3
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM  # noqa: F401 (once, too)
    (_, _, _, error), = run_jobs([("touch", touch_gpu, (args.toy,), 60)], 1, start + 120)
    if error: globals().update(METHOD="spawn")
    print(about["machine"]["name"], about["versions"], f"processes: {METHOD}", flush=True)
    good = [run_part(name, about, args, start + 60*args.minutes) for name in args.parts or PARTS]
    print(f"{'all is well' if all(good) else 'some jobs FAILED'}: {time.monotonic() - start:.0f} s, files in {args.out}")
    return 0 if all(good) else 1


if __name__ == "__main__": sys.exit(main())
