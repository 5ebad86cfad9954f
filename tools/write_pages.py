"""Write what the site derives from the package and the chapters: api.qmd, the public interface, and llms.txt, a table of contents for programs."""
import ast
from dataclasses import dataclass
from textwrap import indent

from book import ROOT, chapters
from quarto_filter import settings

PUBLIC = [("llm", "LLM"), ("engine_args", "EngineArgs"), ("sampling_params", "SamplingParams"), ("llm", "TextPrompt"), ("llm", "TokensPrompt"),
          ("request", "RequestOutput"), ("request", "CompletionOutput"), ("request", "RequestMetrics"), ("sampling_params", "Logprob"),
          ("lora", "LoRARequest"), ("llm", "LLMEngine"), ("async_llm", "AsyncLLM"), ("pooling", "PoolingParams"),
          ("pooling", "PoolingRequestOutput"), ("pooling", "EmbeddingOutput"), ("pooling", "ScoringOutput")]
LATER = {"LLM": ["pooling"]}     # modules that give a class of another one more methods
HEAD = """# The interface {.unnumbered}

What a program that uses the package needs; everything else is explained in the chapters, and may change. Names, defaults and meanings are vLLM's
where we have the same. This page is written from the code's own docstrings and comments.

```python
from nano_vllm import LLM, SamplingParams
```
"""

# The columns are as wide as these dashes say. A `|` in code ends no cell, and the backslash that GitHub wants before it would be shown.
WIDTHS = f"|{'-'*25}|{'-'*22}|{'-'*13}|{'-'*40}|"


@dataclass
class Module:
    "A module's source, and what is defined in it."
    name: str

    def __post_init__(self):
        self.source = (ROOT/"nano_vllm"/f"{self.name}.py").read_text(encoding="utf-8")
        self.lines, self.body = self.source.splitlines(), ast.parse(self.source).body

    def find(self, name: str) -> ast.ClassDef:
        return next(node for node in self.body if isinstance(node, ast.ClassDef) and node.name == name)

    def methods(self, name: str) -> list[ast.FunctionDef]:
        "The public methods of a class, also those that are patched onto it, in the order of the source."
        inside = [node for node in self.find(name).body if isinstance(node, ast.FunctionDef)]
        bodies = [self.body, *(Module(other).body for other in LATER.get(name, ()))]
        patched = [node for body in bodies for node in body if isinstance(node, ast.FunctionDef) and node.args.args
                   and any("patch" in ast.unparse(d) for d in node.decorator_list)
                   and ast.unparse(node.args.args[0].annotation or ast.Constant(None)) == name]
        return [m for m in inside + patched if not m.name.startswith("_") and ast.get_docstring(m)]

    def fields(self, name: str) -> list[tuple[str, str, str, str]]:
        "(field, type, default, comment) of a dataclass."
        found = []
        for node in self.find(name).body:
            if not isinstance(node, ast.AnnAssign): continue
            default = ast.unparse(node.value) if node.value else ""
            comment = self.lines[node.end_lineno - 1][node.end_col_offset:].strip().lstrip("# ")
            found.append((node.target.id, ast.unparse(node.annotation), default, comment))
        return found


def signature(function: ast.FunctionDef) -> str:
    "Name and arguments as one calls it, without `self`."
    args = ast.unparse(function.args).split(", ", 1)
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    is_property = any(ast.unparse(d) == "property" for d in function.decorator_list)
    return function.name + ("" if is_property else f"({args[1] if len(args) > 1 else ''})") + returns


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def entry(module: Module, name: str, chapter) -> str:
    "What the page says of one class."
    doc = ast.get_docstring(module.find(name)) or ""
    parts = [f"## `{name}`", doc, f"Explained in [{chapter.title}](nbs/{chapter.path.name})."]
    for method in module.methods(name):
        said = indent(ast.get_docstring(method), "    ").lstrip()          # all of its paragraphs belong to the method
        parts.append(f"`{signature(method)}`\n\n:   {said}")
    rows = [f"| `{n}` | {code(kind)} | {code(default)} | {text} |" for n, kind, default, text in module.fields(name)]
    if rows: parts.append("\n".join(["| field | type | default | meaning |", WIDTHS, *rows]))
    return "\n\n".join(parts)


def api() -> str:
    of = {c.module: c for c in chapters() if c.module}
    return HEAD + "\n" + "\n\n".join(entry(Module(module), name, of[module]) for module, name in PUBLIC) + "\n"


def llms() -> str:
    "The chapters with what they are about, in the form of https://llmstxt.org."
    s = settings()
    site = s["doc_host"] + s["doc_baseurl"]
    lines = [f"# {s['title']}", "", f"> {s['description']}: a textbook whose chapters are notebooks and whose exported code is an engine with vLLM's interface.",
             "", f"Source: {s['git_url']}. Each chapter is nbs/NAME.ipynb there and nbs/NAME.html here.", "", "## Chapters", ""]
    lines += [f"- [{c.title}]({site}/nbs/{c.name}.html): {c.promise}" for c in chapters()]
    lines += ["", "## Reference", "", f"- [The interface]({site}/api.html): classes, methods and fields of the package",
              f"- [Glossary]({site}/glossary.html): the words of the book"]
    return "\n".join(lines) + "\n"


PAGES = {"api.qmd": api, "llms.txt": llms}

if __name__ == "__main__":
    for name, write in PAGES.items(): (ROOT/name).write_text(write(), encoding="utf-8")
