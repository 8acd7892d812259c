"""Run files: TOML whose keys are the options of ``deploy``, read with line numbers in every error."""

from __future__ import annotations

import difflib
import inspect
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Union, get_args, get_origin

import typer
from typer.main import get_command
from typer.models import OptionInfo

from scconv_deploy.commands.models import deploy
from scconv_deploy.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from scconv_deploy.workflows.cell import Cell

_OURS = ("output", "force", "json", "quiet")
"""Options of ``deploy`` that a run decides."""
_WRITTEN = ("cache",)
"""Options that name a folder which is written, not read."""
_SOURCES = ("model", "data", "plugin", "baseline")
"""Keys whose text may name a file, beside those that always do."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
TABLES = ("run", "defaults", "models", "variants")
_Place = tuple[str | int, ...]
"""Keys and positions from the top of the file to a value."""


@dataclass(frozen=True)
class Key:
    """Key of a run file that is an option of ``deploy``.

    Attributes:
        name: name of the option without its dashes.
        kind: type of one value: bool, int, str, :class:`pathlib.Path`, or a tuple of choices.
        many: whether the option is repeatable.
        option: typer's description of the option.
    """

    name: str
    kind: Any
    many: bool
    option: OptionInfo

    @property
    def is_json(self) -> bool:
        return "JSON" in (self.option.metavar or "")

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.kind is bool:
            return "true or false"
        word = "text" if self.option.metavar is None else f"text: {self.option.metavar}"
        if isinstance(self.kind, tuple):
            word = f"one of {', '.join(self.kind)}"
        elif self.kind is int:
            low, high = self.option.min, self.option.max
            word = (
                "an integer"
                + ("" if low is None else f" of at least {low}")
                + ("" if high is None else f", at most {high}")
            )
        elif self.is_json:
            word += " (or a table)"
        return f"{word}; or a list of such" if self.many else word

    def arguments(self, value: Any) -> list[str]:
        """The value as arguments of ``deploy`` (ValueError if it is none of what is expected)."""
        flag = f"--{self.name}"
        if self.kind is bool:
            _need(isinstance(value, bool))
            return [flag] if value else []
        values = value if self.many and isinstance(value, list) else [value]
        _need(bool(values))
        return [f"{flag}={self._text(one)}" for one in values]

    def _text(self, value: Any) -> str:
        if self.is_json and isinstance(value, dict):
            return json.dumps(value, sort_keys=True)
        if self.kind is int:
            low, high = self.option.min, self.option.max
            _need(type(value) is int and (low is None or value >= low) and (high is None or value <= high))
        else:
            _need(_is_text(value) and (not isinstance(self.kind, tuple) or value in self.kind))
        return str(value)


def _need(good: bool) -> None:
    if not good:
        raise ValueError


@cache
def deploy_keys() -> Mapping[str, Key]:
    """Keys of models, variants and defaults, by name: the options of ``deploy`` but for those that a run decides."""
    app = typer.Typer()
    app.command()(deploy)
    names = {option.name: option.opts[0].removeprefix("--") for option in get_command(app).params}
    parameters = inspect.signature(deploy).parameters
    keys = {names[name]: _key_of(names[name], parameter) for name, parameter in parameters.items()}
    return {name: key for name, key in keys.items() if key is not None and name not in _OURS}


def _key_of(name: str, parameter: inspect.Parameter) -> Key | None:
    """Key of a parameter; None for an argument."""
    kind, option = get_args(parameter.annotation)
    if not isinstance(option, OptionInfo):
        return None
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (one for one in get_args(kind) if one is not NoneType)
    many = get_origin(kind) is list
    if many:
        (kind,) = get_args(kind)
    return Key(name, get_args(kind) if get_origin(kind) is Literal else kind, many, option)


@dataclass(frozen=True)
class RunFile:
    """Content of a run file: its ``[run]``, and its cells in order."""

    output: Path
    engine: Literal["local", "ray"] | None
    address: str
    jobs: int | None
    bench: bool
    cells: tuple[Cell, ...]


def read_run_file(path: Path) -> RunFile:
    """Read a run file.

    Raises:
        UsageError: there is no such file, or a key is unknown, missing or wrong; the line number is in the message.
        IntegrityError: it is not TOML.
    """
    if not path.is_file():
        raise UsageError(f"{path} {'is no file' if path.exists() else 'does not exist'}.", "Name a run file (TOML).")
    return _Reader(path).read()


class _Reader:
    """Reader of one file: every problem becomes a UsageError with its line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._text = path.read_bytes().decode("utf-8")
            self._document = tomllib.loads(self._text)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise IntegrityError(f"{path} is not TOML: {error}.", "Correct it there.") from error

    def read(self) -> RunFile:
        from scconv_deploy.workflows.cell import Cell

        for name in self._document:
            self._known((name,), TABLES, "a run file")
        run = self._table(("run",))
        keys: dict[str, tuple[str, Callable[[Any], bool]]] = {
            "output": ("a folder, for example \"release\"", _is_text),
            "engine": ("one of local, ray", lambda value: value in ("local", "ray")),
            "address": ("the address of a Ray cluster", _is_text),
            "jobs": ("an integer of at least 1", lambda value: type(value) is int and value >= 1),
            "bench": ("true or false", lambda value: isinstance(value, bool)),
        }  # fmt: skip
        for key, value in run.items():
            self._known(("run", key), keys, "[run]")
            if not keys[key][1](value):
                self._wrong(("run", key), value, keys[key][0])
        if "output" not in run:
            self._fail(("run",), f"[run] has no output, expected {keys['output'][0]}.", 'Write output = "release".')
        defaults = self._options(("defaults",), self._table(("defaults",)) if "defaults" in self._document else {})
        models = self._entries("models", ("name", "model"))
        variants = self._entries("variants", ("name",))
        cells = tuple(
            self._cell(Cell, model, variant, defaults | self._options(of_model, model, ("name", "model")) |
                       self._options(of_variant, variant, ("name",)))
            for of_model, model in models
            for of_variant, variant in variants
        )  # fmt: skip
        return RunFile(
            Path(run["output"]),
            run.get("engine"),
            run.get("address", ""),
            run.get("jobs"),
            run.get("bench", False),
            cells,
        )

    def _cell(self, make: type[Cell], model: Mapping[str, Any], variant: Mapping[str, Any], keys: dict) -> Cell:
        options = (text for key, value in keys.items() for text in deploy_keys()[key].arguments(value))
        arguments = [model["model"], *options]
        named = [str(path) for path in self._named(model["model"], keys)]
        open_ended = ":" in str(keys.get("data", "")) and not Path(str(keys["data"])).exists()
        return make(model["name"], variant["name"], tuple(arguments), tuple(dict.fromkeys(named)), open_ended)

    def _named(self, model: str, keys: Mapping[str, Any]) -> Iterator[Path]:
        """Files and folders that a cell's values name; a file that does not exist yet may appear later."""
        for key, value in {"model": model, **keys}.items():
            if key != "model" and deploy_keys()[key].kind is Path and key not in _WRITTEN:
                yield Path(value)
            elif key in _SOURCES:
                whole, file = Path(value), Path(str(value).rpartition(":")[0])
                if whole.exists() or file.is_file():
                    yield whole if whole.exists() else file

    def _entries(self, name: str, required: Sequence[str]) -> list[tuple[_Place, Mapping[str, Any]]]:
        """Entries of an array of tables, with their places; names are checked."""
        found = self._document.get(name)
        if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
            told = f"{name} is {_shown(found)}" if name in self._document else f"There is no [[{name}]]"
            self._fail((name,), f"{told}, expected at least one [[{name}]].", f"Add [[{name}]] with a name.")
        seen: dict[str, int] = {}
        for index, entry in enumerate(found):
            for key in required:
                if key not in entry:
                    words = f"[[{name}]] number {index + 1} has no {key}, expected a text."
                    self._fail((name, index), words, f'Add {key} = "...".')
                if not _is_text(entry[key]):
                    self._wrong((name, index, key), entry[key], "a text")
            title, place = entry["name"], (name, index, "name")
            if not _NAME.fullmatch(title):
                self._wrong(place, title, "a folder's name: letters, digits, and . _ + - after the first")
            if title.casefold() in seen:
                first = self._line((name, seen[title.casefold()], "name"))
                words = f"name is {title!r}, which line {first} has already, expected another."
                self._fail(place, words, "Give every entry its own name.")
            seen[title.casefold()] = index
        return [((name, index), entry) for index, entry in enumerate(found)]

    def _options(self, place: _Place, entry: Mapping[str, Any], but: Sequence[str] = ()) -> dict[str, Any]:
        """Options of an entry, checked by the command line's own types."""
        known = deploy_keys()
        found = {key: value for key, value in entry.items() if key not in but}
        where = f"[{place[0]}]" if len(place) == 1 else f"[[{place[0]}]]"
        for key, value in found.items():
            self._known((*place, key), [*but, *known], where)
            try:
                known[key].arguments(value)
            except ValueError:
                self._wrong((*place, key), value, known[key].expected)
        return found

    def _table(self, place: tuple[str]) -> Mapping[str, Any]:
        if place[0] not in self._document:
            self._fail(place, f"There is no [{place[0]}].", f'Add [{place[0]}] with output = "release".')
        found = self._document[place[0]]
        if not isinstance(found, dict):
            self._wrong(place, found, f"a table [{place[0]}]")
        return found

    def _known(self, place: _Place, names: Sequence[str] | Mapping[str, Any], where: str) -> None:
        key = str(place[-1])
        if key in names:
            return
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(names)}."
        self._fail(place, f"{where} has no key {key!r}.", hint)

    def _wrong(self, place: _Place, found: Any, expected: str) -> NoReturn:
        self._fail(place, f"{place[-1]} is {_shown(found)}, expected {expected}.", "Correct it there.")

    def _fail(self, place: _Place, message: str, remedy: str) -> NoReturn:
        raise UsageError(f"{self._path}, line {self._line(place)}: {message}", remedy)

    def _line(self, place: _Place) -> int:
        """Line of a value: the first line after which TOML's own reader finds it.

        A statement of several lines cannot be read before its last one, so its first line follows the last readable
        one, without comments and empty lines.
        """
        lines = self._text.splitlines()
        last = 0
        for number in range(1, len(lines) + 1):
            try:
                found: Any = tomllib.loads("\n".join(lines[:number]))
            except tomllib.TOMLDecodeError:
                continue
            if _holds(found, place):
                return next(n for n in range(last + 1, number + 1) if lines[n - 1].partition("#")[0].strip())
            last = number
        return max(1, len(lines))


def _holds(found: Any, place: _Place) -> bool:
    for step in place:
        try:
            found = found[step]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _shown(value: Any) -> str:
    """A value as an error quotes it."""
    text = json.dumps(value, default=str) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
