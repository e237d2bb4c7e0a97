"""Reading a settings file: plain YAML, with the line of each key kept for the errors.

YAML 1.1 reads `1e-4` as text and keeps the last of two equal keys without a word; here `1e-4`
is a number and a key given twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from graftune.errors import SettingsError

KeyPath = tuple[str, ...]
"""Where a value lies: `("train", "lr")`."""


class _Loader(yaml.SafeLoader):
    """The safe loader, with the floats of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class SettingsFile:
    """What a settings file says, and the line on which it says each thing."""

    values: dict[str, Any]
    """The file as nested dictionaries."""

    source: str
    """The file's name, as the user gave it."""

    lines: dict[KeyPath, int] = field(default_factory=dict[KeyPath, int])
    """The line of each key, counted from 1."""

    def where(self, path: KeyPath) -> str:
        """Returns `file:line` of a key, or of the nearest key above it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.source}:{self.lines[path[:length]]}"
        return self.source


def read_settings_file(path: str | Path) -> SettingsFile:
    """Returns the values and key lines of a YAML file.

    Raises:
        SettingsError: The file can't be read, isn't YAML, isn't a mapping or names a key twice.
    """
    source = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SettingsError(f'There is no settings file "{source}".') from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f'The settings file "{source}" can\'t be read: {error}.') from error
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines = _key_lines(node, source) if node is not None else {}
        values = loader.construct_document(node) if node is not None else {}
    except yaml.YAMLError as error:
        raise SettingsError(_syntax_message(source, error)) from error
    if not isinstance(values, dict):
        raise SettingsError(f"{source}: a settings file is a list of `key: value` lines.")
    return SettingsFile(cast(dict[str, Any], values), source, lines)


def parse_value(text: str) -> Any:
    """Returns a command-line value as YAML reads it; a text stays as it is, with what YAML folds.

    Example:
        >>> parse_value("1e-3"), parse_value("[query, value]"), parse_value("null")
        (0.001, ['query', 'value'], None)
        >>> parse_value("Text: {text} # good?"), parse_value("# {text}"), parse_value('" a"')
        ('Text: {text} # good?', '# {text}', ' a')
    """
    bare = text.strip()
    try:
        found = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text
    is_text = isinstance(found, str) and bare[:1] not in ("'", '"')
    is_sentence = isinstance(found, dict) and not bare.startswith("{")
    is_comment = found is None and bare.startswith("#")
    return bare if is_text or is_sentence or is_comment else found


def dump(values: dict[str, Any]) -> str:
    """Returns nested dictionaries as YAML, keys in their order."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False)


def _key_lines(node: Any, source: str, above: KeyPath = ()) -> dict[KeyPath, int]:
    lines: dict[KeyPath, int] = {}
    if not isinstance(node, yaml.MappingNode):
        return lines
    for key, value in node.value:
        path = (*above, _key_text(key))
        line = key.start_mark.line + 1
        if path in lines:
            raise SettingsError(
                f"{source}:{line}: {'.'.join(path)} is given twice, first on line {lines[path]}."
            )
        lines[path] = line
        lines.update(_key_lines(value, source, path))
    return lines


def _key_text(key: Any) -> str:
    value: Hashable = key.value if isinstance(key, yaml.ScalarNode) else str(key.value)
    return str(value)


def _syntax_message(source: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f":{mark.line + 1}" if mark is not None else ""
    problem = getattr(error, "problem", None) or str(error)
    return f"{source}{line}: this is not valid YAML: {problem}."
