#!/usr/bin/env python3
"""Quarto's notebook filter: takes nbdev's directives out, and puts the solutions of exercises in.

A notebook comes as JSON on stdin and leaves on stdout. Cells marked `hide` or `default_exp` go altogether; in the others
the lines that are bare directives go (`#| export`), and options (`#| label: fig-x`) stay. Where a chapter links to its
notebook of solutions, each exercise gets its solution from there, text, code and output in one closed box. The box is a
single markdown cell, since Quarto shows those as they are. Standard library only, because Quarto runs this with whatever
Python it finds.
"""
import json
import re
import sys
from pathlib import Path

BARE = re.compile(r"#\|\s*[\w.]+( [\w.]+)*\s*$")      # `#| export`, `#| default_exp engine`
GONE = re.compile(r"#\|\s*(hide|default_exp\b.*)\s*$")
LINK = re.compile(r"The solutions are in \[[^]]+\]\(solutions/(\w+)\.ipynb\)\.")
EXERCISE = re.compile(r"\*\*(\d+)\. ")                # opens an exercise in a chapter
SOLUTION = re.compile(r"## (\d+)\. .*")               # and its solution in the other notebook
FOLDER = Path(__file__).resolve().parent.parent/"nbs/solutions"


def clean(nb: dict) -> dict:
    "The notebook `nb` without nbdev's directives."
    cells = []
    for cell in nb["cells"]:
        source = cell["source"]
        lines = "".join(source).splitlines(keepends=True)
        if cell["cell_type"] == "code":
            if any(GONE.match(line) for line in lines): continue
            lines = [line for line in lines if not BARE.match(line)]
            while lines and not lines[0].strip(): lines.pop(0)  # a blank line that followed a directive
        cells.append({**cell, "source": "".join(lines) if isinstance(source, str) else lines})
    return {**nb, "cells": cells}


def text_of(cell: dict) -> str:
    return "".join(cell["source"]).strip()


def solutions(nb: dict) -> dict[str, list[dict]]:
    "The cells of each solution in a notebook of solutions, by the exercise's number."
    found, current = {}, []
    for cell in nb["cells"]:
        heading = SOLUTION.match(text_of(cell)) if cell["cell_type"] == "markdown" else None
        if heading: current = found[heading[1]] = []
        current.append(cell)
    return found


def fenced(text: str, kind: str) -> str:
    return f"````{kind}\n{text.rstrip()}\n````"


def box(number: str, cells: list[dict]) -> dict:
    "A markdown cell with a closed box, in which `cells` stand with what they printed."
    parts = []
    for cell in cells:
        text = SOLUTION.sub("", text_of(cell)).strip()
        if cell["cell_type"] == "code": text = fenced(text, "python")
        printed = "".join("".join(output.get("text", "")) for output in cell.get("outputs", []))
        parts += [text, fenced(printed, "text")] if printed else [text]
    lines = ['::: {.callout-tip collapse="true" title="Solution"}', *parts, ":::"]
    return {"cell_type": "markdown", "id": f"solution-{number}", "metadata": {}, "source": "\n\n".join(lines)}


def with_solutions(nb: dict, folder: Path = FOLDER) -> dict:
    "The notebook `nb` with a box below each exercise, if it links to its solutions in `folder`."
    texts = [text_of(cell) for cell in nb["cells"]]
    link = next(filter(None, map(LINK.search, texts)), None)
    if link is None: return nb
    left = solutions(json.loads((folder/f"{link[1]}.ipynb").read_text(encoding="utf-8")))
    cells, waiting = [], None                         # the exercise whose cells are passing by
    for cell, text in zip(nb["cells"], texts):
        exercise = EXERCISE.match(text) if cell["cell_type"] == "markdown" else None
        if waiting and cell["cell_type"] == "markdown":   # its cells end where the next text begins
            cells.append(box(waiting, left.pop(waiting)))
            waiting = None
        if exercise: waiting = exercise[1]
        if LINK.search(text): cell = {**cell, "source": LINK.sub("The box below each holds a solution.", text)}
        cells.append(cell)
    return {**nb, "cells": cells}


if __name__ == "__main__":
    sys.stdin.reconfigure(encoding="utf-8"); sys.stdout.reconfigure(encoding="utf-8")
    json.dump(clean(with_solutions(json.load(sys.stdin))), sys.stdout)
