"""An edition: all measurements and outputs of the book from one machine and one commit.

    python tools/edition.py            measures and executes the chapters that are not of this edition yet, in order
    python tools/edition.py --status   says which chapters are of which edition, and what has changed since

It can be interrupted and run again: a chapter that is done has its edition in the notebook. At the end it says what it could not do.
"""
import hashlib
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
BUSY = 0.5        # a load from which on nothing should be measured


def digest(source: str) -> str:
    "Eight digits that name the code of a cell; comments, options and blank lines do not count."
    lines = [line.rstrip() for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


def fit(live, stored):
    "The measurement `stored` (from JSON) in place of `live`, in the same dictionaries and lists and with their keys."
    if isinstance(live, dict) and isinstance(stored, dict):
        keys = {str(key): key for key in live}
        for name, value in stored.items():                    # in the order in which they are stored
            key = keys.get(name, name)
            live[key] = fit(live.pop(key), value) if key in live else value
        return live
    if isinstance(live, (list, tuple)) and isinstance(stored, list):
        values = [fit(a, b) for a, b in zip(live, stored)] + stored[len(live):]
        if isinstance(live, tuple): return tuple(values)
        live[:] = values
        return live
    return stored


def replay():
    "From now on `workbench.record` puts what is stored for this machine in place of what it is given."
    from nano_vllm import workbench

    def record(name, data, folder=workbench.RESULTS):
        here = workbench.machine()["name"]
        for entry in workbench.recorded(name, folder):
            if entry["machine"]["name"] == here: data = fit(data, entry["data"])
        return data

    workbench.record = record


# ---- where the chapters stand

def git(*args) -> str:
    return subprocess.run(["git", *args], cwd=TOOLS.parent, capture_output=True, text=True, check=True).stdout.rstrip()


def outside(status: str) -> list[str]:
    "Of what `git status --porcelain` prints, the files that an edition does not write."
    return [line[3:] for line in status.splitlines() if not line[3:].startswith(("nbs/", "results/"))]


def this_edition() -> dict:
    "Machine and commit of what would be measured now."
    from nano_vllm.workbench import machine
    return dict(machine=machine()["name"], commit=git("rev-parse", "--short", "HEAD"))


def code_digest(nb: dict, folder: Path = TOOLS.parent/"nano_vllm") -> str:
    "Eight digits that name all code behind a chapter's outputs: its cells, and the modules they use, directly or not."
    import quarto_filter
    left, used = set(quarto_filter.imports(nb)), {}
    while left:
        name = left.pop()
        path = folder/f"{name}.py"
        if name in used or not path.exists(): continue
        used[name] = path.read_text(encoding="utf-8")
        left |= set(quarto_filter.MODULE_IMPORT.findall(used[name]))
    cells = [quarto_filter.text_of(c) for c in nb["cells"] if c["cell_type"] == "code"]
    return digest("\n".join(cells + [used[name] for name in sorted(used)]))


def state(nb: dict, wanted: dict) -> str:
    "Where a chapter stands: `done`, or why it is not of the edition `wanted`."
    edition = nb["metadata"].get("edition")
    if edition is None: return "of no edition"
    for key in ("machine", "commit"):
        if edition[key] != wanted[key]: return f"of {key} {edition[key]}"
    return "done" if edition["code"] == code_digest(nb) else "executed before the code changed"


def stamp(path: Path, wanted: dict):
    "Write the edition into the notebook at `path`."
    nb = json.loads(path.read_text(encoding="utf-8"))
    nb["metadata"]["edition"] = {**wanted, "date": str(date.today()), "code": code_digest(nb)}
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def left_over(wanted: dict, results: Path = TOOLS.parent/"results") -> list[str]:
    "Measurements of this machine that are older than today's: no chapter made them anew."
    found = []
    for path in sorted(results.glob("*.json")):
        entry = json.loads(path.read_text(encoding="utf-8"))
        of = entry.get("machine", {}).get("name")
        if of != wanted["machine"]: found.append(f"{path.name}: measured on {of}")
        elif entry.get("date") != str(date.today()): found.append(f"{path.name}: of {entry.get('date')}")
    return found


def chapter_paths() -> list[Path]:
    from book import chapters
    return [c.path for c in chapters()]


def report(wanted: dict) -> int:
    "Print where each chapter stands; the number of those that are not done."
    states = {path.stem: state(json.loads(path.read_text(encoding="utf-8")), wanted) for path in chapter_paths()}
    for name, where in states.items(): print(f"{name:24s} {where}")
    return sum(where != "done" for where in states.values())


def measure(path: Path) -> bool:
    "Execute the chapter at `path` and measure anew; whether all its cells ran."
    env = {**os.environ, "NANO_VLLM_RECORD": "1", "TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, TOOLS/"run_notebooks.py", path], env=env).returncode == 0


def main(args: list[str]):
    wanted = this_edition()
    if "--status" in args: sys.exit(min(report(wanted), 1))
    changed = outside(git("status", "--porcelain"))
    if changed: sys.exit(f"an edition is of one commit, but these are not in it: {', '.join(changed)}")
    if os.getloadavg()[0] > BUSY and "--busy" not in args:
        sys.exit(f"the machine is busy (load {os.getloadavg()[0]:.1f}); times would be those of others, too. --busy measures all the same")
    failed = []
    for path in chapter_paths():
        if state(json.loads(path.read_text(encoding="utf-8")), wanted) == "done": continue
        if measure(path): stamp(path, wanted)
        else: failed.append(path.stem)
    for name in failed: print(f"{name} failed and is as it was")
    for line in left_over(wanted): print(f"not measured anew: {line}")
    print("`make bench`, `make peers` and `make gpu` write the measurements that no chapter makes; run the chapters that show them again afterwards")
    sys.exit(1 if failed else 0)


if __name__ == "__main__": main(sys.argv[1:])
