"Chapter 02: the stream of pieces against decoding everything at once; stop strings; refusals."
import codecs, json, random
import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer as RawTokenizer, decoders, models, normalizers, pre_tokenizers
from nano_vllm.tokenizer import Detokenizer, StopFilter, Tokenizer, find_borders
from nano_vllm.workbench import fetch

CHATML = ("{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
          "{% if add_generation_prompt %}<s>assistant\n{% endif %}")
TEXTS = ["", " ", "Hello world", "naïve café", "你好,世界", "👋🏽", "👩\u200d👩\u200d👧\u200d👦", "🏳️\u200d🌈", "🇩🇪🇯🇵",
         "किताब पढ़ो", "한국어", "e\u0301a\u0308", "\ufffd", "a\ufffd b", "𝔘𝔫𝔦", "\x00\x01", "  two  spaces \n\n\ttab ",
         "<0xE4>", "<|im_end|>", "مرحبا", "½ – “q”"]


def save(folder, raw, chat_template=None):
    from transformers import PreTrainedTokenizerFast
    hf = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    hf.chat_template = chat_template
    hf.save_pretrained(folder)
    return Tokenizer(folder)


def byte_fallback():
    "A tokenizer in the manner of Llama 2: text tokens with a metaspace, and 256 byte tokens."
    names = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    names += [*"▁Helowrd好,", "▁▁", "He", "ll", "Hell", "Hello", "▁Hello", "\ufffd", "▁\ufffd"]
    merges = [("▁", "▁"), ("H", "e"), ("l", "l"), ("He", "ll"), ("Hell", "o"), ("▁", "Hello"), ("▁", "\ufffd")]
    raw = RawTokenizer(models.BPE({n: i for i, n in enumerate(names)}, merges, unk_token="<unk>",
                                  byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    raw.add_tokens(["added token"])
    return raw


def metaspace():
    names = ["<unk>", "▁", *"Helowrd,", "▁Hello", "▁world", "Hello", "lo", "▁▁"]
    raw = RawTokenizer(models.Unigram([(n, -1.0 - i/10) for i, n in enumerate(names)], unk_id=0))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return raw


def wordpiece():
    names = ["<unk>", "<s>", "</s>", "hello", "world", "##s", "##ing", "a", "."]
    raw = RawTokenizer(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
    return raw


@pytest.fixture(scope="module")
def demo(): return Tokenizer(fetch())


@pytest.fixture(scope="module")
def fallback(tmp_path_factory): return save(tmp_path_factory.mktemp("fallback"), byte_fallback())


@pytest.fixture(scope="module", params=["demo", "fallback", "metaspace", "wordpiece"])
def tokenizer(request, tmp_path_factory):
    if request.param in ("demo", "fallback"): return request.getfixturevalue(request.param)
    return save(tmp_path_factory.mktemp(request.param), globals()[request.param]())


def stream(tokenizer, ids, rng=None, **kwargs):
    "All pieces, the last one from finish(); ids are handed over one by one, or in random portions."
    d, pieces, at = Detokenizer(tokenizer, **kwargs), [], 0
    while at < len(ids):
        size = rng.choice([1, 1, 2, 3, 7]) if rng else 1
        pieces.append(d.add(ids[at:at+size]))
        at += size
        assert d.text == "".join(pieces) and d.text_from(len(d.text) - len(pieces[-1])) == pieces[-1]
    pieces.append(d.finish())
    assert d.text == "".join(pieces) and d.finish() == "" and d.add([0] if d.stop_reason else []) == ""
    return pieces, d


def plain(tokenizer, text): return tokenizer.hf.encode(text, add_special_tokens=False)


# --- the pieces join to decode(ids)

@pytest.mark.parametrize("text", TEXTS)
def test_texts(tokenizer, text):
    ids = plain(tokenizer, text)
    for rng in (None, random.Random(0)):
        pieces, d = stream(tokenizer, ids, rng)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert d.num_tokens == len(ids) and d.stop_reason is None


@pytest.mark.parametrize("text", TEXTS)
def test_no_half_characters(demo, text):
    "Every piece is made of the text's own characters, in order; nothing is shown late."
    pieces, _ = stream(demo, plain(demo, text), skip_special_tokens=False)
    assert "".join(pieces) == text and pieces[-1] == ""
    shown, sent = "", b""
    for i, piece in zip(plain(demo, text), pieces):
        shown, sent = shown + piece, sent + demo.token_bytes(i, False)
        assert shown == sent.decode("utf-8", "ignore")


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60), seed=st.integers(0, 9))
def test_random_text(demo, fallback, text, seed):
    for tokenizer in (demo, fallback):
        ids = plain(tokenizer, text)
        pieces, _ = stream(tokenizer, ids, random.Random(seed), skip_special_tokens=False)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_random_ids_byte_level(demo, data, skip):
    torn = [i for i in range(20, 700) if "\ufffd" in demo.decode([i])]
    ids = data.draw(st.lists(st.sampled_from(torn) | st.integers(0, demo.vocab_size + 50), max_size=40))
    split = data.draw(st.integers(0, len(ids)))
    pieces, _ = stream(demo, ids[split:], random.Random(len(ids)), skip_special_tokens=skip)
    assert "".join(pieces) == demo.decode(ids[split:], skip)
    # after a prompt: what its last, unfinished character hides shows up with the answer
    pieces, _ = stream(demo, ids[split:], prompt_token_ids=ids[:split], skip_special_tokens=skip)
    prompt = b"".join(demo.token_bytes(i, skip) for i in ids[:split])
    before = codecs.getincrementaldecoder("utf-8")("replace").decode(prompt)
    assert before + "".join(pieces) == demo.decode(ids, skip)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_random_ids_byte_fallback(fallback, data, skip):
    "Equal wherever each run of byte tokens is valid; else the valid characters are kept."
    ids = data.draw(st.lists(st.integers(0, fallback.vocab_size - 1) | st.sampled_from(plain(fallback, "你👋 ß")),
                             max_size=30))
    pieces, _ = stream(fallback, ids, random.Random(len(ids)), skip_special_tokens=skip)
    whole = fallback.decode(ids, skip)
    tokens = [fallback.hf.convert_ids_to_tokens(i) for i in ids]
    if "\ufffd" not in whole or not any(t.startswith("<0x") for t in tokens): assert "".join(pieces) == whole
    bare = [i for i, t in zip(ids, tokens) if not t.startswith("<0x")]
    pieces, _ = stream(fallback, bare, skip_special_tokens=skip)
    assert "".join(pieces) == fallback.decode(bare, skip)


def test_invalid_run_keeps_what_was_shown(fallback):
    ids = plain(fallback, "你")[1:] + [fallback.hf.convert_tokens_to_ids("<0xFF>")]
    assert stream(fallback, ids)[0] == ["", "", "你", "\ufffd", ""]
    assert fallback.decode(ids) == "\ufffd"*4  # where decoding at once differs, as the chapter says


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_bytes_equal_the_unicode_standard(fallback, data):
    ids = [fallback.hf.convert_tokens_to_ids(f"<0x{b:02X}>") for b in data]
    pieces, _ = stream(fallback, ids, prompt_token_ids=plain(fallback, "Hello"))
    assert "".join(pieces) == data.decode("utf-8", "replace")


def test_incomplete_end(demo):
    first, second = plain(demo, "你")
    pieces, _ = stream(demo, [first])
    assert pieces == ["", "\ufffd"] and demo.decode([first]) == "\ufffd"


# --- special tokens, the prompt's end

def test_special_tokens(demo, fallback):
    for tokenizer, eos in ((demo, "<|im_end|>"), (fallback, "</s>")):
        ids = plain(tokenizer, "Hello")
        end = [tokenizer.eos_token_id]
        assert "".join(stream(tokenizer, end + ids + end)[0]) == "Hello"
        kept = "".join(stream(tokenizer, ids + end, skip_special_tokens=False)[0])
        assert kept == f"Hello{eos}"


def test_special_token_inside_a_character(demo):
    first, second = plain(demo, "你")
    ids = [first, demo.eos_token_id, second]
    assert "".join(stream(demo, ids)[0]) == demo.decode(ids) == "你"
    assert "".join(stream(demo, ids, skip_special_tokens=False)[0]) == demo.decode(ids, False)


def test_leading_space_continues_the_prompt(fallback):
    hello, bos = plain(fallback, "Hello"), fallback.hf.bos_token_id
    for prompt in ([], [bos], [bos, bos]): assert stream(fallback, hello, prompt_token_ids=prompt)[0][0] == "Hello"
    for prompt in (hello, [bos] + hello, hello + [bos], tuple(hello)):
        assert stream(fallback, hello, prompt_token_ids=prompt)[0][0] == " Hello"
    visible = stream(fallback, hello, prompt_token_ids=[bos], skip_special_tokens=False)[0][0]
    assert visible == fallback.decode([bos] + hello, False)[len("<s>"):] == " Hello"
    space = fallback.hf.convert_tokens_to_ids("▁")
    assert "".join(stream(fallback, [bos, space] + hello)[0]) == fallback.decode([space] + hello) == " Hello"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([1, *range(259, 270), 290]), max_size=12), st.integers(0, 12))
def test_prompt_and_answer_join(fallback, ids, split):
    prompt, answer = ids[:split], ids[split:]
    pieces, _ = stream(fallback, answer, prompt_token_ids=prompt)
    assert fallback.decode(prompt) + "".join(pieces) == fallback.decode(ids)


def test_prompt_ends_inside_a_character(demo):
    first, second = plain(demo, "你")
    for prompt in ([first], plain(demo, "long text before it ") + [first]):
        assert stream(demo, [second], prompt_token_ids=prompt)[0] == ["你", ""]
    assert stream(demo, plain(demo, "a"), prompt_token_ids=[first])[0] == ["\ufffda", ""]


# --- stop strings

def first_stop(text, stops):
    "The rule, by trying every end: (text before, stop string) or (text, None)."
    for end in range(len(text) + 1):
        hits = [s for s in stops if text[:end].endswith(s)]
        if hits: return text[:end - len(max(hits, key=len))], max(hits, key=len)
    return text, None


def test_stop_spans_tokens(demo):
    ids = plain(demo, "The end</answer> and more")
    pieces, d = stream(demo, ids, stop="</answer>")
    assert (d.text, d.stop_reason) == ("The end", "</answer>")
    consumed = demo.decode(ids[:d.num_tokens])
    assert "</answer>" in consumed and "</answer>" not in demo.decode(ids[:d.num_tokens - 1])
    assert stream(demo, ids, random.Random(3), stop=["</answer>"])[1].num_tokens == d.num_tokens


def test_consumed_tokens_within_one_call(demo):
    ids = plain(demo, "one two three four")
    d = Detokenizer(demo, stop=["three"])
    assert d.add(ids) == "one two " and d.num_tokens < len(ids)
    assert demo.decode(ids[:d.num_tokens]) == "one two three"
    assert d.add(ids) == d.finish() == "" and demo.decode(ids[:d.num_tokens]) == "one two three"


@settings(max_examples=500, deadline=None)
@given(st.text("ab你", max_size=25), st.lists(st.text("ab你", min_size=1, max_size=5), max_size=4), st.integers(0, 9))
def test_stop_filter(text, stops, seed):
    rng, f, shown, seen = random.Random(seed), StopFilter(stops), "", ""
    while seen != text and f.found is None:
        piece = text[len(seen):len(seen) + rng.randint(1, 4)]
        shown, seen = shown + f.add(piece), seen + piece
        if f.found: break
        longest = max((k for s in stops for k in range(len(s)) if seen.endswith(s[:k])), default=0)
        assert shown == seen[:len(seen) - longest] and f.held == seen[len(seen) - longest:]  # no less, no more
    assert (shown + f.held, f.found) == first_stop(text, stops)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_stop_strings_in_a_stream(demo, data):
    text = data.draw(st.text("ab 👋你\n", max_size=30))
    stops = data.draw(st.lists(st.text("ab 👋你\n", min_size=1, max_size=6), max_size=3))
    ids, rng = plain(demo, text), random.Random(0)
    expected = first_stop(demo.decode(ids), stops)
    (one, d1), (many, d2) = stream(demo, ids, stop=stops), stream(demo, ids, rng, stop=stops)
    for d in (d1, d2): assert (d.text, d.stop_reason) == expected
    assert d1.num_tokens == d2.num_tokens


@pytest.mark.parametrize("stops,text,expected", [
    (["world", "lo"], "hello world", ("hel", "lo")),
    (["b", "ab"], "xab", ("x", "ab")),
    (["abcd", "bc"], "abcd", ("a", "bc")),
    (["aab"], "aaab", ("a", "aab")),
    (["\n\n"], "a\n\n\nb", ("a", "\n\n")),
    (["👋"], "hi 👋 there", ("hi ", "👋")),
    (["never"], "nev", ("nev", None)),
    ([], "text", ("text", None))])
def test_stop_rules(demo, stops, text, expected):
    for order in (stops, stops[::-1]):
        d = stream(demo, plain(demo, text), stop=order)[1]
        assert (d.text, d.stop_reason) == expected


@pytest.mark.parametrize("start", [0, 1, 4, 5, 6])
def test_text_from_a_character_on(demo, start):
    "Characters, not bytes; reading disturbs nothing that is written afterwards."
    d, ids = Detokenizer(demo), plain(demo, "né 👋 你")
    for n in range(len(ids)):
        d.add(ids[n:n + 1])
        assert d.text_from(start) == d.text[start:] and d.text_from(0) == d.text
    assert d.text == "né 👋 你"


@pytest.mark.parametrize("min_tokens, expected", [(0, "a"), (1, "a"), (2, "a b a"), (3, "a b a"), (4, "a b a b a"),
                                                  (5, "a b a b a"), (9, None)])
def test_stop_strings_are_looked_for_after_min_tokens(demo, min_tokens, expected):
    ids = plain(demo, "a b a b a b a b")
    assert [demo.decode([i]) for i in ids] == ["a", " b"] + [" a", " b"] * 3
    for rng in (None, random.Random(1)):
        d = stream(demo, ids, rng, stop=" b", min_tokens=min_tokens)[1]
        if expected is None: assert (d.text, d.stop_reason) == (demo.decode(ids), None)
        else: assert d.stop_reason == " b" and d.text == expected


def test_borders():
    for s in ("a", "aaaa", "abab", "aabaac", "abcabd"):
        assert find_borders(s) == [max(k for k in range(n) if s[:n].endswith(s[:k])) for n in range(1, len(s)+1)]


@pytest.mark.parametrize("stop", ["", [""], ["ok", ""], [3], [None]])
def test_bad_stop(demo, stop):
    with pytest.raises(ValueError, match="stop"): Detokenizer(demo, stop=stop)


# --- linear work

class Counted:
    "A tokenizer that counts how many ids its decoder is given."
    def __init__(self, tokenizer): self.hf, self.work = tokenizer.hf, 0
    def decode(self, ids, skip_special_tokens=True):
        self.work += len(ids)
        return self.hf.decode(ids, skip_special_tokens=skip_special_tokens)


def test_linear_on_invalid_bytes(tmp_path):
    tokenizer = Tokenizer(fetch())
    counted = Counted(tokenizer)
    tokenizer.decode = counted.decode
    lone = plain(tokenizer, "你")[-1]
    d = Detokenizer(tokenizer, stop=["never here"])
    for n in range(20_000):
        assert d.add([lone]) == "\ufffd"  # shown at once, never piled up
    assert counted.work <= 6 and d.text == "\ufffd"*20_000


def test_linear_on_a_hard_stop_string():
    calls = [0]
    class Borders(list):
        def __getitem__(self, i): calls[0] += 1; return super().__getitem__(i)
    f = StopFilter(["a"*500 + "b"])
    f.stops = [(s, Borders(b)) for s, b in f.stops]
    text = ("a"*499 + "c") * 40
    assert "".join(f.add(c) for c in text) + f.held == text
    assert calls[0] <= len(text)  # fallbacks never outnumber characters


# --- the wrapper

def test_encode_decode(demo):
    assert demo.decode(demo.encode("Hello 你")) == "Hello 你"
    assert demo.eos_token_id == 2 and demo.vocab_size == len(demo.hf) == 49152
    assert demo.decode([2], skip_special_tokens=False) == "<|im_end|>" and demo.decode([2]) == ""
    assert all(type(i) is int for i in demo.encode("Hello"))


def test_spaces_are_not_cleaned_up(demo):
    ids = plain(demo, "a . b , c ! it 's")
    demo.hf.clean_up_tokenization_spaces = True
    try: assert demo.decode(ids) == "".join(stream(demo, ids)[0]) == "a . b , c ! it 's"
    finally: demo.hf.clean_up_tokenization_spaces = False


def test_chat_template(demo):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 👋"}]
    turn = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi 👋<|im_end|>\n"
    ids = demo.apply_chat_template(messages)
    assert all(type(i) is int for i in ids)
    assert demo.decode(ids, False) == turn + "<|im_start|>assistant\n"
    assert demo.decode(demo.apply_chat_template(messages, add_generation_prompt=False), False) == turn
    assert messages[0] == {"role": "system", "content": "Be brief."}


def test_chat_template_adds_no_second_bos(tmp_path):
    tokenizer = save(tmp_path, byte_fallback(), CHATML)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert ids[0] == tokenizer.hf.bos_token_id and ids[1] != ids[0]


@pytest.mark.parametrize("messages,field", [
    ([], "messages"), (None, "messages"), ("Hi", "messages"), ({"role": "user", "content": "x"}, "messages"),
    (["Hi"], r"messages\[0\].role"), ([{"content": "x"}], r"messages\[0\].role"),
    ([{"content": "x", "tool_calls": [{}]}], r"messages\[0\].role"), ([{"role": "user"}], r"messages\[0\].content"), ([{"role": "user", "content": None}], r"messages\[0\].content"),
    ([{"role": "user", "content": "x"}, {"role": 3, "content": "x"}], r"messages\[1\].role")])
def test_bad_messages(demo, messages, field):
    with pytest.raises(ValueError, match=field): demo.apply_chat_template(messages)


def test_no_chat_template(fallback):
    with pytest.raises(ValueError, match="messages.*no chat template"):
        fallback.apply_chat_template([{"role": "user", "content": "x"}])


def test_template_refuses(tmp_path):
    tokenizer = save(tmp_path, byte_fallback(), "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="messages: roles must alternate"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("text", [None, 3, b"x", ["x"], "\ud800"])
def test_bad_prompt(demo, text):
    with pytest.raises(ValueError, match="prompt"): demo.encode(text)


def test_missing_or_broken_folder(tmp_path):
    with pytest.raises(ValueError, match="tokenizer: .*none of tokenizer.json"): Tokenizer(tmp_path)
    with pytest.raises(ValueError, match="tokenizer: '/no/such"): Tokenizer("/no/such")
    (tmp_path/"tokenizer.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(ValueError, match="tokenizer"): Tokenizer(tmp_path)


def test_import_is_light():
    import subprocess, sys
    code = "import sys, nano_vllm.tokenizer; print({'transformers', 'tokenizers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
