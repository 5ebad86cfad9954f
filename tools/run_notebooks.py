"""Execute notebooks in place, as a reader would from top to bottom, then clean them with nbdev.

    python tools/run_notebooks.py [--figures | --replay] nbs/04_kv_blocks.ipynb ...

Cells flagged `cuda` keep their stored outputs where there is no GPU; cells flagged `notest` always keep theirs. With
`--figures` all is executed, with the stored measurements in place of new ones, and only pictures are stored, and what is printed
from those measurements. So one can change how a figure looks without measuring anew. With `--replay` all outputs are stored.

Figures are stored as SVG, with the cell's `fig-alt` inside. Each executed cell gets the digest of the code that its
output came from (`edition.digest`), so that tests/test_book.py can tell an output that was left behind by an edit.
"""
import copy
import os
import re
import sys
import time
from html import escape
from pathlib import Path

import nbformat
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import nbdev_clean

from book import ROOT, Cell
from edition import digest

SKIP = "notest" if torch.cuda.is_available() else "notest|cuda"
SVG = "image/svg+xml"


class Client(NotebookClient):
    "Runs every cell but those flagged to be skipped, whose stored outputs stay."

    async def async_execute_cell(self, cell, *args, **kwargs):
        if re.search(rf"^#\|\s*({SKIP})\s*$", cell.source, re.M): return cell
        done = await super().async_execute_cell(cell, *args, **kwargs)
        if cell.source.strip(): cell.metadata["ran"] = digest(cell.source)
        return done


def with_title(svg: str, title: str) -> str:
    "An SVG of matplotlib's without what is of no use in a page, and with a title for those who cannot see it."
    svg = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r"\n\s*\n+", "\n", svg).strip() + "\n"
    return re.sub(r"(<svg\b[^>]*)>", rf'\1 role="img">\n <title>{escape(title)}</title>', svg, count=1)


def finish(cell):
    "Give the pictures of an executed cell their titles."
    options = Cell("code", cell.source, []).options
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        output.get("metadata", {}).pop("needs_background", None)     # JupyterLab would put a plate behind it
        if SVG in data: data[SVG] = with_title(data[SVG], options.get("fig-alt") or options.get("fig-cap", ""))


def printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.get("outputs", []))


def has_picture(cell) -> bool:
    return any(kind.startswith("image/") for output in cell.get("outputs", []) for kind in output.get("data", {}))


def execute(nb, path: Path, first: str = ""):
    "Execute all cells of `nb` in the folder of `path`, after the line `first`."
    if first: nb.cells.insert(0, nbformat.v4.new_code_cell(first))
    Client(nb, timeout=900, coalesce_streams=True, resources={"metadata": {"path": path.parent}},
           extra_arguments=["--InlineBackend.figure_formats={'svg'}"]).execute()
    if first: nb.cells.pop(0)
    for cell in nb.cells: finish(cell)


def redrawn(nb, path: Path):
    "A copy of `nb`, executed with the stored measurements."
    new = copy.deepcopy(nb)
    execute(new, path, f"import sys; sys.path.insert(0, {str(ROOT/'tools')!r}); import edition; edition.replay()")
    return new


def redraw(nb, path: Path):
    "Take over the pictures that the stored measurements give, and what is printed from these: the same in two runs."
    new = redrawn(nb, path)
    different = [i for i, (old, cell) in enumerate(zip(nb.cells, new.cells)) if printed(old) != printed(cell)]
    again = redrawn(nb, path) if different else new
    for i, cell in enumerate(new.cells):
        settled = i in different and printed(cell) == printed(again.cells[i])
        if has_picture(cell) or settled: nb.cells[i] = cell
        if settled: print(f"{path}: cell {i} ({cell.id}) was printed from another measurement than the stored one")


def replay(nb, path: Path):
    "Execute `nb` with the stored measurements."
    nb.cells = redrawn(nb, path).cells


HOW = {"--figures": redraw, "--replay": replay}


def run(path: Path, how=execute):
    "Execute the notebook at `path` and store its outputs, unless a cell fails."
    start, nb = time.perf_counter(), nbformat.read(path, as_version=4)
    how(nb, path)
    nbformat.write(nb, path)
    nbdev_clean.__wrapped__(str(path))
    print(f"{path}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm's, with a path of this machine
    args, failed = sys.argv[1:], []
    how = HOW[args.pop(0)] if args and args[0] in HOW else execute
    for name in args:
        try: run(Path(name), how)
        except CellExecutionError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
    if failed: sys.exit("these failed and were left as they were: " + ", ".join(failed))
