"""The book's rules: its files and references, the shape of its chapters, and what their exported code may import and weigh.

Each test gathers every violation, so that one run shows them all.
"""
import ast
import functools
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

import check_export
import check_numbers
import count_lines
import edition
import make_venv
import quarto_filter
import renumber
from book import (
    NBDEV, NUMBERED, ROOT, Cell, Chapter, chapters, code_lines, listed, plain, quarto)
from short_runs import SHORT, name_of

CHAPTERS = chapters()
MODULES = [c.module for c in CHAPTERS if c.module]            # in reading order
EXAMPLE = """
project: {type, output-dir, render, resources}
book: {title, subtitle, author, description, site-url, favicon, repo-url, repo-branch, repo-actions, search: {location, type},
       sidebar: {style, collapse-level}, page-navigation, reader-mode, open-graph, chapters: {part, chapters}, appendices}
execute: {enabled}
bibliography:
link-citations:
crossref: {chapters}
format: {html: {filters, syntax-definitions, ipynb-filters, theme: {light, dark}, respect-user-color-scheme, toc, toc-depth, number-depth, code-copy,
         code-overflow, code-annotations, lightbox, citations-hover, crossrefs-hover, footnotes-hover, mermaid: {theme}, html-math-method}}
"""
OPTIONS = {"label", "fig-cap", "fig-subcap", "fig-alt", "tbl-cap", "code-fold", "code-summary", "echo", "output", "warning", "eval"}
REQUIRED = {"torch", "triton", "transformers", "safetensors", "xxhash", "numpy", "tqdm", "gguf", "fastcore",
            "tokenizers", "huggingface_hub"}                 # the last two come with transformers
OPTIONAL = {"llguidance", "flash_attn", "starlette", "uvicorn", "aiohttp", "prometheus_client", "ray"}   # behind extras of their own, imported when they are needed


def none(problems):
    problems = list(problems)
    if problems: pytest.fail(f"{len(problems)} found\n" + "\n".join(problems), pytrace=False)


def cells(kind):
    "(where, cell) for all cells of a kind, in reading order."
    return [(f"{c.name}, cell {i}", cell) for c in CHAPTERS for i, cell in enumerate(c.cells) if cell.kind == kind]


CODE, MARKDOWN = cells("code"), cells("markdown")
PAGE_NAMES = ["index.qmd", "api.qmd", "glossary.qmd", "vllm_map.qmd", "references.qmd", "nbs/course/index.md", "nbs/course/questions.md"]
PAGES = [(name, Cell("markdown", (ROOT/name).read_text(encoding="utf-8"), [])) for name in PAGE_NAMES]


# ---- the book's files

def test_every_chapter_exists_and_every_notebook_is_a_chapter():
    assert listed()[0] == "index.qmd" and listed()[-1] == "references.qmd"
    files = listed() + listed("appendices")
    here = {f"nbs/{p.name}" for p in (ROOT/"nbs").glob("*.ipynb")}
    here |= {p.name for p in ROOT.glob("*.qmd")} | {f"nbs/course/{p.name}" for p in (ROOT/"nbs/course").glob("*.md")}
    none(f"{name} is {'not listed in _quarto.yml' if name in here else 'listed, but missing'}"
         for name in sorted(set(files) ^ here))
    assert len(files) == len(set(files))


def notebook_numbers(key):
    return [Path(name).name[:3] for name in listed(key) if name.endswith(".ipynb")]


def test_a_chapters_file_number_is_its_number_on_the_site():
    on_site = notebook_numbers("chapters")                   # Quarto counts from 1, through all parts
    assert on_site == [f"{i:02}_" for i in range(1, len(on_site) + 1)]
    assert set(notebook_numbers("appendices")) == {"00_"}    # lettered on the site; any chapter may use them
    assert len(set(MODULES)) == len(MODULES)


def test_sentences_name_only_chapters_that_exist():
    texts = [(where, cell.source) for where, cell in MARKDOWN + CODE + PAGES]
    paths = [ROOT/"README.md", ROOT/"CONTRIBUTING.md", *ROOT.glob("tools/*.py"), *ROOT.glob("tests/*.py")]
    texts += [(path.name, path.read_text(encoding="utf-8")) for path in paths]
    numbers = {c.number for c in CHAPTERS}
    none(f"{where}: {phrase}" for where, text in texts for phrase in NUMBERED.findall(text)
         if not {int(n) for n in re.findall(r"\d+", phrase)} <= numbers)


def unknown_keys(value, allowed, path=""):
    "The keys of `value` that `allowed` has not at the same place; lists are looked through."
    if isinstance(value, list): return [k for item in value for k in unknown_keys(item, allowed, path)]
    if not isinstance(value, dict): return []
    allowed = allowed or {}
    return [f"{path}{k}" for k in value if k not in allowed] + [
        k for name, inner in value.items() if name in allowed for k in unknown_keys(inner, allowed[name], f"{path}{name}.")]


def test_quarto_yml_has_only_keys_that_are_known_to_render():
    none(unknown_keys(quarto(), yaml.safe_load(EXAMPLE)))
    assert unknown_keys({"project": {"type": "book", "resource": []}}, yaml.safe_load(EXAMPLE)) == ["project.resource"]
    assert quarto()["project"]["type"] == "book"            # a website resolves no reference between pages
    assert quarto()["execute"] == {"enabled": False}
    html = quarto()["format"]["html"]
    for name in html["ipynb-filters"]: assert (ROOT/"nbs"/name).resolve().is_file()
    for name in html["filters"] + html["syntax-definitions"]: assert (ROOT/name).is_file()


def test_cpp_between_three_quotes_begins_as_the_sites_colours_know_it():
    strings = [(where, text) for where, cell in CODE for text in re.split(r"(?<!\+)= *r?(?=\"{3})", cell.source)[1:]
               if re.search(r'static inline|extern "C"', text.split('"""')[1])]
    none(f"{where}: {text[:40]!r}" for where, text in strings if not text.startswith(('"""\n', '"""extern ')))
    assert len(strings) > 40


def test_workflows_parse_and_pages_name_only_targets_that_exist():
    texts = [ROOT/name for name in ("README.md", "CONTRIBUTING.md", "index.qmd", ".ci/run")]
    texts += sorted((ROOT/".github/workflows").glob("*.yml"))
    for path in texts[4:]: assert yaml.safe_load(path.read_text())["jobs"]
    targets = set(re.findall(r"^([a-z]+):", (ROOT/"Makefile").read_text(), re.M))
    named = {(p.name, t) for p in texts for t in re.findall(r"(?:^|run: |exec |`)make ([a-z]+)", p.read_text(), re.M)}
    none(f"{page}: make {target}" for page, target in sorted(named) if target not in targets)
    assert {"demo", "test", "bench", "lab", "book"} <= targets


def test_links_to_files_lead_somewhere():
    pages = [(name, (ROOT/name).read_text(encoding="utf-8"), (ROOT/name).parent) for name in ("README.md", "CONTRIBUTING.md", *PAGE_NAMES)]
    pages += [(where, cell.source, ROOT/"nbs") for where, cell in MARKDOWN]
    pages = [(where, re.sub(r"`[^`\n]*`", "", text), folder) for where, text, folder in pages]  # no examples of links
    none(f"{where}: {link}" for where, text, folder in pages for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
         if not re.match(r"[a-z]+:", link) and not (folder/link).exists())


# ---- references, figures, citations

def labels():
    "(where, label) of everything that can be referred to."
    found = [(where, cell.options["label"]) for where, cell in CODE if "label" in cell.options]
    for where, cell in MARKDOWN + PAGES:
        found += [(where, label) for label in re.findall(r"\{#((?:sec|fig|tbl|eq|lst)-[\w-]+)", cell.source)]
        found += [(where, label) for label in re.findall(r"^%%\| label: *(\S+)", cell.source, re.M)]
    return found


def at_signs():
    "(where, key) for every `@key` in the prose, outside code and formulas; captions are prose."
    pages = [(where, cell.prose) for where, cell in MARKDOWN + PAGES]
    pages += [(where, cell.options.get("fig-cap", "")) for where, cell in CODE]
    return [(where, key.rstrip(".:")) for where, text in pages
            for key in re.findall(r"(?<![\w.@/])@\{?([A-Za-z][\w:.-]*)", text)]


CROSSREF = re.compile(r"(sec|fig|tbl|eq|lst)-")


def test_labels_are_unique():
    names = [label for _, label in labels()]
    none(f"{where}: {label}" for where, label in labels() if names.count(label) > 1)


def test_chapters_are_referred_to_by_links():
    keys = [(where, f"@{key}") for where, key in at_signs() if key.startswith("sec-")]
    keys += [(where, f"#{label}") for where, label in labels() if label.startswith("sec-")]
    none(f"{where}: {key}, which says nothing outside the site" for where, key in keys)


def test_references_resolve():
    known = {label for _, label in labels()}
    none(f"{where}: @{key}" for where, key in at_signs() if CROSSREF.match(key) and key not in known)


def test_citations_resolve():
    bib = (ROOT/"references.bib").read_text(encoding="utf-8")
    entries = {key: body for key, body in re.findall(r"^@\w+\{(\S+),\n(.*?)^\}$", bib, re.M | re.S)}
    assert len(entries) == len(re.findall(r"^@", bib, re.M)) and bib.count("{") == bib.count("}")
    none(f"{key} has no {field}" for key, body in entries.items() for field in ("title", "author", "year")
         if not re.search(rf"^  {field} *= \{{.+\}}", body, re.M))
    none(f"{where}: @{key}" for where, key in at_signs() if not CROSSREF.match(key) and key not in entries)


def test_every_figure_has_a_label_and_a_caption_and_is_referred_to():
    referred, problems = {key for _, key in at_signs()}, []
    for where, cell in CODE:
        label, problem = cell.options.get("label", ""), None
        if not label.startswith("fig-"): problem = cell.images and "draws a figure without a label fig-..."
        elif not cell.options.get("fig-cap"): problem = f"{label} has no caption"
        elif not cell.images: problem = f"{label} has no stored picture"
        elif label not in referred: problem = f"the text never refers to @{label}"
        if problem: problems.append(f"{where}: {problem}")
    none(problems)


# ---- the shape of a chapter

@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.name)
def test_chapter_has_every_part(chapter):
    text = "\n".join(c.source for c in chapter.markdown)
    assert chapter.title and chapter.promise
    assert len(re.findall(r"^# ", "\n".join(c.prose for c in chapter.markdown), re.M)) == 1
    solutions = [c for c in chapter.code if c.options.get("code-summary") == "Solution"]
    exercised = chapter.exercises if chapter.solutions.exists() else solutions
    exercises = re.search(r"^## Exercises$", text, re.M)
    none([*(["no takeaway box"] if '::: {.callout-note title="Takeaway"}' not in text else []),
          *(["no part 'What vLLM does differently'"] if "What vLLM does differently" not in text else []),
          *(["no '## Exercises'"] if not exercises else []),
          *(["no '## Summary' at the end"] if not re.search(r"^## Summary$", chapter.cells[-1].source, re.M) else []),
          *(["a solution stands open in the chapter"] if chapter.exercises and solutions else []),
          *([f"{len(exercised)} exercises, not 3 to 6"] if not 3 <= len(exercised) <= 6 else [])])


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.name)
def test_a_prediction_has_a_verdict(chapter):
    text = "\n".join(c.source for c in chapter.markdown if not re.match(r"\*\*\d", c.source))     # exercises aside
    bold = list(re.finditer(r"\*\*(The |A |Your )?[Pp]rediction.*", text))
    if bold: assert re.search("verdict|predict", text[bold[-1].end():], re.I), f"nothing is said after: {bold[-1][0]}"


def test_div_fences_are_closed_in_their_cell():
    for where, cell in MARKDOWN + PAGES:
        opened = len(re.findall(r"^ *:{3,} *[{\w]", cell.prose, re.M))
        closed = len(re.findall(r"^ *:{3,} *$", cell.prose, re.M))
        assert opened == closed, f"{where}: {opened} ::: opened, {closed} closed"


def test_directives_are_bare_or_known_options():
    problems = []
    for where, cell in CODE:
        head = re.match(r"((#\|.*|\s*)\n)*(#\|.*)?", cell.source)[0]
        for d in cell.directives:
            option = re.fullmatch(r"([a-z-]+): +\S.*", d)
            if not re.fullmatch(NBDEV, d) and not (option and option[1] in OPTIONS): problems.append(f"{where}: #| {d}")
            if f"#| {d}" not in head: problems.append(f"{where}: '#| {d}' is not at the top, or not '#| ' and one space")
        if cell.exported and cell.options: problems.append(f"{where}: export beside {', '.join(cell.options)}")
    none(problems)


def size(cell):
    return sum(code_lines(plain(cell.source)))


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.name)
def test_cells_are_short(chapter):
    sizes = sorted(filter(None, map(size, chapter.code)))
    median, p90 = statistics.median(sizes), sizes[math.ceil(0.9*len(sizes)) - 1]
    assert median <= 6 and p90 <= 20, f"lines of code in a cell: median {median}, p90 {p90}, all {sizes}"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.name)
def test_code_is_at_most_88_columns_wide(chapter):
    none(f"cell {i}, {len(line)} columns: {line}" for i, cell in enumerate(chapter.cells) if cell.kind == "code"
         for line in cell.source.splitlines() if len(line) > 88 and not line.startswith("#|"))


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.name)
def test_prose_goes_with_the_code(chapter):
    words, code = sum(len(c.prose.split()) for c in chapter.markdown), sum(map(size, chapter.code))
    assert 6 <= words/code <= 12, f"{words} words for {code} lines of code: {words/code:.1f} each"


def is_check(cell):
    "A cell that asserts or shows something, and is not part of the package."
    return not cell.exported and bool(cell.outputs or re.search(r"\bassert\b|\btest_\w+\(|\braises\(", cell.source))


def only_imports(cell):
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in cell.tree.body)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.name)
def test_a_check_follows_every_exported_cell(chapter):
    none(f"no check within two code cells of\n{cell.source}" for i, cell in enumerate(chapter.code)
         if cell.exported and not only_imports(cell) and not any(map(is_check, chapter.code[i+1:i+3])))


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.name)
def test_outputs_are_stored_and_clean(chapter):
    outputs = [o for c in chapter.code for o in c.outputs]
    none(f"stores an error: {o['evalue']}" for o in outputs if o["output_type"] == "error")
    assert any(c.images for c in chapter.code), "no figure is stored"
    raw = json.loads(chapter.path.read_text(encoding="utf-8"))["cells"]
    assert not any(c.get("execution_count") or set(c["metadata"]) - {"ran"} for c in raw), "not cleaned: run nbdev_clean"
    text = json.dumps([o.get("text", "") for o in outputs] + [o.get("data", {}).get("text/plain", "") for o in outputs])
    assert not re.search(r"/(home|root|Users|tmp|work)/", text), "an output shows a path of one machine"
    none(f"cell {c['id']} prints an object beside its figure: end its last line with `;`" for c in raw
         if any("image/svg+xml" in o.get("data", {}) for o in c.get("outputs", []))
         and any(o["output_type"] == "execute_result" and "image/svg+xml" not in o["data"] for o in c["outputs"]))


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.name)
def test_outputs_come_from_the_code_above_them(chapter):
    raw = json.loads(chapter.path.read_text(encoding="utf-8"))["cells"]
    none(f"cell {i} ({c['id']}) was changed after its output was stored: execute it again" for i, c in enumerate(raw)
         if c.get("outputs") and "ran" in c["metadata"] and edition.digest("".join(c["source"])) != c["metadata"]["ran"])


# ---- the numbers in the prose

REVIEWED = {   # (cell, number): why it stands there although no output or record of the page gives it
    ("b01fde53", "three milliseconds"): "of other machines, for comparison",
    ("a8e9dc07", "40 milliseconds"): "a premise of the ledger; 32 tokens at the rate that the verdict's cell prints for the bare engine take 39",
    ("13fc0e57", "10 microseconds"): "an estimate, which the next cell checks",
    ("73f0bba5", "five times"): "seven matrices of a layer against two, counted from their shapes",
    ("17477b50", "101 %"): "of queues in general",
    ("1ccf6e1e", "333 seconds"): "a million requests, 3,000 a second",
    ("55d60dfb", "333 seconds"): "a million requests, 3,000 a second"}
GLANCES = {"90df3973", "9d227705", "95e60af5"}   # cells whose times no sentence repeats, in chapters that record nothing


@functools.cache
def claims():
    "Those that need support; found once, and only for the tests that ask, since it takes seconds."
    return [claim for claim in check_numbers.claims(CHAPTERS) if not claim.assumed]


def by_key(found): return {(c.page.cells[c.at].id, c.number.text): c for c in found}
def ungiven(): return by_key(c for c in claims() if not c.support)
def unrecorded(): return by_key(c for c in claims() if c.only_live)


def test_every_measured_number_in_the_prose_stands_on_its_page():
    none(f"{claim}" for key, claim in ungiven().items() if key not in REVIEWED)
    none(f"{key} needs no exception any more" for key in REVIEWED if key not in ungiven() | unrecorded())


def test_what_the_prose_repeats_of_a_measurement_is_recorded():
    none(f"printed, but not recorded: {claim}" for key, claim in unrecorded().items() if key not in REVIEWED)


def test_chapters_that_print_a_time_record_it():
    pages = [check_numbers.Page(c) for c in CHAPTERS if not any("record(" in cell.source for cell in c.code)]
    none(f"{page.name}, cell {i} ({cell.id}) prints a time, and nothing in the chapter is recorded"
         for page in pages for i, cell in page.live.items() if cell.id not in GLANCES)


# ---- the exported code

def imported(tree):
    "(module, names) of every import in `tree`; relative ones become absolute."
    for node in sorted(ast.walk(tree), key=lambda node: getattr(node, "lineno", 0)):
        if isinstance(node, ast.Import): yield from ((alias.name, []) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["nano_vllm" if node.level else "", node.module]))
            yield module, [alias.name for alias in node.names]


def used_modules(tree):
    "The modules of the package that `tree` imports; the package itself (`from nano_vllm import LLM`) is ''."
    for module, names in imported(tree):
        parts = module.split(".")
        if parts[0] != "nano_vllm": continue
        if len(parts) > 1: yield parts[1]
        else: yield from (name if name in MODULES else "" for name in names or [""])


def test_modules_import_only_from_earlier_chapters():
    problems = []
    for path in [c.module_path for c in CHAPTERS if c.module]:
        earlier = MODULES[:MODULES.index(path.stem)]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        problems += [f"{path.stem} imports {m or 'the package itself'}" for m in used_modules(tree) if m not in earlier]
    none(problems)


def test_notebooks_use_only_what_the_reader_has_met():
    problems, met = [], []
    for c in CHAPTERS:
        if "engine_args" in met: met.append("")              # the package's own names come with the whole engine
        if c.name == "00_testing": continue                  # an appendix about all of them, to be read last
        if c.module: met.append(c.module)
        for cell in c.code:
            problems += [f"{c.name} uses {m or 'the package itself'}" for m in used_modules(cell.tree) if m not in met]
    none(problems)


def test_every_module_of_the_package_is_a_chapter():
    assert {p.stem for p in (ROOT/"nano_vllm").glob("*.py")} - {"__init__", "_modidx"} == set(MODULES)


def test_modules_import_only_what_is_required():
    allowed = set(sys.stdlib_module_names) | REQUIRED | OPTIONAL | {"nano_vllm"}
    settings = (ROOT/"settings.ini").read_text()
    requirements = re.search(r"^requirements = (.*)", settings, re.M)[1].split()
    assert {re.split(r"[<>=;]", r)[0] for r in requirements} == REQUIRED - {"tokenizers", "huggingface_hub"}
    none(f"{path.name} imports {name}" for path in sorted((ROOT/"nano_vllm").glob("*.py"))
         for name, _ in imported(ast.parse(path.read_text(encoding="utf-8"))) if name.split(".")[0] not in allowed)


def test_package_imports_the_chapters_in_reading_order():
    order = list(dict.fromkeys(used_modules(ast.parse((ROOT/"nano_vllm/__init__.py").read_text(encoding="utf-8")))))
    assert order in (MODULES, [m for m in MODULES if m != "cli"])


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.ci
def test_import_is_fast_and_light():
    code = """if True:
        import json, sys, time, torch
        start = time.perf_counter()
        import nano_vllm
        seconds = time.perf_counter() - start
        public = [n for n in ("LLM", "SamplingParams", "RequestOutput", "CompletionOutput") if hasattr(nano_vllm, n)]
        print(json.dumps([seconds, list(sys.modules), public]))"""
    runs = [run_python(code) for _ in range(3)]
    seconds, (_, loaded, public) = min(r[0] for r in runs), runs[0]
    print(f"import nano_vllm: {seconds:.2f} s beyond torch")
    assert public == ["LLM", "SamplingParams", "RequestOutput", "CompletionOutput"]
    banned = {"nbdev", "execnb", "IPython", "ipykernel", "jupyter_core", "matplotlib", "transformers", "ray"}
    assert not banned & set(loaded)
    assert seconds < 1


def test_size_rule(capsys):
    rows = count_lines.counts()
    with capsys.disabled():
        print("\n\nexported lines: " + ", ".join(f"{c.name} {n}{f' + {k} of kernels' if k else ''}" for c, n, k in rows))
        print(f"exported lines of all chapters: {count_lines.total(rows)}")
    assert {c.name: n for c, n, _ in rows}["01_tiny_engine"] <= 150


def test_readme_has_the_measured_table():
    assert count_lines.in_readme((ROOT/"README.md").read_text(encoding="utf-8")) == count_lines.table(count_lines.counts()), \
        "run `make lines`"


# ---- the tools

def test_code_lines_counts_code_only():
    source = '''"""A docstring
of two lines."""
__all__ = ["f",
           "g"]

# a comment
def f(x):  # another
    "Doc: ünï."
    return """one
two"""
@triton.jit
def g(x):
    "Doc."

    return x
'''
    assert code_lines(source) == (3, 3)


NOTEBOOK = {"metadata": {"kernelspec": {"name": "python3"}}, "nbformat": 4, "nbformat_minor": 5, "cells": [
    {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["#| export\n", "stays: prose"]},
    {"cell_type": "code", "id": "b", "metadata": {}, "outputs": [], "source": ["#| default_exp engine"]},
    {"cell_type": "code", "id": "c", "metadata": {}, "outputs": [], "source": ["#| hide\n", "secret()"]},
    {"cell_type": "code", "id": "d", "metadata": {}, "outputs": [], "source": ["#| export\n", "\n", "x = 1  #| export\n", "y"]},
    {"cell_type": "code", "id": "e", "metadata": {}, "outputs": [1],
     "source": ["#| cuda\n", "#| label: fig-x\n", "#| fig-cap: \"export\"\n", "plot()"]},
    {"cell_type": "code", "id": "f", "metadata": {}, "outputs": [], "source": "#|slow\nz"}]}


def test_filter_takes_out_directives_and_nothing_else():
    command = [sys.executable, ROOT/"tools/quarto_filter.py"]
    done = subprocess.run(command, input=json.dumps(NOTEBOOK), capture_output=True, text=True, check=True, cwd=ROOT/"nbs")
    out = json.loads(done.stdout)
    assert {k: v for k, v in out.items() if k != "cells"} == {k: v for k, v in NOTEBOOK.items() if k != "cells"}
    assert [c["id"] for c in out["cells"]] == ["a", "d", "e", "f"]
    prose, code, plot, text = out["cells"]
    assert prose == NOTEBOOK["cells"][0]
    assert code["source"] == ["x = 1  #| export\n", "y"]
    shown = ["#| label: fig-x\n", "#| fig-cap: \"export\"\n", "#| fig-alt: \"export\"\n", "plot()"]
    assert plot["source"] == shown and plot["outputs"] == [1]
    assert text["source"] == ["z"]                   # one string leaves as lines


def test_filter_leaves_no_directive_in_any_chapter():
    for c in CHAPTERS:
        nb = json.loads(c.path.read_text(encoding="utf-8"))
        left = [line for cell in quarto_filter.clean(nb)["cells"] if cell["cell_type"] == "code"
                for line in "".join(cell["source"]).splitlines() if line.startswith("#|")]
        assert all(re.match(r"#\| [a-z-]+: ", line) for line in left), left


def test_export_check_sees_every_kind_of_difference(tmp_path):
    fresh, package = tmp_path/"a", tmp_path/"b"
    for folder, files in (fresh, {"same": "x", "changed": "x", "new": "x"}), (package, {"same": "x", "changed": "y", "old": "x"}):
        folder.mkdir()
        for name, text in files.items(): (folder/f"{name}.py").write_text(text)
    found = check_export.differences(fresh, package)
    assert found == ["changed.py: differs", "new.py: in the notebooks, not in the package",
                     "old.py: in the package, but no notebook exports it"]


def write_notebook(path, *sources):
    "A notebook at `path`, whose first cell is markdown and whose others are code; as nbformat writes it."
    cells = [{"cell_type": "markdown" if i == 0 else "code", "id": f"cell{i}", "metadata": {},
              **({} if i == 0 else {"execution_count": None, "outputs": []}), "source": source.splitlines(keepends=True)}
             for i, source in enumerate(sources)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**NOTEBOOK, "cells": cells}, indent=1, ensure_ascii=False) + "\n")


def test_a_chapter_exports_one_module_or_none(tmp_path):
    write_notebook(tmp_path/"03_one.ipynb", "# One\n\n> Exported.", "#| default_exp one", "#| export\na = 1")
    one = Chapter(tmp_path/"03_one.ipynb")
    assert (one.module, one.module_path) == ("one", ROOT/"nano_vllm/one.py") and one.code[1].exported
    write_notebook(tmp_path/"04_tale.ipynb", "# A tale\n\n> Nothing to export.", "#| hide\n1 + 1")
    assert Chapter(tmp_path/"04_tale.ipynb").module is None is Chapter(tmp_path/"04_tale.ipynb").module_path
    write_notebook(tmp_path/"05_lost.ipynb", "# Lost\n\n> Where to?", "#| export\na = 1")
    with pytest.raises(ValueError, match="05_lost has 0 cells with default_exp"): Chapter(tmp_path/"05_lost.ipynb").module
    assert not re.fullmatch(NBDEV, "export second")          # nbdev would add to that module at every export


def small_book(root):
    "Two chapters, solutions to the first, and the files that mention them."
    write_notebook(root/"nbs/01_one.ipynb", "# One\n\n> Then [two](02_two.ipynb), or chapters 01 and 02.")
    write_notebook(root/"nbs/02_two.ipynb", "# Two\n\n> After [one](01_one.ipynb#start), \"chapter 1\", not 01_one_more.")
    write_notebook(root/"nbs/solutions/01_one.ipynb", "# Solutions")
    (root/"nbs/labs").mkdir()
    (root/"nbs/labs/one.html").write_text('<a href="../01_one.html">one</a>')
    (root/"README.md").write_text("[chapter 02](nbs/02_two.ipynb) of 2, chapter 12\n")
    return root


def test_renumber_moves_chapters_and_all_mentions_of_them(tmp_path):
    book = small_book(tmp_path)
    changed = renumber.renumber(book, {"01_one": "02_one", "02_two": "01_two"})
    assert [str(p.relative_to(book)) for p in changed] == ["README.md", "nbs/01_two.ipynb", "nbs/02_one.ipynb", "nbs/labs/one.html"]
    assert {p.name for p in book.glob("nbs/*.ipynb")} == {"01_two.ipynb", "02_one.ipynb"}
    assert (book/"nbs/solutions/02_one.ipynb").exists()
    one, two = (Chapter(book/"nbs"/name).promise for name in ("02_one.ipynb", "01_two.ipynb"))
    assert one == "Then [two](01_two.ipynb), or chapters 02 and 01."
    assert two == 'After [one](02_one.ipynb#start), "chapter 2", not 01_one_more.'
    assert (book/"nbs/labs/one.html").read_text() == '<a href="../02_one.html">one</a>'
    assert (book/"README.md").read_text() == "[chapter 01](nbs/01_two.ipynb) of 2, chapter 12\n"


def test_renumber_refuses_what_would_lose_a_chapter_and_touches_nothing(tmp_path):
    book = small_book(tmp_path)
    before = {p: p.read_bytes() for p in book.rglob("*") if p.is_file()}
    for names, problem in [({"03_three": "04_three"}, "no chapter nbs/03_three"), ({"01_one": "02_two"}, "02_two.ipynb exists"),
                           ({"01_one": "one"}, "'one' is no chapter's name"),
                           ({"01_one": "03_x", "02_two": "03_x"}, "two chapters would have one name")]:
        with pytest.raises(ValueError, match=problem): renumber.renumber(book, names)
    assert before == {p: p.read_bytes() for p in book.rglob("*") if p.is_file()}


def said_and_printed(tmp_path, text, *code_and_output):
    "The numbers of `text`, in a chapter whose cells of code print what follows them."
    write_notebook(tmp_path/"03_one.ipynb", "# One\n\n> It measures.", *code_and_output[::2], text)
    nb = json.loads((tmp_path/"03_one.ipynb").read_text())
    for cell, output in zip(nb["cells"][1:], code_and_output[1::2]):
        cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": output}]
    nb["cells"][-1]["cell_type"] = "markdown"
    (tmp_path/"03_one.ipynb").write_text(json.dumps(nb))
    return check_numbers.claims([Chapter(tmp_path/"03_one.ipynb")])


@pytest.mark.parametrize("text, supported", [
    ("A step takes 12.3 ms.", True), ("A step takes 12.4 ms.", False), ("A step takes 12.345 ms.", False),
    ("A step takes 12 ms.", True), ("A step takes 13 ms.", False), ("A step takes 12.3 µs.", False), ("A step takes 0.012 s.", True),
    ("Two steps take 8.2 and 12.3 ms.", True), ("Two steps take 8.2 and 12.5 ms.", False),
    ("A step took eight milliseconds.", True), ("A step took nine milliseconds.", False),
    ("It makes 86 tokens/s.", True), ("It makes 96 tokens a second.", False), ("It makes some 90 tokens a second.", True),
    ("Decoding is 1.5 times as fast.", True), ("Decoding is 1.7 times as fast.", False), ("It is 33% faster, not 40%.", False),
    ("It is 33% faster.", True), ("The 2 steps before took 16.4 ms.", False), ("2 steps of 8.2 ms take 16.4 ms.", True),
    ("What takes 7 ms, 3 times, takes 21 ms.", False), ("It takes 8 to 9 ms.", True), ("It takes 9 to 11 ms.", False),
    ("It is called 60 times a token.", None), ("It takes 16 bits.", None), ("A step should take 5 ms.", None)])
def test_a_number_needs_what_rounds_to_it(tmp_path, text, supported):
    shown = "show()", "before  12.31 ms\nafter    8.21 ms\n", "rate()", "86.4 tokens/s\n"
    found = [c for c in said_and_printed(tmp_path, text, *shown) if not c.assumed]
    assert bool(found) == (supported is not None)
    assert all(c.support for c in found) == (supported is not False), [str(c) for c in found]


def test_a_ratio_is_one_of_those_printed_where_some_are(tmp_path):
    shown = "show()", "a loop 10.0 ms, 100%\nstreams 12.5 ms, 97%\n"
    assert [bool(c.support) for c in said_and_printed(tmp_path, "Streams cost 3%.\n\nStreams cost 25%.", *shown)] == [True, False]


def test_a_prediction_needs_no_support_and_may_be_repeated(tmp_path):
    text = "**The prediction:** 5 ms a step, in all 0.5 s.\n\n**The verdict.** It is 7 ms and not 5 ms."
    said = [(c.number.text, c.assumed, bool(c.support)) for c in said_and_printed(tmp_path, text, "show()", "7.2 ms\n")]
    assert said == [("5 ms", True, False), ("0.5 s", True, False), ("7 ms", False, True), ("5 ms", False, True)]


@pytest.mark.parametrize("code, live", [
    ("t = timed(f)\nprint(t)", True), ("t = record('x', timed(f))\nprint(t)", False),
    ("def run(): return perf_counter() - start\nprint([run() for _ in range(3)])", True),
    ("t = {}\nt['a'] = timed(f)\n_ = record('x', t)\nfor k, v in t.items(): print(v)", False),
    ("t = timed(f)\nt = 2\nprint(t)", False), ("print(sum(t for t in times))", False)])
def test_times_that_no_record_holds_are_found(tmp_path, code, live):
    claim, = said_and_printed(tmp_path, "It takes 3.1 ms.", code, "3.14 ms\n")
    assert claim.only_live == live and bool(claim.page.live) == live


def test_what_is_shortened_in_tests_of_notebooks_is_there():
    sources = {(name_of(c.path), cell.id): cell.source for c in CHAPTERS for cell in c.cells}
    none(f"{name}, cell {cell}: no {old!r}" for name, cells in SHORT.items() for cell, pairs in cells.items() for old, _ in pairs
         if old not in sources.get((name, cell), ""))


@pytest.mark.ci
def test_all_notebooks_run_and_those_that_fail_are_named(tmp_path):
    cells = dict(good=["x = 1", "assert x == 1"], bad=["x = 1", "assert x == 2"], killed=["import os; os.kill(os.getpid(), 9)"],
                 skipped=["#| notest\n1/0"])
    for name, sources in cells.items():
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
        nbformat.write(nb, tmp_path/f"{name}.ipynb")
    command = [sys.executable, ROOT/"tools/test_notebooks.py", *sorted(tmp_path.glob("*.ipynb"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode and "AssertionError" in done.stderr + done.stdout
    assert set(re.search("these notebooks failed: (.+)", done.stderr)[1].split(", ")) == {"bad.ipynb", "killed.ipynb"}


def test_venv_is_made_anew_only_when_settings_change(tmp_path, monkeypatch):
    monkeypatch.setattr(make_venv, "ROOT", str(tmp_path))
    for name in ("settings.ini", "setup.py"): (tmp_path/name).write_text("1")
    before = make_venv.wanted("torch==1")
    assert before == make_venv.wanted("torch==1") != make_venv.wanted("torch==2")
    (tmp_path/"settings.ini").write_text("2")
    assert make_venv.wanted("torch==1") != before


def test_a_python_that_cannot_make_a_venv_is_told_so(monkeypatch):
    assert make_venv.missing() is None
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert "apt install python3-venv" in make_venv.missing()
    monkeypatch.setattr(make_venv, "MIN_PYTHON", (99, 0))
    assert "too old" in make_venv.missing()
