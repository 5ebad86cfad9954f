#!/usr/bin/env python3
"""Quarto's notebook filter: takes nbdev's directives out, and puts in what only the site has.

A notebook comes as JSON on stdin and leaves on stdout. Cells marked `hide` or `default_exp` go altogether; in the others
the lines that are bare directives go (`#| export`), and options (`#| label: fig-x`) stay. Put in are

- below the title what a chapter takes and needs, all of it read from the notebooks: minutes, chapters it builds on, the file
  of vLLM to open next, links to Colab and to the notebook, and which edition its outputs are from;
- a text for those who cannot see a figure, from its caption, unless the cell has one (`fig-alt`);
- the machines' names below the pictures of a cell that draws one for each;
- a link to the glossary where a chapter first uses one of its terms;
- the solution of each exercise from the notebook that the chapter links to: text, code and output in one closed box. The box
  is a single markdown cell, since Quarto shows those as they are, and HTML's own `details`: a callout that is closed has no key that opens it.

Standard library only, because Quarto runs this with whatever Python it finds.
"""
import configparser
import functools
import json
import re
import sys
from pathlib import Path

BARE = re.compile(r"#\|\s*[\w.]+( [\w.]+)*\s*$")      # `#| export`, `#| default_exp engine`
GONE = re.compile(r"#\|\s*(hide|default_exp\b.*)\s*$")
LINK = re.compile(r"The solutions are in \[[^]]+\]\(solutions/(\w+)\.ipynb\)\.")
EXERCISE = re.compile(r"\*\*(\d+)\. ")                # opens an exercise in a chapter
SOLUTION = re.compile(r"## (\d+)\. .*")               # and its solution in the other notebook
IMPORT = re.compile(r"^\s*from nano_vllm(?:\.| import )(\w+)", re.M)     # a module, or LLM
MODULE_IMPORT = re.compile(r"^from \.(\w+) import", re.M)                       # the same in an exported module
VLLM = re.compile(r"`((?:vllm|csrc)/[\w./-]+\.\w+)`")    # a file of vLLM's
RECORDED = re.compile(r'recorded\("([\w-]+)"')             # measurements that a chapter reads
TERM = re.compile(r"^\[([^]]+)\]\{#([\w-]+)\}", re.M)    # an entry of the glossary
# what is no running text: code, links, citations, formulas, headings, fences, quotes
NO_PROSE = re.compile(r"(^```.*?^```|`+[^`]*`+|!?\[[^]]*\]\([^)]*\)|\[[^]]*\]\{[^}]*\}|\[?@[\w-]+\]?|\$\$.*?\$\$|\$[^$\n]+\$"
                      r"|^[#>|].*?$|^ *:::.*?$|<[^>\n]+>)", re.M | re.S)
WORDS_A_MINUTE, LINES_A_MINUTE, MINUTES_AN_EXERCISE = 200, 15, 10
ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT/"nbs/solutions"


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
        else: text = text.replace("](../", "](")          # the box stands one folder higher
        printed = "".join("".join(output.get("text", "")) for output in cell.get("outputs", []))
        parts += [text, fenced(printed, "text")] if printed else [text]
    lines = ['<details class="answer">', "<summary>Solution</summary>", *parts, "</details>"]
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


def below_caption(cell: dict, name: str, value: str | None = None) -> dict:
    "The figure's cell with the option `name`, unless it has one; without a `value` it is the caption."
    text = "".join(cell["source"])
    caption = re.search(r"^#\| fig-cap: (.*)\n", text, re.M)
    if not caption or f"#| {name}:" in text: return cell
    text = text.replace(caption[0], f"{caption[0]}#| {name}: {value or caption[1]}\n")
    return {**cell, "source": text if isinstance(cell["source"], str) else text.splitlines(keepends=True)}


def with_alt_texts(nb: dict) -> dict:
    "The notebook `nb` in which each figure has a text for those who cannot see it."
    return {**nb, "cells": [below_caption(cell, "fig-alt") for cell in nb["cells"]]}


@functools.cache
def machines() -> dict[str, list[str]]:
    "{benchmark: the machines that it was measured on}, in the order in which chapters get them."
    found = {}
    for path in sorted((ROOT/"results").glob("*.json")):
        entry = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(entry["benchmark"], []).append(entry["machine"]["name"])
    return found


def num_pictures(cell: dict) -> int:
    return sum(any(kind.startswith("image/") for kind in output.get("data", ())) for output in cell["outputs"])


def with_machines(nb: dict) -> dict:
    "The notebook `nb`, in which a cell that draws a picture for each machine has their names below the pictures."
    cells = []
    for cell in nb["cells"]:
        drawn = [machines().get(name, []) for name in RECORDED.findall(text_of(cell))] if cell["cell_type"] == "code" else []
        names = next((names for names in drawn if len(names) == num_pictures(cell) > 1), None)
        cells.append(below_caption(cell, "fig-subcap", json.dumps(names)) if names else cell)
    return {**nb, "cells": cells}


# ---- what a chapter takes and needs

def imports(nb: dict) -> set[str]:
    "The modules that a chapter's cells import."
    code = "\n".join(text_of(c) for c in nb["cells"] if c["cell_type"] == "code")
    return {name.lower() for name in IMPORT.findall(code)}


@functools.cache
def chapters(folder: Path = ROOT/"nbs") -> dict[str, dict]:
    "{file name without its end: title, module, modules it imports, its first cell} of all chapters, in order."
    found = {}
    for path in sorted(folder.glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        nb = json.loads(text)
        first, module = text_of(nb["cells"][0]), re.search(r"#\| default_exp (\w+)", text)
        found[path.stem] = dict(title=first.splitlines()[0].lstrip("# "), module=module and module[1], first=first, imports=imports(nb))
    return found


def all_imports(module: str, of: dict[str, set]) -> set:
    "What `module` imports, directly or not."
    return of.get(module, set()).union(*(all_imports(m, of) for m in of.get(module, ())))


def needs(name: str) -> list[str]:
    "The chapters that `name` builds on, appendices aside, without those that one of these builds on."
    known = {n: c for n, c in chapters().items() if not n.startswith("00_")}
    of = {c["module"]: c["imports"] - {c["module"]} for c in known.values() if c["module"]}
    direct = known[name]["imports"] - {known[name]["module"]} if name in known else set()
    direct -= set().union(*(all_imports(m, of) for m in direct))
    return [other for other, c in known.items() if c["module"] in direct]


def minutes(nb: dict) -> tuple[int, int]:
    "How long a chapter takes: (to read, its exercises), in minutes, by its words and lines."
    words = sum(len(text_of(c).split()) for c in nb["cells"] if c["cell_type"] == "markdown")
    lines = sum(bool(line.strip()) for c in nb["cells"] if c["cell_type"] == "code" for line in text_of(c).splitlines())
    exercises = sum(bool(EXERCISE.match(text_of(c))) for c in nb["cells"])
    reading = words/WORDS_A_MINUTE + lines/LINES_A_MINUTE
    return 5*round(reading/5), MINUTES_AN_EXERCISE*exercises


def vllm_file(nb: dict) -> str | None:
    "The first file of vLLM's that the chapter names in its part on vLLM."
    text = "\n\n".join(text_of(c) for c in nb["cells"] if c["cell_type"] == "markdown")
    found = VLLM.search(text, max(text.find("What vLLM does differently"), 0))
    return found and found[1]


def settings() -> dict:
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def facts(nb: dict, name: str) -> str:
    "Below a chapter's title: what it takes and needs, and where else it is to be had."
    (reading, exercises), of = minutes(nb), chapters()
    on = ", ".join(f"[{of[n]['title']}]({n}.ipynb)" for n in needs(name)) or "Python, and a little PyTorch"
    code, file = settings()["git_url"], vllm_file(nb)
    place = code.split("github.com/")[-1]
    lines = [f"**How long:** {reading} minutes to read" + (f", {exercises} for the exercises" if exercises else ""),
             f"**What you should know:** {on}"]
    if file: lines.append(f"**In vLLM, open next:** [`{file}`](https://github.com/vllm-project/vllm/blob/main/{file})")
    lines.append(f"[Open in Colab](https://colab.research.google.com/github/{place}/blob/main/nbs/{name}.ipynb) · "
                 f"[Download the notebook]({code}/raw/main/nbs/{name}.ipynb)")
    edition = nb.get("metadata", {}).get("edition")
    if edition: lines.append(f"**Edition:** {edition['machine']}, commit {edition['commit']}, {edition['date']}")
    return "\n".join(["::: {.chapter-facts}", *(f"- {line}" for line in lines), ":::"])


def with_facts(nb: dict) -> dict:
    "The notebook `nb` with its facts below the title, if it is a chapter."
    first = text_of(nb["cells"][0])
    name = next((n for n, c in chapters().items() if c["first"] == first), None)
    if name is None: return nb
    cell = {"cell_type": "markdown", "id": "facts", "metadata": {}, "source": facts(nb, name)}
    return {**nb, "cells": [nb["cells"][0], cell, *nb["cells"][1:]]}


# ---- the glossary

@functools.cache
def glossary(path: Path = ROOT/"glossary.qmd") -> dict[str, str]:
    "{term: the place of its entry}, longest term first, so that `KV cache` is found before `cache`."
    found = TERM.findall(path.read_text(encoding="utf-8")) if path.exists() else []
    return dict(sorted(found, key=lambda entry: -len(entry[0])))


def link_terms(text: str, left: dict[str, str]) -> str:
    "`text` with a link at the first use of each term that is `left`, which is then taken out."
    parts = NO_PROSE.split(text)
    for term, place in list(left.items()):
        word = re.compile(rf"(?<![\w-]){re.escape(term)}(?:e?s)?(?![\w-])", re.I)
        for i in range(0, len(parts), 2):                     # the parts between are no prose
            if not word.search(parts[i]): continue
            parts[i] = word.sub(lambda m: f"[{m[0]}](../glossary.qmd#{place}){{.term}}", parts[i], count=1)
            parts[i:i+1] = NO_PROSE.split(parts[i])           # the new link is a link like others
            del left[term]
            break
    return "".join(parts)


def with_terms(nb: dict) -> dict:
    "The notebook `nb` with links to the glossary."
    left, cells = dict(glossary()), []
    for i, cell in enumerate(nb["cells"]):
        if cell["cell_type"] == "markdown" and i: cell = {**cell, "source": link_terms("".join(cell["source"]), left)}
        cells.append(cell)
    return {**nb, "cells": cells}


def as_lines(nb: dict) -> dict:
    "The notebook `nb` with each source as a list of lines: Quarto takes one string too, and loses its newlines."
    return {**nb, "cells": [{**c, "source": "".join(c["source"]).splitlines(keepends=True)} for c in nb["cells"]]}


def filtered(nb: dict) -> dict:
    return as_lines(clean(with_machines(with_alt_texts(with_solutions(with_facts(with_terms(nb)))))))


if __name__ == "__main__":
    sys.stdin.reconfigure(encoding="utf-8"); sys.stdout.reconfigure(encoding="utf-8")
    json.dump(filtered(json.load(sys.stdin)), sys.stdout)
