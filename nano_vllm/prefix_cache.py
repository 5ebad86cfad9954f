"Keys and values depend only on the text before them, so a text seen before need not be computed again."

# %%
from array import array
from dataclasses import dataclass
from itertools import count
import xxhash
from nano_vllm.kv_blocks import BlockPool, Sequence, blocks_needed

# %%
def hash_block(parent_hash: int, tokens: list[int]) -> int:
    "Hash (63 bits) of a full block and, through `parent_hash`, of all text before it."
    data = array("q", [parent_hash, *tokens]).tobytes()
    return xxhash.xxh3_64_intdigest(data) >> 1

# %%
def hash_blocks(seq: Sequence, block_size: int) -> list[int]:
    "Chained hashes of the full blocks of `seq`, kept in `seq.block_hashes`."
    hashes = seq.block_hashes
    for i in range(len(hashes), seq.num_tokens // block_size):
        parent = hashes[-1] if hashes else seq.cache_salt
        hashes.append(hash_block(parent, seq.tokens(i*block_size, (i+1)*block_size)))
    return hashes

# %%
@dataclass
class CachedBlock:
    "What a cached block holds, exactly: `tokens`, after the text of entry `parent`."
    hash: int
    uid: int          # never used twice, unlike block numbers
    parent: int       # uid of the entry before it, or ~cache_salt for a first block
    tokens: list[int]

# %%
class PrefixCache:
    "Which block holds which part of a text: full blocks, found by their contents."
    def __init__(self, num_blocks: int):
        self.block_of: dict[int, int] = {}                        # hash -> block
        self.entries: list[CachedBlock | None] = [None] * num_blocks   # of each block
        self.uids = count()

    def find(self, hash: int, parent: int, tokens: list[int]) -> int | None:
        "The block with `tokens` after the text of entry `parent`, compared in full."
        block = self.block_of.get(hash)
        if block is None: return None
        entry = self.entries[block]
        return block if entry.parent == parent and entry.tokens == tokens else None

    def cache_full_block(self, block: int, hash: int, parent: int,
                         tokens: list[int]) -> int | None:
        "Make `block` findable; the block of an entry of equal hash that gives way."
        replaced = self.block_of.get(hash)
        if replaced is not None: self.evict(replaced)
        self.block_of[hash] = block
        self.entries[block] = CachedBlock(hash, next(self.uids), parent, tokens)
        return replaced

    def evict(self, block: int):
        "Make the contents of `block`, if it has an entry, unfindable."
        if self.entries[block] is None: return
        del self.block_of[self.entries[block].hash]
        self.entries[block] = None

# %%
class KVCacheManager:
    "Blocks for sequences, with known prefixes found again (automatic prefix caching)."
    def __init__(self, num_blocks: int, block_size: int,
                 sliding_window: int | None = None):
        self.block_size, self.sliding_window = block_size, sliding_window
        self.reset(num_blocks)

    def reset(self, num_blocks: int | None = None):
        "All blocks are free, and none is remembered."
        self.pool = BlockPool(num_blocks or self.pool.num_blocks, self.block_size)
        self.cache = PrefixCache(self.pool.num_blocks)
        self.pending: dict[int, Sequence] = {}  # hash of a block -> who is computing it

    def full_block(self, seq: Sequence, i: int) -> tuple[int, list[int]]:
        "Hash and tokens of full block `i` of `seq`."
        tokens = seq.tokens(i * self.block_size, (i + 1) * self.block_size)
        return hash_blocks(seq, self.block_size)[i], tokens

    def get_computed_blocks(self, seq: Sequence) -> list[int]:
        "Cached blocks of the longest prefix of `seq` that leaves a token to compute."
        blocks, parent = [], ~seq.cache_salt
        for i in range((seq.num_tokens - 1) // self.block_size):
            hash, tokens = self.full_block(seq, i)
            block = self.cache.find(hash, parent, tokens)
            if block is None: break
            blocks.append(block)
            parent = self.cache.entries[block].uid
        return blocks

    def has_pending_prefix(self, seq: Sequence, num_computed_blocks: int) -> bool:
        "Is the block after the computed ones about to be filled by another sequence?"
        if num_computed_blocks >= (seq.num_tokens - 1) // self.block_size: return False
        return self.full_block(seq, num_computed_blocks)[0] in self.pending

    def allocate_slots(self, seq: Sequence, num_tokens: int, computed_blocks=(),
                       watermark: int = 0) -> bool:
        """Let `seq` have blocks for its first `num_tokens` tokens.

        `computed_blocks` are shared with it, if it begins. False, and nothing is done,
        if fewer than `watermark` blocks would be free afterwards."""
        held = len(seq.block_table) + len(computed_blocks)
        missing = blocks_needed(num_tokens, self.block_size) - held
        if held and not missing and not computed_blocks: return True    # as most often
        revived = sum(self.pool.ref_counts[b] == 0 for b in computed_blocks)
        if missing + revived + watermark > len(self.pool.free_blocks): return False
        if not seq.block_table: self.begin(seq, computed_blocks)
        for _ in range(missing): seq.block_table.append(self.new_block())
        return True

    def begin(self, seq: Sequence, computed_blocks):
        "Share the computed blocks with `seq`, and note what it is going to compute."
        for block in computed_blocks: self.pool.touch(block)
        seq.block_table = list(computed_blocks)
        seq.cache_entries = [self.cache.entries[b].uid for b in computed_blocks]
        seq.num_computed_tokens = len(computed_blocks) * self.block_size
        for hash in hash_blocks(seq, self.block_size)[len(computed_blocks):]:
            self.pending.setdefault(hash, seq)

    def new_block(self) -> int:
        "A free block, whose contents are forgotten."
        block = self.pool.allocate()
        self.cache.evict(block)
        return block

    def cache_blocks(self, seq: Sequence, num_tokens: int):
        "Make the blocks findable that the first `num_tokens` computed tokens fill."
        entries = seq.cache_entries
        for i in range(len(entries), num_tokens // self.block_size):
            hash, tokens = self.full_block(seq, i)
            if self.pending.get(hash) is seq: del self.pending[hash]
            parent = entries[-1] if entries else ~seq.cache_salt
            block = self.cache.find(hash, parent, tokens)
            if block is None:
                block = seq.block_table[i]
                replaced = self.cache.cache_full_block(block, hash, parent, tokens)
                if replaced is not None: self.pool.put_first(replaced)
            entries.append(self.cache.entries[block].uid)

    def free(self, seq: Sequence):
        "Give back the blocks of `seq`; what full ones hold stays findable."
        for hash in seq.block_hashes:
            if self.pending.get(hash) is seq: del self.pending[hash]
        for block in reversed(seq.block_table[seq.num_released_blocks:]):
            self.release(block)
        placeholders = seq.num_output_placeholders   # these are still being sampled
        seq.reset()
        seq.num_output_placeholders = placeholders

    def release(self, block: int):
        "Give back a block: to be reused soon, or late if a text can find it."
        self.pool.free(block, keep=self.cache.entries[block] is not None)

    def free_behind_window(self, seq: Sequence):
        "Give back the blocks that no coming token of `seq` will look at."
        unseen = seq.num_computed_tokens + 1 - self.sliding_window   # from the start
        last = min(unseen // self.block_size, len(seq.cache_entries))
        for i in range(seq.num_released_blocks, last):
            self.release(seq.block_table[i])
            seq.block_table[i] = 0       # a number that no kernel will use
            seq.num_released_blocks = i + 1
