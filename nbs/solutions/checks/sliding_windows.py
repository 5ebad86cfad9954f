"Checks of the exercises of the chapter on sliding windows."
from itertools import product

from . import exercise, expect


@exercise
def check_share(share):
    for full, local, window, length in ((3, 15, 512, 8192), (3, 15, 512, 100), (1, 1, 4, 8), (4, 22, 512, 512), (2, 0, 8, 50)):
        held = full * length + local * min(window, length)
        expect(share, (full, local, window, length), held / ((full + local) * length),
               "a layer with a window holds the window, or the whole text if that is shorter")


def seen(start, end, window, size):
    first = max(0, start + 1 - window) // size
    return first, (end - 1) // size - first + 1


@exercise
def check_blocks_in_sight(blocks_in_sight):
    for start, end, window, size in ((7, 8, 6, 2), (8, 9, 6, 2), (0, 10, 6, 2), (8191, 8192, 512, 16), (1024, 2048, 512, 16), (5, 6, 1, 4), (3, 9, 20, 4)):
        expect(blocks_in_sight, (start, end, window, size), seen(start, end, window, size),
               f"the token at {start} sees {window} tokens, itself included: from {max(0, start + 1 - window)} on")


def longest(full, local, window, size):
    "By trying all lengths."
    for n in range(len(full), -1, -1):
        first = max(0, n * size + 1 - window) // size
        if all(full[:n]) and all(local[first:n]): return n


@exercise
def check_longest_hit(longest_hit):
    yes, no = True, False
    cases = [([yes] * 4, [yes] * 4), ([yes] * 4, [no] * 2 + [yes] * 2), ([yes, no, yes, yes], [yes] * 4), ([yes] * 4, [yes, yes, no, yes]), ([], [])]
    for (full, local), window, size in product(cases, (1, 2, 5, 6, 100), (2, 4)):
        expect(longest_hit, (list(full), list(local), window, size), longest(full, local, window, size),
               f"the next token, at position n*{size}, sees {window} tokens, itself included")
