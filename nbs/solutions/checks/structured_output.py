"Checks of the exercises of the chapter on structured output."
import itertools

from . import attempt, exercise, expect, require, show

VOCABULARY = ["", "y", "yes", "no", "none", "n", "o", "ne", "e", " no", "x"]


@exercise
def check_allowed_tokens(allowed_tokens):
    texts = ["yes", "no", "none"]
    why = {"": "'' is the end, and no text is complete yet", "no": "the answer may end, or go on with 'ne'", "n": "'no' and 'none' begin so",
           "nay": "no text begins so, so nothing may come", "yes": "only the end is left"}
    for said, reason in why.items():
        wanted = [said in texts if token == "" else any(t.startswith(said + token) for t in texts) for token in VOCABULARY]
        expect(allowed_tokens, (texts, said, VOCABULARY), wanted, reason)
    expect(allowed_tokens, (["a b", "a"], "a", [" ", "", " b", "b"]), [True, True, True, False], "a space is a letter as any other")


@exercise
def check_forced(forced):
    cases = [(["yes", "no", "none"], "", "", "y or n may come"), (["yes", "no", "none"], "y", "es", "only 'yes' begins so"),
             (["yes", "no", "none"], "n", "o", "both go on with 'o'; after it the answer may end"),
             (["yes", "no", "none"], "no", "", "the answer may end here"), (["yes", "no", "none"], "none", "", "the answer is complete"),
             (['{"name": 1}', '{"name": 22}'], '{"na', 'me": ', "then a digit is chosen"), (["no", "yes", "none"], "non", "e", "only 'none' begins so"),
             (["aab", "aac", "aad"], "", "aa", "all three begin with it"), (["x"], "", "x", "there is one text")]
    for texts, said, wanted, reason in cases: expect(forced, (texts, said), wanted, reason)


@exercise
def check_brackets(Brackets):
    def reading(text):
        "The state after `text`; None from the first byte on that cannot come."
        state = attempt("Brackets()", Brackets)
        for n, byte in enumerate(text.encode()):
            if state is None: return None
            state = attempt(f"after({chr(byte)!r}) behind {text[:n]!r}", state.after, byte)
        return state
    def depths(text): return list(itertools.accumulate({"[": 1, "]": -1}.get(c, -99) for c in text))
    texts = ["".join(t) for n in range(7) for t in itertools.product("[]", repeat=n)] + ["x", "[x", "[[]]" * 2, "[" * 500, "[" * 500 + "]" * 500]
    for text in texts:
        d = depths(text)
        possible = not d or min(d) >= 0 and 0 not in d[:-1]
        state = reading(text)
        require((state is not None) == possible, f"{show(text)} {'cannot come' if state is None else 'can come'}, says your class",
                "there is one outer list, closed by the last bracket" if not possible else "it is the beginning of a list of lists")
        if state is None: continue
        wanted = bool(d) and d[-1] == 0
        got = attempt(f"is_complete behind {show(text)}", lambda: state.is_complete)
        require(bool(got) == wanted, f"behind {show(text)}, is_complete is {show(got)}, expected {wanted}", "the text is over when the first bracket is closed")
    state = reading("[[")
    state.after(ord("]"))
    require(state.after(ord("]")) is not None and reading("[[").after(ord("[")) is not None and not state.is_complete,
            "after() changes the state that it is asked of", "it should give a new one: the mask asks one state about many tokens")


@exercise
def check_at_most(at_most):
    from nano_vllm.structured_output import EMPTY, NEVER, OneOf, either, literal, then, walk
    digit, pair = OneOf(frozenset(b"0123456789")), literal("ab")
    for name, inner, piece in (("a digit", digit, b"7"), ("'ab'", pair, b"ab")):
        for n in (0, 1, 2, 5, 60):
            case = f"at_most({name}, {n})"
            made = attempt(case, at_most, inner, n, then, either, EMPTY)
            require(hasattr(made, "after"), f"{case} gives {show(made)}, not an expression", "Is a `return` missing?" if made is None else "")
            for times in {0, 1, n - 1, n, n + 1} - {-1}:
                state = walk(made, piece * times)
                fits = times <= n
                require((state != NEVER) == fits, f"{case} {'refuses' if fits else 'takes'} {times} of them")
                require(not fits or state.is_complete, f"{case}: behind {times} of them the text may end, and is_complete is False")
