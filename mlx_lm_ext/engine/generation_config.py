"""How a model is to be sampled, by the ``generation_config.json`` that comes with it."""

from pathlib import Path
from typing import Any, Dict

from ..errors import RequestError
from ..request.fields import check_fields, check_type
from .json_files import read_object

FILE = "generation_config.json"
# The fields of a request that the file may give.
NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_sampling(path: Path) -> Dict[str, Any]:
    """Read the sampling of a model.

    Args:
        path (Path): The folder of the model.

    Returns:
        Values by fields of a request; none if there is no such file.

    Raises:
        ValueError: If the file cannot be read, or a value is wrong.
    """
    config = read_object(path / FILE)
    values = {n: config[n] for n in NAMES if config.get(n) is not None}
    do_sample = config.get("do_sample")
    try:
        check_fields(values)
        if do_sample is not None:
            check_type("do_sample", do_sample, bool)
    except RequestError as e:
        raise ValueError(f"its {FILE} cannot be used: {e}")
    if do_sample is False:
        values["temperature"] = 0.0
    elif do_sample:
        # The default of transformers, for which the file is made.
        values.setdefault("temperature", 1.0)
    return values
