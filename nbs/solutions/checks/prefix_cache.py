"Checks of the exercises of the chapter on the prefix cache."
import random
from itertools import permutations

from nano_vllm.kv_blocks import Sequence
from nano_vllm.prefix_cache import KVCacheManager, hash_block
from nano_vllm.sampling_params import SamplingParams

from . import WrongAnswer, attempt, exercise, expect, require, show


def new(tokens, salt=0):
    return Sequence("test", list(tokens), SamplingParams(), cache_salt=salt)


def serve(manager, tokens, salt=0):
    "Compute a text and give its blocks back; how many of its tokens were found."
    seq = new(tokens, salt)
    found = manager.get_computed_blocks(seq)
    assert manager.allocate_slots(seq, seq.num_tokens, found)
    manager.cache_blocks(seq, seq.num_tokens)
    manager.free(seq)
    return len(found) * manager.block_size


@exercise
def check_most_cached(most_cached):
    for n in (1, 2, 15, 16, 17, 31, 32, 33, 8192):
        expect(most_cached, (n, 16), (n - 1) // 16 * 16,
               f"only full blocks are found, and one of the {n} tokens must be left to compute")
    expect(most_cached, (5, 1), 4, "one of the 5 tokens must be left to compute")


@exercise
def check_find_prefix(find_prefix):
    def cached(texts, size):
        "Hash to block number, for all full blocks of `texts`."
        block_of = {}
        for text in texts:
            parent = 0
            for i in range(len(text) // size):
                parent = hash_block(parent, text[i*size:(i+1)*size])
                block_of.setdefault(parent, 10 + len(block_of))
        return block_of

    text = [1, 2, 3, 4, 5, 6, 7, 8]
    block_of = cached([text], 2)
    cases = [("all of it is cached", text + [9], block_of, [10, 11, 12, 13]),
             ("all of it is cached, but a token must be left to compute", text, block_of, [10, 11, 12]),
             ("its last token fills no block", text[:7], block_of, [10, 11, 12]),
             ("it is another text from the third token on", [1, 2, 9, 9, 5, 6, 7], block_of, [10]),
             ("its first block differs, so what follows is another text", [9, 9, 3, 4, 5], block_of, []),
             ("nothing is cached", text, {}, []), ("it has a single token", [1], block_of, [])]
    hole = dict(block_of)
    del hole[next(h for h, block in block_of.items() if block == 11)]
    cases.append(("all of it is cached, and 0 is the number of a block", text + [9],
                  {h: block - 10 for h, block in block_of.items()}, [0, 1, 2, 3]))
    cases.append(("its second block is missing, so its third is of no use", text, hole, [10]))
    for why, tokens, known, wanted in cases:
        expect(find_prefix, (list(tokens), 2, known), wanted, why,
               case=f"find_prefix({tokens}, 2, block_of), {len(known)} blocks of {text} cached,")


@exercise
def check_still_found(still_found):
    for table, order, k, why in (
            ([4, 7, 2, 9], [9, 2, 7, 4], 1, "block 9 is lost, the end of the text"),
            ([4, 7, 2, 9], [4, 7, 2, 9], 1, "block 4 is lost, and nobody finds a text without its beginning"),
            ([4, 7, 2, 9], [9, 2, 7, 4], 0, "nothing is overwritten"),
            ([4, 7, 2, 9], [2, 9, 7, 4], 2, "blocks 2 and 9 are lost"),
            ([4, 7, 2, 9], [7, 9, 4, 2], 1, "block 7 is lost; 2 and 9 have no use without it"),
            ([4, 7, 2, 9], [9, 2, 7, 4], 4, "all are overwritten")):
        lost = set(order[:k])
        wanted = next((i for i, block in enumerate(table) if block in lost), len(table))
        expect(still_found, (table, order, k), wanted, why)
    for order in permutations([5, 6, 8]):
        for k in range(4):
            wanted = next((i for i, block in enumerate([5, 6, 8]) if block in order[:k]), 3)
            expect(still_found, ([5, 6, 8], list(order), k), wanted,
                   f"blocks {list(order[:k])} are overwritten")


@exercise
def check_steal(steal):
    def spied(manager, secret, salt=0):
        "How many tokens of a prompt are found; WrongAnswer for too many questions, or an empty one."
        asked = 0

        def found(tokens):
            nonlocal asked
            asked += 1
            if asked > 20_000: raise WrongAnswer(f"more than 20,000 questions for the secret {secret}: go block by block")
            if not tokens: raise WrongAnswer("a prompt has at least one token")
            return len(manager.get_computed_blocks(new(tokens, salt))) * manager.block_size

        return found

    for secret, size, vocab in (([3, 1, 4, 1], 2, 5), ([0, 2, 2, 0, 1], 2, 3), ([7, 7, 7, 7, 5, 6], 2, 8), ([4, 0, 3], 1, 5)):
        manager = KVCacheManager(4096, size)
        serve(manager, secret)
        wanted = secret[:len(secret) // size * size]
        case = f"steal(found, {size}, {vocab}), while somebody's text {secret} is cached,"
        got = attempt(case, steal, spied(manager, secret), size, vocab)
        require(got is not None, f"{case} gives None. Is a `return` missing?")
        got = attempt(f"{case} gives {show(got)}; reading it as a list", list, got)
        require(got == wanted, f"{case} gives {got}, expected {wanted}",
                "only full blocks are in the cache, and a block is found only if a token comes after it")
    manager = KVCacheManager(64, 2)
    serve(manager, [3, 1, 4, 1], salt=11)
    got = attempt("steal from a cache with salts", steal,
                  spied(manager, "of a user with a salt, of which nothing can be found", salt=22), 2, 5)
    require(not got, f"from a user with a salt of its own you claim to have stolen {got}", "nothing can be found there")
    return "and a salt stops it"


@exercise
def check_tree_cache(TreeCache):
    cache = attempt("TreeCache(2)", TreeCache, 2)
    story = []

    def insert(tokens, blocks):
        story.append(f"insert({tokens}, {blocks})")
        attempt(f"after {'; '.join(story[:-1]) or 'nothing'}: {story[-1]}", cache.insert, list(tokens), list(blocks))

    def find(tokens, wanted, why):
        case = f"after {'; '.join(story[-3:])}: find({tokens})"
        got = attempt(case, cache.find, list(tokens))
        require(got is not None, f"{case} gives None. Is a `return` missing?")
        got = attempt(f"{case} gives {show(got)}; reading it as a list", list, got)
        require(got == wanted, f"{case} gives {got}, expected {wanted}", why)

    find([1, 2], [], "nothing is cached")
    insert([1, 2, 3, 4, 5], [7, 3, 5])
    find([1, 2, 3, 4], [7, 3], "both of its blocks are cached")
    find([1, 2, 3, 4, 5, 6], [7, 3], "block 5 is not full, so it must not be cached")
    find([1, 2, 9, 9], [7], "the second block is another text")
    find([3, 4], [], "3, 4 is cached after 1, 2, which is another text")
    insert([1, 2, 8, 8], [7, 4])
    find([1, 2, 3, 4], [7, 3], "a second text with the same beginning must not take the first one's place")
    find([1, 2, 8, 8], [7, 4], "two texts part after their first block")
    insert([1, 2, 3, 4, 6, 6], [9, 9, 2])
    find([1, 2, 3, 4, 6, 6], [7, 3, 2], "what is cached stays; only the third block is new")
    insert([3, 4, 1, 2], [0, 1])
    find([3, 4, 1, 2], [0, 1], "the same blocks in another order are another text")
    rng, first = random.Random(0), {}
    cache = attempt("TreeCache(2)", TreeCache, 2)
    for number in range(200):
        text = [rng.randrange(2) for _ in range(rng.randint(1, 12))]
        blocks = [100*number + i for i in range(len(text) // 2 + 1)]
        attempt(f"after {number} random texts: insert({text}, {blocks})", cache.insert, list(text), list(blocks))
        for i in range(len(text) // 2): first.setdefault(tuple(text[:2*i + 2]), 100*number + i)
        got = attempt(f"after {number + 1} random texts: find({text})", lambda: list(cache.find(list(text))))
        wanted = [first[tuple(text[:2*i + 2])] for i in range(len(text) // 2)]
        require(got == wanted, f"after {number + 1} random texts, find({text}) gives {got}, expected {wanted}")


def score(manager_class) -> int:
    """Tokens found in a workload of eight chats and, between their turns, prompts that come once.

    Breaking the law of the pool raises; a manager that keeps the right blocks finds more."""
    manager, rng, found = manager_class(64, 4), random.Random(0), 0
    chats = [[1000*chat + i for i in range(16)] for chat in range(8)]
    for turn in range(200):
        chat = chats[rng.randrange(8)]
        found += serve(manager, chat)
        if rng.random() < .5: serve(manager, [10**6 + 100*turn + i for i in range(60)])
        pool = manager.pool
        if sorted(pool.free_blocks) != list(range(64)) or any(pool.ref_counts):
            raise WrongAnswer(f"after turn {turn} {len(pool.free_blocks)} of 64 blocks are free, though nobody runs")
        if len(chat) < 24: chat += [turn, turn]
    return found
