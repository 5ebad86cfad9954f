"Who may use an engine: any thread, one at a time, and no process that was forked."
import os
import sys
import threading

import pytest
from helpers import assert_idle, tiny_folder
from nano_vllm import LLM, SamplingParams

PROMPTS = [[5 + i, 6, 7 + i] * (1 + i) for i in range(6)]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM(tiny_folder(tmp_path_factory.mktemp("tiny")), num_kv_blocks=60, block_size=4, device="cpu")


def params(i): return SamplingParams(temperature=0.9, seed=i, max_tokens=5 + i, ignore_eos=True)


def in_threads(works):
    "Run each function of `works` in a thread of its own, all at once; what they raised."
    errors, start = [], threading.Barrier(len(works))
    def run(work):
        start.wait()
        try: work()
        except BaseException as e: errors.append(e)
    threads = [threading.Thread(target=run, args=[work], daemon=True) for work in works]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert not any(t.is_alive() for t in threads)
    return errors


def test_threads_share_an_engine(llm):
    "Whole answers, streams and streams that are dropped, from six threads: everyone gets what he would have got alone."
    alone = [llm.generate([p], params(i), use_tqdm=False)[0]["token_ids"] for i, p in enumerate(PROMPTS)]

    def ask(i):
        for turn in range(8):
            if turn % 3 == 0: got = llm.generate([PROMPTS[i]], params(i), use_tqdm=False)[0]["token_ids"]
            if turn % 3 == 1: got = sum([piece["token_ids"] for piece in llm.stream([PROMPTS[i]], params(i))], [])
            if turn % 3 == 2:
                stream = llm.stream([PROMPTS[i]], params(i))
                next(stream), stream.close()
                continue
            assert got == alone[i], (i, turn)

    assert in_threads([lambda i=i: ask(i) for i in range(6)]) == []
    assert_idle(llm)


def test_a_bad_prompt_in_another_thread(llm):
    "The thread that asks it is told; nobody else notices."
    good, refused = [], []
    def bad():
        for _ in range(20):
            try: llm.generate([[-1]], use_tqdm=False)
            except ValueError as e: refused.append(e)
    def ask():
        for _ in range(5): good.append(llm.generate([PROMPTS[2]], params(2), use_tqdm=False)[0]["token_ids"])
    assert in_threads([bad, ask, ask]) == []
    assert len(refused) == 20 and len(set(map(tuple, good))) == 1
    assert_idle(llm)


def test_requests_have_names_of_their_own(llm):
    "Two threads that ask at once never get the same request id."
    ids, before = [], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)     # threads take turns a thousand times as often
    def ask():
        for _ in range(200): ids.extend(r.request_id for r in llm.make_requests([[5]], None))
    try: assert in_threads([ask] * 4) == []
    finally: sys.setswitchinterval(before)
    assert len(set(ids)) == len(ids) == 800


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_told(llm):
    "Its copy of the engine has no threads to compute with: it would wait for ever."
    before = llm.generate([PROMPTS[0]], params(0), use_tqdm=False)[0]["token_ids"]
    child = os.fork()
    if child == 0:
        code = 1
        try: llm.generate([PROMPTS[0]], params(0), use_tqdm=False)
        except RuntimeError as e: code = 7 if "fork" in str(e) and "spawn" in str(e) else 2
        finally: os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert llm.generate([PROMPTS[0]], params(0), use_tqdm=False)[0]["token_ids"] == before
    assert_idle(llm)
