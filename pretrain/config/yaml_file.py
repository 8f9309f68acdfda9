"""Reading a user's YAML file, with one line for each possible error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError


def read_mapping(path: Path, example: str) -> dict[str, Any]:
    """Read the mapping in a file, or raise ConfigError; `example` names a file like it."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a mapping of settings; {example}")
    return values
