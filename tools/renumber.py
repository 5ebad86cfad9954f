"""Give chapters new numbers: renames the notebooks and rewrites every mention of them.

    python tools/renumber.py 13_scheduler 14_scheduler 14_engine 13_engine

takes pairs OLD NEW, without `.ipynb`, and does all of them at once, so that chapters may
change places. File names are rewritten, and phrases such as "chapter 13". Two things stay
to do: put the files into their order in `_quarto.yml`, then `nbdev_export` and `make lines`.
"""
import re
import sys
from pathlib import Path

from book import NUMBERED, ROOT

TEXTS = ("*.md", "*.qmd", "*.yml", "Makefile", ".github/**/*.yml", "nbs/**/*.ipynb",
         "nbs/labs/*.html", "nbs/course/*.md", "tests/**/*.py", "tools/*.py", "results/*.json")


def check(root: Path, names: dict[str, str]):
    "Raise a ValueError unless the chapters `names` (old to new) can be renamed so."
    taken = {path.stem for path in (root/"nbs").glob("*.ipynb")}
    for old, new in names.items():
        if old not in taken:
            raise ValueError(f"there is no chapter nbs/{old}.ipynb")
        if not re.fullmatch(r"\d\d_\w+", new):
            raise ValueError(f"{new!r} is no chapter's name, such as 13_scheduler")
        if new in taken - set(names):
            raise ValueError(f"nbs/{new}.ipynb exists; rename it as well")
    if len(set(names.values())) < len(names):
        raise ValueError("two chapters would have one name")


def rename(root: Path, names: dict[str, str]):
    "Rename the notebooks, in two steps: a new name may be the old one of another."
    for old, new in names.items():
        for path in (root/"nbs").rglob(f"{old}.ipynb"):
            path.rename(path.with_name(f"{new}.renamed"))
    for path in (root/"nbs").rglob("*.renamed"):
        path.rename(path.with_suffix(".ipynb"))


def rewrite(text: str, names: dict[str, str]) -> str:
    "`text` with the chapters' new names and numbers."
    numbers = {int(old[:2]): int(new[:2]) for old, new in names.items()}

    def new_number(digits):
        number = numbers.get(int(digits[0]), digits[0])
        return str(number).zfill(len(digits[0]))         # as many digits as before

    any_name = "|".join(map(re.escape, names))
    text = re.sub(rf"\b({any_name})\b", lambda name: names[name[0]], text)
    return NUMBERED.sub(lambda phrase: re.sub(r"\d+", new_number, phrase[0]), text)


def renumber(root: Path, names: dict[str, str]) -> list[Path]:
    """Rename the chapters `names` (old to new) and every mention of them under `root`.

    Gives the files whose text changed. Raises a ValueError, and changes nothing, where a
    chapter is missing or would be lost.
    """
    check(root, names)
    rename(root, names)
    changed = []
    for path in sorted({path for pattern in TEXTS for path in root.glob(pattern)}):
        before = path.read_text(encoding="utf-8")
        after = rewrite(before, names)
        if after != before:
            path.write_text(after, encoding="utf-8")
            changed.append(path)
    return changed


if __name__ == "__main__":
    args = sys.argv[1:]
    if not args or len(args) % 2: sys.exit(__doc__)
    try:
        changed = renumber(ROOT, dict(zip(args[::2], args[1::2])))
    except ValueError as error:
        sys.exit(f"renumber: {error}")
    for path in changed: print(f"{path.relative_to(ROOT)}: rewritten")
