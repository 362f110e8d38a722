"""Reading recipes' YAML: repeated keys are errors, and plain numbers and dates are those of YAML 1.2.

PyYAML is YAML 1.1 and keeps the last of two equal keys. It would read 1e-5 as text, 1:30 as 90, 010 as 8, and 2026-01-01 as
a date.
"""

import re
from collections.abc import Hashable
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from caftune.errors import CaftuneError, not_utf8

_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?(0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)$")
_FLOAT = re.compile(r"[-+]?((\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+$")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2, and dates as text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own name, read as a class attribute)
        first: [
            (tag, pattern) for tag, pattern in found if tag not in (f"{_TAG}{n}" for n in ("int", "float", "timestamp"))
        ]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_octal(self, node: yaml.ScalarNode) -> int:
        """An integer; octal only with YAML 1.2's prefix 0o (010 has been refused)."""
        return int(node.value.replace("_", ""), 8) if "0o" in node.value else self.construct_yaml_int(node)


_Loader.add_implicit_resolver(f"{_TAG}int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_octal)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        CaftuneError: not UTF-8, malformed, several documents, a key given twice, or a number with a leading zero.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error


def parse_yaml(text: str, place: str) -> Any:
    """What one YAML document holds; `place` names it in errors, which are those of `read_yaml`."""
    try:
        loader = _Loader(text)
        node = loader.get_node() if loader.check_node() else None
        if loader.check_node():
            line = loader.get_event().start_mark.line + 1
            raise CaftuneError(f"{place}, line {line}: must be one YAML document, got a second one here. Remove one.")
        _check(node, place)
        return loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise CaftuneError(
            f"{place}, line {line}: is not valid YAML ({error.problem}). Fix the line or the one before."
        ) from error
    except yaml.YAMLError as error:  # a control character
        raise CaftuneError(f"{place} is not valid YAML ({' '.join(str(error).split())}). Fix the file.") from error
    except RecursionError as error:
        raise CaftuneError(f"{place} must be nested less deeply. Fix the file.") from error


def _check(node: yaml.Node | None, place: str, above: tuple[yaml.Node, ...] = ()) -> None:
    """Raise CaftuneError for a key given twice, a number with a leading zero, and a value that contains itself."""
    if node is None:
        return
    line = node.start_mark.line + 1
    if any(node is other for other in above):
        raise CaftuneError(
            f"{place}, line {line}: a value must not contain itself, got an alias of the anchor around it. Remove the alias."
        )
    if node.tag == f"{_TAG}int" and _LEADING_ZERO.match(node.value):
        raise CaftuneError(
            f"{place}, line {line}: {node.value} must be written without its leading zero, which marks octal numbers in "
            "YAML 1.1. Remove the zero, or put it in quotes where it is text."
        )
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, place)
    parts = () if isinstance(node, yaml.ScalarNode) else node.value
    for part in chain.from_iterable(parts) if isinstance(node, yaml.MappingNode) else parts:
        _check(part, place, (*above, node))


def _check_keys(node: yaml.MappingNode, place: str) -> None:
    """Raise CaftuneError for a key given twice. A key may override a merged one (<<), as in YAML."""
    lines: dict[Hashable, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue  # PyYAML refuses other keys
        line = key.start_mark.line + 1
        if line in lines.values():  # an alias has the place of its anchor
            line = max(line, value.start_mark.line + 1)
        name = key.value if key.tag == f"{_TAG}str" else (key.tag, key.value)
        if name in lines:
            raise CaftuneError(
                f"{place}, line {line}: {key.value} must be given once, got it twice (first in line {lines[name]}). "
                "Remove one, or put what they hold under one key."
            )
        lines[name] = line
