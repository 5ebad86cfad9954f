"""Count the exported lines of each chapter, print the table of chapters, and write it into README.md."""
import re

from book import ROOT, chapters, code_lines

BEGIN, END = "<!-- chapters: written by `make lines` -->\n", "<!-- end of chapters -->\n"
CORE = range(1, 11)  # the chapters under the size rule, but for
KERNELS = "05_triton_kernels"  # the kernels and what launches them: other small engines import theirs from a library


def counts() -> list[tuple]:
    "(chapter, lines, lines of Triton kernels) in reading order."
    return [(c, *code_lines(c.module_path.read_text(encoding="utf-8"))) for c in chapters()]


def core_total(rows: list[tuple]) -> int:
    "The lines of chapters 01 to 10, without the chapter of Triton kernels."
    return sum(lines for c, lines, _ in rows if c.number in CORE and c.name != KERNELS)


def table(rows: list[tuple]) -> str:
    "The chapters as a markdown table: title with link, promise, exported lines."
    out = ["| chapter | what it is about | lines |", "|---|---|---:|"]
    for c, lines, kernels in rows:
        shown = f"{lines} + {kernels} of kernels" if kernels else lines
        out.append(f"| [{c.name}](nbs/{c.path.name}) | **{c.title}.** {c.promise} | {shown} |")
    out.append(f"| **01 to 10** | the engine, without its Triton kernels | **{core_total(rows):,}** |")
    return "\n".join(out) + "\n"


def in_readme(readme: str) -> str:
    "The table that `readme` holds now."
    return re.search(re.escape(BEGIN) + "(.*?)" + re.escape(END), readme, re.S)[1]


if __name__ == "__main__":
    path = ROOT/"README.md"
    readme, new = path.read_text(encoding="utf-8"), table(counts())
    path.write_text(readme.replace(BEGIN + in_readme(readme), BEGIN + new), encoding="utf-8")
    print(new, end="")
