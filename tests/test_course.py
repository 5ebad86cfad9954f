"""The assignments: blanked where they should be, complete where they are solved, and graded as nbgrader grades.

The real autograder runs where nbgrader is installed (`pip install nbgrader`, the extra `course`); its rule, that a grading cell
gives its points if it runs without an error, is tried in any case."""
import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import make_course
from book import ROOT
from make_course import ASSIGNMENTS, BEGIN, END, Task, assignment, blanked, marked, released

sys.path.insert(0, str(ROOT/"nbs/course"))
import grading  # noqa: E402


def chapter(name): return json.loads((ROOT/"nbs"/f"{name}.ipynb").read_text(encoding="utf-8"))


def made(name): return assignment(chapter(name), ASSIGNMENTS[name])


def test_a_body_is_marked_and_blanked_and_its_docstring_stays():
    source = '#| export\nclass A:\n    "Doc."\n    x = 1\n    def f(self):\n        "What."\n        y = 2\n        return y\n\n    def g(self): return 3\n\n    def h(self): pass'
    task = Task("A", ("f", "g"), 1, "")
    out = marked(source, task)
    assert ast.unparse(ast.parse(out)) == ast.unparse(ast.parse(source))       # marks are comments
    assert out.count(BEGIN) == out.count(END) == 2
    blank = ast.parse(blanked(out)).body[0]
    f, g, h = [n for n in blank.body if isinstance(n, ast.FunctionDef)]
    assert [ast.unparse(s) for s in f.body] == ["'What.'", "raise NotImplementedError()"]
    assert [ast.unparse(s) for s in g.body] == ["raise NotImplementedError()"] and ast.unparse(h.body[0]) == "pass"
    assert marked("def other(): return 1", task) == "def other(): return 1"


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_an_assignment_is_the_chapter_with_the_bodies_out(name):
    source, tasks = made(name), ASSIGNMENTS[name]
    nbformat.validate(nbformat.from_dict(source))
    of = {c["id"]: "".join(c["source"]) for c in chapter(name)["cells"]}
    code = {c["id"]: c["source"] for c in source["cells"] if c["cell_type"] == "code"}
    for task in tasks:
        cell = code[f"task-{task.name}"]
        without = "\n".join(line for line in cell.split("\n") if line.strip() not in (BEGIN, END))
        assert ast.unparse(ast.parse(without)) in [ast.unparse(ast.parse(s)) for s in of.values() if f"class {task.name}" in s or f"def {task.name}" in s
                                                   and not s.startswith(("%", "#", ">")) or s.startswith("#| export")]
        assert cell.count(BEGIN) == max(1, len(task.methods))
    public = json.dumps(released(source))
    assert BEGIN not in public and public.count("YOUR CODE HERE") == sum(max(1, len(t.methods)) for t in tasks)
    graded = [c["metadata"]["nbgrader"] for c in source["cells"] if c["metadata"].get("nbgrader", {}).get("grade")]
    assert [g["points"] for g in graded] == [t.points for t in tasks] and all(g["locked"] for g in graded)
    ids = [c["metadata"]["nbgrader"]["grade_id"] for c in source["cells"] if "nbgrader" in c["metadata"]]
    assert len(set(ids)) == len(ids)


def test_an_unknown_definition_is_refused():
    with pytest.raises(ValueError, match="no exported cell defines nothing_such"):
        assignment(chapter("04_kv_blocks"), [Task("nothing_such", (), 1, "")])


def test_the_newest_definition_of_a_notebook_is_graded():
    cells = ["def f(): return 1", "%magic\nx = 2", "not python at all", "@deco\ndef f():\n    return 3\nf()"]
    assert grading.last_definition(cells, "f") == "@deco\ndef f():\n    return 3"
    with pytest.raises(AssertionError, match="no cell that was executed defines g"): grading.last_definition(cells, "g")
    assert grading.with_definition("a = 1\ndef f():\n    pass\nb = 2", "f", "def f(): return 9") == "a = 1\ndef f(): return 9\nb = 2"


def score(nb: dict) -> tuple[int, int]:
    "(points, points of all) of an executed notebook: a grading cell counts if it raised nothing."
    graded = [(c.metadata.nbgrader.points, any(o.output_type == "error" for o in c.outputs)) for c in nb.cells
              if c.metadata.get("nbgrader", {}).get("grade")]
    return sum(points for points, failed in graded if not failed), sum(points for points, _ in graded)


def executed(nb: dict, folder: Path):
    nb = nbformat.from_dict(nb)
    NotebookClient(nb, timeout=600, allow_errors=True, resources={"metadata": {"path": folder}}).execute()
    return nb


@pytest.mark.ci
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if i == 0 else pytest.mark.slow) for i, name in enumerate(ASSIGNMENTS)])
def test_a_blank_copy_gets_nothing_and_a_solved_one_all(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    points = sum(task.points for task in ASSIGNMENTS[name])
    assert score(executed(made(name), tmp_path)) == (points, points)
    assert score(executed(released(made(name)), tmp_path)) == (0, points)


@pytest.mark.ci
def test_a_mistake_costs_the_points_of_its_task_and_says_which_test_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nb = made("04_kv_blocks")
    cell, = [c for c in nb["cells"] if c["id"] == "task-BlockPool"]
    cell["source"] = cell["source"].replace("if self.ref_counts[block]: return", "pass")     # frees what others use
    done = executed(nb, tmp_path)
    assert score(done) == (2, 10)
    error, = [o for o in done.cells[-1].outputs if o.output_type == "error"]
    assert "test_kv_blocks.py with your BlockPool" in error.evalue and "FAILED" in error.evalue


@pytest.mark.slow
def test_nbgrader_itself_agrees(tmp_path):
    pytest.importorskip("nbgrader")
    from nbgrader.api import Gradebook
    make_course.write(tmp_path)
    shutil.rmtree(tmp_path/"release")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    def nbgrader(*args):
        code = "from nbgrader.apps import NbGraderApp; NbGraderApp.launch_instance()"
        done = subprocess.run([sys.executable, "-c", code, *args], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    name = "04_kv_blocks"
    nbgrader("generate_assignment", name)
    ours = released(made(name))
    theirs = json.loads((tmp_path/"release"/name/f"{name}.ipynb").read_text())
    assert ["".join(c["source"]) for c in theirs["cells"]] == [c["source"] for c in ours["cells"]]
    for student, folder in ("blank", "release"), ("solved", "source"):
        shutil.copytree(tmp_path/folder/name, tmp_path/"submitted"/student/name)
    nbgrader("autograde", name)
    with Gradebook(f"sqlite:///{tmp_path/'gradebook.db'}") as book:
        scores = {s: (book.find_submission(name, s).score, book.find_submission(name, s).max_score) for s in ("blank", "solved")}
    assert scores == {"blank": (0, 10), "solved": (10, 10)}
