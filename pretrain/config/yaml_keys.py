"""Keys that stand twice in a YAML file, of which readers take the last without a word."""

from __future__ import annotations

from pathlib import Path

from pretrain.errors import ConfigError


def refuse_repeated_keys(text: str, path: Path) -> None:
    """Raise ConfigError, with both lines, for a mapping with a key twice; else yaml.YAMLError."""
    import yaml

    open_nodes: list[dict[str, int] | None] = []
    at_key: list[bool] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            open_nodes.pop()
            at_key.pop()
        if not isinstance(event, yaml.NodeEvent):
            continue
        keys = open_nodes[-1] if open_nodes else None
        if keys is not None:
            if at_key[-1] and isinstance(event, yaml.ScalarEvent):
                line = 1 + (event.start_mark.line if event.start_mark else 0)
                if event.value in keys:
                    raise ConfigError(
                        f"{path}: the key {event.value!r} stands twice, in lines "
                        f"{keys[event.value]} and {line}; remove one of them"
                    )
                keys[event.value] = line
            at_key[-1] = not at_key[-1]
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append({} if isinstance(event, yaml.MappingStartEvent) else None)
            at_key.append(True)
