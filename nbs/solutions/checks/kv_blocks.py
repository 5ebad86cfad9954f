"Checks of the exercises of the chapter on KV blocks."
from collections import Counter

from nano_vllm.kv_blocks import BlockPool, blocks_needed

from . import WrongAnswer, attempt, exercise, expect, require, same, show


@exercise
def check_opens_block(opens_block):
    for block_size in (4, 16, 3, 2, 1):
        for n in range(1, 40):
            wanted = blocks_needed(n, block_size) > blocks_needed(n - 1, block_size)
            expect(opens_block, (n, block_size), wanted,
                   f"{n - 1} tokens need {blocks_needed(n - 1, block_size)} blocks of {block_size}, "
                   f"{n} need {blocks_needed(n, block_size)}")


@exercise
def check_chunk_slots(chunk_slots):
    for table, start, end, size in (([2, 0, 7], 0, 9, 4), ([3, 7], 20, 21, 16), ([5, 1, 0], 3, 10, 4),
                                    ([6, 2], 2, 4, 2), ([4], 0, 3, 8), ([1, 3], 3, 3, 4)):
        wanted = [table[p // size] * size + p % size for p in range(start, end)]
        why = "no position, no slot"
        if wanted:
            p = end - 1
            why = (f"position {p} is in block table[{p} // {size}] = {table[p // size]}, "
                   f"at offset {p} % {size} = {p % size}, so in slot {wanted[-1]}")
        expect(chunk_slots, (table, start, end, size), wanted, why)


@exercise
def check_answers_that_fit(answers_that_fit):
    for blocks, size, prompt, answer in ((1000, 16, 96, 4), (1000, 16, 100, 100), (1000, 16, 0, 2048),
                                         (10, 4, 7, 2), (10, 4, 8, 4), (10, 4, 9, 3), (7, 4, 7, 1), (2, 4, 8, 1),
                                         (1, 4, 8, 1)):
        shared = prompt // size
        own = blocks_needed(prompt + answer, size) - shared
        expect(answers_that_fit, (blocks, size, prompt, answer), max(0, blocks - shared) // own,
               f"{shared} full blocks of the prompt are shared, and each answer needs {own} of its own")


@exercise
def check_strict_pool(StrictPool):
    pool = attempt("StrictPool(4, 2)", StrictPool, 4, 2)
    first, second = (attempt("allocate() of a new pool", pool.allocate) for _ in range(2))
    pool.touch(first)
    attempt("free of a block with two references", pool.free, first)
    require(pool.ref_counts[first] == 1 and first not in pool.free_blocks,
            f"after one `free` of two references, the references are {pool.ref_counts[first]} and the free blocks "
            f"{list(pool.free_blocks)}", "block 0 still has an owner")
    attempt("free with keep=True", lambda: pool.free(first, keep=True))
    require(list(pool.free_blocks) == [2, 3, 0],
            f"after free(0, keep=True) the free blocks are {list(pool.free_blocks)}, expected [2, 3, 0]",
            "what is worth keeping goes to the end")
    attempt("free of the last reference", pool.free, second)
    require(list(pool.free_blocks) == [1, 2, 3, 0],
            f"after free(1) the free blocks are {list(pool.free_blocks)}, expected [1, 2, 3, 0]")
    before = list(pool.ref_counts), list(pool.free_blocks)
    for block in (second, 3):
        try:
            pool.free(block)
        except ValueError as error:
            require(str(block) in str(error), f"the message {str(error)!r} does not say which block: {block}")
        except Exception as error:
            raise WrongAnswer(f"free({block}) of a free block raises {type(error).__name__}, not a ValueError") from error
        else:
            raise WrongAnswer(f"free({block}) of a block that nobody holds raises nothing")
        after = list(pool.ref_counts), list(pool.free_blocks)
        require(after == before, f"a refused free({block}) changes references and free blocks from {before} to {after}",
                "refuse before anything is changed")


@exercise
def check_make_writable(make_writable):
    def shared_pool(*tables):
        pool = BlockPool(6, 4)
        for _ in range(len({b for table in tables for b in table})): pool.allocate()
        for block, n in Counter(b for table in tables for b in table).items():
            for _ in range(n - 1): pool.touch(block)
        return pool

    def run(case, *tables):
        "The pool after the first of `tables` was made writable, what came of the tables, and what was returned."
        pool, tables = shared_pool(*tables), [list(table) for table in tables]
        got = attempt(case, make_writable, pool, tables[0])
        held = Counter(b for table in tables for b in table)
        for block in range(pool.num_blocks):
            require(pool.ref_counts[block] == held[block],
                    f"{case}: afterwards block {block} has {pool.ref_counts[block]} references, and {held[block]} "
                    f"tables name it; the tables are {tables}")
            require((block in pool.free_blocks) == (held[block] == 0),
                    f"{case}: afterwards {held[block]} tables name block {block}, and the free blocks are "
                    f"{list(pool.free_blocks)}", "a block is free when nobody holds it, and only then")
        return tables, got

    tables, got = run("a table [0, 1] that nobody shares", [0, 1])
    require(got is None and tables == [[0, 1]],
            f"a table [0, 1] that nobody shares becomes {tables[0]} and gives {got}, expected [0, 1] and None",
            "its last block has one reference, so it may be written")
    tables, got = run("a table [0, 1] whose two blocks another text has, too", [0, 1], [0, 1])
    require(tables[1] == [0, 1], f"the other text's table [0, 1] has become {tables[1]}")
    require(tables[0] == [0, 2], f"the table [0, 1], shared with another text, becomes {tables[0]}, expected [0, 2]",
            "only the last block is going to be written; block 2 is the next free one")
    require(same(got, (1, 2)), f"for the table [0, 1] the copy to make is given as {show(got)}, expected (1, 2)",
            "from the old block to the new one")
    tables, got = run("a table [0, 1] that two other texts have, too", [0, 1], [0, 1], [0, 1])
    require(tables == [[0, 2], [0, 1], [0, 1]] and same(got, (1, 2)),
            f"the tables [0, 1] of three texts become {tables} and the copy is given as {show(got)}, expected [0, 2] for "
            "the first and (1, 2)", "two others still have block 1")
    tables, got = run("a table [0, 1], of which another text has block 0", [0, 1], [0, 2])
    require(got is None and tables[0] == [0, 1],
            f"a table [0, 1] of which only block 0 is shared becomes {tables[0]} and gives {got}, expected [0, 1] and None",
            "nobody writes to block 0 any more")
