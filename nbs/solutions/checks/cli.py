"Checks of the exercises of the chapter on the command line."
import argparse
import contextlib
import io

from . import WrongAnswer, attempt, exercise, require


def parsed(parser, argv, case):
    "What `parser` makes of `argv`; None if it refuses."
    with contextlib.redirect_stderr(io.StringIO()):
        try: return vars(attempt(case, parser.parse_args, argv))
        except SystemExit: return None


@exercise
def check_add_stop(add_stop):
    for argv, wanted in ((["--stop", "a", "--stop", "b"], {"stop": ["a", "b"]}), (["--stop", "a b"], {"stop": ["a b"]}), ([], {}),
                         (["--stop=Q:", "--stop="], {"stop": ["Q:", ""]})):
        parser = argparse.ArgumentParser()
        attempt("add_stop(parser)", add_stop, parser)
        got = parsed(parser, argv, f"parsing {argv}")
        require(got is not None, f"{argv} is refused")
        require(got == wanted, f"{argv} is parsed to {got}, expected {wanted}",
                "" if argv else "what was not given leaves no trace, so that the default is the library's")


@exercise
def check_number_of(number_of):
    for text, wanted in (("100", 100), ("8k", 8192), ("8K", 8192), ("0", 0), ("2m", 2 * 2**20), ("1M", 2**20)):
        got = attempt(f"number_of({text!r})", number_of, text)
        require(got == wanted and isinstance(got, int), f"number_of({text!r}) gives {got!r}, expected {wanted!r}")
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-model-len", type=number_of)
    for text in ("", "k", "8kk", "eight", "8g", "k8", "1.5", "1.5k"):
        try: got = parsed(parser, [f"--max-model-len={text}"], f"parsing --max-model-len={text}")
        except WrongAnswer as error:
            raise WrongAnswer(f"{error}. For argparse to tell the user, bad text has to raise a ValueError") from None
        require(got is None, f"{text!r} is taken for {got and got['max_model_len']}, though it is no number")


TABLE = dict(max_tokens=(int, "most tokens"), temperature=(float, "0 is greedy"), stop=(str, "end before this"), async_scheduling=(bool, "overlap"))


@exercise
def check_add_table(add_table):
    for argv, wanted in (([], {}), (["--max-tokens", "5"], dict(max_tokens=5)), (["--temperature", "0"], dict(temperature=0.)),
                         (["--stop", "5"], dict(stop="5")), (["--async-scheduling"], dict(async_scheduling=True)),
                         (["--no-async-scheduling", "--max-tokens", "7"], dict(async_scheduling=False, max_tokens=7)),
                         (["--max-tokens", "five"], None), (["--async-scheduling=False"], None)):
        parser = argparse.ArgumentParser(allow_abbrev=False)
        attempt("add_table(parser, table)", add_table, parser, dict(TABLE))
        got = parsed(parser, argv, f"parsing {argv}")
        if wanted is None: require(got is None, f"{argv} is parsed to {got}, though it should be refused")
        else:
            require(got is not None, f"{argv} is refused")
            same = got == wanted and all(type(got[name]) is type(value) for name, value in wanted.items())
            require(same, f"{argv} is parsed to {got}, expected {wanted}",
                    "" if argv else "what was not given leaves no trace, so that the default is the library's")
    said = " ".join(parser.format_help().split())      # a narrow terminal has broken the lines
    for _, text in TABLE.values(): require(text in said, f"--help does not say {text!r}")


@exercise
def check_exit_code(exit_code):
    def doing(error=None, says=""):
        def command():
            print("an answer")
            if error: raise error
        return command

    for error, wanted in ((None, 0), (ValueError("temperature is -1.0, must be from 0 to 2"), 2), (RuntimeError("no g++"), 2), (KeyboardInterrupt(), 130)):
        out, err, case = io.StringIO(), io.StringIO(), f"exit_code(command), where command raises {error!r}," if error else "exit_code(command)"
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): got = exit_code(doing(error))
        except BaseException as raised: raise WrongAnswer(f"{case} raises {raised!r}") from raised
        require(got == wanted and got is not False, f"{case} gives {got!r}, expected {wanted}")
        require(out.getvalue() == "an answer\n", f"{case} prints {out.getvalue()!r} to standard output", "it is for answers only; messages go to standard error")
        lines, message = err.getvalue().splitlines(), str(error or "")
        if wanted == 2: require(len(lines) == 1 and message in lines[0], f"{case} prints {err.getvalue()!r} to standard error, expected one line with {message!r}")
        else: require(not lines, f"{case} prints {err.getvalue()!r} to standard error")
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): got = exit_code(doing(ZeroDivisionError("a bug")))
    except ZeroDivisionError: return
    raise WrongAnswer(f"exit_code(command) gives {got!r} where command has a bug and raises ZeroDivisionError: hide no bugs, let it pass with its traceback")
