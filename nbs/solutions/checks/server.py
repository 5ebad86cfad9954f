"Checks of the exercises of the chapter on the server. Nothing here opens a socket."
import json

from . import attempt, exercise, require, show


@exercise
def check_field_of(field_of):
    names = {"prompt", "top_p", "p", "n", "max_tokens"}
    for message, wanted, why in (
            ("max_tokens must be at least 1, got 0", "max_tokens", "it is the first word"),
            ("prompt[2]: token ids must be from 0 to 9", "prompt", "a bracket ends a word"),
            ("top_p must be at most 1", "top_p", "a part of a word is no word"),
            ("no news", None, "a part of a word is no word"), ("the body is not JSON", None, "no field is named"), ("", None, "no field is named"),
            ("at least 1 token must be in prompt, n is 3", "prompt", "the first word that is a field counts"),
            ("n must be 1 with top_p", "n", "the first word that is a field counts")):
        case = f"field_of({message!r}, {sorted(names)})"
        got = attempt(case, field_of, message, names)
        require(got == wanted, f"{case} gives {show(got)}, expected {show(wanted)}", why)


EVENTS = [{"text": "One,"}, {"text": "naïve 👋"}, {"text": "a\nb data: [DONE]"}, {"text": "", "usage": {"n": 3}}]


def stream_of(events, end="\n\n", extra=""):
    return (extra + "".join(f"data: {json.dumps(e, ensure_ascii=False)}{end}" for e in events) + f"data: [DONE]{end}").encode()


@exercise
def check_parse_events(parse_events):
    whole = stream_of(EVENTS)
    cases = {"all at once": [whole], "a line at a time": whole.splitlines(keepends=True),
             "a byte at a time": [whole[i:i+1] for i in range(len(whole))], "seven bytes at a time": [whole[i:i+7] for i in range(0, len(whole), 7)],
             "with a comment before it": [stream_of(EVENTS, extra=": keep-alive\n\n")], "with CRLF": [stream_of(EVENTS, end="\r\n\r\n")]}
    for name, pieces in cases.items():
        got = attempt(f"parse_events of a stream, {name},", lambda: list(parse_events(iter(pieces))))
        require(got == EVENTS, f"of a stream, {name}, parse_events yields {show(got)}, expected {show(EVENTS)}")
    left = iter([whole, b"data: {\"of\": \"nobody\"}\n\n"])
    require(list(parse_events(left)) == EVENTS, "parse_events goes on behind [DONE]")
    seen, taken = [], []
    def noted():
        for piece in (stream_of(EVENTS[:1])[:-14], stream_of(EVENTS)):
            taken.append(list(seen))
            yield piece
    for event in parse_events(noted()): seen.append(event)
    require(len(taken) == 2 and taken[1], "the first event was there, and parse_events waits for more before it yields it: a reader wants it at once")


@exercise
def check_places(Places):
    calls = [("enter", 3, 200, ""), ("enter", 2, 429, "3 of 4 places are taken, and 2 more do not fit now"),
             ("enter", 1, 200, "who was refused has taken no place, and one is free"), ("enter", 5, 400, "5 never fit into 4 places; to come back is of no use"),
             ("leave", 3, None, ""), ("enter", 4, 429, "1 place is taken"), ("enter", 3, 200, "3 of 4 places are free"),
             ("leave", 4, None, ""), ("enter", 4, 200, "all places are free"), ("enter", 1, 429, "no place is free now, and one would fit later")]
    places, said = attempt("Places(4)", Places, 4), []
    for name, num, status, why in calls:
        said.append(f"{name}({num})")
        got = attempt(", ".join(said), getattr(places, name), num)
        require(status is None or got == status, f"after {', '.join(said[:-1]) or 'nothing'}, {name}({num}) gives {show(got)}, expected {status}", why)
