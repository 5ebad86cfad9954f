"""Where chapters measure for readers, their tests do with less: tools/test_notebooks.py puts these numbers into the cells that it runs.

A chapter, without its number -> a cell's id -> (what stands there, what runs). The cells run from top to bottom all the same, on shorter texts, in fewer rounds
or for fewer of the ways that they compare. tests/test_book.py sees to it that each of the words is still there."""
import time

SHORT = {
    "tiny_engine": {
        "708785df": [("runs=9", "runs=1"), ("weights.values()], 25)", "weights.values()], 1)")],
        "beeceda0": [("prompt_ids, 96", "prompt_ids, 24")],
        "c873c072": [("97", "25")],
        "d93a0e47": [("story, 16", "story, 6")],
        "ad4b5485": [("batch, 32", "batch, 12")],
        "5457fbcb": [("ids, 32", "ids, 12"), ("zip(batch, answers)", "list(zip(batch, answers))[:2]")],
        "f13a5e08": [("[ids], 32", "[ids], 12"), ("zip(batch, answers)", "list(zip(batch, answers))[:2]"), ("zip(batch, sampled)", "list(zip(batch, sampled))[:2]")],
        "b915c815": [("max_tokens=64", "max_tokens=12")],
    },
    "triton_kernels": {"d23f0824": [("range(20)", "range(4)")]},
    "model": {"0f0a4ed5": [("(1, 2, 4, 8, 16, 32, 64)", "(1, 2, 4, 64)")]},
    "cuda_graphs": {"13ed3ae3": [("range(1, 6)", "range(1, 5)")]},
    "engine": {
        "2de79f20": [("max_tokens=24", "max_tokens=12")],
        "5d9e87c8": [("max_tokens=24", "max_tokens=12")],
        "e3dee16f": [("range(16)", "range(4)"), ("(8, 96)", "(8, 24)")],
        "0ec16aff": [("prompt(512)", "prompt(128)"), ("range(8)", "range(2)"), ("/ 8", "/ 2")],
    },
    "benchmark": {
        "3179245e": [("random_workload(8,", "random_workload(2,")],
        "38f46226": [("race_work(100 + r, n=16 if recording else 3)", "random_workload(3, (16, 32), (4, 8), vocab_size, r)")],
        "26c87344": [("repeat=6", "repeat=1")],
        "d8d2978a": [("[1, 2, 4, 8, 16, 32]", "[1, 2, 4]")],
        "c32be8fc": [("steps=4", "steps=1")],
        "97adc8c6": [("(1, 8, 32)", "(1, 4)")],
    },
    "latency": {
        "f9b50ea4": [("(.5, .75, 1, 1.5, 2)", "(.5, 2)")],
        "6a8f25cc": [("if recording else 3", "if recording else 2")],
        "d1c04d69": [("(256, 0)", "(64, 0)")],
    },
    "cpu_kernels": {"309ce4f6": [("((8,), range(1))", "((1,), range(1))")]},
    "cpu_products": {
        "75101231": [("(1, 2, 4, 8, 16, 32, 128, 512)", "(1, 8, 128)")],
        "28e7bd5c": [("((8,), range(1))", "((1,), range(1))")],
    },
    "bfloat16": {"5bb76319": [("((8,), range(1))", "((1,), range(1))")]},
    "quantization": {
        "f94bdf59": [("ids[:1024]", "ids[:256]")],
        "f91e7c47": [("ids[:2048]", "ids[:512]")],
    },
    "four_bits": {
        "2b6199fc": [("ids[:1024]", "ids[:256]")],
        "be330730": [("ids[:1024]", "ids[:256]")],
        "0dae760b": [("else 12", "else 3")],
        "f4d618b7": [("num_turns=15", "num_turns=3")],
        "69c88866": [("else 10", "else 3")],
        "83c9860b": [("ids[:2048]", "ids[:512]")],
    },
    "fp8": {
        "20016267": [("ids[:1024]", "ids[:256]")],
        "a478e89c": [("ids[:1024]", "ids[:256]")],
    },
    "fusions": {
        "d6ff12bb": [("(rotate_by_roll, rotate)", "(rotate,)")],
        "5e19c415": [("(1, 2, 9, 64)", "(1, 9)")],
    },
    "ranks": {
        "92ffc7be": [("rounds=101", "rounds=11")],
        "12ece768": [("max_tokens=16", "max_tokens=6")],
    },
    "mixture_of_experts": {"4acb84b9": [("runs=7", "runs=1")]},
    "async_llm": {"6cc84fd0": [("for way in ways}", "for way in ways[::2]}")]},
    "structured_output": {"c1f6a466": [("answers(20)", "answers(4)")]},
    "lora": {
        "2c19d3ef": [("range(10)", "range(1)")],
        "e4831a7d": [("max_tokens=16", "max_tokens=6")],
        "bb180ae2": [("[:200]", "[:60]")],
        "2e75be3f": [("(16, 32)", "(16, 4)")],
        "635959aa": [("range(12)", "range(2)")],
        "b5810768": [("else 2", "else 1")],
        "3aa1b40e": [("range(30)", "range(3)")],
    },
    "pipeline_parallelism": {
        "483ad739": [("in CASES.items()", "in list(CASES.items())[:1]")],
        "a412b7c8": [("num_tokens=48", "num_tokens=4")],
        "31afd8a3": [("(1, 16, 32)", "(1, 2, 4)")],
        "771d7f5f": [("in WAYS.items()", "in list(WAYS.items())[:1]")],
    },
    "replicas": {"e34387e2": [("else 2)", "else 1)")]},
    "disaggregated_prefill": {
        "d1a00021": [("num_cpus=10", "num_cpus=4")],
        "d1a00049": [("in WAYS.items()}", "in list(WAYS.items())[2:3]}")],
        "d1a000a9": [("num_requests=300", "num_requests=100")],
    },
    "batch_invariance": {
        "4eeb5f14": [("max_tokens=20", "max_tokens=6")],
        "eeaecb2b": [("num_steps=8", "num_steps=3")],
        "230ebe63": [("rounds=2", "rounds=1")],
        "d4eaacce": [("rounds=41", "rounds=5")],
        "e8142a50": [("(2, 3, 4)", "(2, 3)")],
        "64006827": [("twelve, seeded", "twelve[:4], seeded[:4]")],
    },
}


def name_of(path) -> str:
    "A chapter's file name without number and suffix."
    return path.stem.partition("_")[2]


def shortened(path, cell_id: str, source: str) -> str:
    "The source of a cell of the notebook at `path`, as the tests run it."
    for old, new in SHORT.get(name_of(path), {}).get(cell_id, ()): source = source.replace(old, new)
    return source


def timed_once(f, repeat: int = 5) -> float:
    "In the place of `workbench.timed`: seconds of the second call of `f`."
    f()
    start = time.perf_counter()
    f()
    return time.perf_counter() - start
