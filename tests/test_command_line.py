"""generate.py as people run it: what it prints, where, and how it ends."""

import io
import os
import shlex
import signal
import subprocess
import sys
import types

import pytest
import torch
from huggingface_hub import constants

import generate
from mamba import SCANS, Mamba, MambaConfig

SHORT = ("--max-new-tokens", "12", "--seed", "1")
PROMPT = "To be, or not to be"


def start(*arguments: str, **options) -> subprocess.Popen:
    """The program in a process of its own, with nothing on stdin and no Python options of ours."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment |= {"OMP_NUM_THREADS": "1", **options.pop("env", {})}
    command = [sys.executable, generate.__file__, *arguments]
    return subprocess.Popen(command, env=environment, **{**pipes, **options})


def finish(process: subprocess.Popen, stdin: bytes | None = None) -> tuple[int, str, str]:
    out, err = process.communicate(stdin, timeout=60)
    return process.returncode, out.decode(), err.decode()


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """main(arguments) in an empty folder -> (exit code, stdout, stderr); a string is on stdin."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)

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
    """Exit 2 for a wrong call, 1 for a failure, an empty stdout and one line with the words."""
    actual_code, out, err = result
    assert (actual_code, out) == (code, ""), err
    assert err.startswith("generate.py: error: ") and err.endswith("\n"), err
    assert err.count("\n") == 1 and len(err) < 300, err
    assert all(word in err for word in words), err


def set_clock(monkeypatch, *seconds: float) -> None:
    clock = types.SimpleNamespace(perf_counter=iter(seconds).__next__)
    monkeypatch.setattr(generate, "time", clock)


def test_a_model_of_the_hub_completes_a_prompt_from_wherever(hub, run, tmp_path, monkeypatch):
    """Nothing on stderr; from the Hub that the environment names, then from its cache."""
    files = {path.name: path.read_bytes() for path in generate.DEFAULT_MODEL.iterdir()}
    hub.repositories = {"someone/model": files}
    call = (*SHORT, "--model", "someone/model")
    process = start(*call, stdin=subprocess.PIPE, cwd=tmp_path, env=hub.environment(tmp_path))
    code, text, err = finish(process, PROMPT.encode() + b"\n")
    assert (code, err) == (0, "")
    assert text.startswith(PROMPT) and text.endswith("\n")
    assert len(text) == len(PROMPT) + 12 + len("\n")

    hub.stop()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert run(PROMPT, *call) == (0, text, "")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    assert_one_line(run(PROMPT, *call), 1, "someone/model", "out of reach")

    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbf" + PROMPT.encode() + b"\r\n")  # as Notepad writes it
    assert run(PROMPT, *SHORT) == run("--prompt-file", str(path), *SHORT) == (0, text, "")
    assert run(*SHORT, "--", PROMPT) == run(*SHORT, stdin=PROMPT) == (0, text, "")


def test_a_prompt_loses_one_newline_at_its_end_and_may_look_like_an_option(run):
    for prompt in ("- a list", "-5 degrees", "-"):
        assert run(prompt, "--max-new-tokens", "1")[1].startswith(prompt)
    assert run(*SHORT, "--", "-yes")[1].startswith("-yes")
    assert run(*SHORT, stdin="To be\n\n") == run("To be\n", *SHORT)
    assert_one_line(run(stdin=""), 2, "the prompt is empty")
    assert_one_line(run(os.fsdecode(b"caf\xe9")), 2, "the prompt is not UTF-8")


def test_stats_are_tokens_and_times_on_stderr_and_leave_stdout_as_it_is(run, monkeypatch):
    _, text, _ = run(PROMPT, *SHORT)
    set_clock(monkeypatch, 10.0, 13.0, 15.0)
    # 10 layers x 512 channels x (16 states + 3 inputs of the convolution) x 4 bytes
    stats = "prompt 19 tokens, first token after 3.000 s; 12 tokens, after the first 5.5 tokens/s; "
    stats += "state 389120 bytes\n"
    assert run(PROMPT, *SHORT, "--stats") == (0, text, stats)
    set_clock(monkeypatch, 10.0, 13.0, 15.0)
    _, _, err = run(PROMPT, "--max-new-tokens", "1", "--stats")
    assert err == stats.replace("12 tokens", "1 tokens").replace("5.5", "0.0")


def test_help_shows_every_option_with_its_default_and_the_scans_are_the_models(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = run("--help")
    assert all(f"{value})" in out for value in "300 0.8 0.95 1.0 auto float32 None".split())
    assert out.count("(default: ") == out.count("\n  --") + 1 == 16, "and of the prompt"
    offered = run("hello", "--scan", "fast")[2].split("choose from ")[1].strip().strip(")")
    assert {*offered.replace("'", "").split(", ")} == {"auto", *SCANS, "triton"}


def test_the_text_ends_before_the_models_end_token_or_a_stop_string(run, tmp_path):
    call = (PROMPT, "--temperature", "0", "--max-new-tokens", "80")
    _, text, _ = run(*call)
    line = text.removeprefix(PROMPT).splitlines()[0]
    assert 5 < len(line) < 80
    for path in generate.DEFAULT_MODEL.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [10, 0]}')
    code, out, err = run(*call, "--model", str(tmp_path), "--stats")
    assert (code, out) == (0, PROMPT + line + "\n")
    assert f" {len(line)} tokens," in err
    for stop in (("--stop", "\n"), ("--stop", "never", "--stop", line[-2:] + "\n")):
        expected = line if stop[1] == "\n" else line[:-2]
        assert run(*call, *stop) == (0, PROMPT + expected + "\n", "")


def test_a_prompt_that_takes_long_says_so_on_a_terminal(run, monkeypatch):
    """Four parts of so many seconds each: after 2 s a line, and nothing is left of it."""
    monkeypatch.setattr(generate, "CPU_READS", 5)
    line = f"\r{'15 of 19 tokens of the prompt are read':60}\r\r{'':60}\r"
    for seconds, terminal, expected in ((0.5, True, ""), (1.0, False, ""), (1.0, True, line)):
        monkeypatch.setattr(sys, "stderr", file := io.StringIO())
        file.isatty = lambda terminal=terminal: terminal
        set_clock(monkeypatch, *(i * seconds for i in range(99)))
        assert run(PROMPT, "--max-new-tokens", "1", "--device", "cpu")[0] == 0
        assert file.getvalue() == expected


def test_samples_are_separated_and_differ_as_if_run_with_seeds_one_after_the_other(run):
    def texts(*options: str) -> list[str]:
        return run("O", "--max-new-tokens", "6", *options)[1].split("-" * 80 + "\n")

    for first, *seeds in (("1", "2", "3"), (str(2**64 - 1), "0")):
        found = texts("--seed", first, "--num-samples", str(len(seeds) + 1))
        assert found == [texts("--seed", seed)[0] for seed in (first, *seeds)]
    assert len({*texts("--num-samples", "2")}) == 2, "without a seed they differ"


@pytest.mark.parametrize(("d_model", "threads"), [(512, 1), (513, 2)])
def test_a_small_model_takes_one_thread_and_no_row_without_text(d_model, threads, run, tmp_path):
    """Of the tokens of a random model with 384 rows one in three would be such a row."""
    torch.set_num_threads(2)
    config = MambaConfig(d_model, vocab_size=384, tokenizer="bytes", d_state=1, expand=0.1)
    Mamba(config).save_pretrained(tmp_path)
    call = "a --device cpu --temperature 1 --top-p 1 --max-new-tokens 40 --model".split()
    code, out, err = run(*call, str(tmp_path))
    assert (code, err) == (0, "") and len(out) > 10
    assert torch.get_num_threads() == threads


def test_help_and_wrong_calls_are_answered_before_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    closed = {"preexec_fn": lambda: os.close(0), "stdin": None}
    for call, options, stdin, expected, words in (
        (["--help"], {}, None, 0, "--max-new-tokens"),
        (["hello", "--top-p", "7"], {}, None, 2, "--top-p must be"),
        ([], {"stdin": subprocess.PIPE}, b"caf\xe9", 2, "the prompt is not UTF-8"),
        ([], closed, None, 2, "a prompt is missing"),
    ):
        process = start(*call, env={"PYTHONPATH": str(tmp_path)}, **options)
        code, out, err = finish(process, stdin)
        assert code == expected and words in (err if code else out)
        assert not (out if code else err)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send")
def test_ctrl_c_ends_without_a_traceback_and_the_terminal_gets_no_warnings(tmp_path):
    """A torch that warns at import, prints what the terminal does not know, and takes long."""
    fake = "import time, warnings; warnings.warn('old driver'); print('\N{EURO SIGN}', flush=True)"
    (tmp_path / "torch.py").write_text(fake + "\ntime.sleep(60)", "utf-8")
    process = start("hello", env={"PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "latin-1"})
    assert process.stdout.read(1) == b"?"
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert (code, err) == (-signal.SIGINT, "")  # the shell's 130


def test_a_reader_that_has_seen_enough_is_not_an_error():
    process = start(PROMPT, "--max-new-tokens", "1000000")
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == b""


def test_a_scan_that_cannot_run_here_is_one_line_and_the_shell_gets_the_exit_code():
    """In a process of its own: Triton's interpreter, which tests switch on, would run it here."""
    process = start("hello", "--scan", "triton", "--device", "cpu", env={"TRITON_INTERPRET": "0"})
    assert_one_line(finish(process), 1, "--scan chunked")


def test_the_loader_gets_the_options_and_its_errors_name_those_of_the_shell(run, monkeypatch):
    def fail(*arguments, **options):
        assert arguments == ("x/y",)
        assert options == {"device": "cpu", "dtype": torch.bfloat16, "scan": "chunked"}
        raise RuntimeError("scan='triton' needs a GPU.\nOr use scan='chunked', dtype=bfloat16")

    monkeypatch.setattr(Mamba, "from_pretrained", fail)
    call = shlex.split("a --model x/y --device cpu --dtype bfloat16 --scan chunked")
    said = "--scan triton needs a GPU. Or use --scan chunked, --dtype bfloat16"
    assert_one_line(run(*call), 1, said)


WRONG_CALLS = [
    ("a --temperature -1", "--temperature must be 0 (greedy) or a positive number, got -1.0"),
    ("a --top-k 2.5", "--top-k: invalid int value: '2.5'"),
    ("a --num-samples 0", "--num-samples must be at least 1, got 0"),
    ("a --stop ''", "--stop must be a list of texts that are not empty"),
    ("a --temprature 1", "unknown option --temprature: did you mean --temperature? --help"),
    ("a --temp=1", "unknown option --temp=1: did you mean --temperature?"),
    ("a --xyz", "unknown option --xyz: --help shows all"),
    ("-yes", "a prompt that starts with '-' stands last, after '--'"),
    ("To be or not", 'quote the prompt: generate.py "To be or not"'),
    ("a --model mamba-130m", "no folder 'mamba-130m': on the Hub it is --model state-spaces/"),
    ("", "a prompt is missing"),  # in a terminal
    ("--prompt-file newline", "the prompt is empty"),
    ("--prompt-file binary", "the prompt is not UTF-8"),
    ("--prompt-file nowhere", "cannot read the prompt from nowhere: No such file"),
]
FAILURES = [
    ("a --device gpu", "--device gpu is not available on this machine"),
    ("a --model x/y/", "x/y: config.json is not in the cache"),
    ("a --model mamba-2.8b", "config.json"),  # here a folder has the name
]


@pytest.mark.parametrize(("code", "calls"), [(2, WRONG_CALLS), (1, FAILURES)])
def test_a_fault_is_one_line_that_names_it(code, calls, run, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "newline").write_bytes(b"\n")
    (tmp_path / "binary").write_bytes(b"caf\xe9")
    (tmp_path / "mamba-2.8b").mkdir()
    for call, words in calls:
        assert_one_line(run(*shlex.split(call)), code, words)
