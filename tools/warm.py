"""Python programs that find PyTorch, transformers and the package imported: forks of a process that has done so and computed nothing.

Each saves two seconds of a core. Ranks that tests start are such programs (tests/conftest.py, test_notebooks.py), and scripts where a test
says so. Ranks that begin from nothing are tried by their own chapter, and by the tests of what becomes of them when their program ends."""
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path

MOST = 2**17     # bytes of a request


def make_pair():
    "Two sockets that keep messages apart."
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Server:
    "The process that forks; it ends with this one."

    def __init__(self, forked=False):
        "`forked`: from this process, which has computed nothing; else it begins anew."
        self.asks, theirs = make_pair()
        if forked:
            self.pid = os.fork()
            if self.pid == 0: self.asks.close(), be_program(theirs)
        else: self.begin(theirs)
        theirs.close()

    def begin(self, theirs):
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        self.process = subprocess.Popen([sys.executable, "-c", f"import warm; warm.be_forked({theirs.fileno()})"],
                                        env=os.environ | dict(PYTHONPATH=path), pass_fds=[theirs.fileno()])
        self.pid = self.process.pid


server = cache(Server)


def fork_server():
    "Let this process, which has imported all and computed nothing, be what programs are forks of."
    global server
    made = Server(forked=True)
    def server(): return made


class Popen:
    "As `subprocess.Popen`, of `[sys.executable, '-c', code, ...]` or `[sys.executable, script, ...]`."

    def __init__(self, args, cwd=None, env=None, stdin=0, stdout=1, stderr=2):
        self.args, self.returncode = [str(a) for a in args[1:]], None
        self.hears, theirs = make_pair()
        request = pickle.dumps((self.args, str(cwd or os.getcwd()), dict(env or os.environ)))
        socket.send_fds(server().asks, [request], [stdin, stdout, stderr, theirs.fileno()])
        theirs.close()
        self.pid = int(self.hears.recv(99))

    def ended(self, seconds=None):
        if self.returncode is None and select.select([self.hears], [], [], seconds)[0]:
            self.returncode = int(self.hears.recv(99))
            self.hears.close()
        return self.returncode

    def poll(self): return self.ended(0)

    def wait(self, timeout=None):
        if self.ended(timeout) is None: raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            with suppress(ProcessLookupError): os.kill(self.pid, number)     # it has just ended, and we hear of it in a moment

    def kill(self): self.send_signal(signal.SIGKILL)


def run(args, cwd=None, env=None, timeout=300):
    "As `subprocess.run` with `capture_output=True, text=True`."
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = Popen(args, cwd, env, stdout=out.fileno(), stderr=err.fileno())
        try: process.wait(timeout)
        finally: process.kill()
        for file in (out, err): file.seek(0)
        return subprocess.CompletedProcess(args, process.returncode, out.read(), err.read())


if sys.platform != "linux":     # without its files of processes, programs begin from nothing
    class Server: pid = None
    server, Popen, fork_server = cache(Server), subprocess.Popen, lambda: None
    def run(args, cwd=None, env=None, timeout=300):
        return subprocess.run(args, cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True)


# ---- in the process that forks

def be_forked(fd):
    "Fork for each request; the fork becomes the program that it asks for."
    import nano_vllm, transformers  # noqa: F401, E401
    from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast  # noqa: F401
    become(*next_request(socket.socket(fileno=fd)))


def be_program(asks):
    "The same, in a process that has the rest of another program behind it."
    code = 1
    try:
        become(*next_request(asks))
        code = 0
    except SystemExit as e: code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def next_request(asks):
    "In a fork, what it is to be. Whoever asks hears the fork's number, and then how it ended."
    running = {}     # file of a process -> (its number, who hears of its end)
    while True:
        ready, *_ = select.select([asks, *running], [], [])
        for file in running.keys() & set(ready):
            pid, answers = running.pop(file)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            try: answers.send(b"%d" % code)
            except OSError: pass      # nobody hears any more
            answers.close(), os.close(file)
        if asks not in ready: continue
        request, fds, *_ = socket.recv_fds(asks, MOST, 4)
        if not request: os._exit(0)
        *files, answers = fds
        answers, pid = socket.socket(fileno=answers), os.fork()
        if pid == 0:
            for end in (asks, answers, *(s for _, s in running.values())): end.close()
            for number, file in enumerate(files): os.dup2(file, number)
            os.closerange(3, 4096)
            return pickle.loads(request)
        for file in files: os.close(file)
        running[os.pidfd_open(pid)] = pid, answers
        answers.send(b"%d" % pid)


def become(args, cwd, env):
    "Be `python -c code ...` or `python script ...` in this folder and environment."
    import torch
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", torch.get_num_threads())))
    place, *rest = args
    inline = place == "-c"
    sys.path[:0] = ["" if inline else str(Path(place).absolute().parent), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    if inline:
        code = compile(rest.pop(0), "<string>", "exec")
        sys.argv = ["-c", *rest]
        exec(code, sys.modules["__main__"].__dict__)
    else:
        sys.argv = args
        runpy.run_path(place, run_name="__main__")
