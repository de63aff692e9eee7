"""The command line's manners: exit status, one line for an error, one object for --json, nothing slow at start."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import lightvlm
import pytest
from lightvlm import bench, cli, doctor
from lightvlm.methods import method_names

COMMANDS = list(cli.COMMANDS)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that finds the same packages."""
    import os

    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help(call, words):
    result = call(*words)
    assert result.status == 0
    assert result.out.startswith("usage: lightvlm")
    assert not result.err


def test_version(call):
    assert call("--version").out == f"lightvlm {lightvlm.__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "COMMAND"),
        (["frobnicate"], "frobnicate"),
        (["doctor", "--frobnicate"], "--frobnicate"),
        (["methods", "--keep", "0.5"], "--keep"),
        (["bench"], "KIND"),
        (["bench", "frobnicate"], "frobnicate"),
        (["bench", "decoder", "--rounds", "many"], "--rounds"),
        (["generate", "--image", "a.png", "--prompt", "what ?"], "--model"),
        (["generate", "--model", "m", "--prompt", "what ?"], "--image"),
        (["generate", "--model", "m", "--image", "a.png"], "--prompt"),
        (["generate", "--model", "m", "--image", "a.png", "--prompt", "?", "--keep", "x"], "--keep"),
        (["generate", "--model", "m", "--image", "a.png", "--prompt", "?", "--dtype", "int8"], "--dtype"),
        (
            ["generate", "--model", "m", "--image", "a.png", "--prompt", "?", "--max-new-tokens", "1.5"],
            "--max-new-tokens",
        ),
        (["demo", "--questions", "few"], "--questions"),
    ],
)
def test_usage_errors(call, words, said):
    result = call(*words)
    assert result.status == 2
    assert said in result.err
    assert result.err.count("\n") == 1
    assert not result.out


def test_starting_imports_nothing_slow():
    code = (
        "import sys; from lightvlm.cli import main; main(['--help']); main(['bench', '--help']);"
        "assert not {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules), 'slow'"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_runs_as_a_module():
    result = python("import runpy; runpy.run_module('lightvlm', run_name='__main__')")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1


def test_a_reader_that_leaves_early(tmp_path):
    code = (
        "import os, sys; read, write = os.pipe(); os.close(read); os.dup2(write, 1);"
        "from lightvlm.cli import main; sys.exit(main(['doctor']))"
    )
    result = python(code)
    assert (result.returncode, result.stderr) == (1, "")


def test_a_strange_error_takes_one_line(call, monkeypatch):
    def fail(args):
        raise KeyError("several\nlines " + "x" * 5000)

    monkeypatch.setattr(doctor, "run", fail)
    result = call("doctor", "--json")
    assert result.status == 1
    assert not result.out
    assert result.err.startswith("lightvlm: KeyError: ")
    assert result.err.count("\n") == 1
    assert len(result.err) < 600
    assert "Traceback" in call("doctor", "--debug").err


def test_an_interrupt_takes_one_line(call, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupt)
    assert call("doctor") == (1, "", "lightvlm: interrupted\n")


def test_json_is_alone_on_standard_output(call, monkeypatch):
    def chatter(args):
        print("a library says something")
        return {"x": 1}

    monkeypatch.setattr(doctor, "run", chatter)
    result = call("doctor", "--json")
    assert result.json == {"x": 1}
    assert result.err == "a library says something\n"


def test_json_has_no_infinities(call, monkeypatch):
    monkeypatch.setattr(doctor, "run", lambda args: {"x": float("nan")})
    result = call("doctor", "--json")
    assert result.status == 1
    assert not result.out


# -- bench ---------------------------------------------------------------------------------------------------------

ROW = {
    "case": "c",
    "method": "m",
    "baseline": "b",
    "seconds": 0.25,
    "baseline_seconds": 1.0,
    "ratio": 4.0,
    "runs": [1],
}
FAKE = {"kind": "ops", "device": "d", "torch": "t", "commit": "abc", "rows": [ROW, {**ROW, "more": 1}]}


@pytest.fixture
def fake_bench(monkeypatch):
    """A kind that measures nothing."""
    module = SimpleNamespace(
        add_arguments=lambda parser: parser.add_argument("--rounds", type=int, default=1),
        run=lambda args: {**FAKE, "rounds": args.rounds},
    )
    monkeypatch.setattr(bench, "load", lambda kind: module)
    return module


def test_bench_hands_options_to_its_kind(call, fake_bench):
    assert call("bench", "ops", "--rounds", 7, "--json").json == {**FAKE, "rounds": 7}


def test_bench_prints_the_fields_that_all_rows_have(call, fake_bench):
    result = call("bench", "ops")
    assert result.status == 0
    assert all(word in result.out for word in ("baseline_seconds", "0.25", "abc"))
    assert "runs" not in result.out
    assert "more" not in result.out


def test_bench_prints_a_kind_s_own_table(call, fake_bench):
    from rich.table import Table

    fake_bench.table = lambda result: Table(f"mine: {len(result['rows'])} rows")
    assert "mine: 2 rows" in call("bench", "ops").out


def test_bench_decoder(call):
    words = [
        "--geometry",
        "tiny",
        "--image-tokens",
        64,
        "--text-tokens",
        8,
        "--rounds",
        1,
        "--dtype",
        "float32",
        "--keep",
        0.5,
    ]
    found = call("bench", "decoder", *words, "--json").json
    assert found["kind"] == "decoder"
    assert {row["method"] for row in found["rows"]} >= {"lightvlm"}
    assert all(
        {"case", "method", "baseline", "seconds", "baseline_seconds", "ratio"} <= set(row)
        for row in found["rows"]
    )
    result = call("bench", "decoder", *words[:-2], "--image-tokens", 0)
    assert result.status == 1
    assert "--image-tokens" in result.err


def test_bench_names_an_unknown_kind():
    with pytest.raises(ValueError, match="kind must be one of ops, decoder, fidelity"):
        bench.load("speed")


# -- doctor and methods --------------------------------------------------------------------------------------------


def test_doctor(call):
    found = call("doctor", "--json").json
    assert set(found) >= {"version", "torch", "backends", "attention", "problems", "methods", "models"}
    assert found["backends"]["cpu"] == {"built": True, "usable": True}
    assert found["attention"]["sdpa"] is True
    assert found["methods"] == method_names()
    assert "Qwen2_5_VLForConditionalGeneration" in found["models"]
    assert all(isinstance(problem, str) for problem in found["problems"])
    text = call("doctor").out
    assert all(problem in text for problem in found["problems"])


def test_doctor_names_what_is_missing(call, monkeypatch, tmp_path):
    real = doctor.importlib.util.find_spec
    gone = {"torchvision", "sklearn", "matplotlib"}
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in gone else real(name))
    monkeypatch.setattr(lightvlm.reference_vlm, "__file__", str(tmp_path / "__init__.py"))
    problems = call("doctor", "--json").json["problems"]
    for word in ("torchvision", "scikit-learn", "matplotlib", "weights"):
        assert sum(word in problem for problem in problems) == 1, word
    assert "pip install 'lightvlm[demo]'" in " ".join(problems)


def test_doctor_without_the_compiled_library(tmp_path):
    code = "import sys; from lightvlm.cli import main; sys.exit(main(['doctor', '--json']))"
    result = python(code, LIGHTVLM_LIBRARY=str(tmp_path / "none.so"))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert not found["backends"]["cpu"]["usable"]
    assert any("none.so" in problem for problem in found["problems"])


@pytest.mark.parametrize(
    ("arches", "capability", "runs"),
    [
        (["80-real"], (8, 0), True),
        (["80-real"], (8, 9), True),
        (["89-real"], (8, 0), False),
        (["80-real"], (9, 0), False),
        (["80-virtual"], (9, 0), True),
        (["80"], (12, 0), True),
        (["90-virtual"], (8, 0), False),
        (["90a-real"], (9, 0), True),
        (["90a-real"], (10, 0), False),
        (["80-real", "90a-real", "90-virtual"], (12, 1), True),
        (["100f-real"], (10, 0), True),
        ([], (8, 0), False),
    ],
)
def test_which_gpus_a_build_runs_on(arches, capability, runs):
    assert doctor.covers(arches, capability) is runs


def test_methods_lists_every_option(call):
    found = {entry["name"]: entry for entry in call("methods", "--json").json["methods"]}
    assert list(found) == method_names()
    options = {option["name"]: option for option in found["lightvlm"]["options"]}
    assert options["keep"]["default"] == 0.35
    assert options["decode_interval"]["low"] == 1
    assert options["merge"]["choices"] == ["uniform", "score", "drop"]
    assert "2509.00419" in found["lightvlm"]["source"]
    for entry in found.values():
        assert all(option["doc"] for option in entry["options"]), entry["name"]
    text = call("methods").out
    assert "decode_interval" in text
    assert "random" in text


@pytest.mark.parametrize("name", method_names())
def test_every_listed_option_can_be_given(name):
    from lightvlm.catalogue import describe, make_plan

    options = {option["name"]: option["default"] for option in describe(name)["options"]}
    assert make_plan(name, options) == lightvlm.method(name)
