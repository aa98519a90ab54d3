"""Typed options: dataclass fields that become command-line flags in named groups, or come from a file."""

import argparse
import dataclasses
import difflib
import json
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path

from medart_core.errors import UserError

# What options.json keeps besides the options: where the run was made.
OF_THE_MACHINE = ("precision", "num_processes")


class Parser(argparse.ArgumentParser):
    """A parser that complains in one line, and takes no shortened names, for a typing error would pass for one."""

    def __init__(self, **settings: typing.Any) -> None:
        super().__init__(
            **{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **settings}
        )

    def error(self, message: str) -> typing.NoReturn:
        """Raise UserError, with the option that was meant where it is easily guessed."""
        unknown = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
        known = {flag.replace("_", "-"): flag for flag in self._option_string_actions}
        near = difflib.get_close_matches(unknown.replace("_", "-"), known, n=1)
        if message.startswith("unrecognized arguments: ") and near:
            message = f"there is no option {unknown}, perhaps {known[near[0]]} is meant"
        raise UserError(f"{message}; --help lists all options")


def option(
    default,
    group: str,
    help: str,
    choices: Sequence[str] | None = None,
    read: Callable[[str], typing.Any] | None = None,
):
    """A dataclass field that becomes a command-line flag; `read` turns its text into the value."""
    return field(default=default, metadata={"group": group, "help": help, "choices": choices, "read": read})


def add_options(parser: argparse.ArgumentParser, options_type: type) -> None:
    """Give `parser` one flag per field of a dataclass made of `option` fields, in named groups.

    A switch has an opposite, for what a file or a preset has switched on: --no_compile, and --hldf for --no_hldf.
    """
    groups: dict[str, argparse._ArgumentGroup] = {}
    for item, kind in zip(dataclasses.fields(options_type), typing.get_type_hints(options_type).values(), strict=True):
        group, text = item.metadata["group"], item.metadata["help"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        flag = f"--{item.name}"
        if isinstance(kind, types.UnionType):
            kind = next(part for part in typing.get_args(kind) if part is not type(None))
        read = item.metadata["read"] or kind
        if kind is bool:
            groups[group].add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
            opposite = f"--{item.name.removeprefix('no_')}" if item.name.startswith("no_") else f"--no_{item.name}"
            groups[group].add_argument(
                opposite, action="store_false", dest=item.name, default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )
        elif typing.get_origin(kind) is list:
            text += "; repeatable"
            groups[group].add_argument(flag, action="append", metavar="TEXT", default=argparse.SUPPRESS, help=text)
        else:
            shown = text if item.default is None else f"{text} (default: {item.default})"
            metavar = {int: "N", float: "X", str: "TEXT"}[kind] if item.metadata["choices"] is None else None
            groups[group].add_argument(
                flag,
                type=read,
                default=argparse.SUPPRESS,
                choices=item.metadata["choices"],
                metavar=metavar,
                help=shown,
            )


def parse(
    options_type: type,
    description: str | None,
    argv: Sequence[str] | None = None,
    presets: Mapping[str, Mapping[str, typing.Any]] = types.MappingProxyType({}),
    preset_option: str = "preset",
    preset: str | None = None,
    aliases: Mapping[str, str] = types.MappingProxyType({}),
):
    """Read the command line, over `--config` and that over `--preset`, into a checked instance of `options_type`.

    `presets` gives the defaults that a value of the option `preset_option` stands for, `preset` is that value when
    none is given. `aliases` are other names of options.
    """
    parser = Parser(description=description)
    help = "options from a .toml or .json file, such as a run's options.json; --no_NAME switches off what it has on"
    parser.add_argument("--config", type=Path, metavar="FILE", default=argparse.SUPPRESS, help=help)
    add_options(parser, options_type)
    words = [_underscores(word, aliases) for word in (sys.argv[1:] if argv is None else argv)]
    given = vars(parser.parse_args(words))
    below: dict[str, typing.Any] = {}
    if file := given.pop("config", None):
        content = read_config(file, [item.name for item in dataclasses.fields(options_type)])
        below = {name: value for name, value in content.items() if value is None or value is False}
        below |= vars(parser.parse_args(_command_line(content)))
    preset = given.get(preset_option) or below.get(preset_option) or preset
    if preset is not None and presets:
        if preset not in presets:
            raise UserError(f"--{preset_option} {preset} does not exist; choose from {', '.join(presets)}")
        below = {**presets[preset], preset_option: preset, **below}
    options = options_type(**{**below, **given})
    options.check()
    return options


def _underscores(word: str, aliases: Mapping[str, str]) -> str:
    """`--random-weights=x-y` -> `--random_weights=x-y`: both spellings of an option's name are understood."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    return f"--{aliases.get(name, name)}{equals}{value}"


def _command_line(content: Mapping[str, typing.Any]) -> list[str]:
    """Options from a file as words, for the parser to check as it checks a person's."""
    argv = []
    for name, value in content.items():
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each is not False:
                argv.append(f"--{name}" if each is True else f"--{name}={each}")
    return argv


def read_config(file: Path, names: Sequence[str]) -> dict[str, typing.Any]:
    """The options in a .toml or .json file.

    Raises:
        UserError: for an unreadable file, or an option that does not exist.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"--config {file} cannot be read ({error}); give a .toml or .json file of options") from error
    if not isinstance(content, Mapping):
        raise UserError(f"--config {file} holds no table of options; write name = value lines, or a JSON object")
    unknown = sorted(content.keys() - {*names, *OF_THE_MACHINE})
    if unknown:
        raise UserError(f"--config {file}: there is no option {unknown[0]}; --help lists them")
    return {name: value for name, value in content.items() if name not in OF_THE_MACHINE}
