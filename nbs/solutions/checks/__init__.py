"""What the checks of the exercises share.

A check is called with a reader's answer. It says "not done yet" of a stub and "right" of a right answer;
of a wrong one it raises `WrongAnswer`, which names a case in which it is wrong. Nothing here has to be read to
solve an exercise. Standard library only: the first exercises do without torch.
"""
import copy
import functools
import numbers
import traceback


class WrongAnswer(AssertionError):
    "Says in which case an answer is wrong, and why."

    def _render_traceback_(self):
        return [f"Not yet: {self}"]      # what IPython shows in place of a traceback


def stub():
    "What a stub looks like."
    ...


def is_stub(answer) -> bool:
    "Is `answer` still as empty as the chapter has it? Of a class: is one of its methods?"
    if answer is ...: return True
    if isinstance(answer, type): return any(map(is_stub, vars(answer).values()))
    answer = getattr(answer, "fn", answer)      # of a Triton kernel: the function below its decorator
    code, empty = getattr(answer, "__code__", None), stub.__code__
    return code is not None and code.co_code == empty.co_code and code.co_consts[1:] == empty.co_consts[1:]


def exercise(check):
    "Make a function that raises WrongAnswer, or returns what is to be said, into a check."
    @functools.wraps(check)
    def wrapper(answer):
        if is_stub(answer):
            print(f"{check.__name__}: not done yet")
        else:
            said = check(answer)
            print(f"{check.__name__}: right" + (f", {said}" if said else ""))
    return wrapper


def show(value) -> str:
    "`value` in a message: short, and tensors as numbers."
    if hasattr(value, "tolist"):
        if getattr(value, "ndim", 0) and getattr(value.dtype, "is_floating_point", False):
            if value.dtype.itemsize == 1: value = value.float()      # PyTorch rounds no such numbers
            value = value.round(decimals=3)
        value = value.tolist()
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def same(a, b, tolerance=0) -> bool:
    "Are two results equal? A tuple is as good as a list; tensors are compared number by number."
    if hasattr(b, "shape"):
        if getattr(a, "shape", None) != b.shape: return False
        return bool(((a == b) | ((a - b).abs() <= tolerance) if tolerance else (a == b)).all())
    if isinstance(b, (list, tuple)):
        return isinstance(a, (list, tuple)) and len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b))
    if getattr(a, "shape", ()) != (): return False       # many numbers in the place of one
    return a == b if not tolerance else isinstance(a, numbers.Real) and abs(a - b) <= tolerance


def call_text(function, args) -> str:
    return f"{getattr(function, '__name__', 'your answer')}({', '.join(map(show, args))})"


def call(function, *args, case=None):
    "What `function` gives for `args`, which it must not change; `case` says it in words."
    before = copy.deepcopy(args)
    case = case or call_text(function, before)
    got = attempt(case, function, *args)
    for old, new in zip(before, args):
        if not callable(old) and not same(new, old):
            raise WrongAnswer(f"{case} changes what it is given: {show(old)} has become {show(new)}")
    return got


def attempt(case, function, *args):
    "What `function` gives for `args`; WrongAnswer with its line if it raises anything."
    try:
        return function(*args)
    except WrongAnswer:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        line = f", at the line `{last.line}`" if last.line else ""
        raise WrongAnswer(f"{case} raises {type(error).__name__}: {error}{line}") from error


def expect(function, args, wanted, why="", tolerance=0, case=None):
    "`function` must give `wanted` for `args`."
    case = case or call_text(function, args)
    got = call(function, *args, case=case)
    if got is None: why += " (Is a `return` missing?)"
    elif show(got) == show(wanted): why = f"it is a {type(got).__name__}, not a {type(wanted).__name__}"
    require(same(got, wanted, tolerance), f"{case} gives {show(got)}, expected {show(wanted)}", why)


def require(condition, problem, why=""):
    "WrongAnswer with `problem`, and `why` it is one, unless `condition` holds."
    if not condition: raise WrongAnswer(problem + (f": {why}" if why else ""))
