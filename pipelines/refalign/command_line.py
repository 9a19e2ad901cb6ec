"""What our programs have in common: commands and their help, `--version`, and errors of users in one line.

Nothing heavy is imported, so that `--help` answers at once.
"""

import argparse
import ast
import contextlib
import difflib
import errno
import inspect
import itertools
import logging
import os
import shutil
import signal
import sys
import textwrap
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import Positional, PositionalMetavarFromFieldName
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from refalign import __version__
from refalign.files import os_error_number
from refalign.privacy import shown


def _tell_interruption(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In place of a traceback, when Ctrl-C comes while modules are imported, before a program's `main`."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted; nothing was done.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _tell_interruption  # only programs import this module

DEBUG = "--debug"
PACKAGES = {"refalign", "refalign_training", "refalign_evaluation"}
# What torchao, where it is installed, logs whenever diffusers is imported: kernels for other machines that it lacks
NOISY = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
LONGEST = 1000  # characters of an error that nobody expected

# What to do about errors, by the operating system's numbers and by words
MEMORY = (errno.ENOMEM,)
REMEDIES = (
    (
        "Free some space, or name an output (for temporary files: the variable TMPDIR) on another disk.",
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        ("database or disk is full",),
    ),
    (
        "There is not enough memory: take a smaller size, fewer frames, a smaller batch or fewer workers.",
        MEMORY,
        ("out of memory", "can't allocate memory"),
    ),
    ("Raise the number of files that may be open (`ulimit -n`), or take fewer workers.", (errno.EMFILE,), ()),
)


@dataclass(frozen=True)
class Command:
    """A command of a program."""

    options: type
    """The dataclass of its options, whose docstring says in a line what it does."""
    run: Callable[[Any], int]
    """What runs it, and returns the exit code."""
    example: str
    """The options of a call that can be made."""
    read: Callable[..., Any] = tyro.cli
    """What makes options of words, called as `tyro.cli` is."""

    @property
    def description(self) -> str:
        return inspect.getdoc(self.options) or ""


@dataclass(frozen=True)
class Program:
    """A program, or a command that has commands of its own."""

    name: str
    description: str
    commands: Mapping[str, "Command | Program"]
    default: str | None = None
    """The command that is meant where options alone are given."""
    errors: tuple[type[Exception], ...] = (ValueError, OSError, ImportError)
    """Errors of users, whose words say all. Of others, the line also says what they are and where they were raised."""

    def main(self, words: Sequence[str] | None = None) -> int:
        """Runs the command that words, by default the command line's, give, and returns its exit code.

        An error is told in one line; with `--debug`, by its traceback too.
        """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of an exception, so that nothing half is left
        words = list(sys.argv[1:] if words is None else words)
        is_debugged = DEBUG in words
        try:
            command, options = self.parse([word for word in words if word != DEBUG])
            handler = logging.StreamHandler()
            handler.setFormatter(_Formatter())
            logging.basicConfig(level=logging.INFO, handlers=[handler])
            for client in ("httpx", "httpx2"):  # the Hub's, which log each request
                logging.getLogger(client).setLevel(logging.WARNING)
            for library in NOISY:
                logging.getLogger(library).setLevel(logging.ERROR)
            output: Any = _Shown(sys.stdout)
            with contextlib.redirect_stdout(output):
                return command.run(options)
        except Exception as error:
            if is_debugged:
                traceback.print_exc()
            if not (isinstance(error, BrokenPipeError) and _has_lost_reader("\n")):
                print(f"{self.name}: {shown(one_line(error, self.errors))}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"{self.name}: interrupted; no unfinished file is left.", file=sys.stderr)
            return 130
        finally:
            _has_lost_reader()  # asked now, because at exit Python would tell a traceback

    def parse(self, words: Sequence[str]) -> tuple[Command, Any]:
        """
        The command that words name, and its options.

        Raises:
            SystemExit: if help or the version was asked for, or the words are not understood.
        """
        name, rest = (words[0], list(words[1:])) if words else ("", [])
        if name in ("-h", "--help"):
            print(self._overview())
            raise SystemExit(0)
        if name == "--version":
            print(f"{self.name} {__version__}")
            raise SystemExit(0)
        if self.default is not None and name.startswith("-"):
            name, rest = self.default, list(words)
        command = self.commands.get(name)
        if command is None:
            print(f"{self.name}: {self._correction(name)}", file=sys.stderr)
            raise SystemExit(2)
        return command.parse(rest) if isinstance(command, Program) else self._parse_options(name, command, rest)

    def _parse_options(self, name: str, command: Command, words: list[str]) -> tuple[Command, Any]:
        program, description = f"{self.name} {name}", command.description
        if required := ", ".join(_required(command.options)):
            description += f"\n\nRequired: {required}."
        told = {"prog": program, "description": description, "registry": REGISTRY}
        words = _with_lists_joined(command.options, words)
        try:
            return command, command.read(command.options, args=words, config=(PositionalMetavarFromFieldName,), **told)
        except SystemExit as exit:
            if not exit.code:
                print(f"\nExample:\n  {program} {command.example}")
            raise

    def _overview(self) -> str:
        lines = [f"usage: {self.name} COMMAND [OPTIONS]", "", self.description, "", "Commands:"]
        width = max(map(len, self.commands)) + 4
        for name, command in self.commands.items():
            columns = shutil.get_terminal_size().columns
            first, later = f"  {name}".ljust(width), " " * width
            lines.append(textwrap.fill(command.description, columns, initial_indent=first, subsequent_indent=later))
        if self.default is not None:
            lines += ["", f"`{self.name} [OPTIONS]` means `{self.name} {self.default} [OPTIONS]`."]
        lines += ["", f"`{self.name} COMMAND --help` describes a command and its options."]
        return "\n".join([*lines, f"With {DEBUG}, an error shows its traceback too."])

    def _correction(self, name: str) -> str:
        names = ", ".join(self.commands)
        if not name:
            return f"Name a command: {names}. --help describes them."
        matches = difflib.get_close_matches(name, self.commands, n=1)
        hint = f" Did you mean {matches[0]}?" if matches else ""
        return f"There is no command {name!r}.{hint} The commands are {names}."


def one_line(error: Exception, expected: tuple[type[Exception], ...] = (ValueError, OSError, ImportError)) -> str:
    """What an error says in one line, and what to do about it. Errors that nobody expected say what and where they
    are."""
    text = " ".join(str(error).split()) or type(error).__name__
    number = os_error_number(error)
    for remedy, numbers, words in REMEDIES:
        is_memory = numbers == MEMORY and isinstance(error, MemoryError)
        if number in numbers or is_memory or any(word in text for word in words):
            return f"{text.rstrip('.')}. {remedy}"
    if isinstance(error, expected):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if not PACKAGES.isdisjoint(Path(frame.filename).parts)] or frames
    where = "".join(f", {Path(frame.filename).name} line {frame.lineno}" for frame in ours[-1:])
    text = f"{text[:LONGEST]} ..." if len(text) > LONGEST else text
    return f"{text} ({type(error).__name__}{where}). This was not expected: {DEBUG} shows the traceback."


class _Formatter(logging.Formatter):
    """Names and texts of others, in a log, command no terminal and begin no line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return shown(super().formatMessage(record))


class _Shown:
    """A stream on which they command no terminal either; its lines are the program's own."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write("\n".join(map(shown, text.split("\n"))))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _has_lost_reader(text: str = "") -> bool:
    """Whether nobody reads the output any more, as when `head` has seen enough; the rest of it is then thrown away."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


REGISTRY = ConstructorRegistry()


@REGISTRY.struct_rule
def _rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """What tyro does with a dataclass, but lines of a docstring are joined, and its own options stand first."""
    if not is_dataclass(info.type):
        return None
    hints = get_type_hints(info.type, include_extras=True)
    own = info.type.__annotations__
    specs = []
    for field in sorted(fields(info.type), key=lambda field: field.name not in own):
        text = partial(description, info.type, field.name)
        default = getattr(info.default, field.name) if isinstance(info.default, info.type) else _default(field)
        specs.append(StructFieldSpec(field.name, hints[field.name], default, text))
    return StructConstructorSpec(info.type, tuple(specs))


def _default(field: Field) -> Any:
    if field.default is not MISSING:
        return field.default
    if field.default_factory is MISSING or is_dataclass(field.default_factory):
        return tyro.MISSING_NONPROP  # a section has defaults of its own
    return field.default_factory()


def description(options: type, name: str) -> str | None:
    """The docstring beneath a field of a dataclass or of one that it extends, as one line."""
    for kind in options.__mro__:
        if is_dataclass(kind) and name in _docstrings(kind):
            return _docstrings(kind)[name]
    return None


@cache
def _docstrings(options: type) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(options))).body
    texts = {}
    for pair in itertools.pairwise(ast.iter_child_nodes(definition)):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = " ".join(text.split())
    return texts


def _with_lists_joined(options: type, words: list[str]) -> list[str]:
    """The words with `--lora A --lora B` as `--lora A B`: of an option that is given twice, tyro drops the first."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags = dict(_lists(options))
    given = Counter(name for word in words if (name := flags.get(word.partition("=")[0])))
    for name in [name for name, count in given.items() if count > 1]:
        spellings = [flag for flag, option in flags.items() if option == name]
        parser.add_argument(*spellings, dest=name, nargs="*", action="extend")
    joined, rest = parser.parse_known_args(words)
    for name, values in vars(joined).items():
        rest += [name, *values]
    return rest


def _lists(options: type, prefix: str = "--") -> Iterator[tuple[str, str]]:
    """Every spelling of the options that take any number of values, with the option's name."""
    for field, hint in get_type_hints(options, include_extras=True).items():
        bare = next(iter(get_args(hint)), hint) if get_origin(hint) is Annotated else hint
        name = f"{prefix}{field.replace('_', '-')}"
        if isinstance(bare, type) and is_dataclass(bare):
            yield from _lists(bare, f"{name}.")
        elif get_origin(bare) is tuple and Ellipsis in get_args(bare) and hint != Positional[bare]:
            yield name, name
            yield f"{prefix}{field}", name
            for extra in get_args(hint)[1:] if hint is not bare else ():
                for alias in getattr(extra, "aliases", None) or ():
                    yield alias, name


def _required(options: type) -> Iterator[str]:
    """The options that have no default, as the command line writes them."""
    hints = get_type_hints(options, include_extras=True)
    for field in fields(options):
        if field.default is not MISSING or field.default_factory is not MISSING:
            continue
        kind = hints[field.name]
        bare = next(iter(get_args(kind)), kind)
        if isinstance(bare, type) and is_dataclass(bare):
            yield from _required(bare)
        elif kind == Positional[bare]:
            yield field.name.upper()
        else:
            yield f"--{field.name.replace('_', '-')}"
