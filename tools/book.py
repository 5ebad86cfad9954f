"""What the tools and tests know about the book: its chapters in order, their cells, their exported code."""
import ast
import io
import json
import re
import tokenize
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
EXPORT = "export|exporti|exports"
NBDEV = rf"{EXPORT}|hide|notest|cuda|slow|default_exp \w+"
# "chapter 14", "chapters 06, 19 and 31"
NUMBERED = re.compile(r"\b[Cc]hapters? \d+(?:(?:, | and | to )\d+)*\b")
EXERCISE = re.compile(r"\*\*(\d+\. .+?)\*\*")           # opens the text of an exercise


@dataclass
class Cell:
    kind: str      # "code", "markdown" or "raw"
    source: str
    outputs: list
    id: str = ""

    @cached_property
    def directives(self) -> list[str]:
        "The lines that start with `#|`, without it."
        return [line[2:].strip() for line in self.source.splitlines() if line.startswith("#|")]

    @cached_property
    def options(self) -> dict[str, str]:
        "Quarto's options, such as `label`: those directives that hold a colon."
        pairs = [d.split(":", 1) for d in self.directives if ":" in d]
        return {key.strip(): value.strip().strip("\"'") for key, value in pairs}

    @property
    def exported(self) -> bool:
        return any(re.match(rf"({EXPORT})\b", d) for d in self.directives)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(plain(self.source))

    @property
    def images(self) -> int:
        "How many of the stored outputs are pictures."
        return sum(any(kind.startswith("image/") for kind in o.get("data", {})) for o in self.outputs)

    @cached_property
    def linked_prose(self) -> str:
        "A markdown cell's text without code and formulas."
        text = re.sub(r"^( *)(```|~~~).*?^ *\2 *$", "", self.source, flags=re.M | re.S)
        return re.sub(r"(`+).*?\1|\$\$.*?\$\$|\$[^$\n]+\$", " x ", text, flags=re.S)

    @cached_property
    def prose(self) -> str:
        "A markdown cell's text without code, formulas and link targets."
        return re.sub(r"\]\([^)]*\)", "]", self.linked_prose)


@dataclass
class Chapter:
    path: Path

    @cached_property
    def cells(self) -> list[Cell]:
        cells = json.loads(self.path.read_text(encoding="utf-8"))["cells"]
        return [Cell(c["cell_type"], "".join(c["source"]), c.get("outputs", []), c.get("id", "")) for c in cells]

    @property
    def code(self) -> list[Cell]: return [c for c in self.cells if c.kind == "code"]

    @property
    def markdown(self) -> list[Cell]: return [c for c in self.cells if c.kind == "markdown"]

    @property
    def name(self) -> str: return self.path.stem

    @property
    def number(self) -> int: return int(self.name[:2])

    @cached_property
    def head(self) -> re.Match:
        "Title and one-line promise, which open every chapter."
        found = re.match(r"# (.+)\n\n> (.+)\n?$", self.cells[0].source)
        if not found:
            raise ValueError(f"{self.name} does not open with '# Title' and '> promise'")
        return found

    @property
    def title(self) -> str: return self.head[1]

    @property
    def promise(self) -> str: return self.head[2]

    @cached_property
    def module(self) -> str | None:
        "The module that it exports (`default_exp`); None, if it only tells."
        found = [d.split()[1] for c in self.code for d in c.directives if d.startswith("default_exp ")]
        if len(found) > 1 or (not found and any(c.exported for c in self.code)):
            raise ValueError(f"{self.name} has {len(found)} cells with default_exp, not one")
        return found[0] if found else None

    @property
    def exercises(self) -> list[str]:
        "Number and title of each exercise whose solution stands in a notebook of its own."
        opened = [EXERCISE.match(c.source) for c in self.markdown]
        return [match[1] for match in opened if match]

    @property
    def solutions(self) -> Path:
        "The notebook of solutions, which not every chapter has yet."
        return self.path.parent/"solutions"/self.path.name

    @property
    def module_path(self) -> Path | None:
        return ROOT/"nano_vllm"/f"{self.module}.py" if self.module else None


def quarto() -> dict:
    return yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))


def listed(key: str = "chapters") -> list[str]:
    "The files under `chapters` of _quarto.yml, or under `appendices`, in its order."
    files = []
    for entry in quarto()["book"].get(key, []):
        files += entry["chapters"] if isinstance(entry, dict) else [entry]
    return files


def chapters() -> list[Chapter]:
    "The notebooks in reading order: the appendices (00), which any chapter may use, then the chapters."
    paths = [ROOT/name for name in listed("appendices") + listed() if name.endswith(".ipynb")]
    return [Chapter(path) for path in paths if path.exists()]


def plain(source: str) -> str:
    "A cell's source without IPython's own lines (`%magic`, `!command`), so that Python can parse it."
    return "\n".join("pass" if re.match(r"[%!]", line) else line for line in source.split("\n"))


def code_lines(source: str) -> tuple[int, int]:
    """Lines of code in `source`: (all but kernels, Triton kernels).

    Blank lines, comments, docstrings and the generated `__all__` do not count; a string over three lines does, thrice.
    """
    skipped, kernels = [], []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            skipped.append(span(node))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__": skipped.append(span(node))
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            kernels.append((min(d.lineno for d in node.decorator_list), node.end_lineno))
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        inside = any(start <= token.start < end for start, end in skipped)
        if token.type not in blank and not inside: lines |= set(range(token.start[0], token.end[0] + 1))
    in_kernel = {n for n in lines if any(first <= n <= last for first, last in kernels)}
    return len(lines - in_kernel), len(in_kernel)


def span(node) -> tuple:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
