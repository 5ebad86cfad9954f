"Checks of the exercises of the chapter on the tokenizer."
import random

from nano_vllm.tokenizer import StopFilter

from . import attempt, exercise, expect, require


@exercise
def check_unfinished(unfinished):
    for char in "aé你🙂":
        data = b"ok" + char.encode()
        for n in range(2, len(data) + 1):
            wanted = n - 2 if n < len(data) else 0
            why = (f"these are the first {wanted} of the {len(char.encode())} bytes of {char!r}" if wanted
                   else "all of its characters are whole")
            expect(unfinished, (data[:n],), wanted, why)
    expect(unfinished, ("é你".encode(),), 0, "all of its characters are whole")
    expect(unfinished, (b"",), 0, "there is nothing")
    expect(unfinished, ("🙂".encode() + "🙂".encode()[:3],), 3, "one whole character, and three bytes of another")


@exercise
def check_held_back(held_back):
    def wanted(text, stops):
        return max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)

    cases = [("I say <", ["</b>"], "'<' may become '</b>'"), ("plain", ["</b>"], "nothing of it begins a stop string"),
             ("aaa", ["aab"], "'aa' may become 'aab', and the first 'a' may not"),
             ("ab", ["abab"], "'ab' may become 'abab'"), ("aba", ["abab", "bax"], "'aba' may become 'abab'"),
             ("x\n", ["\n\nQ", "\nUser"], "a line break may begin either"), ("", ["x"], "there is nothing"),
             ("abc", [], "there is no stop string"), ("so b", ["bc", "o bd"], "'o b' may become 'o bd', which is longer than 'b'")]
    rng = random.Random(0)
    letters = lambda n: "".join(rng.choice("ab") for _ in range(n))
    for text, stops, why in cases + [(letters(6), [letters(4), letters(3)], "") for _ in range(100)]:
        if any(stop in text for stop in stops): continue
        expect(held_back, (text, stops), wanted(text, stops), why)


@exercise
def check_overlooked(overlooked):
    require(isinstance(overlooked, (tuple, list)) and len(overlooked) == 2 and all(isinstance(s, str) for s in overlooked),
            f"your example is {overlooked!r}; it is to be a pair of strings, (stop, text)")
    stop, text = overlooked
    require(stop and stop in text, f"{stop!r} is not in {text!r}, so there is nothing to overlook")
    k = 0
    for i, char in enumerate(text):
        if stop[k] != char: k = 0
        k += stop[k] == char
        require(k < len(stop), f"the search that starts over finds {stop!r} in {text!r}, at character {i}",
                "look for a stop string whose beginning stands in it a second time, so that a mismatch in the middle is "
                "the beginning of a hit")
    return f"{text!r} holds {stop!r}, unseen"


@exercise
def check_inclusive(Inclusive):
    rng = random.Random(0)
    cases = [(["bold <", "/b", "> plain"], ["</b>"]), (["a", "a", "a", "b", "c"], ["aab"]), (["no stop", " here"], ["</b>"]),
             (["one STOP two"], ["STOP"]), (["x", "y", "z"], ["yz", "xyz"])]
    for _ in range(200):
        text = "".join(rng.choice("ab") for _ in range(12))
        cuts = sorted(rng.sample(range(1, 12), rng.randint(0, 4)))
        cases.append(([text[a:b] for a, b in zip([0, *cuts], [*cuts, 12])], [rng.choice(["aab", "abab", "bbb", "ba"])]))
    for pieces, stops in cases:
        plain, filter, shown = StopFilter(stops), attempt(f"Inclusive({stops})", Inclusive, stops), []
        safe = ""
        for i, piece in enumerate(pieces):
            safe += plain.add(piece)
            case = f"stop strings {stops}, pieces {pieces[:i + 1]}"
            shown.append(attempt(case, lambda: filter.add(piece)))
            require(isinstance(shown[-1], str), f"{case}: the last `add` gives {shown[-1]!r}. Is a `return` missing?")
            whole = safe + (plain.found or plain.held)
            require("".join(shown) == whole, f"{case}: {shown} has been shown, together {''.join(shown)!r}, expected {whole!r}",
                    f"{plain.found!r} ends it" if plain.found else "nothing needs to be held back")
            found = getattr(filter, "found", None)
            require(found == plain.found, f"{case}: `found` is {found!r}, expected {plain.found!r}")
            if plain.found: break
