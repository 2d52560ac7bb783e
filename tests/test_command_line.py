"""generate.py as people run it: what it prints, where, and how it ends.

Whatever goes wrong is one line on stderr, with nothing on stdout: exit 2 for a wrong call, exit 1
for a failure. Each subprocess spends two seconds on importing torch, so those start one that need
a process of their own (pipes, signals, exit codes); the others call `main`.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import generate
from mamba import SCANS, Mamba, MambaConfig

PROGRAM = Path(generate.__file__)
SHORT = ("--max-new-tokens", "12", "--seed", "1")
PROMPT = "To be, or not to be"


def start(*arguments: str, **options) -> subprocess.Popen:
    """The program, with nothing on stdin and no Python options of this process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **options.pop("env", {})}
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.Popen(command, env=environment, **{**pipes, **options})


def finish(process: subprocess.Popen, stdin: bytes | None = None) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    out, err = process.communicate(stdin, timeout=60)
    return process.returncode, out.decode(), err.decode()


@pytest.fixture
def run(capsys, monkeypatch):
    """main(arguments) -> (exit code, stdout, stderr); a string is what stands on stdin."""
    threads = torch.get_num_threads()

    def run(*arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
        file = io.StringIO(stdin)
        file.isatty = lambda: stdin is None
        monkeypatch.setattr(sys, "stdin", file)
        try:
            code = generate.main(generate.parse_arguments(list(arguments)))
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    yield run
    torch.set_num_threads(threads)


def assert_one_line(result: tuple[int, str, str], code: int, *words: str) -> None:
    """The result of a run is this exit code, an empty stdout and one line that has the words."""
    actual_code, out, err = result
    assert (actual_code, out) == (code, ""), err
    assert err.startswith("generate.py: error: ") and err.endswith("\n"), err
    assert err.count("\n") == 1 and len(err) < 300, err
    assert all(word in err for word in words), err


## ================================================================================================
## What it prints
## ================================================================================================


def test_stdout_is_the_prompt_and_its_continuation_wherever_the_prompt_comes_from(run, tmp_path):
    """And stderr is empty: from another folder, through pipes, with all warnings as they are."""
    process = start(*SHORT, stdin=subprocess.PIPE, cwd=tmp_path)
    code, text, err = finish(process, PROMPT.encode() + b"\n")
    assert (code, err) == (0, "")
    assert text.startswith(PROMPT) and text.endswith("\n")
    assert len(text) == len(PROMPT) + 12 + len("\n")

    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbf" + PROMPT.encode() + b"\r\n")  # as Notepad writes it
    assert run(PROMPT, *SHORT) == run("--prompt-file", str(path), *SHORT) == (0, text, "")
    assert run(*SHORT, "--", PROMPT) == run(*SHORT, stdin=PROMPT) == (0, text, "")


def test_stats_go_to_stderr_and_leave_stdout_as_it_is(run):
    _, text, _ = run(PROMPT, *SHORT)
    code, out, err = run(PROMPT, *SHORT, "--stats")
    assert (code, out) == (0, text)
    assert err.startswith("prompt 19 tokens, ") and "12 tokens," in err and err.count("\n") == 1
    # 10 layers x 512 channels x (16 states + 3 inputs of the convolution) x 4 bytes
    assert err.endswith("state 389120 bytes\n")


def test_help_shows_every_option_with_its_default(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for default in (
        "300",
        "0.8",
        "0.95",
        "1.0",
        "auto",
        "float32",
        "None",
        str(Path("shakespeare")),
    ):
        assert f"{default})" in out
    options = [line for line in out.splitlines() if line.startswith("  --")]
    assert out.count("(default: ") == len(options) + 1 == 16, "and of the prompt"


def test_the_scans_and_options_of_the_command_line_are_those_of_the_model(run):
    code, _, err = run("hello", "--scan", "fast")
    offered = set(err.split("choose from ")[1].strip().strip(")").replace("'", "").split(", "))
    assert code == 2 and offered == {"auto", *SCANS, "triton"}


@pytest.fixture
def ending_model(tmp_path) -> str:
    """The model that ships, with the end of a line as its end token."""
    for path in generate.DEFAULT_MODEL.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [10, 0]}')
    return str(tmp_path)


def test_the_text_ends_before_the_models_end_token_or_a_stop_string(run, ending_model):
    call = (PROMPT, "--temperature", "0", "--max-new-tokens", "80")
    _, text, _ = run(*call)
    line = text.removeprefix(PROMPT).splitlines()[0]
    assert 5 < len(line) < 80
    code, out, err = run(*call, "--model", ending_model, "--stats")
    assert (code, out) == (0, PROMPT + line + "\n")
    assert f" {len(line)} tokens," in err
    for stop in (("--stop", "\n"), ("--stop", "never", "--stop", line[-2:] + "\n")):
        expected = line if stop[1] == "\n" else line[:-2]
        assert run(*call, *stop) == (0, PROMPT + expected + "\n", "")


def test_what_may_become_a_stop_string_is_not_printed_before_it_is_sure(run, monkeypatch):
    printed = []
    monkeypatch.setattr("builtins.print", lambda text, **options: printed.append(text))
    monkeypatch.setattr(generate, "sample", lambda logits, **_: torch.tensor([next(script)]))
    script = iter(b"ab#ab##")
    generate.main(generate.parse_arguments(["x", "--stop", "##", "--max-new-tokens", "20"]))
    assert printed == ["xa", "b", "", "#a", "b", "", "", ""]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("seconds", "shown"), [(1.0, [1, 2, 3]), (0.4, [])])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_prompt_that_takes_long_says_so_on_a_terminal_until_it_is_read(
    seconds, shown, terminal, monkeypatch
):
    """Four parts of so many seconds each: after 2 s a line, and nothing is left of it."""
    file = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(generate, "CPU_READS", 5)
    clock = iter(i * seconds for i in range(99))
    monkeypatch.setattr(generate.time, "perf_counter", lambda: next(clock))
    options = [PROMPT, "--max-new-tokens", "1", "--device", "cpu"]
    assert generate.main(generate.parse_arguments(options)) == 0
    lines = [line for line in file.getvalue().split("\r") if line]
    if not terminal or not shown:
        assert file.getvalue() == ""
    else:
        assert lines[0].strip() == "15 of 19 tokens of the prompt are read"
        assert lines[-1].strip() == "" and len(lines[-1]) >= len(lines[0].strip())


def test_samples_are_separated_and_differ_as_if_run_with_seeds_one_after_the_other(run):
    _, out, _ = run(PROMPT, *SHORT, "--num-samples", "3")
    samples = out.split("-" * 80 + "\n")
    seeds = ("1", "2", "3")
    assert samples == [run(PROMPT, "--max-new-tokens", "12", "--seed", s)[1] for s in seeds]
    code, out, _ = run("O", "--max-new-tokens", "1", "--seed", str(2**64 - 1), "--num-samples", "2")
    assert code == 0 and out.count("\n") >= 3, "the largest seed has a successor too"


def test_rows_beyond_the_tokenizer_never_reach_the_text(run, tmp_path):
    """Of 300 tokens of a random model, one in three would be such a row."""
    torch.manual_seed(0)
    config = MambaConfig(d_model=8, vocab_size=384, tokenizer="bytes")
    Mamba(config).save_pretrained(tmp_path)
    code, out, err = run("a", "--model", str(tmp_path), "--temperature", "1", "--top-p", "1")
    assert (code, err) == (0, "") and len(out) > 100


def test_characters_that_the_terminal_does_not_know_are_replaced():
    latin = {"PYTHONIOENCODING": "latin-1"}
    code, out, err = finish(start("\N{EURO SIGN}", "--max-new-tokens", "1", env=latin))
    assert (code, out[0], err) == (0, "?", "")


@pytest.mark.parametrize("prompt", ["- a list", "-5 degrees", "-5", "-"])
def test_a_prompt_that_starts_with_a_dash_but_is_no_option_is_a_prompt(prompt, run):
    code, out, err = run(prompt, *SHORT)
    assert (code, err) == (0, "") and out.startswith(prompt)


## ================================================================================================
## How it ends
## ================================================================================================


def test_exit_codes_reach_the_shell_and_warnings_do_not_reach_stderr(tmp_path):
    """Three processes at once. A warning as torch gives it at import comes from a fake torch."""
    fake = tmp_path / "torch.py"
    fake.write_text("import warnings; warnings.warn('old driver'); raise SystemExit(7)")
    processes = [
        start("hello", "--top-p", "0"),
        start("hello", "--model", str(tmp_path)),
        start("hello", env={"PYTHONPATH": str(tmp_path)}),
    ]
    wrong, failed, warned = map(finish, processes)
    assert_one_line(wrong, 2, "--top-p must be in (0, 1], got 0.0")
    assert_one_line(failed, 1, str(tmp_path), "config.json")
    assert warned == (7, "", "")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "--max-new-tokens"),
        (["To", "be", "or", "not"], 2, 'quote the prompt: generate.py "To be or not"'),
        (["hello", "--temprature", "1"], 2, "did you mean --temperature?"),
        (["hello", "--top-p", "7"], 2, "--top-p must be"),
        (["hello", "--model", "mamba-370m"], 2, "--model state-spaces/mamba-370m"),
        ([], 2, "a prompt is missing"),
    ],
)
def test_help_and_wrong_calls_are_answered_before_torch_is_imported(
    arguments, code, words, tmp_path
):
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    closed = {} if arguments else {"preexec_fn": lambda: os.close(0), "stdin": None}
    process = start(*arguments, env={"PYTHONPATH": str(tmp_path)}, **closed)
    actual, out, err = finish(process)
    assert actual == code and words in (err if code else out)
    assert not (out if code else err)


def interrupt_after_first_byte(process: subprocess.Popen) -> tuple[int, str, str]:
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    return finish(process)


needs_signals = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send")


@needs_signals
def test_ctrl_c_while_torch_is_imported_ends_without_a_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import time; print('.', flush=True); time.sleep(60)")
    process = start("hello", env={"PYTHONPATH": str(tmp_path)})
    code, _, err = interrupt_after_first_byte(process)
    assert (code, err) == (-signal.SIGINT, "")  # the shell's 130


@needs_signals
def test_ctrl_c_in_the_middle_of_a_text_ends_without_a_traceback():
    process = start(PROMPT, "--max-new-tokens", "1000000")
    code, out, err = interrupt_after_first_byte(process)
    assert (code, err) == (-signal.SIGINT, "")
    assert (PROMPT[1:] + " " * 99).startswith(out[: len(PROMPT) - 1])  # whole so far


@pytest.mark.parametrize("arguments", [(PROMPT, "--max-new-tokens", "1000000"), ("--help",)])
def test_a_reader_that_has_seen_enough_is_not_an_error(arguments):
    process = start(*arguments)
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "wb") as full:
        process = start(PROMPT, *SHORT, stdout=full)
        _, err = process.communicate(timeout=60)
    assert_one_line((process.returncode, "", err.decode()), 1, "No space left on device")


def test_a_model_on_the_hub_is_completed_online_and_then_from_the_cache(hub, run, tmp_path):
    """Three processes: first from the Hub, then without one, cached and not cached."""
    files = {path.name: path.read_bytes() for path in generate.DEFAULT_MODEL.iterdir()}
    hub.repositories = {"someone/model": files}
    online = {"env": hub.environment(tmp_path / "home", HF_HUB_OFFLINE="0")}
    call = (PROMPT, *SHORT, "--model", "someone/model")
    expected = run(PROMPT, *SHORT)
    assert finish(start(*call, **online)) == expected
    hub.stop()
    elsewhere = {"env": hub.environment(tmp_path / "other", HF_HUB_OFFLINE="0")}
    cached, uncached = start(*call, **online), start(*call, **elsewhere)
    assert finish(cached) == expected
    assert_one_line(finish(uncached), 1, "someone/model", "out of reach")


## ================================================================================================
## Wrong calls
## ================================================================================================


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--temperature -1", "--temperature must be 0 (greedy) or a positive number, got -1.0"),
        ("--temperature nan", "--temperature must be"),
        ("--temperature warm", "--temperature: invalid float value: 'warm'"),
        ("--top-k -1", "--top-k must be 0 (off) or a positive integer, got -1"),
        ("--top-k 2.5", "--top-k: invalid int value: '2.5'"),
        ("--top-p 0", "--top-p must be in (0, 1], got 0.0"),
        ("--top-p 1.1", "--top-p must be in (0, 1], got 1.1"),
        ("--min-p 2", "--min-p must be in [0, 1], got 2.0"),
        ("--repetition-penalty 0", "--repetition-penalty must be a positive number, got 0.0"),
        ("--max-new-tokens 0", "--max-new-tokens must be an integer, at least 1, got 0"),
        ("--max-new-tokens many", "--max-new-tokens: invalid int value: 'many'"),
        ("--num-samples 0", "--num-samples must be at least 1, got 0"),
        ("--seed -1", "--seed must be an integer in [0, 2**64), got -1"),
        ("--seed", "--seed: expected one argument"),
        ("--dtype int8", "'int8'"),
        ("--scan fast", "'fast'"),
        ("--temprature 1", "unknown option --temprature: did you mean --temperature?"),
        ("--temperatur=1", "unknown option --temperatur=1: did you mean --temperature?"),
        ("another", 'quote the prompt: generate.py "hello another"'),
        ("--prompt-file prompt.txt", "--prompt-file: not allowed with argument prompt"),
    ],
    ids=lambda value: value if value.startswith("--") else "",
)
def test_a_wrong_option_is_one_line_that_names_it(arguments, words, run):
    assert_one_line(run("hello", *arguments.split()), 2, words)


@pytest.mark.parametrize("prompt", ["-yes", "--hello", "-x"])
def test_a_prompt_that_looks_like_an_option_is_told_where_to_stand(prompt, run):
    assert_one_line(run(prompt), 2, "a prompt that starts with '-' stands last, after '--'")
    assert run(*SHORT, "--", prompt)[1].startswith(prompt)


def test_the_name_of_an_original_gets_its_owner_unless_it_is_a_folder(run, tmp_path, monkeypatch):
    for name in ("mamba-130m", "mamba-2.8b-slimpj", "mamba-370m-hf"):
        assert_one_line(run("a", "--model", name), 2, f"--model state-spaces/{name}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mamba-130m").mkdir()
    assert_one_line(run("a", "--model", "mamba-130m"), 1, "config.json")


def test_a_stop_string_that_would_end_every_text_is_refused(run):
    assert_one_line(run("a", "--stop", ""), 2, "--stop must be a list of texts that are not empty")


def test_what_python_would_be_told_is_told_in_the_words_of_the_command_line(run, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("scan='triton' needs a GPU. Or use scan='chunked', dtype=bfloat16")

    monkeypatch.setattr(Mamba, "from_pretrained", fail)
    assert_one_line(
        run("a"), 1, "--scan triton needs a GPU. Or use --scan chunked, --dtype bfloat16"
    )


def test_a_prompt_that_is_not_there_is_one_line(run, tmp_path):
    empty, newline, binary = (tmp_path / name for name in ("empty", "newline", "binary"))
    for path, content in ((empty, b""), (newline, b"\n"), (binary, b"caf\xe9")):
        path.write_bytes(content)
    assert_one_line(run(), 2, "a prompt is missing")  # in a terminal
    assert_one_line(run(""), 2, "the prompt is empty")
    assert_one_line(run(stdin=""), 2, "the prompt is empty")
    assert_one_line(run("--prompt-file", str(empty)), 2, "the prompt is empty")
    assert_one_line(run("--prompt-file", str(newline)), 2, "the prompt is empty")
    assert_one_line(run("--prompt-file", str(binary)), 2, "the prompt is not UTF-8")
    assert_one_line(run("--prompt-file", "nowhere.txt"), 2, "nowhere.txt", "No such file")
    assert_one_line(run("--prompt-file", str(tmp_path)), 2, str(tmp_path), "directory")
    assert_one_line(run("--prompt-file", ""), 2, "directory")
    assert_one_line(run(os.fsdecode(b"caf\xe9")), 2, "the prompt is not UTF-8")


def test_a_prompt_that_is_not_utf_8_or_a_closed_stdin_is_one_line_too():
    processes = [start(stdin=subprocess.PIPE), start(preexec_fn=lambda: os.close(0), stdin=None)]
    not_utf_8, closed = finish(processes[0], b"caf\xe9"), finish(processes[1])
    assert_one_line(not_utf_8, 2, "the prompt is not UTF-8")
    assert_one_line(closed, 2, "a prompt is missing")


## ================================================================================================
## Failures
## ================================================================================================


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_a_device_that_cannot_be_used_is_one_line_that_names_it(device, run):
    assert_one_line(run("hello", "--device", device), 1, f"--device {device} is not available")


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"model_type": "bert"}'])
def test_a_folder_that_holds_no_model_is_one_line(content, run, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert_one_line(run("hello", "--model", str(tmp_path)), 1, "config.json")


@pytest.mark.parametrize("name", ["", "nowhere", "no/such/folder", "./nowhere", "a b/c", "x/y/"])
def test_a_name_that_is_no_model_is_one_line_that_repeats_it(name, run, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_one_line(run("hello", "--model", name), 1, name.rstrip("/"))


def test_a_model_without_weights_or_with_a_foreign_tokenizer_is_one_line(run, tmp_path):
    config = json.loads((generate.DEFAULT_MODEL / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_one_line(run("hello", "--model", str(tmp_path)), 1, str(tmp_path))
    weights = "model.safetensors"
    (tmp_path / weights).write_bytes((generate.DEFAULT_MODEL / weights).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tokenizer": "words"}))
    assert_one_line(run("hello", "--model", str(tmp_path)), 1, "'words'")
    (tmp_path / "config.json").write_text(json.dumps({**config, "tokenizer": None}))
    (tmp_path / "tokenizer.json").write_text("<html>")
    assert_one_line(run("hello", "--model", str(tmp_path)), 1, "not a tokenizer")


def test_a_scan_that_cannot_run_here_is_one_line():
    """In a process of its own: Triton's interpreter, which tests switch on, would run it here."""
    process = start("hello", "--scan", "triton", "--device", "cpu", env={"TRITON_INTERPRET": "0"})
    assert_one_line(finish(process), 1, "--scan chunked")
