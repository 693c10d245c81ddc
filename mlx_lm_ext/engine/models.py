"""Models by name: what a handler thread may know of them, and loading.

Rules:
1. Weights are loaded on the generation thread only, by upstream's ``load``.
2. A wrong name is found out before that, so it never costs the running model.
3. A request may name only what the command line allows. Of anything else it is not even
   told whether it exists.
"""

import logging
import os
from pathlib import Path
from threading import Lock
from typing import Any, Dict, Optional, Set

from huggingface_hub import snapshot_download
from mlx_lm.generate import make_stop_sequences
from mlx_lm.processors import PROCESSORS
from mlx_lm.server import ModelDescription
from mlx_lm.utils import load_config, load_tokenizer

from ..device import on_cpu, process_limit
from ..errors import RequestError
from ..patterns import matches
from ..request.served_model import ModelKey, ServedModel
from ..request.tokenizing import bound_chat_templates, most_characters
from .upstream import ModelProviderBase, download

# Models of which tokenizer and configuration are kept.
MAX_DESCRIBED = 8
# The fields of a request that name the parts of a key.
PARAMS = ("model", "adapters", "draft_model")
# Allows requests to name any model.
ANY = "any"


def takes_images(config: Dict[str, Any]) -> bool:
    """Whether a model of this configuration has a processor of images."""
    kind = config.get("processor_type", config.get("model_type"))
    return bool(config.get("vision_config")) and kind in PROCESSORS


def normalised(name: str) -> str:
    """One name for all spellings of the same folder. Of a repository it is the name."""
    if is_path(name) or os.path.isdir(name):
        try:
            # First without "..", as the patterns are compared.
            return os.path.realpath(os.path.abspath(name))
        except ValueError:
            pass  # no path has such characters
    return name


def is_path(name: str) -> bool:
    """Whether a name can only be a path. So are names that no repository has."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def spellings(name: str) -> Set[str]:
    """The texts of which a pattern may be one to allow a name."""
    texts = set()
    if os.path.normpath(name) == name:
        texts.add(name)
    if is_path(name) or os.path.isdir(name):
        texts.add(os.path.abspath(name))
    return texts


def cached_snapshot(name: str) -> Optional[str]:
    """The folder of a repository in the Hugging Face cache, if it is there."""
    try:
        return snapshot_download(name, local_files_only=True)
    except Exception:
        # A name that none can have, or a cache that is not whole.
        return None


def find_context_length(config: Dict[str, Any]) -> Optional[int]:
    """Tokens that a model takes by its configuration, its positions stretched as its RoPE
    stretches them; None if it does not say."""
    length = config.get("max_position_embeddings")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factor = scaling.get("factor")
    if length is None or not isinstance(factor, (int, float)):
        return length
    original = scaling.get("original_max_position_embeddings")
    kind = scaling.get("type") or scaling.get("rope_type")
    if original is not None:
        # Some have the stretched length already.
        return max(length, int(original * factor))
    if kind == "yarn" or kind == "dynamic":
        return int(length * factor)
    return length


def check_room(path: Path) -> None:
    """Refuse a model for whose weights this process has no room: it would be ended.

    Raises:
        MemoryError: If its files are larger than what limits the process.
    """
    limit = process_limit()
    n_bytes = sum(f.stat().st_size for f in path.glob("*.safetensors"))
    if on_cpu() and limit is not None and n_bytes > limit:
        raise MemoryError(
            f"its weights take {n_bytes / 1e9:.1f} GB, and a limit of this process "
            f"(control group or ulimit -v) leaves {limit / 1e9:.1f} GB"
        )


class BatchModelProvider(ModelProviderBase):
    """Upstream's ``ModelProvider`` that also answers handler threads."""

    def __init__(self, cli_args):
        super().__init__(cli_args)
        self._lock, self._describing = Lock(), Lock()
        # The last one is the one that was asked for last.
        self._served: Dict[ModelKey, ServedModel] = {}
        patterns = cli_args.allow_models
        # Without any, what the Hugging Face cache holds.
        self.allows_cached = patterns is None
        self.patterns = {
            text
            for pattern in patterns or ()
            for text in (pattern, os.path.abspath(os.path.expanduser(pattern)))
        }
        self.default_key: ModelKey = tuple(
            None if name is None else normalised(name)
            for name in (cli_args.model, cli_args.adapter_path, cli_args.draft_model)
        )

    def key(self, model: ModelDescription) -> ModelKey:
        """The model, the adapter and the draft model that a request names.

        Raises:
            RequestError: If it may not have one of them.
        """
        default = ModelDescription("default_model", "default_model", None)
        names = self.resolve(model)
        if names == self.resolve(default):
            return self.default_key
        return tuple(map(self._allowed, PARAMS, names, self.default_key))

    def _allowed(
        self, param: str, name: Optional[str], served: Optional[str]
    ) -> Optional[str]:
        """The normalised name of what a request may have."""
        if name is None or (served is not None and normalised(name) == served):
            return name and served
        texts = spellings(name)
        if ANY in self.patterns or any(matches(t, self.patterns) for t in texts):
            return normalised(name)
        is_repository = param != "adapters" and normalised(name) == name
        if self.allows_cached and is_repository and (path := cached_snapshot(name)):
            return path
        message = f"{param} {name!r} is not there, or not one of --allow-models"
        raise self.not_found(param, message)

    def lists(self, name: str) -> bool:
        """Whether requests may name a repository that the Hugging Face cache holds."""
        return (
            self.allows_cached or ANY in self.patterns or matches(name, self.patterns)
        )

    def describe(self, model: ModelDescription) -> ServedModel:
        """Find a request's model without loading its weights (any thread).

        Raises:
            RequestError: If the model, its adapter or its draft model is not found, or
              may not be loaded.
        """
        key = self.key(model)
        served = self._served.get(key)
        if served is None:
            # One at a time: many may ask for it at once.
            with self._describing:
                served = self._served.get(key)
                if served is None:
                    served = self._describe(key, self._locate(key, self.resolve(model)))
        self._keep(served)
        return served

    def _keep(self, served: ServedModel) -> None:
        """Note that a model was asked for; those that were not for longest go."""
        with self._lock:
            self._served.pop(served.key, None)
            self._served[served.key] = served
            others = [key for key in self._served if key != self.default_key]
            for key in others[: max(0, len(others) - MAX_DESCRIBED)]:
                del self._served[key]

    def _describe(
        self, key: ModelKey, path: Path, tokenizer: Any = None
    ) -> ServedModel:
        try:
            config = load_config(path)
            eos_token_ids = config.get("eos_token_id")
            if tokenizer is None:
                tokenizer = load_tokenizer(path, self.tokenizer_config, eos_token_ids)
        except Exception as e:
            raise self.unusable("model", key[0], e)
        if self.cli_args.use_default_chat_template and tokenizer.chat_template is None:
            tokenizer.chat_template = tokenizer.default_chat_template
        text_config = config.get("text_config") or config
        context_length = find_context_length(text_config)
        bound_chat_templates(tokenizer)
        return ServedModel(
            key=key,
            tokenizer=tokenizer,
            vocabulary_size=text_config.get("vocab_size", len(tokenizer)),
            context_length=context_length,
            most_characters=most_characters(tokenizer, context_length),
            takes_images=takes_images(config),
            end_of_text=make_stop_sequences(tokenizer),
        )

    def _locate(self, key: ModelKey, names: Optional[ModelKey] = None) -> Path:
        """Find the files of a model, its adapter and its draft model.

        Args:
            key (ModelKey): Where they are.
            names (Optional[ModelKey]): What a request calls them.
        """
        paths = {}
        for param, name, called in zip(PARAMS, key, names or key):
            if name is None:
                continue
            is_adapter = param == "adapters"
            config = "adapter_config.json" if is_adapter else "config.json"
            try:
                is_local = is_adapter or is_path(name)
                path = paths[param] = Path(name) if is_local else download(name)
                if not path.is_dir():
                    raise FileNotFoundError("there is no such folder")
                if not (path / config).is_file():
                    raise FileNotFoundError(f"it has no {config}")
            except Exception as e:
                raise self.unusable(param, called, e)
        if "draft_model" in paths:
            self._check_draft(paths["model"], paths["draft_model"])
        return paths["model"]

    def _check_draft(self, model: Path, draft: Path) -> None:
        """Refuse a draft model that knows more tokens: the model would read beyond its
        embedding."""
        sizes = []
        for param, path in (("model", model), ("draft_model", draft)):
            try:
                config = load_config(path)
            except Exception as e:
                raise self.unusable(param, path.name, e)
            sizes.append((config.get("text_config") or config).get("vocab_size"))
        if None not in sizes and sizes[1] > sizes[0]:
            message = f"the draft model has {sizes[1]} tokens, and the model {sizes[0]}"
            raise RequestError(400, message, "draft_model")

    def switch_to(self, key: ModelKey) -> None:
        """Load the weights of ``key`` unless they are (generation thread)."""
        if key == self.model_key:
            return
        path = self._locate(key)
        logging.info(f"Loading {key[0]}")
        try:
            check_room(path)
            _, tokenizer = self.load(*key)
        except Exception as e:
            raise self.unusable("model", key[0], e)
        self._keep(self._describe(key, path, tokenizer))

    def unusable(self, param: str, name: str, reason: Any) -> RequestError:
        """The 404 for what may be loaded, and is not there or not whole."""
        reason = (str(reason).splitlines() or [type(reason).__name__])[0].rstrip(".")
        message = f"{param} {name!r} cannot be loaded: {reason}"
        if name == self.default_key[0]:
            return RequestError(404, message, param, "model_not_found")
        return self.not_found(param, message)

    def not_found(self, param: str, message: str) -> RequestError:
        if param == "model":
            message += "; 'default_model' is the one that is served"
        return RequestError(404, message, param, "model_not_found")
