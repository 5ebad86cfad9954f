"""Make `.venv` and install nano_vllm into it; does nothing where that has been done for these settings.

Uses the standard library only, and no syntax newer than Python 3.6: an old interpreter gets far enough to say so.
"""
import hashlib
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
STAMP = os.path.join(VENV, "installed")
PYTHON = os.path.join(VENV, "bin", "python")
MIN_PYTHON = (3, 10)


def wanted(torch):
    "What a finished .venv has in its stamp: the folder it was made in, and a digest of what was installed."
    digest = hashlib.sha256(torch.encode())
    for name in ("settings.ini", "setup.py"):
        with open(os.path.join(ROOT, name), "rb") as f:
            digest.update(f.read())
    return ROOT + "\n" + digest.hexdigest() + "\n"


def missing():
    "Why this Python cannot make a virtual environment, or None."
    if sys.version_info < MIN_PYTHON:
        have, want = "%d.%d" % sys.version_info[:2], "%d.%d" % MIN_PYTHON
        return "Python %s is too old, nano_vllm needs %s: name another one, as in `make PYTHON=python%s demo`" % (
            have, want, want)
    try:
        import ensurepip, venv  # noqa: F401
    except ImportError as error:
        return ("this Python cannot make a virtual environment (no module %r); on Debian or Ubuntu, "
                "`apt install python3-venv` adds it" % error.name)


def run(*command):
    "Run a command in the root folder; stop with its exit code if it fails."
    code = subprocess.call(command, cwd=ROOT)
    if code:
        sys.exit("make_venv: this failed, see its message above; run make again to go on from here:\n  "
                 + " ".join(command))


def main(torch):
    stamp = ""
    if os.path.exists(STAMP):
        with open(STAMP) as f:
            stamp = f.read()
    if stamp == wanted(torch):
        return
    problem = missing()
    if problem:
        sys.exit("make_venv: " + problem)
    moved = bool(stamp) and stamp.split("\n")[0] != ROOT  # a virtual environment does not survive a move
    run(sys.executable, "-m", "venv", *(["--clear"] if moved else []), VENV)
    pip = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check",
           "--no-compile"]  # Python compiles what is imported, when it is
    run(*pip, torch)  # first and alone, so that nothing else chooses the build
    run(*pip, torch, "-e", ".[dev]")
    with open(STAMP, "w") as f:
        f.write(wanted(torch))


if __name__ == "__main__":
    main(sys.argv[1])
