"""Reads the JSON files of a model, so that an error says which of them is wrong."""

import json
from pathlib import Path
from typing import Any, Dict


def read_object(path: Path) -> Dict[str, Any]:
    """Read a file that holds a JSON object.

    Args:
        path (Path): The file; one that is not there is empty.

    Raises:
        ValueError: If it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as e:
        reason = getattr(e, "strerror", None) or e
        raise ValueError(f"its {path.name} cannot be used: {reason}")
    return value
