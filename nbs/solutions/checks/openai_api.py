"Checks of the exercises of the chapter on the whole API. Nothing here opens a socket."
from . import WrongAnswer, attempt, exercise, require, same, show

INF = float("inf")


@exercise
def check_percentile(percentile):
    limits = [.1, .5, 1, INF]
    for counts, p, wanted, why in (
            ([5, 9, 10, 10], .5, .1, "5 of 10 values are at most 0.1, and that is half of them"),
            ([5, 9, 10, 10], .9, .5, "9 of 10 values are at most 0.5; the counts are sums already"),
            ([5, 9, 10, 10], .95, 1, "9 of 10 values are less than 95%"),
            ([0, 0, 4, 4], .5, 1, "no value is at most 0.5"),
            ([1, 2, 2, 100], .99, INF, "only 2 of 100 values have a bound"),
            ([0, 3, 3, 3], 0, .1, "of no values at all, each limit is a bound, and the smallest is 0.1"),
            ([0, 0, 0, 0], .5, None, "there are no values")):
        case = f"percentile({limits}, {counts}, {p})"
        got = attempt(case, percentile, limits, counts, p)
        require(got == wanted, f"{case} gives {show(got)}, expected {show(wanted)}", why)


class Spied:
    "A key that notes which of its letters have been looked at."
    def __init__(self, text): self.text, self.seen = text, []
    def __len__(self): return len(self.text)

    def __getitem__(self, i):
        if not isinstance(i, int): raise WrongAnswer("same_key takes slices; look at one letter at a time, so that they can be counted")
        letter = self.text[i]                    # IndexError ends a loop over the letters
        self.seen.append(i)
        return letter


@exercise
def check_same_key(same_key):
    key = "s3cret-key"
    looks = {}
    for given in (key, "S3cret-key", "s3cret-keY", "s3cret-kex", "xxxxxxxxxx", "s3cret", "s3cret-key-and-more", ""):
        a, b = Spied(given), Spied(key)
        case = f"same_key({given!r}, {key!r})"
        got = attempt(case, same_key, a, b)
        require(got is not None, f"{case} gives None. Is a `return` missing?")
        require(bool(got) == (given == key), f"{case} gives {show(got)}, expected {given == key}")
        looks.setdefault(len(given), {})[given] = len(a.seen) + len(b.seen)
    for length, counts in looks.items():
        if len(set(counts.values())) == 1: continue
        (one, n), (other, m) = min(counts.items(), key=lambda c: c[1]), max(counts.items(), key=lambda c: c[1])
        raise WrongAnswer(f"same_key looks at {n} letters for {one!r}, counting the key's, and at {m} for {other!r}: the time tells where the first difference is")


SHOWN = [(["Hello", " you"], ["Hello", " you"], "nothing of it may become the tag"),
         (["a <", "b"], ["a ", "<b"], "`<` might have become the tag, and has not: it is shown with the next piece"),
         (["a <ca", "ll> b", " c"], ["a ", "", ""], "the tag is there, and nothing is shown from it on"),
         (["a <call> b"], ["a "], "the tag is in the middle of a piece"),
         (["<<ca", "ll>x"], ["<", ""], "only the second `<` can be the tag's first letter"),
         (["<ca<c", "all>"], ["<ca", ""], "what might have become the tag has not, and its end may be the beginning of another one"),
         (["<c", "al", "l>x"], ["", "", ""], "the tag may come in three pieces, and is the same tag"),
         (["x", "", "<"], ["x", "", ""], "at the end `<` is still held back"), ([], [], "there is no piece")]


@exercise
def check_shown(shown):
    for pieces, wanted, why in SHOWN:
        case = f"shown({pieces}, '<call>')"
        got = attempt(case, shown, list(pieces), "<call>")
        if hasattr(got, "__next__"): got = attempt(case, list, got)        # of a generator
        require(same(got, wanted), f"{case} gives {show(got)}, expected {show(wanted)}", why)
