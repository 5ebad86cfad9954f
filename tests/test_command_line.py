"The command as a Unix tool: in pipes, on full disks, with odd terminals and odd arguments. Programs of their own are started where that matters."
import os
import subprocess
import sys

import pytest
from helpers import tiny_folder
from nano_vllm.cli import main, make_parser

PROGRAM = [sys.executable, "-c", "import sys; from nano_vllm.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return str(tiny_folder(tmp_path_factory.mktemp("tiny")))


def run(*words, **options):
    return subprocess.run([*PROGRAM, *words], stdout=options.pop("stdout", subprocess.PIPE), stderr=subprocess.PIPE, timeout=120, **options)


@pytest.mark.ci
def test_a_reader_that_goes(folder):
    "`| head -c 1`: the program ends without a word, as one that SIGPIPE ends."
    command = [*PROGRAM, "generate", "Hello", "--model", folder, "--max-tokens", "400"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait(60) == 141
    assert "Traceback" not in errors and "Broken" not in errors and "Exception ignored" not in errors


@pytest.mark.ci
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [["fetch"], ["generate", "Hello", "--max-tokens", "3"]])
def test_a_full_disk(folder, words):
    if words[0] != "fetch": words = [*words, "--model", folder]
    with open("/dev/full", "w") as full: done = run(*words, stdout=full)
    errors = done.stderr.decode()
    assert done.returncode == 1 and "nano-vllm: error:" in errors and "No space left" in errors
    assert "Traceback" not in errors and "Exception ignored" not in errors


@pytest.mark.ci
def test_a_terminal_without_most_characters(folder):
    "A tiny random model writes every script there is; a Latin-1 terminal shows what it can."
    done = run("generate", "Hello", "--model", folder, "--max-tokens", "60", "--seed", "1", env=os.environ | {"PYTHONIOENCODING": "latin-1:strict"})
    assert done.returncode == 0, done.stderr.decode()
    assert b"?" in done.stdout


@pytest.mark.ci
def test_an_argument_that_is_no_text(folder):
    done = run("generate", b"caf\xe9", "--model", folder)
    assert done.returncode == 2 and b"not Unicode" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.ci
def test_input_that_is_no_text(folder):
    done = run("chat", "--model", folder, "--max-tokens", "2", input=b"\xff\xfe\n")
    assert done.returncode in (0, 2) and b"error:" in done.stderr and b"Traceback" not in done.stderr   # 0: the next line may be better


def test_an_empty_message_is_a_message(folder, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks for a message"))
    assert main(["chat", "", "--model", folder, "--max-tokens", "2"]) == 0


@pytest.mark.parametrize("file", ["/no/such/folder/x.json", "."])
@pytest.mark.parametrize("bench", ["throughput", "latency", "serve-like", "plan"])
def test_a_file_that_cannot_be_written(folder, file, bench, monkeypatch, capsys):
    "It is found before the model is loaded."
    monkeypatch.setattr("nano_vllm.cli.LLM", lambda *_, **__: pytest.fail("loaded a model"))
    with pytest.raises(SystemExit) as end: main(["bench", bench, "--model", folder, "--output-json", file])
    assert end.value.code == 2 and "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["bench", "latency", "--input-len", "500", "--output-len", "100"], ["bench", "serve-like", "--max-model-len", "100"],
                                   ["generate", "word " * 600], ["chat", "word " * 600]])
def test_lengths_beyond_the_context(folder, words, capsys):
    assert main([*words, "--model", folder]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "max_model_len" in error and len(error) < 500


def test_a_message_does_not_repeat_a_book(folder, capsys):
    "The value is quoted, with its middle left out."
    assert main(["generate", "x", "--model", "m" * 10**6]) == 2
    assert len(capsys.readouterr().err.splitlines()[-1]) < 600


def test_options_by_the_names_of_fields():
    args = make_parser().parse_args(["generate", "--block_size=8", "--max_tokens", "3", "-tp", "2", "a_b", "--", "--no_option"])
    assert (args.block_size, args.max_tokens, args.tensor_parallel_size) == (8, 3, 2)
    assert args.prompts == ["a_b", "--no_option"]
