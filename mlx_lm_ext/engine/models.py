"""Finds the models that requests name, and loads them.

Rules:
1. Weights are loaded on the generation thread only, by upstream's ``load``.
2. A wrong name is refused before that, so that it does not unload the running model.
"""

import logging
import traceback
from collections import OrderedDict
from math import inf
from os.path import isfile, join
from pathlib import Path
from threading import Lock
from typing import Any, Dict, List, Optional

from mlx_lm.generate import make_stop_sequences
from mlx_lm.processors import PROCESSORS
from mlx_lm.server import ModelDescription
from mlx_lm.utils import load_config, load_tokenizer

from ..device import on_cpu, process_limit
from ..distributed.group import ONE_PROCESS, OneProcess
from ..distributed.launch import check_heads, weights
from ..errors import RequestError, one_line
from ..log import stage
from ..request.served_model import ModelKey, ServedModel
from ..request.tokenizing import bound_chat_templates, most_characters
from . import dequantize
from .context_length import (
    TABLE_MODELS,
    find_context_length,
    find_vocabulary_size,
    text_config,
)
from .generation_config import FILE, read_sampling
from .json_files import read_object
from .model_names import AllowedModels, cached_snapshot, is_path, normalize
from .upstream import ModelProviderBase, download

logger = logging.getLogger(__name__)

# Models whose tokenizer and configuration are kept.
MAX_DESCRIBED = 8
# The fields of a request that name the parts of a key.
PARAMS = ("model", "adapters", "draft_model")


def takes_images(config: Dict[str, Any]) -> bool:
    """Whether mlx-lm has an image processor for models with this configuration."""
    kind = config.get("processor_type", config.get("model_type"))
    return bool(config.get("vision_config")) and kind in PROCESSORS


def check_room(path: Path, n_ranks: int) -> None:
    """Refuse a model whose weights are larger than the memory limit of this process: the
    system would end the process.

    Args:
        path (Path): Its folder.
        n_ranks (int): How many processes share them out.

    Raises:
        MemoryError: If its files are larger than the limit.
    """
    limit = process_limit()
    n_bytes = sum(f.stat().st_size for f in path.glob("*.safetensors")) // n_ranks
    if on_cpu() and limit is not None and n_bytes > limit:
        raise MemoryError(
            f"its weights take {n_bytes / 1e9:.1f} GB, and a limit of this process "
            f"(control group or ulimit -v) leaves {limit / 1e9:.1f} GB"
        )


class BatchModelProvider(ModelProviderBase):
    """Upstream's ``ModelProvider`` that also answers handlers.

    Args:
        cli_args (argparse.Namespace): The command line.
        group (OneProcess): The ranks that run the model.
    """

    def __init__(self, cli_args, group: OneProcess = ONE_PROCESS):
        super().__init__(cli_args)
        self.group = group
        self._lock, self._describing = Lock(), Lock()
        # In the order in which they were last asked for.
        self._served: "OrderedDict[ModelKey, ServedModel]" = OrderedDict()
        self.allowed = AllowedModels(cli_args.allow_models)
        others = (cli_args.adapter_path, cli_args.draft_model)
        adapter, draft = (name and normalize(name) for name in others)
        self.default_key: ModelKey = (normalize(cli_args.model), adapter, draft)

    def key(self, model: ModelDescription) -> ModelKey:
        """The model, the adapter and the draft model that a request names.

        Raises:
            RequestError: If it may not name one of them.
        """
        default = ModelDescription("default_model", "default_model", None)
        names = self.resolve(model)
        if names == self.resolve(default):
            return self.default_key
        if self.group.size > 1:
            asked = zip(PARAMS, names, self.resolve(default))
            param, name = next((p, n) for p, n, served in asked if n != served)
            message = f"{param} {name!r} is not what the {self.group.size} ranks serve"
            raise self.not_found(param, message)
        model_name, adapter, draft = map(self._allow, PARAMS, names, self.default_key)
        return model_name, adapter, draft

    def _allow(
        self, param: str, name: Optional[str], served: Optional[str]
    ) -> Optional[str]:
        """The normalized name of what a request names in the field ``param``.

        Raises:
            RequestError: If the request may not name it.
        """
        if name is None:
            return None
        if served is not None and normalize(name) == served:
            return served
        found = self.allowed.find(name, is_adapter=param == "adapters")
        if found is None:
            message = f"{param} {name!r} is not there, or not one of --allow-models"
            raise self.not_found(param, message)
        return found

    def has(self, name: str) -> bool:
        """Whether a request may name a model that is on this machine (any thread)."""
        if normalize(name) == self.default_key[0]:
            return True
        found = self.allowed.find(name)
        if found is not None and not is_path(found):
            found = cached_snapshot(found) or found
        # ``Path.is_file`` raises an error for a name that is too long.
        return found is not None and isfile(join(found, "config.json"))

    def describe(self, model: ModelDescription) -> ServedModel:
        """What a request's model is, found without loading its weights (any thread).

        Raises:
            RequestError: If the model, its adapter or its draft model is not found, or
              may not be loaded.
        """
        key = self.key(model)
        served = self._served.get(key)
        if served is None:
            # Not under the lock, because it may take minutes to download a model.
            path = self._locate(key, self.resolve(model))
            with self._describing:
                served = self._served.get(key) or self._describe(key, path)
        self._keep(served)
        return served

    def _keep(self, served: ServedModel) -> None:
        """Keep a model that was asked for, and drop those that were not for the longest
        time."""
        with self._lock:
            self._served[served.key] = served
            self._served.move_to_end(served.key)
            others = [key for key in self._served if key != self.default_key]
            for key in others[: max(0, len(others) - MAX_DESCRIBED)]:
                del self._served[key]

    @property
    def served_names(self) -> List[str]:
        """What clients may call the served model (any thread)."""
        args = self.cli_args
        return args.served_model_name or [args.model_id]

    @property
    def takes_images(self) -> bool:
        """Whether one of the models that were asked for takes images (any thread)."""
        with self._lock:
            return any(served.takes_images for served in self._served.values())

    def _describe(
        self, key: ModelKey, path: Path, tokenizer: Any = None
    ) -> ServedModel:
        try:
            sampling = self._read_sampling(path)
            config = load_config(path)
            eos_token_ids = config.get("eos_token_id")
            context_length = find_context_length(config, self.cli_args.context_length)
            if tokenizer is None:
                tokenizer = load_tokenizer(path, self.tokenizer_config, eos_token_ids)
            has_template = tokenizer.chat_template is not None
            if self.cli_args.use_default_chat_template and not has_template:
                tokenizer.chat_template = tokenizer.default_chat_template
            wrong = bound_chat_templates(tokenizer)
            # Other models are loaded for a request, which may have no chat.
            if wrong is not None and key == self.default_key:
                raise ValueError(wrong)
        except Exception as e:
            raise self.unusable("model", key[0], e)
        return ServedModel(
            key=key,
            tokenizer=tokenizer,
            vocabulary_size=find_vocabulary_size(config) or len(tokenizer),
            context_length=context_length,
            most_characters=most_characters(tokenizer, context_length),
            # Without a template, upstream would write an image as Python does.
            takes_images=takes_images(config) and tokenizer.has_chat_template,
            end_of_text=make_stop_sequences(tokenizer),
            sampling=sampling,
        )

    def _read_sampling(self, path: Path) -> Dict[str, Any]:
        """The sampling that a model recommends, without what the command line gives."""
        args = self.cli_args
        if args.generation_config == "none":
            return {}
        sampling = read_sampling(path)
        return {name: sampling[name] for name in sampling if name not in args.given}

    def _locate(self, key: ModelKey, names: Optional[ModelKey] = None) -> Path:
        """Find the files of a model, its adapter and its draft model.

        Args:
            key (ModelKey): Where they are.
            names (Optional[ModelKey]): What the request called them, for messages.
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
                # Upstream reads the same files, and its errors do not name them.
                for name_of_file in (config, "tokenizer_config.json"):
                    read_object(path / name_of_file)
                if param == "model":
                    self._read_sampling(path)
            except Exception as e:
                raise self.unusable(param, called, e)
        if "draft_model" in paths:
            self._check_draft(paths["model"], paths["draft_model"])
        return paths["model"]

    def _check_draft(self, model: Path, draft: Path) -> None:
        """Refuse a draft model that would read beyond one of its arrays: one with more tokens
        than the model has, or with fewer positions."""
        wanted = (self.cli_args.context_length, None)
        configs, lengths = [], []
        for param, path, length in zip(
            ("model", "draft_model"), (model, draft), wanted
        ):
            try:
                config = load_config(path)
                lengths.append(find_context_length(config, length))
            except Exception as e:
                raise self.unusable(param, path.name, e)
            configs.append(text_config(config))
        n_tokens, n_drafted = (find_vocabulary_size(config) or 0 for config in configs)
        if n_drafted > n_tokens > 0:
            message = (
                f"the draft model has {n_drafted} tokens, and the model {n_tokens}"
            )
            raise RequestError(400, message, "draft_model")
        n, n_draft = (length or inf for length in lengths)
        if n_draft < n and configs[1].get("model_type") in TABLE_MODELS:
            message = (
                f"the draft model has {n_draft} positions, and the model takes {n} tokens "
                "(--context-length)"
            )
            raise RequestError(400, message, "draft_model")

    def switch_to(self, key: ModelKey) -> None:
        """Load the weights of ``key`` if they are not loaded (generation thread).

        Raises:
            RequestError: If they cannot be loaded.
        """
        if key == self.model_key:
            return
        path = self._locate(key)
        try:
            with stage(f"Loading {key[0]}"):
                self.check_shares(path)
                self.load(*key)
            dequantize.convert(
                [m for m in (self.model, self.draft_model) if m is not None],
                self.cli_args,
                self.group,
            )
        except Exception as e:
            # The frames hold arrays, and the error goes to another thread.
            traceback.clear_frames(e.__traceback__)
            if self.model_key == key:
                self.reset()  # it is loaded, but not as it has to be
            raise self.unusable("model", key[0], e)
        # What is known of a model that a request has named already is kept.
        served = self._served.get(key) or self._describe(key, path, self.tokenizer)
        self.tokenizer = served.tokenizer
        if self.cli_args.generation_config == "model":
            logger.info(f"Sampling by {FILE}: {served.sampling or 'it gives none'}")
        self._keep(served)

    def check_shares(self, path: Path) -> None:
        """Check that there is room for the weights, and that they can be shared out among the
        ranks.

        Raises:
            MemoryError: If there is no room.
            ValueError: If they cannot be shared out.
        """
        check_room(path, self.group.size)
        if self.tensor_group is not None:
            check_heads(text_config(load_config(path)), self.group.size)

    @property
    def digests(self) -> Dict[str, str]:
        """A digest of each file of the loaded model."""
        return weights(self._locate(self.model_key))

    def unusable(self, param: str, name: str, reason: Exception) -> RequestError:
        """The 404 for a model that a request may name, and that cannot be loaded."""
        message = f"{param} {name!r} cannot be loaded: {one_line(reason)}"
        if name == self.default_key[0]:
            return RequestError(404, message, param, "model_not_found")
        return self.not_found(param, message)

    def not_found(self, param: str, message: str) -> RequestError:
        if param == "model":
            message += f"; served is {' or '.join(map(repr, self.served_names))}"
        return RequestError(404, message, param, "model_not_found")
