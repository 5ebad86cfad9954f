"""Grade a definition of a student's notebook with the engine's own tests: they run on a copy of the package that has it in its place."""
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def last_definition(cells: list[str], name: str) -> str:
    "The source of the class or function `name` as the newest of `cells` has it."
    for cell in reversed(cells):
        code = "\n".join("" if line[:1] in "%!" else line for line in cell.split("\n"))
        try: body = ast.parse(code).body
        except SyntaxError: continue
        for node in body:
            if getattr(node, "name", None) == name: return "\n".join(code.split("\n")[first_line(node) - 1:node.end_lineno])
    raise AssertionError(f"no cell that was executed defines {name}")


def first_line(node) -> int:
    "The line on which a definition begins, decorators included."
    return min([node.lineno, *(d.lineno for d in node.decorator_list)])


def with_definition(source: str, name: str, definition: str) -> str:
    "A module's `source` with another definition of `name`."
    node = next(node for node in ast.parse(source).body if getattr(node, "name", None) == name)
    lines = source.split("\n")
    return "\n".join([*lines[:first_line(node) - 1], definition, *lines[node.end_lineno:]])


def grade(cells: list[str], module: str, name: str, tests: str):
    """Run `tests` with the notebook's own `name` in the package's `module`; an AssertionError shows the first test that fails.

    `cells` are the sources of the executed cells, which IPython keeps in `In`."""
    definition = last_definition(cells, name)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT/"nano_vllm", Path(folder)/"nano_vllm", ignore=shutil.ignore_patterns("__pycache__"))
        path = Path(folder)/"nano_vllm"/f"{module}.py"
        path.write_text(with_definition(path.read_text(encoding="utf-8"), name, definition), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist",
                   "--rootdir", str(ROOT), "-c", str(ROOT/"pytest.ini"), str(ROOT/"tests"/tests)]
        env = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 0, f"{tests} with your {name}:\n" + "\n".join(lines[-25:])
    print(f"{tests} with your {name}: {lines[-1]}")
