"Checks of the exercises of the chapter on disaggregated prefill."
import random

from . import attempt, call, exercise, expect, require, show


@exercise
def check_seconds_to_send(seconds_to_send):
    for num_tokens, size, layers, heads, head_dim, itemsize, bandwidth in (
            (512, 16, 30, 3, 64, 4, 1e9), (100, 16, 30, 3, 64, 4, 1e9), (15, 16, 2, 1, 8, 2, 10.0), (16, 16, 2, 1, 8, 2, 10.0), (1000, 32, 32, 8, 128, 2, 1.25e9)):
        args = (num_tokens, size, layers, heads, head_dim, itemsize, bandwidth)
        full = num_tokens // size * size
        wanted = full * 2 * layers * heads * head_dim * itemsize / bandwidth
        got = call(seconds_to_send, *args)
        require(isinstance(got, (int, float)) and abs(got - wanted) <= 1e-9 * max(wanted, 1), f"seconds_to_send{args} gives {show(got)}, expected {wanted:.6g}",
                f"{full} of the {num_tokens} tokens are in full blocks, and each token has a key and a value in each layer")


@exercise
def check_first_step(first_step):
    cases = [(100, 16, 0, 6, 100), (100, 16, 0, 0, 100), (96, 16, 0, 6, 100), (96, 16, 9, 0, 0), (100, 16, 2, 6, 1), (100, 16, 2, 6, 0), (100, 16, 4, 2, 50), (15, 16, 0, 0, 9),
             (100, 16, 3, 9, 2), (100, 16, 6, 6, 0)]
    for prompt, size, known, arrived, free in cases:
        useful = prompt // size
        have = min(known, useful)
        have += max(0, min(min(arrived, useful) - have, free))
        expect(first_step, (prompt, size, known, arrived, free), prompt + 1 - have * size,
               f"{prompt + 1} tokens are known, and {have} blocks are found; a block that is not full is never found")


def stored(free, cache, hashes):
    "What is to come of a message: free blocks, cache, blocks of the text."
    free, cache = list(free), dict(cache)
    known = []
    for h in hashes:
        if h not in cache: break
        known.append(cache[h])
    released = [b for b in known if b in free]
    for b in released: free.remove(b)
    new = []
    for h in hashes[len(known):]:
        if not free: break
        block = free.pop(0)
        for old in [k for k, b in cache.items() if b == block]: del cache[old]
        cache[h] = block
        new.append(block)
    back = [b for b in known + new if b in released or b in new]
    return free + back[::-1], cache, known + new


@exercise
def check_store(store):
    cases = [([0, 1, 2, 3], {}, ["a", "b"]), ([0, 1, 2], {"a": 0, "b": 1}, ["a", "b", "c"]), ([0], {"a": 0}, ["a", "b"]), ([], {"a": 3}, ["a", "b"]), ([5], {"x": 5}, ["a", "b"]),
             ([2, 1], {"x": 2, "a": 7}, ["a", "b"]), ([1, 2], {"a": 1}, [])]
    rng = random.Random(0)
    for _ in range(60):
        blocks = rng.sample(range(8), rng.randint(0, 8))
        names = rng.sample("abcdxyz", rng.randint(0, min(7, len(blocks))))
        prefix = "abcd"[:rng.randint(0, 4)]
        cache = {n: b for n, b in zip(names, blocks) if n not in "abcd" or n in prefix}
        while any(c in cache and p not in cache for p, c in zip("abc", "bcd")):       # a text is known from its beginning on
            cache = {n: b for n, b in cache.items() if n not in "abcd" or all(m in cache for m in "abcd"[:"abcd".index(n)])}
        free = [b for b in blocks if rng.random() < .7]
        rng.shuffle(free)
        cases.append((free, cache, list("abcd"[:rng.randint(0, 4)])))
    for free, cache, hashes in cases:
        case = f"store({show(free)}, {show(cache)}, {show(hashes)})"
        got_free, got_cache = list(free), dict(cache)
        got = attempt(case, store, got_free, got_cache, list(hashes))
        want_free, want_cache, wanted = stored(free, cache, hashes)
        require(isinstance(got, (list, tuple)), f"{case} gives {show(got)}", "the text's blocks are to be returned, in order")
        require(list(got) == wanted, f"{case} gives {show(got)}, expected {show(wanted)}", "blocks that are known are used, and are not given up for others of the same text; then come the free ones, the next first")
        require(got_cache == want_cache, f"after {case} the cache is {show(got_cache)}, expected {show(want_cache)}", "a new block is entered under its hash, and what it held before is forgotten")
        require(got_free == want_free, f"after {case} free is {show(got_free)}, expected {show(want_free)}", "the text's blocks that were free or are new stand at the end, the text's last one first; blocks in use by others stay in use")


@exercise
def check_num_producers(num_producers):
    for n, prefill, decode in ((2, 1.0, 9.0), (4, 1.0, 9.0), (4, 1.0, 1.0), (4, 3.0, 1.0), (4, 1.0, 3.0), (8, 5.0, 1.0), (8, 1.0, 100.0), (8, 100.0, 1.0), (5, 1.0, 1.0), (9, 2.0, 3.0)):
        wanted = min(range(1, n), key=lambda p: max(prefill / p, decode / (n - p)))
        expect(num_producers, (n, prefill, decode), wanted, f"with {wanted} producers {min(wanted / prefill, (n - wanted) / decode):.3f} requests a second are answered")
