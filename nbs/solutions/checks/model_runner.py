"Checks of the exercises of the chapter on the model runner."
import random

import numpy as np

from . import attempt, exercise, expect, require, show


@exercise
def check_bytes_sent(bytes_sent):
    for n, context, size in ((64, 4096, 16), (1, 1, 16), (256, 4097, 16), (3, 10, 4)):
        rows, blocks = 3*8*n, -(-context // size)
        expect(bytes_sent, (n, context, size), (rows, rows + 8*n*blocks),
               f"{n} token ids, positions and slots, and in the second case {n} tables of {blocks} blocks")


@exercise
def check_flat(flat):
    tables = np.array([[5, 3, 0, 0], [8, 0, 0, 0], [1, 2, 7, 4]])
    for says, rows, starts, lens in (
            ("one token of each", [0, 1, 2], [5, 2, 9], [1, 1, 1]), ("a whole prompt", [0], [0], [8]),
            ("a chunk between two decodes", [0, 1, 2], [7, 0, 3], [1, 3, 10]), ("rows 2 and 0", [2, 0], [4, 6], [5, 2]),
            ("chunks that end with their blocks", [2, 1], [4, 0], [4, 4])):
        case = f"flat(tables, rows={rows}, starts={starts}, lens={lens}, block_size=4), {says},"
        before = tables.copy()
        got = attempt(case, flat, tables, np.array(rows), np.array(starts), np.array(lens), 4)
        require((before == tables).all(), f"{case} changes the tables")
        require(isinstance(got, (tuple, list)) and len(got) == 2, f"{case} gives {show(got)}, not positions and slots")
        pairs = [(row, p) for row, start, n in zip(rows, starts, lens) for p in range(start, start + n)]
        for name, numbers, wanted in zip(("positions", "slots"), got, (
                [p for _, p in pairs], [int(tables[row, p // 4]) * 4 + p % 4 for row, p in pairs])):
            numbers = np.asarray(numbers).tolist()
            require(numbers == wanted, f"{case} gives the {name} {show(numbers)}, expected {show(wanted)}")


class Counting(np.ndarray):
    "An array that counts the cells that are written through it or its views."
    written = None

    def __array_finalize__(self, base): self.written = getattr(base, "written", None)

    def __setitem__(self, index, values):
        if self.written is not None: self.written.append(int(np.size(np.ndarray.__getitem__(self, index))))
        super().__setitem__(index, values)


def counting(num_rows, width):
    table = np.zeros((num_rows, width), np.int64).view(Counting)
    table.written = []
    return table


@exercise
def check_rows(Rows):
    table = counting(4, 6)
    rows, story, wanted = attempt("Rows(table)", Rows, table), [], {}

    def do(text, at_most, method, *args):
        "Call a method; it may write `at_most` cells."
        story.append(text)
        table.written.clear()
        attempt(f"after {'; '.join(story[-4:-1]) or 'nothing'}: {text}", getattr(rows, method), *args)
        case, written = f"after {'; '.join(story[-4:])}", sum(table.written)
        row_of = {name: attempt(f"{case}: row_of({name!r})", rows.row_of, name) for name in wanted}
        require(attempt(f"{case} the rows are {row_of}; sorting them", sorted, row_of.values()) == list(range(len(wanted))),
                f"{case} the rows are {row_of}", f"the {len(wanted)} texts have the rows 0 to {len(wanted) - 1}, without a gap")
        for name, blocks in wanted.items():
            got = np.asarray(table)[row_of[name], :len(blocks)].tolist()
            require(got == blocks, f"{case} the row of {name} begins with {got}, expected {blocks}")
        require(written <= at_most, f"{case}, where {text} has written {written} cells", f"{at_most} are enough")

    def add(name): wanted[name] = []; do(f"add({name!r})", 0, "add", name)
    def grow(name, *new):
        wanted[name] = [*wanted[name], *new]
        do(f"update({name!r}, {wanted[name]})", len(new), "update", name, list(wanted[name]))
    def remove(name):
        del wanted[name]
        do(f"remove({name!r})", max(map(len, wanted.values()), default=0), "remove", name)

    for name, blocks in dict(A=[5, 3], B=[8], C=[1, 2, 7]).items():
        add(name)
        grow(name, *blocks)
    grow("A", 4)
    grow("B")
    remove("A"); grow("C", 9); add("D"); grow("D", 6); remove("C"); grow("D", 11); remove("D"); add("A"); grow("A", 1)
    remove("A"); remove("B")
    rng = random.Random(0)
    for number in range(200):
        name = rng.choice("ABCDEFG")
        if name not in wanted and len(wanted) < 4: add(name)
        elif name in wanted and len(wanted[name]) < 6 and rng.random() < .7: grow(name, number)
        elif name in wanted: remove(name)
    return "and nothing is written twice"
