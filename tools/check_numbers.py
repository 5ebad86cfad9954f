"""Find numbers in the prose that look measured and that the page does not give.

    python tools/check_numbers.py            for each chapter: cell, number, sentence, and the nearest value that the page has
    python tools/check_numbers.py --all      all numbers that were looked at, and what supports each
    python tools/check_numbers.py --live     cells that print a time which no record holds

Looked at are times, rates, and what is so many times or so many per cent of something, in the text and in captions. A number
is supported by what rounds to it: what a cell of the chapter prints or writes into a figure; a measurement that the chapter
records or reads; ratio, sum or difference of two printed numbers that stand in a row or a column close by; arithmetic on what
its sentence has said before; a constant in the code around it; or what a chapter shows to which its sentence links.
The fewer digits it has, the closer must stand what supports it. Predictions and suppositions need no support, and what they
say may be repeated. Exercises are not looked at, nor are numbers in words that are no count ("half", "twice").
"""
import ast
import io
import json
import math
import re
import sys
import tokenize
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import permutations

from book import ROOT, Cell, Chapter, chapters

TIME = dict.fromkeys(("ns", "nanosecond", "nanoseconds"), 1e-9) | dict.fromkeys(("µs", "us", "microsecond", "microseconds"), 1e-6)
TIME |= dict.fromkeys(("ms", "millisecond", "milliseconds"), 1e-3) | dict.fromkeys(("s", "second", "seconds"), 1)
TIME |= dict.fromkeys(("minute", "minutes"), 60)
RATIO = dict.fromkeys(("times", "x", "×"), 1) | dict.fromkeys(("%", "per cent"), .01)
PREFIX = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
RATE = r"(?P<prefix>[kMGT]?)(?:B|FLOP|[a-z]+)(?:/s\b| (?:a|per) second\b)"
MEASURE = "|".join([*sorted([*TIME, "times", "%", "per cent"], key=len, reverse=True), r"(?<=\d)[x×]"])
UNIT = rf"(?P<rate>{RATE})|(?P<measure>{MEASURE})(?![\w/]| *\d)|(?P<other>[kMGT]?i?B\b|[a-z]+s\b)|(?P<label>:)"
WORDS = dict(zip("one two three four five six seven eight nine ten eleven twelve".split(), range(1, 13)))
WORDS |= dict(zip("thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split(), range(13, 20)))
WORDS |= dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10)))
DIGITS = r"(?<![\w.@#/-])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!_)"
NUMBER = rf"{DIGITS}|\b(?i:{'|'.join(WORDS)})\b"
LIST = re.compile(rf"(?P<numbers>(?:{NUMBER})(?:(?:, | and | or | to |–)(?:{NUMBER}))*)(?:[\s-]*)(?:{UNIT})")
ROUGHLY = r"(?:about|some|around|nearly|almost|roughly|close to|≈|~)\s+\**$"
COMPARED = r"\*{0,2} (?:as|the|slower|faster|too|what|that|those|more|less|longer|shorter|smaller|larger)\b"
MEASURED = (r"(?i)measur|verdict|predict|fast|slow|\btak(e|es|ing|en)\b|took|cost|long|short|\bsav|wait|speed|gain|busy|reach|"
            r"within|second|throughput|gap|lose")
PREDICTION = r"\*\*(?:The |A |Your )?[Pp]redict[^*]*\*\*"
ASSUMED = r"\b(should|would|could|let (us|it)|suppose|imagine|by hand|if)\b|, say\b|\bsay that|\?[*)]*\s*$"
FOUND = r"verdict|measured|@fig-|was printed"       # a sentence with one of these supposes nothing
SENTENCE = r"(?<=[.!?])[)*\"]*\s+(?=[*(\"\[]*[A-Z@`x])|\n(?=[-|] )"
CLOCKS = {"timed", "timeit", "perf_counter", "perf_counter_ns", "monotonic", "process_time"}
AROUND, CLOSE, LONG = 3, 4, 120      # cells of code around a number; outputs close to it; numbers in a record that are no samples


# ---- numbers in a text

@dataclass
class Number:
    value: float         # in seconds, units a second, or times
    step: float          # the size of its last digit
    kind: str = ""       # "time", "rate", "ratio", "other"; "" if no unit follows
    unit: str = ""
    scale: float = 1
    text: str = ""
    start: int = 0
    end: int = 0
    units: tuple = ()    # which units it may have, if none follows
    reach: float = 0     # "8 to 9%": how far it is to the other end

    @property
    def one_digit(self) -> bool: return self.value/self.step < 9.999


def number(text: str, roughly: bool, **rest) -> Number:
    "`roughly` allows what rounds to as many digits as are not zero; otherwise final zeros may hide a twentieth at most."
    digits = str(WORDS.get(text.lower(), text)).replace(",", "")
    value, step = float(digits), 10.0 ** -len(digits.partition(".")[2])
    if digits.endswith("0") and step == 1 and value:
        zeros = 10.0 ** (len(digits) - len(digits.rstrip("0")))
        step = zeros if roughly else max(1, min(zeros, value/10))
    scale = rest.get("scale", 1)
    return Number(value*scale, step*scale, text=f"{text} {rest.get('unit', '')}".strip(), **rest)


def unit_of(match: re.Match) -> dict:
    if match["rate"]: return dict(kind="rate", scale=PREFIX[match["prefix"]], unit=match["rate"])
    unit = match["measure"]
    if unit in TIME: return dict(kind="time", scale=TIME[unit], unit=unit)
    if unit in RATIO: return dict(kind="ratio", scale=RATIO[unit], unit=unit)
    return dict(kind="other", unit=match["other"] or "")


def numbers(text: str) -> list[Number]:
    "All numbers in `text`, in order, each with the unit that follows it or its list."
    found = {}
    for match in LIST.finditer(text):
        roughly = bool(re.search(ROUGHLY, text[:match.start()]))
        here = [number(n[0], roughly, start=match.start() + n.start(), end=match.end(), **unit_of(match))
                for n in re.finditer(NUMBER, match["numbers"])]
        if " to " in match["numbers"] and len(here) == 2 and here[0].value < here[1].value <= 1.5*here[0].value:
            here[0].reach, here[1].reach = here[1].value - here[0].value, here[0].value - here[1].value
        found |= {n.start: n for n in here}
    for match in re.finditer(DIGITS, text):
        found.setdefault(match.start(), number(match[0], False, start=match.start(), end=match.end()))
    return [found[start] for start in sorted(found)]


def measured(sentence: str) -> list[Number]:
    "The numbers of a sentence that look measured."
    found = []
    for n in numbers(sentence):
        if n.kind == "" and n.step < 1 and found:      # "4.4 times for a quotation, 1.0 for an essay"
            scale = found[-1].scale
            n = replace(n, value=n.value*scale, step=n.step*scale, kind=found[-1].kind, unit=found[-1].unit, scale=scale)
        counts = n.unit == "times" and n.step >= 1 and not re.match(COMPARED, sentence[n.end:])   # "60 times a token"
        if n.kind == "ratio" and (counts or not re.search(MEASURED, sentence)): continue
        if n.kind in ("time", "rate", "ratio"): found.append(n)
    return found


# ---- what a chapter has to show

def printed(cell: Cell, ticks: bool = False) -> str:
    "What stands in a cell's outputs, texts in its figures included; the numbers along an axis only with `ticks`."
    texts = []
    for output in cell.outputs:
        data = output.get("data", {})
        svg = "".join(data.get("image/svg+xml", ""))
        if not ticks: svg = re.sub(r'<g id="[xy]tick_\d+">.*?</text>', "", svg, flags=re.S)
        texts += ["".join(output.get("text", "")), *re.findall(r"<text[^>]*>([^<]*)</text>", svg)]
        if not svg: texts.append("".join(data.get("text/plain", "")))
    return "\n".join(texts)


def table(text: str) -> list[list[Number]]:
    "The numbers of each line; one without a unit may have any unit of time that stands in the text."
    units = tuple({TIME[unit] for unit in re.findall(rf"(?<![\w/])(?:\d+)?({'|'.join(TIME)})(?![\w/])", text)})
    rows = [row for line in text.splitlines() if (row := numbers(line))]
    return [[replace(n, units=units) if n.kind == "" else n for n in row] for row in rows]


def constants(cell: Cell) -> set[float]:
    tokens = tokenize.generate_tokens(io.StringIO(re.sub(r"^[%!].*", "", cell.source, flags=re.M)).readline)
    return {ast.literal_eval(token.string) for token in tokens if token.type == tokenize.NUMBER}


def leaves(data, path=""):
    "(path, number) for all numbers of a measurement."
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items: yield from leaves(value, f"{path}/{key}")
    if isinstance(data, (int, float)): yield path, data


@cache
def results() -> list[tuple[str, dict]]:
    "(name, numbers) of the stored measurements that are no long lists of samples."
    entries = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT/"results").glob("*.json"))]
    found = [(entry["benchmark"], dict(leaves(entry["data"]))) for entry in entries]
    return [(name, data) for name, data in found if len(data) <= LONG]


class Page:
    "The outputs, constants and measurements of a chapter."

    def __init__(self, chapter: Chapter):
        self.name, self.cells = chapter.name, chapter.cells
        self.code = {i: cell for i, cell in enumerate(self.cells) if cell.kind == "code"}
        self.labels = {cell.options.get("label"): i for i, cell in self.code.items()}

    @cached_property
    def outputs(self) -> dict[int, list]:
        return {i: rows for i, cell in self.code.items() if (rows := table(printed(cell)))}

    @cached_property
    def constants(self) -> dict[int, set]:
        return {i: constants(cell) for i, cell in self.code.items()}

    @cached_property
    def live(self) -> dict[int, Cell]:
        return dict(live_cells(self))

    @cached_property
    def records(self) -> list[tuple[str, dict]]:
        code = "\n".join(cell.source for cell in self.code.values())
        names = re.findall(r'\brecord(?:ed)?\(\s*"([^"]+)"', code)
        return [(name, data) for name, data in results() if name in names]


# ---- cells that show what they have just timed, and what no record holds

def is_record(node) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "record"


def names(*nodes) -> set[str]:
    return {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)}


def read(node) -> set[str]:
    "The names that `node` reads, but for what it gives to `record`."
    if is_record(node): return set()
    here = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) else set()
    if isinstance(node, ast.Attribute): here = {node.attr} & CLOCKS
    return here.union(*map(read, ast.iter_child_nodes(node)))


def own(node) -> set[str]:
    "The names that only mean something inside `node`."
    inside = isinstance(node, (ast.FunctionDef, ast.ClassDef))
    found = set()
    for n in ast.walk(node):
        if isinstance(n, (ast.comprehension, ast.For)): found |= names(n.target)
        if isinstance(n, ast.arg): found.add(n.arg)
        if inside and isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store): found.add(n.id)
    return found


def written(node) -> set[str]:
    found = set()
    for n in ast.walk(node):
        if isinstance(n, (ast.Name, ast.Subscript, ast.Attribute)) and isinstance(n.ctx, ast.Store): found |= names(n)
        if isinstance(n, ast.Call) and getattr(n.func, "attr", "") in ("append", "extend", "update"): found |= names(n.func)
    return found


def live_cells(page: Page):
    "(index, cell) of those that print a time that was read from a clock and has not passed through `record`."
    live = set(CLOCKS)
    for i, cell in page.code.items():
        shown = set()
        for node in cell.tree.body:
            used = (read(node) - own(node)) & live
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                live = live | {node.name} if used else live - {node.name}
                continue
            last = node is cell.tree.body[-1] and isinstance(node, ast.Expr)
            if last or "print" in read(node): shown |= used
            if used: live |= written(node)
            elif isinstance(node, (ast.Assign, ast.For)): live -= written(node) | own(node)
            live -= {name for n in ast.walk(node) if is_record(n) for name in names(*n.args)} - CLOCKS
        units = {n.kind for row in page.outputs.get(i, []) for n in row}
        if shown and not cell.images and units & {"time", "rate"}: yield i, cell


# ---- what supports a number

def fits(claim: Number, value: float) -> bool:
    low, high = sorted((claim.value, claim.value + claim.reach))
    half = claim.step/2 * (1 + 1e-9)
    return low - half <= value <= high + half


def readings(claim: Number, n: Number):
    "The values that `n`, which is printed, may have in the eyes of a claim."
    percent = claim.unit in ("%", "per cent")
    if n.kind == claim.kind:
        yield n.value
        if percent: yield abs(n.value - 1)           # 1.08 times, or 92%, are 8% more or less
    elif n.kind == "" and claim.kind == "ratio" and n.step < 1 and not claim.one_digit:
        yield n.value
        if percent: yield abs(n.value - 1)
    elif n.kind == "" and claim.kind == "time":
        for unit in n.units: yield n.value*unit
    elif n.kind == "" and claim.kind == "rate": yield n.value*claim.scale


def pairs(claim: Number, rows: list[list[Number]]):
    """(description, value) of two numbers in a row; or in a column, if they are neighbours or one is the first.

    Where ratios, or per cents, are printed, a ratio is one of these.
    """
    if claim.kind == "ratio" and any(n.scale == claim.scale and n.kind == "ratio" for n in sum(rows, [])): return
    couples = [couple for row in rows for couple in permutations(row[:12], 2)]
    for i in range(max(map(len, rows), default=0)):
        column = [row[i] for row in rows if len(row) > i]
        beside = {(k, other) for k in range(1, len(column)) for other in (0, k - 1)}
        couples += [couple for k, other in beside for couple in permutations((column[k], column[other]))]
    for a, b in couples:
        if a.unit != b.unit or not b.value or a.unit == a.kind == "other": continue
        text = f"{a.text} and {b.text}"
        if claim.kind == a.kind == "time": yield from ((text, a.value - b.value), (text, a.value + b.value))
        if claim.kind == "ratio" and a.kind != "ratio" and min(a.value/a.step, b.value/b.step) >= 10:
            yield text, a.value/b.value
            if claim.scale == .01: yield text, abs(a.value/b.value - 1)


def arithmetic(claim: Number, before: list[Number]):
    "(description, value) of two numbers that stand before the claim in its sentence."
    for a, b in permutations(before, 2):
        text = f"{a.text} and {b.text}"
        if claim.kind == a.kind == "time":
            if b.kind == "time": yield text, a.value - b.value
            else: yield text, a.value*b.value
            if b.kind != "time" and b.value: yield text, a.value/b.value
        if claim.kind == "ratio" and a.kind == b.kind and b.value: yield text, a.value/b.value


def exact(n: Number, value: float) -> float:
    "A constant of the code is given, and not measured: it supports nothing but itself."
    return value if abs(value - n.value) < 1e-9*n.value else math.inf


def in_seconds(path: str, value: float) -> float:
    "Times are recorded in seconds, unless the name says otherwise."
    return value*(1e-3 if re.search(r"ms\b|milli", path) else 1e-6 if re.search(r"us\b|µs|micro", path) else 1)


def from_output(n: Number, where, rows: list):
    for found in sum(rows, []):
        for value in readings(n, found): yield where, found.text, value


def from_code(n: Number, at: int, page: "Page"):
    for i, found in page.constants.items():
        around = abs(i - at) <= AROUND
        for value in found:
            counts = value in range(13) and n.kind != "rate" and not (around and n.kind == "time") and i != at
            if not counts: yield "code", f"{value}", exact(n, value)
            if around and n.kind == "time": yield "code", f"{value}", exact(n, value*n.scale)


def from_records(n: Number, page: "Page"):
    for name, data in page.records:
        for path, value in data.items():
            yield "record", f"{name}{path}", in_seconds(path, value) if n.kind == "time" else value


def evidence(claim: "Claim"):
    "(where, description, value) of all that might support a claim, what is nearest first; where: a cell's index, or a word."
    n, page, at = claim.number, claim.page, claim.at
    near = sorted(page.outputs, key=lambda i: abs(i - at))
    above = [i for i in near if i <= at][:2]
    if at in page.code: yield from from_output(n, at, table(printed(page.cells[at], ticks=True)))
    for i in dict.fromkeys(claim.figures + (near[:CLOSE] if n.one_digit else near)): yield from from_output(n, i, page.outputs[i])
    for i in dict.fromkeys(claim.figures + above):
        for text, value in pairs(n, page.outputs[i]): yield i, text, value
    for text, value in arithmetic(n, claim.before): yield "sentence", text, value
    for said in claim.said:
        if said.kind == n.kind and said.value == n.value: yield "said before", said.text, said.value
    yield from from_code(n, at, page)
    for other in claim.linked:
        for rows in other.outputs.values(): yield from from_output(n, other.name, rows)
    if n.kind == "ratio" or n.one_digit: return
    for source in (page, *claim.linked): yield from from_records(n, source)


# ---- what a chapter says

@dataclass
class Claim:
    page: Page
    at: int                  # the cell's index
    sentence: str
    number: Number
    before: list[Number]     # in the same sentence
    figures: list[int]       # cells of the figures that the paragraph refers to
    linked: list[Page]       # chapters to which the sentence links
    said: list[Number]       # before, in predictions and of other chapters
    assumed: bool            # a prediction, or a supposition, which needs no support

    @cached_property
    def evidence(self) -> list: return list(evidence(self))

    @cached_property
    def support(self) -> list: return [e for e in self.evidence if fits(self.number, e[2])]

    @property
    def only_live(self) -> bool:
        "Whether it was read off what is measured anew in every run and recorded in none."
        return bool(self.support) and all(where in self.page.live for where, _, _ in self.support)

    def __str__(self):
        cell, sentence = self.page.cells[self.at], " ".join(self.sentence.split())
        known = [e for e in self.evidence if math.isfinite(e[2])]
        nearest = min(known, key=lambda e: abs(e[2] - self.number.value), default=None)
        source = nearest and (self.page.cells[nearest[0]].id if isinstance(nearest[0], int) else nearest[0])
        near = f"{nearest[2]/self.number.scale:.4g} ({nearest[1]}, {source})" if nearest else "nothing"
        return f"{self.page.name}, cell {self.at} ({cell.id}): {self.number.text!r}, the nearest is {near}: {sentence}"


def said_in(cell: Cell) -> str:
    if cell.kind == "markdown": return cell.linked_prose
    return "\n\n".join(cell.options.get(key, "") for key in ("fig-cap", "fig-alt", "tbl-cap"))


def paragraphs(page: Page):
    "(cell index, text) of all paragraphs but the exercises and what is said of vLLM."
    exercises = False
    for at, cell in enumerate(page.cells):
        if found := re.findall("^## (.+)", cell.source, re.M): exercises = found[-1] == "Exercises"
        for text in re.split(r"\n\s*\n", said_in(cell)):
            if not exercises and not text.lstrip().startswith("**What vLLM does"): yield at, text


def claims_of(page: Page, pages: dict[str, Page]):
    said = []
    for at, text in paragraphs(page):
        figures = [page.labels.get(label.rstrip(".:")) for label in re.findall(r"@([\w-]+)", text)]
        figures = [i for i in figures if i in page.outputs]
        by_hand = "by hand" in text.lower()
        for sentence in filter(None, re.split(SENTENCE, text)):
            names = re.findall(r"\]\((\d\d_\w+)\.ipynb", sentence)
            linked = [pages[name] for name in names if name in pages and name != page.name]
            supposed = by_hand or bool(re.search(ASSUMED, sentence, re.I)) and not re.search(FOUND, sentence, re.I)
            predicted = bool(re.search(PREDICTION, text)) and not linked
            found = measured(sentence)
            for n in found:
                before = [other for other in numbers(sentence) if other.start < n.start]
                yield Claim(page, at, sentence, n, before, figures, linked, said, predicted or supposed)
            if predicted or supposed or linked: said = said + found


def claims(of: list[Chapter]) -> list[Claim]:
    "Every number of the chapters that was looked at."
    pages = {chapter.name: Page(chapter) for chapter in of}
    return [claim for page in pages.values() for claim in claims_of(page, pages)]


if __name__ == "__main__":
    if "--live" in sys.argv:
        for page in map(Page, chapters()):
            for i, cell in page.live.items(): print(f"{page.name}, cell {i} ({cell.id}): {printed(cell).strip().splitlines()[0]}")
        sys.exit()
    found = claims(chapters())
    for claim in found:
        live = " live" * claim.only_live
        where, text, _ = claim.support[0] if claim.support else ("", "assumed" if claim.assumed else "NOTHING", 0)
        if "--all" in sys.argv: print(f"{claim.page.name}, cell {claim.at}: {claim.number.text!r}: {text} {where}{live}")
        elif text == "NOTHING": print(claim)
    wrong = sum(not claim.support and not claim.assumed for claim in found)
    print(f"{len(found)} numbers looked at, {sum(c.assumed for c in found)} of them assumed; {wrong} without support")
