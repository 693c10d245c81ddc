"""A client that sends chats and takes little time from a server on the same machine."""

import json
import time
from typing import Dict, List, Optional

from mlx_lm_ext.bench.timings import Timing

try:
    import aiohttp
except ImportError as e:
    raise SystemExit(f"error: {e}; pip install 'mlx-lm-ext[bench]'")

Messages = List[Dict[str, str]]

GREEDY = {"temperature": 0.0}


class Client:
    """Sends chats to one model of one server."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str):
        self.session = session
        self.url = f"{url}/chat/completions"
        self.model = model

    async def chat(
        self,
        messages: Messages,
        max_tokens: int,
        timing: Optional[Timing] = None,
        **sampling: float,
    ) -> Timing:
        """Stream one answer and time it.

        Args:
            timing (Optional[Timing]): Filled in while the answer comes.
        """
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **(sampling or GREEDY),
        }
        timing = timing or Timing()
        timing.streamed, timing.start = True, time.perf_counter()
        error = None
        try:
            async with self.session.post(self.url, json=body) as response:
                if response.status != 200:
                    answer = " ".join((await response.text()).split())
                    error = f"HTTP {response.status}: {answer[:200]}"
                else:
                    async for line in response.content:
                        if line.startswith(b"data: {"):
                            timing.read(json.loads(line[6:]))
        except (aiohttp.ClientError, OSError, ValueError) as e:
            error = f"{type(e).__name__}: {e}"
        timing.close(error)
        return timing
