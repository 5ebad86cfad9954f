"""Execute notebooks in place, as a reader would from top to bottom, then clean them with nbdev.

Cells flagged `cuda` keep their stored outputs where there is no GPU; cells flagged `notest` always keep theirs.
"""
import os
import re
import sys
import time
from pathlib import Path

import nbformat
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import nbdev_clean

SKIP = "notest" if torch.cuda.is_available() else "notest|cuda"


class Client(NotebookClient):
    "Runs every cell but those flagged to be skipped, whose stored outputs stay."

    async def async_execute_cell(self, cell, *args, **kwargs):
        if re.search(rf"^#\|\s*({SKIP})\s*$", cell.source, re.M): return cell
        return await super().async_execute_cell(cell, *args, **kwargs)


def run(path: Path):
    "Execute the notebook at `path` and store its outputs, unless a cell fails."
    start, nb = time.perf_counter(), nbformat.read(path, as_version=4)
    Client(nb, timeout=900, coalesce_streams=True, resources={"metadata": {"path": path.parent}}).execute()
    nbformat.write(nb, path)
    nbdev_clean.__wrapped__(str(path))
    print(f"{path}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm's, with a path of this machine
    failed = []
    for name in sys.argv[1:]:
        try: run(Path(name))
        except CellExecutionError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
    if failed: sys.exit("these failed and were left as they were: " + ", ".join(failed))
