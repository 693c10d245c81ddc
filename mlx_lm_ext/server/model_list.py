"""The models in the Hugging Face cache, for ``/v1/models``."""

from pathlib import Path
from typing import Iterator

from huggingface_hub import constants


def cached_models() -> Iterator[str]:
    """The repositories in the Hugging Face cache that look like models for mlx-lm.

    Only names of files are read. ``huggingface_hub.scan_cache_dir`` also asks for the size
    of every file, which takes seconds for a large cache.
    """
    try:
        folders = list(Path(constants.HF_HUB_CACHE).glob("models--*"))
    except OSError:
        return  # it cannot be read, so that no model in it can be served either
    for folder in folders:
        try:
            revision = (folder / "refs" / "main").read_text().strip()
            snapshot = folder / "snapshots" / revision
            # The files are links, whose targets an interrupted download lacks.
            names = {file.name for file in snapshot.iterdir() if file.exists()}
        except (OSError, ValueError):
            continue  # nothing of it is downloaded, or the reference is no text
        if {"config.json", "tokenizer_config.json"} <= names and any(
            name.endswith(".safetensors") for name in names
        ):
            yield folder.name.removeprefix("models--").replace("--", "/")
