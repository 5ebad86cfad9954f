"""Write assignments into course/: chapters up to definitions whose bodies are for the student to write, graded by the engine's tests.

    python tools/make_course.py [folder]

makes `source/NAME/NAME.ipynb`, with the solutions between nbgrader's marks, and `release/NAME/NAME.ipynb`, without them: what
`nbgrader generate_assignment NAME` makes of the former. `nbgrader autograde NAME` grades what students hand in. ASSIGNMENTS below
says what is blanked.
"""
import ast
import copy
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from book import ROOT

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
STUB = ["# YOUR CODE HERE", "raise NotImplementedError()"]
IMPORT = "import nano_vllm, sys\nsys.path.insert(0, nano_vllm.__path__[0] + '/../nbs/course')\nfrom grading import grade"


@dataclass(frozen=True)
class Task:
    "A definition of a chapter that is to be written anew; of a class, the bodies of `methods`."
    name: str
    methods: tuple[str, ...]
    points: int
    tests: str


ASSIGNMENTS = {
    "04_kv_blocks": [Task("blocks_needed", (), 2, "test_kv_blocks.py"),
                     Task("BlockPool", ("allocate", "touch", "free", "put_first"), 8, "test_kv_blocks.py")],
    "05_prefix_cache": [Task("hash_blocks", (), 3, "test_prefix_cache.py"),
                        Task("KVCacheManager", ("get_computed_blocks", "allocate_slots", "cache_blocks"), 12, "test_prefix_cache.py")],
    "14_scheduler": [Task("num_missing", (), 2, "test_scheduler.py"),
                     Task("Scheduler", ("schedule_running", "preempt_until_fits", "schedule_waiting"), 15, "test_scheduler.py")],
}


def bodies(tree: ast.Module, task: Task) -> list[ast.FunctionDef]:
    "The functions of a cell whose bodies are to be taken out."
    node = next((n for n in tree.body if getattr(n, "name", None) == task.name), None)
    if node is None: return []
    if not task.methods: return [node]
    return [n for n in node.body if getattr(n, "name", None) in task.methods]


def marked(source: str, task: Task) -> str:
    "A cell's source with nbgrader's marks around the bodies that `task` takes out; docstrings stay."
    lines = source.split("\n")
    for function in reversed(bodies(ast.parse(source), task)):
        first = function.body[1] if ast.get_docstring(function, clean=False) is not None else function.body[0]
        indent = " " * (function.col_offset + 4)
        start, end = first.lineno - 1, function.end_lineno
        solution = lines[start:end]
        if first.lineno == function.lineno:                   # `def f(): return 1` on one line
            solution = [indent + lines[start][first.col_offset:]]
            lines[start] = lines[start][:first.col_offset].rstrip()
            start += 1
        lines[start:end] = [indent + BEGIN, *solution, indent + END]
    return "\n".join(lines)


def blanked(source: str) -> str:
    "A marked source as nbgrader gives it to students."
    return re.sub(rf"^( *){BEGIN}$.*?^ *{END}$", lambda m: "\n".join(m[1] + line for line in STUB), source, flags=re.M | re.S)


def cell(kind: str, name: str, source: str, **nbgrader) -> dict:
    made = {"cell_type": kind, "id": name, "metadata": {}, "source": source}
    if kind == "code": made |= {"execution_count": None, "outputs": []}
    if nbgrader: made["metadata"] = {"nbgrader": {"grade_id": name, "schema_version": 3, "task": False, **nbgrader}}
    return made


def grader(task: Task, module: str) -> dict:
    "The cell that grades `task`."
    source = f"grade(In, {module!r}, {task.name!r}, {task.tests!r})"
    return cell("code", f"test-{task.name}", source, grade=True, locked=True, solution=False, points=task.points)


def assignment(nb: dict, tasks: list[Task]) -> dict:
    "The chapter `nb` up to the last of `tasks`, with their solutions marked and cells that grade."
    module = re.search(r"#\| default_exp (\w+)", json.dumps(nb))[1]
    kept, left = [], {task.name: task for task in tasks}
    for old in nb["cells"]:
        if not left: break
        new = {**copy.deepcopy(old), "source": "".join(old["source"]), "metadata": {}}
        if old["cell_type"] == "code":
            new |= {"outputs": [], "execution_count": None}
            defined = {n.name for n in ast.parse(new["source"]).body if hasattr(n, "name")} if "#| export" in new["source"] else set()
            for name in defined & set(left):
                task = left.pop(name)
                new |= cell("code", f"task-{name}", marked(new["source"], task), grade=False, locked=False, solution=True)
        kept.append(new)
    if left: raise ValueError(f"no exported cell defines {', '.join(left)}")
    first = cell("code", "grading", IMPORT, grade=False, locked=True, solution=False)
    text = "**To hand in.** Write the bodies of " + ", ".join(f"`{task.name}`" for task in tasks) + \
        ". The last cells run the engine's own tests on the package with your code in it."
    cells = [kept[0], cell("markdown", "hand-in", text), first, *kept[1:], *(grader(task, module) for task in tasks)]
    return {**nb, "cells": cells}


def released(nb: dict) -> dict:
    "An assignment as students get it."
    return {**nb, "cells": [{**c, "source": blanked(c["source"])} if c["cell_type"] == "code" else c for c in nb["cells"]]}


def write(folder: Path) -> list[Path]:
    paths = []
    for name, tasks in ASSIGNMENTS.items():
        source = assignment(json.loads((ROOT/"nbs"/f"{name}.ipynb").read_text(encoding="utf-8")), tasks)
        for kind, nb in (("source", source), ("release", released(source))):
            path = folder/kind/name/f"{name}.ipynb"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            paths.append(path)
    (folder/"nbgrader_config.py").write_text('c = get_config()\nc.CourseDirectory.course_id = "nano_vllm"\nc.ExecutePreprocessor.timeout = 600\n')
    return paths


if __name__ == "__main__":
    for path in write(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT/"course"): print(path)
