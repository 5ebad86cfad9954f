"""What the tests of exercises share: how an answer is noted, and what a check has to say of it."""
import itertools
import runpy
import tempfile
from pathlib import Path

import pytest

from solutions.checks import WrongAnswer


class Answers(list):
    "(check, answer, what the message names, or None for a right answer)"
    def right(self, check): return lambda answer: self.note(check, answer, None)
    def wrong(self, check, says): return lambda answer: self.note(check, answer, says)

    def note(self, check, answer, says):
        self.append((check, answer, says))
        return answer


def checks_of(modules):
    "{name: check} of the modules' checks."
    return {name: check for module in modules for name, check in vars(module).items() if name.startswith("check_")}


def name_of(case):
    check, answer, says = case
    return f"{check.__name__}-{'right' if says is None else says[:30]}"


def try_answer(case, capsys):
    "The check accepts a right answer, and says of a wrong one what is wrong."
    check, answer, says = case
    if says is None:
        check(answer)
        assert capsys.readouterr().out.startswith(f"{check.__name__}: right")
        return
    with pytest.raises(WrongAnswer) as told: check(answer)
    assert says in str(told.value)


def assert_all_tried(checks, answers):
    "Each check has met a right answer, and two mistakes that differ."
    for name, check in checks.items():
        says = [says for tried, _, says in answers if tried is check]
        assert None in says and len(set(says) - {None}) >= 2, f"{name}: {len(says)} answers"


COUNT, KERNEL_FOLDER = itertools.count(), tempfile.TemporaryDirectory()


def kernel_of(text, name, **words):
    "The kernel `name` of a source in which each of the `words` is replaced, interpreted; Triton reads its source, so it stands in a file."
    for word, value in words.items(): text = text.replace(word, value)
    path = Path(KERNEL_FOLDER.name)/f"kernels_{next(COUNT)}.py"
    path.write_text("import triton\nimport triton.language as tl\n" + text)
    return runpy.run_path(str(path))[name]
