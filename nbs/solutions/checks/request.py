"Checks of the exercises of the chapter on requests and answers. Nothing here needs a model."
from nano_vllm.request import RequestMetrics

from . import attempt, exercise, expect, require


@exercise
def check_time_per_token(time_per_token):
    for times, wanted, why in (((10., 10.5, 11., 14.5, 8), 0.5, "7 tokens came in the 3.5 s after the first"),
                               ((0., 0., 1., 2., 2), 1.0, "one token came in the second after the first"),
                               ((0., 0., 1., 1., 1), None, "a single token has no time between tokens"),
                               ((0., 0., 1., None, 5), None, "it has not finished"),
                               ((0., None, None, None, 0), None, "it has not begun")):
        metrics = RequestMetrics(*times)
        case = f"time_per_token of a request with first token at {times[2]}, end at {times[3]} and {times[4]} tokens"
        got = attempt(case, time_per_token, metrics)
        close = got == wanted if wanted is None or not isinstance(got, (int, float)) else abs(got - wanted) < 1e-9
        require(close, f"{case} gives {got}, expected {wanted}", why)


@exercise
def check_why_ended(why_ended):
    eos, stops = {0}, {0, 7}
    for output, prompt_len, max_len, wanted, why in (
            ([5, 3], 4, 20, None, "it goes on"),
            ([5, 0], 4, 20, ("stop", None), "the model ended it itself"),
            ([5, 7], 4, 20, ("stop", 7), "7 is a stop token of the request, and no end-of-sequence token"),
            ([5, 3], 4, 6, ("length", None), "4 + 2 tokens are all that it may have"),
            ([5, 0], 4, 6, ("stop", None), "an answer that ends by itself with its last permitted token has ended by itself"),
            ([5, 7], 4, 6, ("stop", 7), "an answer whose last permitted token is a stop token has met the stop token"),
            ([7, 5], 4, 20, None, "only the last token is new"), ([3], 19, 20, ("length", None), "19 + 1 tokens")):
        expect(why_ended, (output, prompt_len, max_len, stops, eos), wanted, why)


class Interruption(Exception): "No bad input: something else has gone wrong."


@exercise
def check_check_all(check_all):
    seen = []

    def check(prompt):
        seen.append(prompt)
        if prompt == "stop": raise Interruption("out of memory")
        if not prompt: raise ValueError("empty")
        if len(prompt) > 9: raise ValueError(f"too long: {len(prompt)} letters")
        return prompt.upper()

    for prompts, wanted in (([], []), (["a"], ["A"]), (["a", "b", "a"], ["A", "B", "A"])):
        expect(check_all, (prompts, check), wanted, "all of them are good")
    for prompts, named, unnamed in ((["a", "", "b", "abcdefghijk", ""], ["prompts[1]: empty", "prompts[3]: too long: 11 letters", "prompts[4]: empty"], [0, 2]),
                                    (["", "a"], ["prompts[0]: empty"], [1]), (["a", "b", ""], ["prompts[2]: empty"], [0, 1])):
        case = f"check_all({prompts})"
        seen.clear()
        try: got = check_all(prompts, check)
        except ValueError as e: message = str(e)
        except Exception as e: require(False, f"{case} raises {type(e).__name__}: {e}", "a ValueError is asked for")
        else: require(False, f"{case} gives {got!r}", f"{len(named)} of the prompts are refused, so it must raise a ValueError")
        require(seen == prompts, f"{case} checks {seen}", "each prompt is checked once, also after one has been refused")
        for part in named: require(part in message, f"{case} says {message!r}", f"it does not say {part!r}")
        for i in unnamed: require(f"prompts[{i}]" not in message, f"{case} says {message!r}", f"prompts[{i}] is good")
    case = "check_all(['', 'stop', 'a']), where the second check raises an Interruption,"
    try: got = check_all(["", "stop", "a"], check)
    except Interruption: return
    except Exception as e: require(False, f"{case} raises {type(e).__name__}", "what is no ValueError is nobody's bad input and must come through as it is")
    require(False, f"{case} gives {got!r}", "what is no ValueError must come through as it is")
