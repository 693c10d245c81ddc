"""Which models, adapters and draft models a request may name.

Rule: of what a request may not name, it is not even told whether it exists.
"""

import os
from typing import List, Optional, Set

from huggingface_hub import snapshot_download

from ..patterns import matches

# As a pattern, allows requests to name any model.
ANY = "any"


def normalize(name: str) -> str:
    """The real path of a folder, so that all spellings of it are one name. The name of a
    repository stays as it is."""
    if is_path(name) or os.path.isdir(name):
        try:
            # ``abspath`` first: the patterns are compared with what it gives.
            return os.path.realpath(os.path.abspath(name))
        except ValueError:
            pass  # the name has characters that no path has
    return name


def is_path(name: str) -> bool:
    """Whether a name can only be a path, because no repository has such a name."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def spellings(name: str) -> Set[str]:
    """The texts that a pattern is compared with to decide whether it allows a name."""
    texts = set()
    if os.path.normpath(name) == name:
        texts.add(name)
    if is_path(name) or os.path.isdir(name):
        texts.add(os.path.abspath(name))
    return texts


def cached_snapshot(name: str) -> Optional[str]:
    """The folder of a repository in the Hugging Face cache, if the repository is there."""
    try:
        return snapshot_download(name, local_files_only=True)
    except Exception:
        # The name is none that a repository can have, or the cache is incomplete.
        return None


class AllowedModels:
    """The names that ``--allow-models`` allows.

    Args:
        patterns (Optional[List[str]]): Names and paths, in which ``*`` stands for any
          characters but slashes. None allows what the Hugging Face cache holds; an empty
          list allows nothing.
    """

    def __init__(self, patterns: Optional[List[str]]):
        self.allows_cached = patterns is None
        self.patterns = {
            text
            for pattern in patterns or ()
            for text in (pattern, os.path.abspath(os.path.expanduser(pattern)))
        }

    def find(self, name: str, is_adapter: bool = False) -> Optional[str]:
        """The normalized name, or the folder in the Hugging Face cache, of what a request
        names. ``None`` if the request may not name it."""
        texts = spellings(name)
        if ANY in self.patterns or any(matches(t, self.patterns) for t in texts):
            return normalize(name)
        if self.allows_cached and not is_adapter and normalize(name) == name:
            return cached_snapshot(name)
        return None

    def lists(self, repository: str) -> bool:
        """Whether requests may name a repository that the Hugging Face cache holds."""
        return (
            self.allows_cached
            or ANY in self.patterns
            or matches(repository, self.patterns)
        )
