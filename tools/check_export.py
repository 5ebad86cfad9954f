"""Export the notebooks into a scratch folder and compare: the committed package must be what they say."""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from book import ROOT


def exported(scratch: Path, root: Path = ROOT) -> Path:
    "The package that the notebooks of `root` export to, made under `scratch`."
    for name in ("settings.ini", "setup.py"): shutil.copy(root/name, scratch)
    shutil.copytree(root/"nbs", scratch/"nbs", ignore=shutil.ignore_patterns(".*"))
    (scratch/"nano_vllm").mkdir()
    shutil.copy(root/"nano_vllm/__init__.py", scratch/"nano_vllm")  # the one file written by hand
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}   # under which nbdev exports nothing
    code = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", code], cwd=scratch, env=env, check=True)
    return scratch/"nano_vllm"


def differences(fresh: Path, package: Path) -> list[str]:
    "The files that differ between two copies of the package, each with how."
    files = {p.relative_to(d) for d in (fresh, package) for p in d.rglob("*.py")}
    found = []
    for name in sorted(files):
        if not (package/name).exists(): found.append(f"{name}: in the notebooks, not in the package")
        elif not (fresh/name).exists(): found.append(f"{name}: in the package, but no notebook exports it")
        elif (fresh/name).read_bytes() != (package/name).read_bytes(): found.append(f"{name}: differs")
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = differences(exported(Path(scratch)), ROOT/"nano_vllm")
    if found: sys.exit("nano_vllm/ is not what the notebooks export; run .venv/bin/nbdev_export:\n  " + "\n  ".join(found))
    print("nano_vllm/ is what the notebooks export")
