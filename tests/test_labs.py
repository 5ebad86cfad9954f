"""The labs: what a page computes is what the engine computes, and the pages work in a real browser.

The tests with a browser are slow and need Chromium, Playwright and the runtime of the pages in a folder:

    pip install playwright && npm install pyodide@314
    pip download xxhash --no-deps --only-binary=:all: --python-version 3.14 --abi cp314 --implementation cp \\
        --platform pyemscripten_2026_0_wasm32 -d node_modules/pyodide
    NANO_VLLM_PYODIDE=node_modules/pyodide pytest tests/test_labs.py -m slow
"""
import ast
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from book import ROOT, quarto
from fake_engine import fake_engine
from nano_vllm.kv_blocks import Sequence
from nano_vllm.model import Decoder, ModelConfig
from nano_vllm.model_runner import kv_block_bytes
from nano_vllm.prefix_cache import KVCacheManager, hash_block
from nano_vllm.sampler import SAMPLING_STAGES, SamplingMetadata, run_stages, sample
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.workbench import fetch

LABS = ROOT/"nbs/labs"
sys.path.insert(0, str(LABS))
import blocks_lab  # noqa: E402
import roofline_lab  # noqa: E402
import sampling_lab  # noqa: E402
import scheduler_lab  # noqa: E402

PAGES = sorted(LABS.glob("*.html"))
RUNTIME = Path(os.environ.get("NANO_VLLM_PYODIDE", ROOT/"node_modules/pyodide"))


def data(name): return json.loads((LABS/f"{name}.json").read_text(encoding="utf-8"))


# ---- the scheduler's lab

def engine_schedule(settings, requests):
    "What the engine schedules, step by step, {name: (start, tokens, samples)}, and whom it preempts; all that the lab may not know."
    engine = fake_engine(settings["num_blocks"], settings["block_size"], settings["max_num_seqs"],
                         settings["max_num_batched_tokens"], max_model_len=400, threshold=settings["long_prefill_token_threshold"])
    schedule, outputs = engine.scheduler.schedule, []
    def recorded():
        outputs.append(schedule())
        return outputs[-1]
    engine.scheduler.schedule = recorded
    arrivals, names = {}, {}
    for i, r in enumerate(requests):
        shared = min(r["shared"], r["prompt"])
        ids = list(range(shared)) + [60 + i]*(r["prompt"] - shared)
        request, = engine.input_processor.make_requests([ids], SamplingParams(max_tokens=r["output"], ignore_eos=True))
        names[request.request_id] = r["name"]
        arrivals.setdefault(r["arrival"], []).append(request)
    steps = []
    while arrivals or engine.requests:
        for request in arrivals.pop(len(steps), ()): engine.add(request)
        running = [s for s in engine.scheduler.running]
        engine.step()
        steps.append(({names[s.seq.request_id]: (s.start, s.num_tokens, s.samples) for s in outputs[-1].scheduled},
                      {names[s.request_id] for s in running if s in engine.scheduler.waiting}))
    return steps


def lab_schedule(settings, requests):
    "The same of the lab."
    return [({name: (c["start"], c["tokens"], c["samples"]) for name, c in step["cells"].items() if "tokens" in c},
             {name for name, c in step["cells"].items() if c["lost"]})
            for step in scheduler_lab.run(settings, requests)["steps"]]


def settings(budget=16, num_blocks=40, block_size=4, max_num_seqs=8, threshold=0):
    return dict(max_num_batched_tokens=budget, num_blocks=num_blocks, block_size=block_size, max_num_seqs=max_num_seqs,
                long_prefill_token_threshold=threshold)


def requests(*rows): return [dict(zip(("name", "arrival", "prompt", "shared", "output"), row)) for row in rows]


CASES = {
    "chunks": (settings(budget=5), requests(("A", 0, 3, 0, 9), ("B", 1, 17, 0, 4), ("C", 2, 2, 0, 3))),
    "a threshold": (settings(threshold=3), requests(("A", 0, 20, 0, 4), ("B", 0, 11, 0, 4), ("C", 3, 2, 0, 8))),
    "preemptions": (settings(num_blocks=8), requests(*((n, 0, 6, 0, 12) for n in "ABC"))),
    "a shared prefix": (settings(budget=12), requests(*((n, 0, 18, 16, 4) for n in "ABC"))),
    "a shared prefix and little memory": (settings(num_blocks=9), requests(*((n, i, 14, 9, 9) for i, n in enumerate("ABCD")))),
    "one at a time": (settings(max_num_seqs=1), requests(("A", 0, 3, 0, 3), ("B", 0, 5, 0, 2), ("C", 9, 1, 0, 1))),
    **{s["title"]: (s["settings"], s["requests"]) for s in data("scheduler")}}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_scheduler_lab_shows_the_engines_schedule(case):
    assert lab_schedule(*case) == engine_schedule(*case)


def some_case(rng):
    rows = [(chr(65 + i), rng.randint(0, 8), rng.randint(1, 25), rng.choice([0, 0, 8, 13]), rng.randint(1, 12))
            for i in range(rng.randint(1, 7))]
    block_size, spare = rng.choice([2, 4]), rng.choice([0, 1, 50])      # the longest request just fits
    return settings(rng.choice([1, 4, 9, 30]), 36//block_size + spare, block_size, rng.randint(1, 7),
                    rng.choice([0, 0, 3])), requests(*rows)


def test_the_scheduler_lab_shows_the_engines_schedule_whatever_is_asked():
    preemptions = 0
    for seed in range(60):
        case = some_case(random.Random(seed))
        assert lab_schedule(*case) == engine_schedule(*case), seed
        preemptions += scheduler_lab.run(*case)["preemptions"]
    assert preemptions > 10


def test_the_scheduler_labs_scenarios_show_what_they_are_about():
    prompt, memory, shared = ({**s, **scheduler_lab.run(s["settings"], s["requests"])} for s in data("scheduler"))
    assert prompt["preemptions"] == 0 and prompt["first_token"]["D"] > prompt["first_token"]["C"] > 3
    assert memory["preempted"].keys() == {"C"} and shared["cached"] == {"B": 16, "C": 16}
    for s in (prompt, memory, shared):
        table, name = s["answer"]
        assert isinstance(s[table][name], int) and re.search(rf"\b{name}\b", s["question"])


def test_the_scheduler_lab_counts_every_block_once():
    for case in CASES.values():
        for step in scheduler_lab.run(*case)["steps"]:
            assert step["used"] + step["found"] + step["free"] == case[0]["num_blocks"]


def test_the_scheduler_lab_refuses_what_can_never_finish_by_name():
    with pytest.raises(ValueError, match="request B: .*need 6 KV blocks"):
        scheduler_lab.run(settings(num_blocks=5), requests(("A", 0, 3, 0, 3), ("B", 0, 20, 0, 4)))
    with pytest.raises(ValueError, match="two requests are called 'A'"):
        scheduler_lab.run(settings(), requests(("A", 0, 3, 0, 3), ("A", 0, 20, 0, 4)))
    with pytest.raises(ValueError, match="more than 400 steps"):
        scheduler_lab.run(settings(budget=1, num_blocks=200), requests(("A", 0, 300, 0, 102)))


# ---- the blocks' lab

def some_actions(rng):
    "Texts that share beginnings come, grow and end."
    actions, running, count = [], [], 0
    for _ in range(rng.randint(1, 25)):
        kind = rng.choice(["start", "grow", "end"]) if running else "start"
        if kind == "start":
            actions.append(["start", " ".join(rng.choices("ab", k=rng.randint(1, 12)))])
            running.append(count)
            count += 1
        else:
            index = rng.choice(running)
            actions.append(["end", index] if kind == "end" else ["grow", index, rng.choice("ab")])
            if kind == "end": running.remove(index)
    return actions


def direct_blocks(settings, actions):
    "The block tables, counts and free list after `actions`, by a cache manager that has tuples of letters for texts."
    manager, seqs = KVCacheManager(**settings), []
    for name, *rest in actions:
        if name == "end": manager.free(seqs[rest[0]])
        if name == "grow": seqs[rest[0]].output_token_ids.append(ord(rest[1]))
        if name == "start": seqs.append(Sequence("", [ord(c) for c in rest[0].split()], SamplingParams()))
        if name == "end": continue
        seq = seqs[-1] if name == "start" else seqs[rest[0]]
        found = manager.get_computed_blocks(seq) if name == "start" else []
        assert manager.allocate_slots(seq, seq.num_tokens, found)
        manager.cache_blocks(seq, seq.num_tokens)
    return [s.block_table for s in seqs if s.block_table], list(manager.pool.free_blocks), manager.pool.ref_counts


def lab_blocks(state):
    tables = [[b["block"] for b in text["blocks"]] for text in state["texts"]]
    return tables, state["free"], [b["refs"] for b in state["blocks"]]


def test_the_blocks_lab_shows_the_engines_blocks():
    reused = 0
    for seed in range(100):
        rng = random.Random(seed)
        case = dict(num_blocks=rng.choice([100, 150]), block_size=rng.choice([2, 3])), some_actions(rng)
        states = blocks_lab.run(*case)
        assert lab_blocks(states[-1]) == direct_blocks(*case), seed
        reused += sum(state["event"]["cached"] for state in states)
    assert reused > 20


def test_the_blocks_lab_says_what_was_evicted_and_what_did_not_fit():
    start, settings = "start", dict(num_blocks=3, block_size=2)
    states = blocks_lab.run(settings, [[start, "a b c d"], [start, "e f g h"], ["end", 0], [start, "e f g h i"]])
    events = [state["event"] for state in states]
    assert [e["kind"] for e in events] == ["empty", "start", "full", "end", "start"]
    assert lab_blocks(states[1]) == lab_blocks(states[2])           # what did not fit has changed nothing
    assert events[-1]["evicted"] == [dict(block=1, words=["c", "d"]), dict(block=0, words=["a", "b"])]
    with pytest.raises(ValueError, match="1 to 200 words, this one 0"): blocks_lab.run(settings, [[start, " "]])


def test_the_blocks_labs_hashes_are_the_engines_and_chained():
    text, = blocks_lab.run(dict(num_blocks=9, block_size=2), [["start", "a b c d e"]])[-1]["texts"]
    first = hash_block(0, [0, 1])
    assert [b["hash"] for b in text["blocks"]] == [f"{first:016x}", f"{hash_block(first, [2, 3]):016x}", None]


def test_the_blocks_labs_scenarios_show_what_they_are_about():
    two, again, small = (blocks_lab.run(s["settings"], s["actions"])[-1] for s in data("blocks"))
    assert (two["event"]["cached"], len(two["event"]["new"])) == (2, 3) and max(b["refs"] for b in two["blocks"]) == 2
    assert again["event"]["cached"] == 2 and small["event"]["cached"] == 1 and small["event"]["evicted"]


# ---- the sampling lab

@pytest.fixture(scope="module")
def entries(): return data("logits")


def settings_of(temperature=1.0, min_p=0.0, top_k=0, top_p=1.0):
    return dict(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)


def some_settings(rng):
    return settings_of(rng.randint(1, 20) / 10, rng.choice([0, 0, 0.02, 0.1, 0.4]), rng.choice([0, 0, 1, 5, 40]),
                       rng.choice([1, 1, 0.2, 0.5, 0.8, 0.95]))


def engine_row(entry):
    "Logits (V,) with what is listed at its place; nearly nothing for the others."
    logits = torch.full((entry["vocab_size"],), -1e4)
    logits[entry["ids"]] = torch.tensor(entry["logits"])
    return logits


def listed_alone(entry):
    "The entry as if there were no others, so that the engine can be given the same row."
    return entry | {"rest": dict.fromkeys(entry["rest"], -math.inf)}


def metadata(settings, seeds=(0,), counts=(0,)):
    sequences = [SimpleNamespace(params=SamplingParams(**settings), seed=seed, prompt_token_ids=[], output_token_ids=[1]*count,
                                 stop_token_ids=frozenset()) for seed, count in zip(seeds, counts)]
    return SamplingMetadata.of(sequences)


def test_the_sampling_labs_filters_are_the_samplers(entries):
    for seed in range(60):
        rng = random.Random(seed)
        entry, settings = listed_alone(rng.choice(entries)), some_settings(rng)
        m = metadata(settings)
        expected = run_stages(SAMPLING_STAGES, engine_row(entry)[None], m).softmax(-1)[0][entry["ids"]]
        *_, (_, row) = sampling_lab.stages(entry, SamplingParams(**settings))
        probs = torch.tensor(sampling_lab.softmax(row)[:-1])
        assert torch.equal(probs > 0, expected > 0), (seed, settings)
        torch.testing.assert_close(probs, expected, rtol=1e-4, atol=1e-9)


def test_the_sampling_labs_race_is_won_by_the_samplers_token(entries):
    seeds = [0, 1, 7, 2**40 + 3, 12345] * 8
    counts = [i // 5 for i in range(40)]
    for entry in map(listed_alone, entries):
        for settings in (settings_of(), settings_of(1.5, top_k=40), settings_of(0.7, min_p=0.02, top_p=0.95)):
            expected = sample(engine_row(entry).expand(40, -1), metadata(settings, seeds, counts))
            *_, (_, row) = sampling_lab.stages(entry, SamplingParams(**settings))
            won = [sampling_lab.winner(sampling_lab.race(entry, row, *pair)) for pair in zip(seeds, counts)]
            assert [entry["ids"][i] for i in won] == expected.tolist()


def test_the_sampling_lab_says_when_a_cut_falls_where_it_cannot_see(entries):
    story = entries[0]
    assert not sampling_lab.run(story, settings_of(2, top_k=50), 0, 0)["partial"]
    seen = sampling_lab.run(story, settings_of(2, top_p=0.95), 0, 0)
    assert seen["partial"] and seen["columns"][-1]["kept"] == 1000 and seen["columns"][-1]["rest_kept"]


def test_what_the_sampling_lab_stores_is_what_the_demo_model_says(entries, hf):
    model, tokenizer = hf
    for entry in entries:
        with torch.inference_mode(): logits = model(**tokenizer(entry["text"], return_tensors="pt")).logits[0, -1]
        assert len(logits) == entry["vocab_size"] and [tokenizer.decode([i]) for i in entry["ids"]] == entry["texts"]
        torch.testing.assert_close(logits[entry["ids"]], torch.tensor(entry["logits"]), rtol=0, atol=5e-3)
        others = logits.double().index_fill(0, torch.tensor(entry["ids"]), -math.inf)
        assert others.max() <= logits[entry["ids"]].min() + 5e-3
        for temperature, total in entry["rest"].items():
            assert abs(float((others/float(temperature)).logsumexp(0)) - total) < 5e-3/float(temperature) + 1e-3


def sampling_answer(scenario, entry):
    run = sampling_lab.run(entry, scenario["settings"], 0, 0)
    last = run["columns"][-1]
    return last["kept"] if scenario["answer"] == "kept" else round(100*last["probs"][0])


def test_the_sampling_labs_scenarios_show_what_they_are_about(entries):
    answers = [sampling_answer(s, entry) for s, entry in zip(data("sampling"), entries)]
    assert answers[0] > 40 and answers[1] < 80 and answers[2] < 10
    best = [sampling_lab.run(e, settings_of(), 0, 0)["columns"][0]["probs"][0] for e in entries]
    said = [int(re.search(r"(\d+) percent", s["question"])[1]) for s in data("sampling")]
    assert [round(100*p) for p in best] == said


# ---- the roofline's lab

def with_files(kind):
    "The lab's models or machines, with the content of the files that they name."
    for entry in data("roofline")[kind]:
        path = entry.get("file") or entry.get("record")
        yield entry | ({"content": json.loads((LABS/path).read_text())} if path else {})


def model_config(model): return model.get("config") or model["content"]


def roofline_setting(machine, scenario_setting):
    units = dict(memory=1e9, bandwidth=1e9, peak=1e12)
    numbers = {k: float(f"{machine.get(k, 0) or machine['content']['data'][k]/unit:.4g}")*unit for k, unit in units.items()}
    return scenario_setting | numbers


@pytest.mark.parametrize("model", list(with_files("models")), ids=lambda m: m["name"])
def test_the_roofline_lab_counts_weights_and_blocks_as_the_engine_does(model):
    config = model_config(model)
    engines = ModelConfig.from_folder((LABS/model["file"]).parent if "file" in model else fetch())
    with torch.device("meta"): parameters = list(Decoder(engines).parameters())
    assert roofline_lab.num_weights(config) == sum(p.numel() for p in parameters)
    for dtype in ("float32", "bfloat16"):
        expected = kv_block_bytes(engines, roofline_lab.BLOCK_SIZE, getattr(torch, dtype))
        assert roofline_lab.kv_token_bytes(config, dtype)*roofline_lab.BLOCK_SIZE == expected


def test_the_roofline_labs_demo_model_is_the_demo_model():
    demo, config = next(with_files("models"))["config"], json.loads((fetch()/"config.json").read_text())
    assert demo == {name: config[name] for name in demo}


def test_the_roofline_lab_counts_a_step_as_the_benchmark_recorded_it():
    demo, measured = next(with_files("models"))["config"], next(with_files("machines"))["content"]["data"]
    setting = dict(weights="float32", kv="float32", bandwidth=measured["bandwidth"], peak=measured["peak"])
    steps = [roofline_lab.step(demo, setting, batch, 32 + 5) for batch in measured["batch"]]
    assert [s["moved"] for s in steps] == measured["bytes"] and [s["computed"] for s in steps] == measured["operations"]
    assert all(s["seconds"] < seconds for s, seconds in zip(steps, measured["seconds"]))


def test_the_roofline_lab_fills_memory_to_the_last_block():
    config = model_config(next(with_files("models")))
    setting = dict(weights="bfloat16", kv="bfloat16")
    room, block = 2*roofline_lab.num_weights(config), 16*roofline_lab.kv_token_bytes(config, "bfloat16")
    def fit(memory, context): return roofline_lab.requests_that_fit(config, setting | dict(memory=memory), context)
    assert [fit(room + 10*block, n) for n in (1, 16, 17, 80, 81, 161)] == [10, 10, 5, 2, 1, 0]
    assert fit(room + 10*block - 1, 16) == 9 and fit(room - 1, 1) == fit(0, 1) == 0


def roofline_answer(scenario):
    model, machine = (list(with_files(kind))[scenario[kind[:-1]]] for kind in ("models", "machines"))
    run = roofline_lab.run(model_config(model), roofline_setting(machine, scenario["setting"]))
    values = dict(fit=run["fit"], rate=round(run["step"]["rate"]), milliseconds=round(1000*run["step"]["seconds"]))
    return values[scenario["answer"]]


def test_the_roofline_labs_scenarios_have_the_answers_that_one_gets_by_hand():
    kv = 2*36*8*128*2                               # Qwen3-8B: 36 layers, 8 KV heads of 128, keys and values in two bytes
    weights = 2*8.19e9
    fit, rate, milliseconds = map(roofline_answer, data("roofline")["scenarios"])
    assert abs(fit - (80e9 - weights)/(4096*kv)) < 1
    bandwidth = next(with_files("machines"))["content"]["data"]["bandwidth"]
    assert abs(rate - bandwidth/(4*134.5e6)) < 1
    assert abs(milliseconds - (weights - 2*0.62e9 + 32*8192*kv)/3350e6) < 1


# ---- what the pages load

def modules():
    "The modules of the package that a page loads."
    return re.search(r"MODULES = \[(.*?)\]", (LABS/"lab.js").read_text())[1].replace('"', "").split(", ")


def imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom): yield "nano_vllm." + node.module if node.level else node.module
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names)


def test_what_runs_in_the_browser_needs_the_standard_library_and_xxhash():
    here = {f"nano_vllm.{m}" for m in modules()}
    paths = [ROOT/f"nano_vllm/{m}.py" for m in modules()] + sorted(LABS.glob("*.py"))
    wrong = [f"{path.name} imports {name}" for path in paths for name in imports(path)
             if name not in here | {"xxhash"} and name.split(".")[0] not in sys.stdlib_module_names]
    assert not wrong


def site_files():
    "What Quarto copies to the site beside the chapters."
    return {path for pattern in quarto()["project"]["resources"] for path in ROOT.glob(pattern)}


def test_the_site_has_all_that_the_pages_load():
    files = site_files()
    assert files >= {path for path in LABS.iterdir() if path.suffix in (".html", ".css", ".js", ".json", ".py")}
    assert files >= {ROOT/f"nano_vllm/{m}.py" for m in modules()}
    named = [*with_files("models"), *with_files("machines")]
    assert files >= {(LABS/path).resolve() for entry in named if (path := entry.get("file") or entry.get("record"))}
    for page in PAGES:
        links = re.findall(r'(?:href|src)="([^"#]+)"', page.read_text(encoding="utf-8"))
        for link in (link for link in links if not link.startswith("data:")):
            target = (LABS/link).resolve()
            chapter = target.with_suffix(".ipynb")          # of which Quarto makes the page
            assert target in files or (chapter.parent == ROOT/"nbs" and chapter.exists()), f"{page.name}: {link}"


def test_pages_name_no_host_but_the_one_that_has_pyodide():
    texts = [path.read_text(encoding="utf-8") for path in LABS.iterdir()
             if path.suffix in (".html", ".css", ".js")]
    hosts = {host for text in texts for host in re.findall(r"https?://([^/\"'`\s]+)", text)}
    # only the first is asked for anything: the second is in the name of SVG, and the third in a sentence
    assert hosts == {"cdn.jsdelivr.net", "www.w3.org", "localhost:8000"}


# ---- the pages in a browser

class Handler(SimpleHTTPRequestHandler):
    "The files of `directory`, and under /runtime/ those of Pyodide, whose list of packages is told of the wheel that is there."

    def translate_path(self, path):
        path = path.partition("?")[0]
        if path.startswith("/runtime/"): return str(RUNTIME/Path(path).name)
        return super().translate_path(path)

    def do_GET(self):
        if self.path != "/runtime/pyodide-lock.json": return super().do_GET()
        wheel, = RUNTIME.glob("xxhash-*wasm32.whl")
        lock = json.loads((RUNTIME/"pyodide-lock.json").read_text())
        lock["packages"]["xxhash"] |= dict(file_name=wheel.name, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
        body = json.dumps(lock).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args): pass


@contextmanager
def served(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium: pytest.skip("no Chromium on the PATH")
    if not (RUNTIME/"pyodide.mjs").exists() or not [*RUNTIME.glob("xxhash-*wasm32.whl")]:
        pytest.skip("NANO_VLLM_PYODIDE names no folder with Pyodide and the wheel of xxhash, see the head of this file")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    "The addresses of the repository and of the site, as far as labs need it."
    site = tmp_path_factory.mktemp("site")
    for path in site_files():
        target = site/path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    with served(ROOT) as repository, served(site) as built: yield dict(repository=repository, site=built)


VIEWS = [(1400, "light", "repository"), (1400, "dark", "site"), (390, "light", "site"), (390, "dark", "repository")]


@pytest.mark.slow
def test_readers_get_pyodide_from_its_cdn_and_from_nowhere_else(browser, layouts):
    "The CDN is played by the files that are here."
    page, asked = browser.new_page(), set()
    def answer(route):
        asked.add(route.request.url.rpartition("/")[0])
        response = route.fetch(url=f"{layouts['site']}/runtime/{route.request.url.rpartition('/')[2]}")
        route.fulfill(response=response, headers=response.headers | {"access-control-allow-origin": "*"})
    page.route(re.compile(r"^(?!http://127\.0\.0\.1)"), answer)
    page.goto(f"{layouts['site']}/nbs/labs/scheduler.html")
    assert guess(page, 7) == "Exactly: 7."
    page.goto(f"{layouts['site']}/nbs/labs/scheduler.html?pyodide=https://example.org/")
    page.locator("#guess").fill("7")
    page.locator("#guess").press("Enter")
    page.wait_for_function("document.querySelector('#lock output').textContent.includes('is on another host')")
    page.close()
    assert len(asked) == 1 and re.fullmatch(r"https://cdn\.jsdelivr\.net/pyodide/v314[.\d]+/full", *asked)


@contextmanager
def opened(browser, layouts, name, view):
    "The page of a lab in one view; afterwards nothing may have gone wrong in it."
    width, scheme, layout = view
    context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme, reduced_motion="reduce")
    page = context.new_page()
    problems, hosts = [], set()
    page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.on("request", lambda r: hosts.add(re.match(r"\w+:/*([^/]*)", r.url)[1]) if r.url.startswith("http") else None)
    page.goto(f"{layouts[layout]}/nbs/labs/{name}.html?pyodide=/runtime/")
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    assert not problems and hosts == {layouts[layout].removeprefix("http://")}
    folder = os.environ.get("NANO_VLLM_SCREENSHOTS")
    if folder: page.screenshot(path=f"{folder}/{name}-{width}-{scheme}.png", full_page=True)
    context.close()


def guess(page, value):
    "Answer the question by the keyboard alone; what the page says to it."
    assert not page.locator("#lab").is_visible()
    page.locator("#guess").focus()
    page.keyboard.type(str(value))
    page.keyboard.press("Enter")
    page.locator("#lab").wait_for(state="visible", timeout=60_000)
    return page.locator("#lock output").inner_text()


def unlabelled(page):
    "Controls without a name for those who cannot see them."
    return page.evaluate("""[...document.querySelectorAll('input, select, textarea, button')].filter(e =>
        !(e.labels && e.labels.length) && !e.getAttribute('aria-label') && !e.textContent.trim()).map(e => e.outerHTML)""")


def shown_schedule(page):
    "The chart on the page: {name: [(state, tokens), ...]}."
    cells = page.evaluate("""[...document.querySelectorAll('[data-cell]')].map(e =>
        [...e.dataset.cell.split(' '), e.dataset.state, Number(e.dataset.tokens)])""")
    rows = {}
    for name, step, state, tokens in cells: rows.setdefault(name, {})[int(step)] = (state, tokens)
    return rows


def expected_schedule(case):
    rows = {}
    for i, step in enumerate(scheduler_lab.run(*case)["steps"]):
        for name, cell in step["cells"].items(): rows.setdefault(name, {})[i] = (cell["state"], cell.get("tokens", 0))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_the_scheduler_page(browser, layouts, view):
    scenario, memory, _ = data("scheduler")
    case = SimpleNamespace(settings=scenario["settings"], requests=scenario["requests"])
    with opened(browser, layouts, "scheduler", view) as page:
        assert guess(page, 4) == "You said 4, the answer is 7: 3 too low."
        assert shown_schedule(page) == expected_schedule((case.settings, case.requests))
        assert unlabelled(page) == []
        page.locator("#step").focus()
        for _ in range(6): page.keyboard.press("ArrowLeft")
        assert page.locator("#story").inner_text().startswith("Step 7.")
        assert "D computes 5 tokens and gets a new token." in page.locator("#story").inner_text()
        for _ in range(7): page.keyboard.press("ArrowLeft")
        page.get_by_role("button", name="Play").press("Enter")
        page.wait_for_function("document.querySelector('#story').textContent.startsWith('Step 2.')")
        page.get_by_role("button", name="Pause").press("Enter")
        assert page.locator("#play").inner_text() == "Play"
        case.settings["max_num_batched_tokens"] += 1
        page.locator("#max_num_batched_tokens").focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function("document.querySelector('#tiles').innerText.includes('of 9')")
        assert shown_schedule(page) == expected_schedule((case.settings, case.requests))
        page.get_by_role("button", name="Remove B").click()
        case.requests = [r for r in case.requests if r["name"] != "B"]
        assert shown_schedule(page) == expected_schedule((case.settings, case.requests))
        page.get_by_role("button", name="Memory runs out").click()
        assert guess(page, 16) == "Exactly: 16."
        assert shown_schedule(page) == expected_schedule((memory["settings"], memory["requests"]))
        page.get_by_label("C: prompt tokens").fill("300")
        page.get_by_label("C: prompt tokens").press("Tab")
        page.wait_for_function("document.querySelector('#error').textContent.includes('request C: ')")
        page.get_by_label("C: prompt tokens").fill("7")
        page.get_by_label("C: prompt tokens").press("Tab")
        page.wait_for_function("document.querySelector('#error').textContent === ''")


@pytest.mark.slow
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_the_blocks_page(browser, layouts, view):
    two, again, small = data("blocks")
    with opened(browser, layouts, "blocks", view) as page:
        assert guess(page, 4) == "You said 4, the answer is 3: 1 too high."
        assert shown_blocks(page) == expected_blocks(two["settings"], two["actions"])
        page.get_by_role("button", name="One more word for Text 2").click()
        actions = [*two["actions"], ["grow", 1, "it"]]
        page.wait_for_function("document.querySelector('#event').textContent.includes('Text 2: 0 blocks taken')")
        assert shown_blocks(page) == expected_blocks(two["settings"], actions)
        page.get_by_role("button", name="End Text 1").click()
        page.wait_for_function("document.querySelector('#event').textContent.includes('has ended')")
        assert shown_blocks(page) == expected_blocks(two["settings"], [*actions, ["end", 0]])
        page.get_by_label("A text").fill("The old lighthouse stood alone")
        page.get_by_role("button", name="Compute it").click()
        page.wait_for_function("document.querySelector('#event').textContent.startsWith('Text 3: 1 block found')")
        assert unlabelled(page) == []
        page.get_by_label("A text").fill("word " * 201)
        page.get_by_role("button", name="Compute it").click()
        page.wait_for_function("document.querySelector('#error').textContent.includes('this one 201')")
        page.get_by_role("button", name="A small pool").click()
        assert guess(page, 1) == "Exactly: 1."
        assert "can no longer be found as" in page.locator("#event").inner_text()
        assert shown_blocks(page) == expected_blocks(small["settings"], small["actions"])


def shown_blocks(page):
    "What the page shows: block tables, the free list, reference counts."
    return page.evaluate("""(() => {
        const numbers = (e, key) => [...e.querySelectorAll('.card')].map(card => Number(card.dataset[key]));
        const texts = [...document.querySelectorAll('[data-text]')].map(e => numbers(e, 'block'));
        const at = id => document.getElementById(id);
        return [texts, numbers(at('free'), 'block'), numbers(at('pool'), 'refs')];
    })()""")


def expected_blocks(settings, actions):
    last = blocks_lab.run(settings, actions)[-1]
    tables = [[b["block"] for b in text["blocks"]] for text in last["texts"]]
    return [tables, last["free"], [b["refs"] for b in last["blocks"]]]


def shown_stages(page):
    "The page's table: a list of percentages for each row."
    return page.evaluate("""[...document.querySelectorAll('#body tr')].map(row => [...row.cells].slice(1).map(c => c.innerText))""")


def percent(p): return "\u2013" if p == 0 else "< 0.1" if p < 0.0005 else f"{100*p:.1f}"


def expected_stages(entry, settings):
    run = sampling_lab.run(entry, settings, 0, 0)
    rows = [[percent(c["probs"][i]) for c in run["columns"]] for i in range(sampling_lab.SHOWN)]
    kept = [c["kept"] + c["rest_kept"]*run["num_rest"] for c in run["columns"]]
    return [*rows, [percent(c["others"]) for c in run["columns"]], [f"{k:,}".replace(",", "\u202f") for k in kept]]


@pytest.mark.slow
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_the_sampling_page(browser, layouts, view, entries):
    story, fact, _ = data("sampling")
    with opened(browser, layouts, "sampling", view) as page:
        assert guess(page, 10) == f"You said 10, the answer is {sampling_answer(story, entries[0])}: 37 too low."
        assert shown_stages(page) == expected_stages(entries[0], story["settings"])
        page.locator("#temperature").focus()
        for _ in range(3): page.keyboard.press("ArrowLeft")
        page.wait_for_function("document.querySelector('#sliders output').textContent === '0.7'")
        page.wait_for_function("!document.querySelector('#left').textContent.startsWith('47 ')")
        assert shown_stages(page) == expected_stages(entries[0], story["settings"] | {"temperature": 0.7})
        page.get_by_role("button", name="Next race").click()
        page.wait_for_function("document.querySelector('#winner').textContent.startsWith('Race 2')")
        page.get_by_role("button", name="200 races").click()
        settings = story["settings"] | {"temperature": 0.7}
        shares = [percent(d["share"]) for d in sampling_lab.draws(entries[0], settings, 0)]
        assert page.locator("#draws tbody td:nth-child(2)").all_inner_texts() == shares
        assert unlabelled(page) == []
        page.get_by_role("button", name="A fact").click()
        assert "percent" in guess(page, 50)
        assert shown_stages(page) == expected_stages(entries[1], fact["settings"])
        page.get_by_role("button", name="A story").click()
        guess(page, 47)
        page.get_by_role("button", name="200 races").click()


@pytest.mark.slow
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_the_roofline_page(browser, layouts, view):
    first, second, third = data("roofline")["scenarios"]
    with opened(browser, layouts, "roofline", view) as page:
        right = roofline_answer(first)
        assert guess(page, right - 5) == f"You said {right - 5}, the answer is {right}: 5 too low."
        assert str(right) in page.locator("#tiles").inner_text()
        page.get_by_role("button", name="A longer context").click()
        assert guess(page, roofline_answer(third)) == f"Exactly: {roofline_answer(third)} ms."
        page.get_by_label("memory, GB").fill("0")
        page.get_by_label("memory, GB").press("Tab")
        page.wait_for_function("document.querySelector('#error').textContent.startsWith('memory: ')")
        page.get_by_role("button", name="A small machine").click()
        assert guess(page, roofline_answer(second)) == f"Exactly: {roofline_answer(second)} tokens/s."
        assert page.locator("circle.measured").count() == 1 + len(next(with_files("machines"))["content"]["data"]["batch"])
        page.locator("#batch").focus()
        for _ in range(6): page.keyboard.press("ArrowRight")
        page.wait_for_function("document.querySelector('#story').textContent.startsWith('Arithmetic')")
        assert unlabelled(page) == []
