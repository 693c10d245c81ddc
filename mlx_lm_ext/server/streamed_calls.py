"""Tool calls while the model writes them, in the parts that streams of OpenAI have.

Rules:
1. Once the arguments of a call have begun as an object of JSON after its name, it is a call,
   and its parts are sent. If it is broken or cut off after that, its arguments are what the
   model wrote.
2. All other calls are sent when they are whole, or stay text.
3. What is sent does not depend on the pieces in which the text comes.
"""

import logging
import re
from typing import Any, Dict, List, NamedTuple, Optional

from .streamed_arguments import StreamedArguments
from .tool_calls import ToolCallParser
from .tool_formats import Headed, Unfinished

logger = logging.getLogger(__name__)

# How often the mark of the end of a tool call may stand in the values of one.
MAX_ENDS_IN_VALUE = 16
# Characters between the mark of the start, or the end of a call, and the arguments of the
# next one.
MAX_HEADER = 1024
# The finish reasons of an answer after which the model would have gone on.
CUT_OFF = ("length", "timeout")

Parts = List[Dict[str, Any]]


class OpenCall:
    """The call whose arguments are being written.

    Args:
        arguments (StreamedArguments): The arguments.
        mark (str): The mark of the end of the calls, or "" if there is none.
        end (re.Pattern): Pattern of the end of a call in which it may be broken.
    """

    def __init__(self, arguments: StreamedArguments, mark: str, end: re.Pattern):
        self.arguments, self.mark, self.end = arguments, mark, end
        # What was not read, and once the call is over, what follows it.
        self.text = ""
        self.is_over = self.is_broken = False
        self.n_searched = 0
        # From a mark of the end in a string on, the pieces until the call has ended, and what
        # the arguments end with if that mark was the end.
        self.doubtful: Optional[List[str]] = None
        self.if_ended = ""

    def add(self, text: str, is_last: bool) -> str:
        """Read the next text; gives the next piece of the arguments."""
        self.text += text
        piece = ""
        if self.doubtful is None and not self.is_broken:
            piece = self.read_pieces(is_last)
        if self.doubtful is not None:
            piece += self.read_doubtful(is_last)
        elif self.is_broken:
            piece += self.read_broken(is_last)
        return piece

    def read_pieces(self, is_last: bool) -> str:
        """Read up to the mark of the end, or what may become it."""
        at = self.text.find(self.mark) if self.mark else -1
        end = at
        if at < 0:
            end = len(self.text)
            end -= 0 if is_last else n_begun(self.mark, self.text)
        piece = self.arguments.add(self.text[:end])
        self.text = self.text[end:]
        if self.arguments.is_done:
            self.text = self.arguments.text + self.text
            self.is_over = True
        elif at >= 0 and self.arguments.in_string:
            self.doubtful, self.if_ended = [], self.arguments.rest()
        elif at >= 0 or is_last or self.arguments.is_broken:
            self.text = self.arguments.rest() + self.text
            self.is_broken = True
        return piece

    def read_doubtful(self, is_last: bool) -> str:
        """Read on within a string that has the mark of the end in it, if it goes on."""
        self.doubtful.append(self.arguments.add(self.text[self.n_searched :]))
        self.n_searched = len(self.text)
        if self.arguments.is_done:
            self.text, self.is_over = self.arguments.text, True
            return "".join(self.doubtful)
        self.is_over = is_last or self.arguments.is_broken
        return self.if_ended if self.is_over else ""

    def read_broken(self, is_last: bool) -> str:
        """Read what is no JSON, up to the next end of a call."""
        at = self.text.find(self.mark, self.n_searched) if self.mark else -1
        if at < 0 and not is_last:
            self.n_searched = max(0, len(self.text) - len(self.mark))
            return ""
        end = self.end.search(self.text, 0, at if at >= 0 else len(self.text)).start()
        piece, self.text = self.text[:end], self.text[end:]
        self.is_over = True
        return piece


def n_begun(mark: str, text: str) -> int:
    """Characters at the end of a text that the mark begins with."""
    n = min(len(mark) - 1, len(text))
    while n > 0 and not text.endswith(mark[:n]):
        n -= 1
    return max(0, n)


class Ended(NamedTuple):
    """What is left of the text of calls.

    Args:
        text (str): What is no call.
        n_after (int): Characters after that.
        rest (str): What follows the mark of the end.
    """

    text: str = ""
    n_after: int = 0
    rest: str = ""


class CallSection:
    """The text from the mark of the start of tool calls to that of their end.

    Args:
        parser (ToolCallParser): The parser of the answer.
        start (str): The mark of the start.
        end (str): The mark of the end, or "" if there is none.
        takes_one (bool): Whether it ends after its first call.
    """

    def __init__(self, parser: ToolCallParser, start: str, end: str, takes_one: bool):
        self.parser, self.takes_one = parser, takes_one
        self.start, self.end = start, end
        # What is in no call that was sent in parts, and how much of it was searched.
        self.text, self.n_searched, self.n_tried = "", 0, 0
        # Where the mark of the end turned out to be a part of a value.
        self.ends_in_value: List[int] = []
        # The call that is being written, and the format of the last one that was.
        self.call: Optional[OpenCall] = None
        self.headed: Optional[Headed] = None

    @property
    def n_waiting(self) -> int:
        """Characters that may yet become text of the answer."""
        if self.call is not None:
            return len(self.call.text)
        return len(self.text) + (0 if self.headed else len(self.start))

    def read(self, parts: Parts, reason: Optional[str]) -> Optional[Ended]:
        """Read the text that has come.

        Args:
            parts (List[Dict]): Parts of calls, to which more are added.
            reason (Optional[str]): The finish reason, if nothing follows.

        Returns:
            What is left, once the section has ended.
        """
        while self.call is not None or self.begin_call(parts):
            piece = self.call.add(self.text, reason is not None)
            if piece:
                self.parser.go_on(piece, parts)
            self.text = self.call.text if self.call.is_over else ""
            if not self.call.is_over:
                return None
            self.call = None
            if self.takes_one:
                return Ended()
        return self.read_whole(parts, reason)

    def begin_call(self, parts: Parts) -> bool:
        """Begin the call of whose arguments the text has the start, if it does."""
        if "{" not in self.text[self.n_tried : MAX_HEADER]:
            return False
        self.n_tried = len(self.text)
        at = self.n_closing
        for headed in self.parser.headed:
            match = headed.start_of_object.match(self.text, at, MAX_HEADER)
            if match is not None:
                break
        else:
            return False
        call, self.text = match.groupdict(), self.text[match.end() :]
        self.n_searched, self.n_tried, self.ends_in_value = 0, 0, []
        arguments = self.parser.begin_streamed(call, parts)
        self.call = OpenCall(arguments, self.end, headed.end)
        self.headed = headed
        return True

    @property
    def n_closing(self) -> int:
        """Characters that still belong to the call before the text."""
        stop = self.headed and self.headed.stop
        return stop.match(self.text, 0, MAX_HEADER).end() if stop else 0

    def read_whole(self, parts: Parts, reason: Optional[str]) -> Optional[Ended]:
        """Parse the text if its end has come."""
        while self.end and (at := self.text.find(self.end, self.n_searched)) >= 0:
            self.n_searched = at + len(self.end)
            try:
                return self.leave(self.parse(at), at, parts)
            except Unfinished:
                if len(self.ends_in_value) == MAX_ENDS_IN_VALUE:
                    return self.leave([], at, parts)
                self.ends_in_value.append(at)
        if reason is None:
            self.n_searched = max(self.n_searched, len(self.text) - len(self.end) + 1)
            return None
        # After a call, the start of the mark is not text either.
        at = len(self.text) - (n_begun(self.end, self.text) if self.headed else 0)
        try:
            calls = self.parse(at, is_cut=reason in CUT_OFF)
        except Unfinished:
            calls = []
        return self.leave(calls, at, parts)

    def parse(self, end: int, is_cut: bool = False) -> List[Dict[str, Any]]:
        """The tool calls of the text up to a character; none if it cannot be parsed.

        Raises:
            Unfinished: If it ends within a value.
        """
        text = self.text[self.n_closing : end]
        try:
            return self.parser.parse(text, is_cut) if text else []
        except Unfinished:
            raise
        except Exception as e:
            # Upstream's parsers raise other errors than the ValueError that they should.
            logger.warning(f"A tool call cannot be parsed: {type(e).__name__}: {e}")
            return []

    def leave(self, calls: List[Dict[str, Any]], at: int, parts: Parts) -> Ended:
        """End after whole calls, or with a text that is no call.

        Args:
            calls (List[Dict]): The calls.
            at (int): Where the text ends.
            parts (List[Dict]): Parts of calls, to which more are added.
        """
        if not calls and self.ends_in_value:
            # It was broken, and has ended there.
            at = self.ends_in_value[0]
        mark = self.end if at < len(self.text) else ""
        rest = self.text[at + len(mark) :]
        for call in calls[:1] if self.takes_one else calls:
            self.parser.add_whole(call, parts)
        if calls:
            return Ended(rest=rest)
        if self.headed is not None:
            # The marks are those of the calls before.
            return Ended(self.text[self.n_closing : at], len(self.text) - at, rest)
        return Ended(self.start + self.text[:at] + mark, len(rest), rest)
