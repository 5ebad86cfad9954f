"""The blocks' lab: texts of words, and the engine's cache manager that has the blocks.

The page hands this file to Python in the browser; the tests import it as it is.
"""
import re

from nano_vllm.kv_blocks import Sequence
from nano_vllm.prefix_cache import KVCacheManager, hash_blocks
from nano_vllm.sampling_params import SamplingParams

MAX_WORDS = 200


class Lab:
    "A cache manager, the texts that came to it, and what happened last."
    def __init__(self, num_blocks, block_size):
        self.manager = KVCacheManager(num_blocks, block_size)
        self.words, self.texts = [], []
        self.event = dict(kind="empty", evicted=[], cached=0, new=[])

    def token(self, word):
        "A word's number: its place among all words so far."
        if word not in self.words: self.words.append(word)
        return self.words.index(word)

    def start(self, text):
        "A prompt comes, finds what it can, and is computed."
        words = re.findall(r"\S+", text)
        if not 1 <= len(words) <= MAX_WORDS:
            raise ValueError(f"a text has 1 to {MAX_WORDS} words, "
                             f"this one {len(words)}")
        seq = Sequence(str(len(self.texts)), [self.token(w) for w in words],
                       SamplingParams())
        computed = self.manager.get_computed_blocks(seq)
        if self.allocate(seq, computed, "start"): self.texts.append(seq)

    def grow(self, index, word):
        "A running text gets one more word."
        seq = self.texts[index]
        seq.output_token_ids.append(self.token(word))
        if not self.allocate(seq, [], "grow"): seq.output_token_ids.pop()

    def allocate(self, seq, computed, kind):
        "Blocks for all tokens of `seq`, and their keys and values; or nothing."
        before, known = self.findable(), len(seq.block_table)
        fits = self.manager.allocate_slots(seq, seq.num_tokens, computed)
        self.event = dict(kind=kind if fits else "full", index=int(seq.request_id),
                          evicted=[], cached=len(computed), new=[])
        if not fits: return False
        self.event["new"] = seq.block_table[known + len(computed):]
        self.event["evicted"] = [dict(block=b, words=before[b])
                                 for b in self.event["new"] if b in before]
        seq.num_computed_tokens = seq.num_tokens
        self.manager.cache_blocks(seq, seq.num_tokens)
        return True

    def end(self, index):
        "A text is done and gives its blocks back."
        seq = self.texts[index]
        self.event = dict(kind="end", index=index, evicted=[], cached=0, new=[])
        self.manager.free(seq)
        seq.finish_reason = "stop"

    def findable(self):
        "The words of every block that a text can find."
        return {b: self.words_of(entry.tokens)
                for b, entry in enumerate(self.manager.cache.entries) if entry}

    def words_of(self, tokens): return [self.words[t] for t in tokens]

    def describe(self):
        "All that there is to see."
        pool = self.manager.pool
        running = [seq for seq in self.texts if not seq.finish_reason]
        held = {b: words for seq in running for b, words in self.pieces(seq)}
        found = self.findable()
        blocks = [dict(refs=refs, findable=b in found,
                       words=held.get(b) or found.get(b, []))
                  for b, refs in enumerate(pool.ref_counts)]
        return dict(event=self.event, blocks=blocks, free=list(pool.free_blocks),
                    texts=[self.describe_text(seq) for seq in running])

    def pieces(self, seq):
        "(block, its words) along the block table of `seq`."
        size = self.manager.block_size
        for i, block in enumerate(seq.block_table):
            yield block, self.words_of(seq.tokens(i * size, (i + 1) * size))

    def describe_text(self, seq):
        hashes = hash_blocks(seq, self.manager.block_size)
        rows = [dict(block=block, words=words, refs=self.manager.pool.ref_counts[block],
                     hash=f"{hashes[i]:016x}" if i < len(hashes) else None)
                for i, (block, words) in enumerate(self.pieces(seq))]
        return dict(index=int(seq.request_id), blocks=rows)


def run(settings, actions):
    "What there is to see at the beginning and after each action."
    lab = Lab(**settings)
    states = [lab.describe()]
    for name, *arguments in actions:
        getattr(lab, name)(*arguments)
        states.append(lab.describe())
    return states
