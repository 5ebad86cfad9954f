#!/usr/bin/env python3
"""Quarto's notebook filter: takes nbdev's directives out, so that a reader sees code and Quarto sees only its own options.

A notebook comes as JSON on stdin and leaves on stdout. Cells marked `hide` or `default_exp` go altogether; in the others
the lines that are bare directives go (`#| export`), and options (`#| label: fig-x`) stay. Standard library only, because
Quarto runs it with whatever Python it finds.
"""
import json
import re
import sys

BARE = re.compile(r"#\|\s*[\w.]+( [\w.]+)*\s*$")      # `#| export`, `#| default_exp engine`
GONE = re.compile(r"#\|\s*(hide|default_exp\b.*)\s*$")


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


if __name__ == "__main__":
    sys.stdin.reconfigure(encoding="utf-8"); sys.stdout.reconfigure(encoding="utf-8")
    json.dump(clean(json.load(sys.stdin)), sys.stdout)
