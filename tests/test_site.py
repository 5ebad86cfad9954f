"""What the site adds to the notebooks, and the pages that are written by tools: all of it checked without Quarto."""
import json
import os
import re
import shutil
import subprocess

import pytest

import edition
import quarto_filter
import write_pages
from book import ROOT, chapters, quarto
from nano_vllm.pooling import NOT_FOR_VECTORS
from nano_vllm.sampling_params import ACCEPTED, REFUSED
from nano_vllm.workbench import recorded

CHAPTERS = chapters()


def load(chapter): return json.loads(chapter.path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def filtered():
    "{chapter's name: its notebook as Quarto gets it}."
    return {c.name: quarto_filter.filtered(load(c)) for c in CHAPTERS}


# ---- what the filter puts in

def test_each_chapter_says_what_it_takes_and_needs(filtered):
    for c in CHAPTERS:
        facts = "".join(filtered[c.name]["cells"][1]["source"])
        assert facts.startswith("::: {.chapter-facts}") and facts.endswith("\n:::")
        assert re.search(r"\*\*How long:\*\* \d+ minutes to read", facts)
        assert f"/blob/main/nbs/{c.name}.ipynb" in facts and f"/raw/main/nbs/{c.name}.ipynb" in facts
        for link in re.findall(r"\]\((\w+\.ipynb)\)", facts): assert (ROOT/"nbs"/link).exists()


def test_each_source_leaves_as_lines(filtered):
    "Of a source that is one string, Quarto's markdown has no newline left: no list, no box, no paragraph."
    for name, nb in filtered.items():
        for cell in nb["cells"]:
            lines = cell["source"]
            assert isinstance(lines, list) and lines == "".join(lines).splitlines(keepends=True), name


def test_every_link_of_a_chapter_leads_to_a_file(filtered):
    "Also those that a solution's text brings along from its own folder."
    for name, nb in filtered.items():
        for cell in nb["cells"]:
            if cell["cell_type"] != "markdown": continue
            prose = re.sub(r"(`{3,}).*?\1|`[^`]*`", "", "".join(cell["source"]), flags=re.S)
            for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)", prose):
                assert (ROOT/"nbs"/link).exists(), f"{name}: {link}"


def test_what_is_drawn_in_letters_fits_the_page():
    "A page that is 1,400 pixels wide shows 98 columns of code; a drawing that is scrolled is none."
    texts = {c.name: [text for cell in load(c)["cells"] if cell["cell_type"] == "markdown" for text in ["".join(cell["source"])]] for c in CHAPTERS}
    texts |= {p.name: [p.read_text(encoding="utf-8")] for p in [*ROOT.glob("*.qmd"), *ROOT.glob("nbs/course/*.md")]}
    for name, parts in texts.items():
        for fence in re.findall(r"^(```\w*\n.*?)^```", "\n".join(parts), re.M | re.S):
            for line in fence.splitlines(): assert len(line) <= 98, f"{name}: {line}"


def test_each_chapter_names_a_file_of_vllm_to_open():
    missing = [c.name for c in CHAPTERS if not quarto_filter.vllm_file(load(c))]
    assert not missing, "these name no file such as `vllm/v1/core/sched/scheduler.py` in their part on vLLM: " + ", ".join(missing)


def test_a_chapter_builds_on_the_nearest_only():
    assert quarto_filter.needs("14_scheduler") == ["05_prefix_cache"]       # which builds on blocks itself
    assert quarto_filter.needs("15_request") == ["02_tokenizer", "10_model", "14_scheduler"]
    assert quarto_filter.needs("01_tiny_engine") == [] == quarto_filter.needs("00_workbench")


def test_minutes_count_words_lines_and_exercises():
    cells = [dict(cell_type="markdown", source="word " * 2000), dict(cell_type="code", source=["a\n", "\n", "b\n"] * 75),
             dict(cell_type="markdown", source="**1. An exercise.** Do it.")]
    assert quarto_filter.minutes(dict(cells=cells)) == (20, 10)


def test_the_first_use_of_a_term_is_linked_and_no_other():
    left = {"KV cache": "kv-cache", "step": "step"}
    text = "# A step\n\nThe `step` of [a step](x.ipynb). Each KV caches: steps, a step.\n\n```\nstep\n```"
    out = quarto_filter.link_terms(text, left)
    assert out == ("# A step\n\nThe `step` of [a step](x.ipynb). Each [KV caches](../glossary.qmd#kv-cache){.term}: "
                   "[steps](../glossary.qmd#step){.term}, a step.\n\n```\nstep\n```")
    assert left == {} and quarto_filter.link_terms("a step", left) == "a step"
    assert quarto_filter.link_terms("stepwise, a-step, footstep", {"step": "step"}) == "stepwise, a-step, footstep"


def test_every_term_of_the_glossary_is_used_and_every_link_leads_to_one(filtered):
    places = {place for _, place in quarto_filter.TERM.findall((ROOT/"glossary.qmd").read_text(encoding="utf-8"))}
    text = json.dumps(list(filtered.values()))
    linked = set(re.findall(r"glossary\.qmd#([\w-]+)", text))
    assert linked <= places and len(places - linked) <= 2, places - linked
    for c in CHAPTERS:
        of = re.findall(r"glossary\.qmd#([\w-]+)", json.dumps(filtered[c.name]))
        assert len(of) == len(set(of)), f"{c.name} links a term twice"


def test_terms_stay_out_of_headings_titles_and_code(filtered):
    for name, nb in filtered.items():
        for cell in nb["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "code": assert "{.term}" not in text
            else: assert not re.search(r"^(#|:::|>).*\{\.term\}", text, re.M), name


def test_every_figure_has_a_text_for_those_who_cannot_see_it(filtered):
    for name, nb in filtered.items():
        for cell in nb["cells"]:
            text = "".join(cell["source"])
            if "#| label: fig-" in text: assert re.search(r"^#\| fig-alt: .+", text, re.M), name
    bare = dict(cells=[dict(cell_type="code", source='#| label: fig-x\n#| fig-cap: "A cap: one."\nplot()')])
    assert quarto_filter.with_alt_texts(bare)["cells"][0]["source"] == '#| label: fig-x\n#| fig-cap: "A cap: one."\n#| fig-alt: "A cap: one."\nplot()'


def test_pictures_of_several_machines_bear_their_names(monkeypatch):
    assert quarto_filter.machines()["peers"] == [entry["machine"]["name"] for entry in recorded("peers")]
    monkeypatch.setattr(quarto_filter, "machines", lambda: {"speed": ["one", "two"]})
    for count, named in ((1, False), (2, True), (3, False)):
        cell = dict(cell_type="code", source='#| fig-cap: "A."\nfor e in recorded("speed"): draw(e)', outputs=[dict(data={"image/svg+xml": "<svg/>"})] * count)
        made = quarto_filter.with_machines(dict(cells=[cell]))["cells"][0]["source"]
        assert ('#| fig-subcap: ["one", "two"]\n' in made) == named


# ---- pages

@pytest.mark.parametrize("name", write_pages.PAGES)
def test_written_pages_are_current(name):
    assert (ROOT/name).read_text(encoding="utf-8") == write_pages.PAGES[name](), "run `make lines`"


def test_the_interface_lists_every_public_name():
    import nano_vllm
    page = (ROOT/"api.qmd").read_text(encoding="utf-8")
    for name in nano_vllm.__all__: assert f"## `{name}`" in page
    for method in ("generate", "chat", "stream", "get_tokenizer"): assert f"`{method}(" in page
    for field in nano_vllm.SamplingParams.__dataclass_fields__: assert f"| `{field}` |" in page


def test_the_interface_says_what_every_field_means():
    rows = re.findall(r"^\| `(\w+)` .*\| (.*?) \|$", write_pages.api(), re.M)
    assert len(rows) > 100 and all(meaning for _, meaning in rows)
    meanings = dict(rows)
    assert meanings["top_p"] == "the best, up to this probability"
    assert {meanings[name] for name in REFUSED | NOT_FOR_VECTORS} == {"refused"} and {meanings[name] for name in ACCEPTED} == {"no effect"}


def test_the_home_page_has_what_sells_the_book():
    page = (ROOT/"index.qmd").read_text(encoding="utf-8")
    assert page.startswith("# Start here {.unnumbered}\n")        # without its own title it would be chapter 1
    screen = page[:page.index("## What a chapter is like")]
    for what in ("images/throughput.svg", "labs/scheduler.html", "An evening", "A week", "Eight sessions", "half an hour", "**You need**"): assert what in screen


def test_the_home_page_leads_to_every_chapter():
    page = (ROOT/"index.qmd").read_text(encoding="utf-8")
    missing = [c.path.name for c in CHAPTERS if f"(nbs/{c.path.name})" not in page]
    assert not missing, missing


def test_the_glossary_is_in_the_order_of_the_alphabet():
    terms = [term.lower() for term, _ in quarto_filter.TERM.findall((ROOT/"glossary.qmd").read_text(encoding="utf-8"))]
    assert len(terms) > 50 and terms == sorted(terms)


def test_no_code_in_a_table_shows_a_backslash_before_its_bar():
    "GitHub wants one there and hides it; Pandoc shows it."
    texts = {p.name: p.read_text(encoding="utf-8") for p in [*ROOT.glob("*.qmd"), *ROOT.glob("nbs/course/*.md")]}
    for c in CHAPTERS: texts[c.name] = "\n\n".join("".join(cell["source"]) for cell in load(c)["cells"] if cell["cell_type"] == "markdown")
    for name, text in texts.items():
        for row in re.findall(r"^\|.*", text, re.M):
            assert not any("\\|" in code for code in re.findall(r"`[^`]+`", row)), f"{name}: {row}"


def test_a_render_leaves_the_working_tree_clean():
    "Quarto appends these lines to .gitignore unless they stand there, letter by letter."
    assert {"/.quarto/", "**/*.quarto_ipynb"} <= set((ROOT/".gitignore").read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("log, page, refused", [
    ("Output created", "Figure 1", ""), ("WARN: no such file", "", "has to go"), ("ERROR (jog.lua:173) a filter failed", "", "has to go"),
    ("", "see ?@sec-nowhere", "lead nowhere")])
def test_a_book_with_warnings_errors_or_open_references_is_refused(tmp_path, log, page, refused):
    "Quarto itself ends well after a warning, and after an error of its filters too."
    shutil.copy(ROOT/"Makefile", tmp_path)
    program = tmp_path/"bin/quarto"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nmkdir -p _docs\necho '{page}' > _docs/a.html\necho '{log}' >&2\n")
    program.chmod(0o755)
    done = subprocess.run(["make", "book"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"})
    assert bool(done.returncode) == bool(refused) and refused in done.stderr


def test_the_site_asks_no_other_host():
    assert "$web-font-path: false;" in (ROOT/"tools/book.scss").read_text(encoding="utf-8")      # or the themes fetch fonts
    texts = {name: (ROOT/name).read_text(encoding="utf-8") for name in ("index.qmd", "404.html", "tools/book.scss", "images/favicon.svg")}
    for name, text in texts.items():
        assert not re.search(r'(src|href)="https?://|url\(|@import|!\[[^]]*\]\(http', text), name
    for name in (quarto()["book"]["favicon"], *quarto()["project"]["resources"]): assert list(ROOT.glob(name)), name


# ---- editions

def test_a_digest_is_of_code_alone():
    assert edition.digest("#| label: fig-x\n\nx = 1   \n# why\ny = 2") == edition.digest("x = 1\ny = 2") != edition.digest("x = 2\ny = 2")


def test_stored_measurements_take_the_place_of_new_ones():
    live = {1: [0.5, 0.25], "a": (1, 2), "old": {}}
    inner = live[1]
    assert edition.fit(live, {"1": [7, 8, 9], "a": [3, 4], "new": 5}) is live
    assert live == {1: [7, 8, 9], "a": (3, 4), "old": {}, "new": 5} and live[1] is inner
    assert list(edition.fit({8: 0, 1: 0, 32: 0}, {"1": 1, "8": 2, "32": 3})) == [1, 8, 32]


def test_an_edition_is_interrupted_and_goes_on():
    assert edition.outside(" M nbs/00_workbench.ipynb\n?? results/new.json\n M nano_vllm/llm.py") == ["nano_vllm/llm.py"]
    assert not any(path.startswith("bs/") for path in edition.outside(edition.git("status", "--porcelain")))


def test_an_edition_knows_where_a_chapter_stands():
    nb = load(CHAPTERS[0])
    wanted = dict(machine="m", commit="c")
    assert edition.state({**nb, "metadata": {}}, wanted) == "of no edition"
    for found, said in ((dict(wanted, code=edition.code_digest(nb)), "done"), (dict(wanted, code="0"), "executed before the code changed"),
                        (dict(wanted, machine="n", code="0"), "of machine n"), (dict(wanted, commit="d", code="0"), "of commit d")):
        assert edition.state({**nb, "metadata": {"edition": found}}, wanted) == said


def test_the_code_behind_a_chapter_includes_the_modules_it_uses(tmp_path):
    (tmp_path/"a.py").write_text("from .b import x\n")
    (tmp_path/"b.py").write_text("x = 1\n")
    nb = dict(cells=[dict(cell_type="code", source="from nano_vllm.a import x")])
    before = edition.code_digest(nb, tmp_path)
    (tmp_path/"b.py").write_text("x = 2\n")
    assert edition.code_digest(nb, tmp_path) != before


def test_what_was_not_measured_anew_is_listed(tmp_path):
    from datetime import date
    for name, of in (("a", dict(machine=dict(name="m"), date=str(date.today()))), ("b", dict(machine=dict(name="m"), date="2020-01-01")),
                     ("c", dict(machine=dict(name="other"), date=str(date.today())))): (tmp_path/f"{name}.json").write_text(json.dumps(of))
    assert edition.left_over(dict(machine="m"), tmp_path) == ["b.json: of 2020-01-01", "c.json: measured on other"]


def test_the_edition_of_a_chapter_stands_below_its_title():
    nb = load(CHAPTERS[0])
    nb["metadata"]["edition"] = dict(machine="AMD EPYC, 2 cores", commit="abc1234", date="2026-01-02", code="0")
    assert "**Edition:** AMD EPYC, 2 cores, commit abc1234, 2026-01-02" in "".join(quarto_filter.filtered(nb)["cells"][1]["source"])


def test_the_map_names_what_is_here():
    "Each name of ours on the map is defined in the module of the chapter that it links to, or of one before it."
    text, of = (ROOT/"vllm_map.qmd").read_text(encoding="utf-8"), {c.path.name: c.module for c in chapters()}
    links = re.findall(r"\[([^]]*`[^]]*)\]\(nbs/([\w.]+)\)", text)
    assert len(links) > 12
    for words, file in links:
        source = (ROOT/f"nano_vllm/{of[file]}.py").read_text(encoding="utf-8")
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", words):
            assert re.search(rf"^\s*(?:class|(?:async )?def) {name}\b", source, re.M), f"{name} is not in {of[file]}"
