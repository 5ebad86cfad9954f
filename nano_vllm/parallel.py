"Several processes compute one model: how they find each other, what they say, and what happens when one dies."

# %%
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
import torch
import torch.distributed as dist
from nano_vllm.layers import LAUNCHERS, TensorParallelGroup

# %%
class Pickler(pickle.Pickler):
    "Pickles tensors of the CPU by way of NumPy, as they are small here."
    def reducer_override(self, obj):
        if isinstance(obj, torch.Tensor): return torch.from_numpy, (obj.numpy(),)
        return NotImplemented


def to_bytes(message) -> bytes:
    "The message, pickled; `pickle.loads` reads it."
    file = io.BytesIO()
    Pickler(file, protocol=5).dump(message)
    return file.getvalue()

# %%
FOREVER = timedelta(days=3650)


def collective_options(kind, **settings):
    "Options of a collective, without a time limit."
    options = kind()
    for name, value in dict(settings, timeout=FOREVER).items():
        setattr(options, name, value)
    return options

# %%
def make_process_group(kind, store, name: str, rank: int, size: int):
    "A `torch.distributed` group whose ranks meet under `name` in the store."
    return kind(dist.PrefixStore(name, store), rank, size, timedelta(minutes=2))

# %%
class ControlGroup(TensorParallelGroup):
    "Ranks in processes of their own, that send each other messages."
    def __init__(self, store, rank: int, size: int):
        super().__init__(rank, size)
        control = make_process_group(dist.ProcessGroupGloo, store, "control", rank,
                                     size)
        self.process_groups = {"control": control}
        weakref.finalize(self, self.process_groups.clear)   # ends their threads
        self.least = collective_options(dist.AllreduceOptions,
                                        reduceOp=dist.ReduceOp.MIN)
        self.from_0 = collective_options(dist.BroadcastOptions, rootRank=0)

    def minimum(self, n: int) -> int:
        "The least `n` of all ranks."
        least = torch.tensor([n])
        self.process_groups["control"].allreduce([least], self.least).wait()
        return int(least)

    def broadcast_tensor(self, x: torch.Tensor):
        "Rank 0's `x`, on the CPU, into that of all others."
        self.process_groups["control"].broadcast([x], self.from_0).wait()

    def broadcast(self, message):
        "From rank 0, any object to all others: its length, then its bytes."
        data = torch.frombuffer(bytearray(to_bytes(message)), dtype=torch.uint8)
        self.broadcast_tensor(torch.tensor([len(data)]))
        self.broadcast_tensor(data)

    def receive(self):
        "What rank 0 broadcasts."
        length = torch.zeros(1, dtype=torch.int64)
        self.broadcast_tensor(length)
        data = torch.empty(int(length), dtype=torch.uint8)
        self.broadcast_tensor(data)
        return pickle.loads(data.numpy().tobytes())

# %%
class DistributedGroup(ControlGroup):
    "Ranks that also add up and gather tensors, by `torch.distributed`."
    def __init__(self, store, rank: int, size: int, device_type: str = "cpu"):
        super().__init__(store, rank, size)
        self.sum = collective_options(dist.AllreduceOptions)
        self.to_0 = collective_options(dist.GatherOptions, rootRank=0)
        data = self.process_groups["control"]
        if device_type != "cpu":
            data = make_process_group(dist.ProcessGroupNCCL, store, "data", rank, size)
        self.process_groups["data"] = data

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        "The sum of the ranks' `x`, on all of them, in place."
        self.process_groups["data"].allreduce([x], self.sum).wait()
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        "On rank 0 the ranks' `x` side by side along the last dimension."
        if self.rank > 0:
            self.process_groups["data"].gather([], [x], self.to_0).wait()
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self.process_groups["data"].gather([parts], [x], self.to_0).wait()
        return torch.cat(parts, dim=-1)

# %%
def worker():
    "The program of a started rank: `python -c '...worker()' PORT RANK`."
    port, rank = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    try:
        size, device_type, target, payload = pickle.loads(store.get("job"))
        store.add("present", 1)
        module, _, name = target.rpartition(".")
        function = getattr(import_module(module), name)
        function(DistributedGroup(store, rank, size, device_type), payload)
    except Exception:
        report(store, f"rank {rank} failed:\n{traceback.format_exc()}")


def report(store, failure: str):
    "Leave a note for rank 0, if it is still there and this is the first failure."
    try:
        if store.add("failures", 1) == 1: store.set("failure", failure)
    except Exception: pass   # rank 0 is gone: nobody will read it
    os._exit(1)

# %%
def start_workers(store, size: int) -> list[subprocess.Popen]:
    "Processes for the ranks from 1 to `size` - 1, each with its part of the threads."
    threads = max(1, torch.get_num_threads() // size)
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | dict(PYTHONPATH=path, OMP_NUM_THREADS=str(threads))
    program = "from nano_vllm.parallel import worker; worker()"
    command = [sys.executable, "-c", program, str(store.port)]
    return [subprocess.Popen([*command, str(rank)], env=environment)
            for rank in range(1, size)]


def stop_workers(processes: list[subprocess.Popen]):
    "End the processes, whatever they are doing."
    for process in processes: process.kill()
    for process in processes: process.wait()

# %%
def describe_end(rank: int, code: int) -> str:
    "What became of a rank whose process ended with exit `code`."
    if code >= 0: return f"rank {rank} ended with status {code}"
    return f"rank {rank} was killed by {signal.Signals(-code).name}"


def find_failure(store, processes: list[subprocess.Popen],
                 seconds: float = 2) -> str | None:
    "What became of the first worker that failed, if one does in that time."
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        codes = {rank: process.poll() for rank, process in enumerate(processes, 1)}
        ended = {rank: code for rank, code in codes.items() if code is not None}
        killed = [rank for rank, code in ended.items() if code < 0]
        if killed: return describe_end(killed[0], ended[killed[0]])
        if store.check(["failure"]): return store.get("failure").decode()
        for rank, code in ended.items(): return describe_end(rank, code)
        time.sleep(0.02)

# %%
@contextmanager
def hold_interrupts():
    "Put off Ctrl-C to the end of the block: the ranks would lose step."
    if threading.current_thread() is not threading.main_thread():
        yield   # Python interrupts no thread but the main one
        return
    caught, handler = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try: yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught and callable(handler): handler(*caught[0])
        elif caught: signal.raise_signal(signal.SIGINT)

# %%
class StartedGroup(DistributedGroup):
    "Rank 0 of a group whose other processes it started itself."
    def __init__(self, size: int, device_type: str, target: str, payload):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.set("job", pickle.dumps((size, device_type, target, payload)))
        self.store, self.failure, self.size = store, None, size
        self.processes = start_workers(store, size)
        self.close = weakref.finalize(self, stop_workers, self.processes)
        with self.collective_guard():
            self.wait_for_workers()
            super().__init__(store, 0, size, device_type)

    def wait_for_workers(self):
        "Until all are there, or one has ended before."
        while self.store.add("present", 0) < self.size - 1:
            if any(process.poll() is not None for process in self.processes):
                raise RuntimeError("a rank ended before it was there")
            time.sleep(0.01)

    @contextmanager
    def collective_guard(self):
        "A context in which all ranks take part; RuntimeError says which one failed."
        if not self.close.alive:
            raise RuntimeError(f"this engine has ended: {self.failure or 'closed'}")
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // self.size))
        try:
            with hold_interrupts(): yield
        except Exception as e:
            other = None
            if isinstance(e, RuntimeError):   # what torch.distributed raises
                other = find_failure(self.store, self.processes)
            self.failure = other or f"rank 0 failed: {e}"
            self.close()
            if other: raise RuntimeError(other) from e
            raise
        finally: torch.set_num_threads(threads)

# %%
num_joined = 0   # engines of this script that ran under torchrun


def join_group(device_type: str) -> DistributedGroup:
    "The group of the processes that `torchrun` started for this script."
    global num_joined
    num_joined += 1
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=2)))
    store = dist.PrefixStore(f"nano_vllm/{num_joined}", store)
    group = DistributedGroup(store, rank, size, device_type)
    group.shares_script = True
    return group

# %%
def launch_group(size: int, device_type: str, target: str, payload) -> DistributedGroup:
    """The group for a model cut into `size` parts: joined under torchrun, else started.

    Each started process runs `target(group, payload)`. ValueError if torchrun has
    started another number of processes."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1: return StartedGroup(size, device_type, target, payload)
    if world == size: return join_group(device_type)
    raise ValueError(f"tensor_parallel_size is {size}, must be 1 or the number of "
                     f"processes that torchrun has started, {world}")


LAUNCHERS["processes"] = launch_group
