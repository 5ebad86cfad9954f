"""Structured output: the masks are an oracle's, every finished answer has its form, and nobody else notices.

(What the server makes of `response_format` and `tool_choice`: test_server.)"""
import importlib
import json
import pickle
import random
import re
import sys

import jsonschema
import numpy as np
import pytest
import torch
from helpers import assert_idle, tiny_folder
from nano_vllm import LLM, SamplingParams
from nano_vllm.sampler import unpack_mask
from nano_vllm.sampling_params import StructuredOutputsParams
from nano_vllm.structured_output import (EMPTY, NEVER, Form, GrammarMask, OneOf, Repeat, either, first_state, grammar_vocabulary, literal, make_grammar_mask,
                                         move, slow_mask, special_ids, then, to_grammar, walk)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory): return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(tiny): return LLM(tiny, num_kv_blocks=400, max_num_seqs=16)


def form_of(llm, **form):
    inputs = llm.engine.input_processor
    return Form(to_grammar(StructuredOutputsParams(**form)), str(inputs.tokenizer.path), inputs.vocab_size, tuple(sorted(inputs.eos_token_ids)))


def tokens_of(mask, output, size=49152):
    "The ids that may come next."
    return unpack_mask(mask.bits(output)[None], size)[0].nonzero()[:, 0].tolist()


# ---- masks against derivatives

ATOMS = {"[0-9]": OneOf(frozenset(b"0123456789")), "[a-f]": OneOf(frozenset(b"abcdef")), "ab": literal("ab"), "x": literal("x"), ":": literal(":"),
         "[^a-z]": None}


def random_expression(rng, depth):
    "A regular expression in the usual notation, and as an object."
    if depth == 0:
        text = rng.choice([a for a in ATOMS if ATOMS[a]])
        return text, ATOMS[text]
    (t, a), (u, b) = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    return rng.choice([(f"({t})({u})", then(a, b)), (f"(({t})|({u}))", either(a, b)), (f"({t})*", Repeat(a)), (f"(({t})?)", either(a, EMPTY))])


@pytest.fixture(scope="module")
def spelled(llm):
    inputs = llm.engine.input_processor
    tokens = grammar_vocabulary(str(inputs.tokenizer.path), inputs.vocab_size, tuple(sorted(inputs.eos_token_ids)))
    special = set(inputs.tokenizer.hf.all_special_ids)
    return [b"" if t in special else tokens.decode_bytes([t]) for t in range(inputs.vocab_size)]


@pytest.mark.parametrize("seed", range(12))
def test_masks_are_those_of_the_derivatives(llm, spelled, seed):
    rng = random.Random(seed)
    text, state = random_expression(rng, 3)
    mask, output = GrammarMask(form_of(llm, regex=text)), []
    short = [t for t, data in enumerate(spelled) if len(data) <= 3]
    some = sorted({*rng.sample(range(len(spelled)), 3000), *rng.sample(short, 2000), *(t for t in short if re.fullmatch(rb"[0-9a-fx:]*", spelled[t])), 2})
    for _ in range(6):
        bits = unpack_mask(mask.bits(output)[None], len(spelled))[0]
        wanted = slow_mask(state, [spelled[t] for t in some], [some.index(2)])
        case = f"{text!r} after {b''.join(spelled[t] for t in output)!r}"
        next_bytes = [b for b in range(128) if move(state, b) != NEVER]
        if len(next_bytes) == 1 and not state.is_complete:      # where a text is forced, its own tokens are enough
            assert bits.any() and not (bits[some] & ~wanted).any(), case
        else: assert bits[some].tolist() == wanted.tolist(), case
        going_on = [t for t in bits.nonzero()[:, 0].tolist() if t != 2]
        if not going_on: break
        output.append(rng.choice(going_on))
        state = walk(state, spelled[output[-1]])
        assert state != NEVER


def test_an_oracle_that_is_wrong_would_be_seen(llm, spelled):
    "The same comparison with a wrong expression fails."
    mask = unpack_mask(GrammarMask(form_of(llm, regex="[0-9]+")).bits([])[None], len(spelled))[0]
    digits = then(ATOMS["[0-9]"], Repeat(ATOMS["[0-9]"]))
    assert mask.equal(slow_mask(digits, spelled, [2])) and not mask.equal(slow_mask(then(digits, ATOMS["x"]), spelled, [2]) | slow_mask(literal("x"), spelled, [2]))


@pytest.mark.parametrize("texts", [["yes", "no"], ['say "no"', "\\", "é👋", " a\n\tb"], ["a", "ab", "abc"]])
def test_a_choice_gives_one_of_the_texts(llm, texts):
    rng, tokenizer = random.Random(0), llm.tokenizer
    for _ in range(20):
        mask, output = GrammarMask(form_of(llm, choice=texts)), []
        while (token := rng.choice(tokens_of(mask, output))) != 2: output.append(token)
        assert tokenizer.decode(output) in texts


def test_moving_there_and_back_gives_what_a_new_mask_gives(llm):
    "As guesses do: longer, shorter, other outputs, in any order; wrong ones allow everything."
    rng, form = random.Random(0), form_of(llm, json_object=True)
    texts = ['{"a": [1, 2, {"b": null}]}', '{"a": [true, "x"]}', '{"a', '{"a": [1}', "no", '{"": ""}']
    outputs = [llm.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    outputs[0].append(2)
    mask, seen = GrammarMask(form), set()
    for _ in range(150):
        output = rng.choice(outputs)
        output = output[:rng.randint(0, len(output))]
        fresh = GrammarMask(form).bits(output)
        assert torch.equal(mask.bits(output), fresh)
        seen.add(bool((fresh == -1).all()))
    assert seen == {True, False}


def test_a_mask_goes_to_another_process(llm):
    mask = GrammarMask(form_of(llm, regex="[0-9]{2}x"))
    digit = llm.tokenizer.encode("1", add_special_tokens=False)
    mask.bits(digit)
    copy = pickle.loads(pickle.dumps(mask))
    assert copy.read == [] and torch.equal(copy.bits(digit * 2), mask.bits(digit * 2))


# ---- JSON of random schemas

def random_schema(rng, depth=3):
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "bounds"] + ["object", "array", "anyOf"] * (depth > 0)
    kind = rng.choice(kinds)
    inner = lambda: random_schema(rng, depth - 1)  # noqa: E731
    if kind == "object":
        names = rng.sample(["name", "a b", "é", 'q"', "age", "x"], rng.randint(0, 4))
        schema = dict(type="object", properties={name: inner() for name in names}, required=rng.sample(names, rng.randint(0, len(names))))
        return schema | (dict(additionalProperties=False) if rng.random() < .7 else {})
    if kind == "array":
        low = rng.randint(0, 2)
        return dict(type="array", items=inner(), minItems=low, maxItems=low + rng.randint(0, 2))
    if kind == "anyOf": return dict(anyOf=[inner() for _ in range(rng.randint(1, 3))])
    if kind == "enum": return dict(enum=rng.sample(["red", "", 3, None, True, 'a"b\\', 1.5], 3))
    if kind == "const": return dict(const=rng.choice(["x", 7, None, False]))
    if kind == "bounds": return rng.choice([dict(type="integer", minimum=-3, maximum=12), dict(type="string", minLength=2, maxLength=5),
                                            dict(type="string", pattern="^[a-c]+[0-9]?$")])
    return dict(type=kind)


def random_answer(mask, rng, size, spelled, longest=200):
    "Tokens drawn from the masks, more often those that close something; None if it does not end."
    output = []
    closing = [t for t, data in enumerate(spelled) if data in (b'"', b"}", b"]", b'"}', b'"]', b'",')]
    for _ in range(longest):
        allowed = unpack_mask(mask.bits(output)[None], size)[0]
        if allowed[2]: return output
        assert allowed.any(), f"nothing may come after {output}"
        near = [t for t in closing if allowed[t]]
        ids = allowed.nonzero()[:, 0]
        output.append(rng.choice(near) if near and rng.random() < .6 else int(ids[rng.randrange(len(ids))]))
    return None


def check_schemas(llm, spelled, seeds):
    finished = 0
    for seed in seeds:
        rng = random.Random(seed)
        schema = random_schema(rng)
        answer = random_answer(GrammarMask(form_of(llm, json=schema)), rng, len(spelled), spelled)
        if answer is None: continue
        finished += 1
        text = b"".join(spelled[t] for t in answer).decode()
        jsonschema.validate(json.loads(text), schema)
    return finished


def test_every_finished_answer_is_valid_under_its_schema(llm, spelled):
    finished = check_schemas(llm, spelled, range(500))
    assert finished > 450, finished


def held(schema_or_form, **params):
    form = schema_or_form if isinstance(schema_or_form, StructuredOutputsParams) else StructuredOutputsParams(json=schema_or_form)
    return SamplingParams(structured_outputs=form, **params)


def check_answers(llm, seeds, max_tokens):
    "Answers of the engine's own sampler, all in one batch, to random schemas, expressions and choices."
    rng, params = random.Random(seeds.start), []
    for seed in seeds:
        form = rng.choice([dict(json=random_schema(random.Random(seed), 2)), dict(regex="[a-c]{2,4}(-[0-9]{1,2})?"), dict(choice=["yes", "no", "perhaps"])])
        params.append(held(StructuredOutputsParams(**form), temperature=1, seed=seed, max_tokens=max_tokens, n=rng.choice([1, 2])))
    outs = llm.generate([[3 + i] * (1 + i % 40) for i in range(len(params))], params, use_tqdm=False)
    finished = 0
    for p, out in zip(params, outs):
        form = p.structured_outputs
        for answer in out.outputs:
            if answer.finish_reason != "stop": continue
            finished += 1
            if form.form == "json": jsonschema.validate(json.loads(answer.text), form.json)
            elif form.form == "regex": assert re.fullmatch(form.regex, answer.text)
            else: assert answer.text in form.choice
    assert_idle(llm)
    return finished, [[o.token_ids for o in out.outputs] for out in outs]


def test_answers_of_the_engine_have_their_forms(llm):
    finished, _ = check_answers(llm, range(40), 24)
    assert finished >= 20, finished


@pytest.mark.slow
def test_answers_of_the_demo_model_have_their_forms():
    finished, _ = check_answers(LLM("smollm2-135m", max_model_len=1024, num_kv_blocks=2000), range(500), 80)
    print(finished)
    assert finished >= 400, finished


# ---- nothing depends on company, chunks, preemption, the loop, guesses, ranks

WAYS = dict(overlapped=dict(async_scheduling=True), synchronous=dict(async_scheduling=False), chunks=dict(max_num_batched_tokens=8, max_num_seqs=8),
            small_pool=dict(num_kv_blocks=14, block_size=4, max_model_len=56, max_num_seqs=8),
            ngram=dict(speculative_config=dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1)))


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_the_same_in_every_way(tiny, llm, way):
    schema = dict(type="object", properties=dict(a=dict(enum=["x", "yy"]), b=dict(type="array", items=dict(type="integer"))), required=["a", "b"])
    forms = [dict(json=schema), dict(regex="(ab|ba){4,20}"), None, dict(choice=["one two three four", "one two five"]), dict(json_object=True), TAGGED]
    params = [SamplingParams(temperature=.9, seed=i, max_tokens=20, structured_outputs=forms[i % 6]) for i in range(12)]
    prompts = [[7, 8, 9] * (1 + i % 5) for i in range(12)]
    alone = [llm.generate([p], [q], use_tqdm=False)[0]["token_ids"] for p, q in zip(prompts, params)]
    other = LLM(tiny, **dict(num_kv_blocks=400) | WAYS[way])
    if way == "ngram":
        from test_speculative import eager_to_guess
        eager_to_guess(other)
    outs = other.generate(prompts, params, use_tqdm=False)
    assert [out["token_ids"] for out in outs] == alone
    if way == "small_pool": assert other.engine.scheduler.num_preemptions > 0
    if way == "ngram": assert other.engine.speculator.stats.num_accepted_tokens > 0
    while other.engine.in_flight: other.engine.step()
    assert_idle(other)


@pytest.mark.slow
def test_two_ranks_give_the_same_tokens(tiny, llm):
    params = held(dict(type="object", properties=dict(a=dict(enum=["x", "yy"])), required=["a"]), temperature=.9, seed=4, max_tokens=24)
    expected = llm.generate([[5, 6]], params, use_tqdm=False)[0]["text"]
    two = LLM(tiny, num_kv_blocks=100, tensor_parallel_size=2)
    assert two.generate([[5, 6]], params, use_tqdm=False)[0]["text"] == expected


def test_greedy_logprobs_and_a_stop_string(llm):
    out, = llm.generate([[5]], held(StructuredOutputsParams(regex="[0-9]{6}"), temperature=0, logprobs=2, max_tokens=20), use_tqdm=False)
    assert re.fullmatch("[0-9]{6}", out["text"]) and out["finish_reason"] == "stop"
    assert len(out.outputs[0].logprobs) == len(out["token_ids"])
    out, = llm.generate([[5]], held(StructuredOutputsParams(choice=["a stop b"]), stop=["stop"]), use_tqdm=False)
    assert out["text"] == "a " and out.outputs[0].stop_reason == "stop"


# ---- tags in a free text

def tags(structures, triggers): return json.dumps(dict(structures=structures, triggers=triggers))


NUMBER, COLOR = {"type": "integer", "minimum": 0, "maximum": 9}, {"enum": ["red", "é"]}
TAGS = dict(begin="<f=one>", schema=NUMBER, end="</f>"), dict(begin="<f=two>", schema=COLOR, end=""), dict(begin='{"', schema=NUMBER, end="}")
TAGGED = dict(structural_tag=tags(TAGS, ["<f=", '{"']))
# the same as an expression of the library `regex`, which knows of a text whether it can become one that matches
FREE = r'(?:(?!<f=|\{").)*'
EXPRESSION = rf'(?s){FREE}(?:(?:<f=one>[0-9]</f>|<f=two>(?:"red"|"é")|\{{"[0-9]\}}){FREE})*'


def fits(text, partial): return importlib.import_module("regex").fullmatch(EXPRESSION, text, partial=partial) is not None


@pytest.mark.parametrize("text", ["", "no tag", "a <f=one>5</f> and <f=two>\"é\"<f=one>0</f>.", '{"7}{"8}', "<f=", "<f<f=one>", "x <f=two>\"re", "a { b", "<f=one>5</f", "\n<f"])
def test_a_tag_is_free_text_until_its_trigger(llm, spelled, text):
    "All tokens that may come next are those of the expression, for all tokens that are whole letters."
    mask, ids = GrammarMask(form_of(llm, **TAGGED)), llm.tokenizer.encode(text, add_special_tokens=False)
    allowed, end = set(tokens_of(mask, ids)), llm.tokenizer.eos_token_id
    special = special_ids(llm.tokenizer).values()
    assert (end in allowed) == fits(text, False)
    for t in random.Random(text).sample(range(len(spelled)), 3000) + [t for t in range(len(spelled)) if re.search(rb'[<{"0-9re]', spelled[t])]:
        try: new = spelled[t].decode()
        except UnicodeDecodeError: continue
        if new and t not in special: assert (t in allowed) == fits(text + new, True), (text, new)


def test_a_trigger_may_be_a_special_token(llm):
    inputs = llm.engine.input_processor
    special, text = special_ids(llm.tokenizer), "Hi"
    start = special["<|im_start|>"]
    given = tags([dict(begin="<|im_start|>f", schema=NUMBER, end="!")], ["<|im_start|>"])
    mask = inputs.make_mask(held(StructuredOutputsParams(structural_tag=given)))
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    assert start in tokens_of(mask, ids) and special["<|endoftext|>"] not in tokens_of(mask, ids)
    assert {llm.tokenizer.decode([t])[0] for t in tokens_of(mask, [*ids, start])} == {"f"}
    done = [*ids, start, *llm.tokenizer.encode("f5!", add_special_tokens=False)]
    assert {start, llm.tokenizer.eos_token_id} <= set(tokens_of(mask, done))


# ---- what is refused

BAD = [(dict(regex="(a"), "invalid regex"), (dict(regex="a(?=b)"), "look-around"), (dict(json={"type": "strin"}), "Invalid type"), (dict(json="{"), "json"),
       (dict(json={"enum": []}), "Unsatisfiable"), (dict(json={"a": {1, 2}}), "not JSON serializable"), (dict(json={"type": "string", "minLength": 3, "maxLength": 1}), "minLength"),
       (dict(json={"$ref": "http://127.0.0.1:9/x"}), "not present"), (dict(grammar="{{{"), "GBNF"), (dict(grammar="start: b"), "b"),
       (dict(structural_tag="{"), "structural_tag"), (dict(structural_tag="[]"), "lists of structures and triggers"), (dict(structural_tag=tags([], ["<f="])), "lists of"),
       (dict(structural_tag=tags([dict(begin="<f=a>", end="", schema=None)], ["<f="])), "schema, an object"), (dict(structural_tag=tags(["x"], ["<f="])), "got x"),
       (dict(structural_tag=tags([dict(begin="<g>", end="", schema={})], ["<f="])), "begin must start with one of triggers, got <g>"),
       (dict(structural_tag=tags([dict(begin="<f=a>", end="", schema={})], [3])), "structural_tag"),
       (dict(structural_tag=tags([dict(begin="<f=a>", end="", schema={"type": "strin"})], ["<f="])), "Invalid type"),
       (dict(json_object=True, whitespace_pattern="("), "unclosed group"), (dict(json={"enum": [json.loads("[" * 500 + "]" * 500)]}), "recursion")]


@pytest.mark.parametrize("form, why", BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_form_is_refused_before_any_work(llm, form, why):
    with pytest.raises(ValueError, match=r"structured_outputs") as e:
        llm.generate([[5], [6]], [SamplingParams(max_tokens=2), held(StructuredOutputsParams(**form))], use_tqdm=False)
    assert why in str(e.value) and len(str(e.value)) < 700
    assert_idle(llm)


def linked(n, entry):
    "A schema of `n` definitions, each of which `entry` makes of a reference to the next."
    made = {f"a{i}": entry({"$ref": f"#/$defs/a{i + 1}"}) for i in range(n)} | {f"a{n}": {"type": "integer"}}
    return {"$ref": "#/$defs/a0", "$defs": made}


def wrapped(n): return lambda ref: json.loads('{"anyOf": [{"type": "null"}, ' * n + json.dumps(ref) + "]}" * n)


CHAINS = {
    "references": dict(json=linked(3000, lambda ref: ref)), "arrays": dict(json=linked(5000, lambda ref: dict(type="array", items=ref))),
    "few, each deep": dict(json=linked(60, wrapped(50))), "as text": dict(json=json.dumps(linked(3000, lambda ref: ref)).replace("$ref", "\\u0024ref")),
    "rules": dict(grammar="start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(20_000)) + 'a20000: "x"'),
    "in a grammar": dict(grammar="start: %json " + json.dumps(linked(3000, lambda ref: ref))),
    "in a tag": dict(structural_tag=json.dumps(dict(structures=[dict(begin="<a>", end="</a>", schema=linked(3000, lambda ref: ref))], triggers=["<a"])))}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_that_would_fill_the_librarys_stack_is_refused(name):
    "It would end the process. (So this test must not ask the library without the check.)"
    with pytest.raises(ValueError, match="structured_outputs.*at most (1000|500)"): to_grammar(StructuredOutputsParams(**CHAINS[name]))


def test_what_leads_deep_and_not_too_deep_is_taken(llm):
    for form in (dict(json=linked(480, lambda ref: dict(type="array", items=ref))), dict(json=linked(990, lambda ref: ref)), dict(json=linked(45, wrapped(10))), dict(json={"type": "array", "items": {"$ref": "#"}}),
                 dict(grammar="start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(490)) + 'a490: "x"')):
        make_grammar_mask(StructuredOutputsParams(**form), llm.engine.input_processor)


@pytest.mark.parametrize("fields", [{}, dict(regex="a", choice=["b"]), dict(regex=""), dict(regex=5), dict(choice=[]), dict(choice=["a", 3]), dict(choice="abc"),
                                    dict(json=3), dict(json=True), dict(json_object="yes"), dict(structural_tag={}), dict(structural_tag=""), dict(grammar=None), dict(regex="\ud800"),
                                    dict(regex="a", disable_any_whitespace="no"), dict(schema={})])
def test_bad_fields_are_refused_by_name(fields):
    with pytest.raises(ValueError, match="structured_outputs|structural_tag|disable_any_whitespace"): SamplingParams(structured_outputs=fields)


@pytest.mark.parametrize("other", [dict(ignore_eos=True), dict(min_tokens=1), dict(bad_words=["x"]), dict(allowed_token_ids=[5])])
def test_what_goes_against_a_form_is_refused(other):
    with pytest.raises(ValueError, match=f"{next(iter(other))} must be .* with structured_outputs"): held(StructuredOutputsParams(regex="a"), **other)


def test_without_the_library_the_error_names_the_extra(llm, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install nano_vllm\[structured\]"):
        llm.generate([[5]], held(StructuredOutputsParams(regex="a")), use_tqdm=False)
    assert_idle(llm)


def test_a_grammar_that_outgrows_its_limits_ends_the_text(llm):
    "The library stops; the request ends, and the others go on."
    from llguidance import LLMatcher, LLParserLimits
    form = form_of(llm, regex="[a-z]*(ab|[c-z]{1,50})*[0-9]{1,90}")
    vocabulary = grammar_vocabulary(form.path, form.vocab_size, form.eos_token_ids)
    matcher = LLMatcher(vocabulary, form.grammar, limits=LLParserLimits(step_lexer_fuel=1, initial_lexer_fuel=10**6))
    mask = GrammarMask(form)
    mask.matcher = matcher
    ids = tokens_of(mask, [])
    assert matcher.is_error() and ids == [2]


def test_a_form_costs_its_neighbours_no_tokens(llm):
    free = SamplingParams(temperature=1, seed=9, max_tokens=12, ignore_eos=True)
    alone, = llm.generate([[5, 6]], free, use_tqdm=False)
    together = llm.generate([[5, 6], [7]], [free, held(StructuredOutputsParams(choice=["a"]), max_tokens=12)], use_tqdm=False)
    assert together[0]["token_ids"] == alone["token_ids"] and together[1]["text"] == "a"


def test_first_states_are_shared_and_bounded(llm):
    form = form_of(llm, regex="[0-9]{7}")
    assert first_state(form) is first_state(form_of(llm, regex="[0-9]{7}")) and first_state.cache_info().maxsize == 64
    assert np.unpackbits(np.frombuffer(first_state(form).deep_copy().compute_bitmask(), np.uint8)).sum() == 10
