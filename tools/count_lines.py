"""Count the exported lines of each chapter, print the table of chapters, and write it into README.md."""
import re

from book import ROOT, chapters, code_lines

BEGIN, END = "<!-- chapters: written by `make lines` -->\n", "<!-- end of chapters -->\n"


def counts() -> list[tuple]:
    "(chapter, lines, lines of Triton kernels) in reading order."
    return [(c, *module_lines(c)) for c in chapters()]


def module_lines(chapter) -> tuple[int, int]:
    "(lines, lines of Triton kernels) of the module that the chapter exports, if it exports one."
    if not chapter.module: return 0, 0
    return code_lines(chapter.module_path.read_text(encoding="utf-8"))


def total(rows: list[tuple]) -> str:
    "All lines, as the table and the tests print them."
    return f"{sum(row[1] for row in rows):,} + {sum(row[2] for row in rows)} of kernels"


def table(rows: list[tuple]) -> str:
    "The chapters as a markdown table: title with link, promise, exported lines."
    out = ["| chapter | what it is about | lines |", "|---|---|---:|"]
    for c, lines, kernels in rows:
        shown = f"{lines} + {kernels} of kernels" if kernels else lines
        out.append(f"| [{c.name}](nbs/{c.path.name}) | **{c.title}.** {c.promise} | {shown} |")
    out.append(f"| **all** | the whole package | **{total(rows)}** |")
    return "\n".join(out) + "\n"


def in_readme(readme: str) -> str:
    "The table that `readme` holds now."
    return re.search(re.escape(BEGIN) + "(.*?)" + re.escape(END), readme, re.S)[1]


if __name__ == "__main__":
    path = ROOT/"README.md"
    readme, new = path.read_text(encoding="utf-8"), table(counts())
    path.write_text(readme.replace(BEGIN + in_readme(readme), BEGIN + new), encoding="utf-8")
    print(new, end="")
