"""The command line: parses arguments, runs a command, prints its result or one line that says what is wrong.

A command is a module with ``add_arguments(parser)``, ``run(args) -> dict`` (what ``--json`` prints) and
``show(result)`` (what is printed without); it may have ``exit_status(result) -> int``. Only the module of the command
that was asked for is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from . import __version__, bench

COMMANDS = {
    "demo": "the reference VLM on held-out images: accuracy, tokens, bytes, time and pictures of what was kept",
    "generate": "answer a question about images with a model of transformers",
    "bench": "measure ops, a decoder, or fidelity; compare two results",
    "methods": "the methods, where they come from, and their options",
    "doctor": "what is built, found and usable here, and what is missing",
}
_LONGEST = 500  # characters of a message; some libraries print whole objects
_MODULES = {"generate": "answer", "methods": "catalogue"}  # where a command's module is not named as it is


class _Parser(argparse.ArgumentParser):
    """Usage errors take one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser; options are there only for the command (and kind of benchmark) that ``argv`` names."""
    words = [word for word in argv if not word.startswith("-")]
    command, kind = (*words, "", "")[:2]
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    common.add_argument(
        "--debug", action="store_true", help="show the traceback of an error, and all warnings"
    )
    parser = _Parser("lightvlm", description="Faster vision-language models at inference, without training.")
    parser.add_argument("--version", action="version", version=f"lightvlm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        about: dict[str, Any] = {"help": summary, "description": summary[0].upper() + summary[1:] + "."}
        if name == "bench":
            _add_kinds(commands.add_parser(name, **about), common, kind if command == "bench" else "")
        else:
            sub = commands.add_parser(name, parents=[common], **about)
            if name == command:
                _module(name).add_arguments(sub)
    return parser


def _add_kinds(parser: argparse.ArgumentParser, common: argparse.ArgumentParser, chosen: str) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, summary in bench.KINDS.items():
        sub = kinds.add_parser(
            name, parents=[common], help=summary, description=summary[0].upper() + summary[1:] + "."
        )
        if name == chosen:
            bench.load(name).add_arguments(sub)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 on a usage error, 1 on any other, or on bad news."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = build_parser(argv).parse_args(argv)
        module = _module(args.command)
        # Standard output is for the result alone.
        with contextlib.redirect_stdout(sys.stderr), contextlib.nullcontext() if args.debug else _quiet():
            result = module.run(args)
        if args.json:
            print(json.dumps(result, allow_nan=False))
        else:
            module.show(result)
        sys.stdout.flush()
        status = getattr(module, "exit_status", None)
        return status(result) if status is not None else 0
    except SystemExit as stop:  # argparse: --help, --version, a usage error
        return stop.code if isinstance(stop.code, int) else 1
    except BrokenPipeError:  # whoever read our output, `head` say, has enough
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or the interpreter complains when it ends
        return 1
    except KeyboardInterrupt:
        print("lightvlm: interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        else:
            print(f"lightvlm: {one_line(error)}", file=sys.stderr)
        return 1


def one_line(error: BaseException) -> str:
    """An exception as one line; kinds whose message seldom explains itself are named."""
    text = " ".join(str(error).split())
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + " ..."
    explained = isinstance(error, ValueError | TypeError | OSError | ImportError)
    return text if explained and text else f"{type(error).__name__}: {text} (--debug shows where)"


def _module(command: str) -> Any:
    return importlib.import_module(f".{_MODULES.get(command, command)}", __package__)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave standard error to us: libraries' warnings and bars hide the one line that an error takes."""
    for library in ("TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with warnings.catch_warnings(), _quiet_transformers():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """The same for who calls :func:`main` from Python and has imported transformers: it reads the variables once."""
    if "transformers" not in sys.modules:
        yield
        return
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
