"""Reading a user's YAML file, with one line for each possible error.

A file may come from anybody, so it is looked at before it is built: aliases could make a few lines
a billion values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.regular import read_regular
from pretrain.config.yaml_keys import refuse_repeated_keys
from pretrain.errors import ConfigError

LARGEST_FILE = 1 << 20
MOST_VALUES = 100_000
"""Values of a file, those behind its aliases counted each time they are named."""
DEEPEST = 50
MOST_INTERPOLATIONS = 16
"""Uses of `${...}`, each of which may double a text that another one made."""


def read_mapping(path: Path, example: str) -> dict[str, Any]:
    """Read the mapping in a file, or raise ConfigError; `example` names a file like it."""
    import yaml

    try:
        text = read_yaml(path)
        values = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a mapping of settings; {example}")
    return values


def read_yaml(path: Path) -> str:
    """Text of a YAML file of bounded size and depth; ConfigError if it cannot be read.

    FileNotFoundError and IsADirectoryError are left to the caller's words.
    """
    import yaml

    try:
        text = read_regular(path, LARGEST_FILE).decode("utf-8")
        _check_size(text)
        refuse_repeated_keys(text, path)
    except (FileNotFoundError, IsADirectoryError):
        raise
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    return text


def _check_size(text: str) -> None:
    """Raise ValueError for a text that is deep, or that aliases or interpolations make large."""
    import yaml

    if text.count("${") > MOST_INTERPOLATIONS:
        raise ValueError(f"it holds more than {MOST_INTERPOLATIONS} interpolations ${{...}}")
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
            _add(open_nodes, sizes, anchor, size)
        elif isinstance(event, yaml.ScalarEvent):
            _add(open_nodes, sizes, event.anchor, 1)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias *{event.anchor} names nothing that is complete")
            _add(open_nodes, sizes, None, sizes[event.anchor])
        if len(open_nodes) > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def _add(
    open_nodes: list[tuple[str | None, int]], sizes: dict[str, int], anchor: str | None, size: int
) -> None:
    """Count a complete node of `size` values into the node around it."""
    around, before = open_nodes[-1]
    if before + size > MOST_VALUES:
        raise ValueError(f"it holds more than {MOST_VALUES:,} values")
    open_nodes[-1] = (around, before + size)
    if anchor is not None:
        sizes[anchor] = size
