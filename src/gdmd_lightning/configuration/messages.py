"""jsonargparse's errors about wrong arguments, turned into one readable line.

Its messages list every type that a value could have had, several levels deep. A person needs the key, the
value and the right form; these are spread over the chain of causes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from gdmd_lightning.configuration.suggestions import (
    Argument,
    Arguments,
    arguments_of,
    arguments_of_class,
    class_names,
    did_you_mean,
    expectation,
    instead_of_key,
)
from gdmd_lightning.errors import UserError

LENGTH = 300
LINES = re.MULTILINE | re.DOTALL
OWN_CLASS = "a class of your own is found in the working directory and on PYTHONPATH"


@dataclass
class Place:
    """Where in a configuration the chain of causes points.

    Args:
        command: The command that was given.
        arguments: Its arguments.
        keys: Keys from the top, as typed: without ``init_args``.
        owners: Class paths of the objects on the way, from the outermost.
        inside: Keys within the innermost owner, or from the top without one.
    """

    command: str
    arguments: Arguments
    keys: list[str] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)
    inside: list[str] = field(default_factory=list)

    def enter(self, key: str) -> None:
        """Follow a dotted key downwards; the chain repeats keys."""
        parts = key.removeprefix("fit.").split(".")
        if self.inside[-len(parts) :] != parts:
            self.keys += parts
            self.inside += parts

    def own(self, class_path: str) -> None:
        """Go on inside an object of this class."""
        if self.owners[-1:] != [class_path]:
            self.owners.append(class_path)
            self.inside.clear()

    def known(self) -> Arguments:
        """The arguments among which the last key is looked up."""
        if not self.owners:
            return self.arguments
        try:
            return arguments_of_class(self.owners[-1])
        except (ImportError, AttributeError):  # a class inside another one: no suggestions
            return {}

    def see(self) -> str:
        """The command that shows what is valid here."""
        if self.keys[:1] == ["model"] and self.owners:
            return f"see {self.command} --model.help {self.owners[0].rpartition('.')[2]}"
        return f"see {self.command} --help"


def readable_error(error: BaseException, command: str, arguments: Arguments | None = None) -> UserError:
    """Turn an error of a parser or a constructor into a :class:`UserError`.

    If one of its causes is a :class:`UserError` already, return that.

    Args:
        error: The error, with its causes.
        command: The command whose ``--help`` the message points to.
        arguments: The command's arguments, to suggest the right ones.
    """
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, UserError):
            return cause
    place = Place(command, arguments or {})
    for cause in chain:
        if found := re.match(r'Parser key "([^"]+)":', str(cause)):
            place.enter(found[1])
        elif found := re.match(r"Problem with given class_path '([^']+)'", str(cause)):
            place.own(found[1])
    what, remedy = _explanation(chain, place)
    if not remedy.startswith(OWN_CLASS):
        remedy = f"{remedy}{' ' if remedy.endswith('?') else '; ' if remedy else ''}{place.see()}"
    # An unknown key is named from the top in the message itself.
    where = "" if what.startswith(("unknown key", "unknown option")) else ".".join(place.keys)
    return UserError(shortened(what), where=where or command, remedy=remedy)


def parsed(parser: Any, arguments: Sequence[str]) -> Any:
    """The arguments as a parser of jsonargparse reads them.

    Args:
        parser: The parser of a command; its ``prog`` ends with the command's name.
        arguments: As given.

    Raises:
        UserError: If they are wrong.
    """
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(list(arguments))
    except ArgumentError as error:
        raise readable_error(error, parser.prog.split()[-1], arguments_of(parser)) from error


def shortened(text: object) -> str:
    """A text on one line, cut between words after at most :data:`LENGTH` characters."""
    line = " ".join(str(text).split()).rstrip(".")
    return line if len(line) <= LENGTH else f"{line[:LENGTH].rpartition(' ')[0]} ..."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The chain of causes, from the outermost.

    Where a key takes a name or an object, and an object was given, the chain goes on with the complaint that it is no
    name. What was wrong with the object is only in the text; its lines are the causes then.
    """
    while error is not None:
        yield error
        found = re.search(r"^Errors:\n(.+)\nGiven value type: .*(?:Namespace|NestedArg)'>$", str(error), LINES)
        if found and str(error.__cause__).startswith("Expected a <class 'str'>"):
            branches = re.split(r"^  - ", found[1], flags=re.MULTILINE)[1:]
            of_object = next((each for each in branches if not each.startswith("Expected a <class 'str'>")), "")
            yield from (ValueError(line.strip()) for line in of_object.splitlines())
            return
        error = error.__cause__


def _explanation(chain: list[BaseException], place: Place) -> tuple[str, str]:
    """What was wrong, and what would be right, from the deepest error whose text says it."""
    deepest, text = chain[-1], str(chain[-1])
    if type(deepest).__module__.startswith("omegaconf"):
        return _interpolation(deepest, place)
    if (found := _failed_import(chain)) is not None:
        return found
    if isinstance(deepest, AttributeError | KeyError) and len(chain) > 1:
        text = str(chain[-2])
    if match := re.match(r"Expected a dot import path string: (.*)", text):
        return _unknown_class(match[1], place)
    if re.search(r"Unable to load config", text):
        value = re.search(r'Unable to load config "(.*)"', text)
        return _unexpected(value[1] if value else "", place)
    if match := re.match(r"Expected a (.+?)\. Got value: (.*)", text, re.DOTALL):
        union = re.search(r"Subtypes: \[(.+)\]\n", str(chain[-2])) if len(chain) > 1 else None
        choices = re.findall(r"'([^']*)'", " ".join(re.findall(r"Literal\[[^\]]+\]", union[1] if union else match[1])))
        meant = did_you_mean(match[2], choices) if len(match[2]) > 2 else ""
        return f"expected {_type_name(union[1] if union else match[1])}, got {match[2]!r}", _question(meant)
    if match := re.search(r"Group '(.+)' does not accept option '(.+)'", text):
        return _unknown_key(f"{match[1]}.{match[2]}", place)
    if match := re.search(r"ption '(.+)' is not accepted|does not accept option '(.+)'", text):
        return _unknown_key(match[1] or match[2], place)
    if match := re.match(r"unrecognized arguments: --?([^\s=]+)", text):
        return _unknown_key(match[1].removesuffix("+"), place, "option '--")
    if match := re.match(r"Import path (\S+) does not correspond to a subclass of (\w+)", text):
        names = class_names(place.known().get(".".join(place.inside), Argument()).type)
        return f"{match[1]!r} is not a {match[2]}", f"use a subclass of it: {', '.join(names)}" if names else ""
    if match := re.match(r"the following arguments are required: (.+)", text):
        missing = match[1].replace("fit.", "")
        return f"missing: {missing}", "give --config shapes.yaml, or --model GDMD" if missing == "model" else ""
    return text, ""


def _question(remedy: str) -> str:
    return remedy if remedy.startswith("did you mean") else ""


def _unknown_key(key: str, place: Place, kind: str = "key '") -> tuple[str, str]:
    """An unknown key, named from the top, and the nearest valid one."""
    typed = [part for part in key.removeprefix("fit.").split(".") if part != "init_args"]
    whole, within = ".".join([*place.keys, *typed]), ".".join([*place.inside, *typed])
    remedy = instead_of_key(within, place.known(), whole.removesuffix(within))
    if not remedy and place.owners:
        owner = place.owners[-1].rpartition(".")[2]
        remedy = f"{owner} has {', '.join(place.known())}" if place.known() else f"{owner} has no settings"
    return f"unknown {kind}{whole}'", shortened(remedy)


def _unknown_class(name: str, place: Place) -> tuple[str, str]:
    """A word that names no class; anything else but a word was not meant as one."""
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        return _unexpected(name, place)
    key, known = ".".join(place.inside), place.known()
    names = class_names(known[key].type) if key in known else []
    remedy = did_you_mean(name, names)
    if not remedy.startswith("did you mean") and key in known:
        expected, example = expectation(".".join(place.keys), key, known)
        if expected.startswith("settings"):
            return _unexpected(name, place)
        remedy = f"{remedy or f'expected {expected}'}; e.g. {example}"
    return f"unknown class {name!r}", remedy


def _unexpected(value: str, place: Place) -> tuple[str, str]:
    key, known = ".".join(place.inside), place.known()
    expected, example = expectation(".".join(place.keys), key, known)
    return f"expected {expected}, got {value!r}", f"e.g. {example}"


def _interpolation(error: Any, place: Place) -> tuple[str, str]:
    """A ``${...}`` that OmegaConf cannot resolve."""
    key = [part for part in str(getattr(error, "full_key", "") or "").split(".") if part not in ("", "init_args")]
    place.keys[:] = [part for part in key if part != "fit"]
    what = str(error).split("\n")[0]
    if match := re.match(r"Interpolation key '(.+)' not found", what):
        what = f"'${{{match[1]}}}' refers to a key that is not there"
    if match := re.search(r"Environment variable '(.+)' not found", what):
        return f"the environment variable {match[1]} is not set", f"set it, or write ${{oc.env:{match[1]},DEFAULT}}"
    return what, "write ${...} with the whole key from the top, e.g. ${model.init_args.height}, in the same file"


def _failed_import(chain: list[BaseException]) -> tuple[str, str] | None:
    """The message for a module that cannot be imported, or that lacks the class; ``None`` for other errors."""
    deepest = chain[-1]
    given = next(
        (m[1] for e in reversed(chain) if (m := re.match(r"Problem with given class_path '([^']+)'", str(e)))), ""
    )
    failed = _module_that_failed(deepest.__traceback__)
    if isinstance(deepest, SyntaxError):
        return f"{deepest.filename}, line {deepest.lineno}, is not Python: {deepest.msg}", ""
    if isinstance(deepest, ModuleNotFoundError) and failed is None:
        if deepest.name is None:  # raised by a library that checks what is installed
            return str(deepest), ""
        if given == deepest.name or given.startswith(f"{deepest.name}."):
            return f"there is no module {deepest.name!r} for {given!r}", f"{OWN_CLASS}; it is not there"
        return f"there is no module {deepest.name!r}", OWN_CLASS
    if failed is not None:
        cause = f"{type(deepest).__name__}: {deepest}"
        return f"module {failed!r} cannot be imported: {cause}", f"{OWN_CLASS}; so must be what it imports"
    if isinstance(deepest, AttributeError) and given:
        module, _, name = given.rpartition(".")
        return f"module {module!r} has no class {name!r}", _classes_in(module, name)
    return None


def _classes_in(module: str, name: str) -> str:
    """The class of an imported module that was probably meant."""
    import inspect
    import sys

    found = vars(sys.modules[module]) if module in sys.modules else {}
    return did_you_mean(name, [key for key, value in found.items() if inspect.isclass(value)], "it has")


def _module_that_failed(trace: TracebackType | None) -> str | None:
    """The first module whose own code was running when the error was raised."""
    while trace is not None:
        code = trace.tb_frame
        if code.f_code.co_name == "<module>" and code.f_globals.get("__name__") != "__main__":
            return str(code.f_globals["__name__"])
        trace = trace.tb_next
    return None


def _type_name(text: str) -> str:
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"(?:\w+\.)*Literal\[([^\]]+)\]", r"one of \1", text)
    return text.replace(", one of", " or").replace(", NoneType", " or null")
