"""What the very bytes of a request ask: a bounded memo of what the parser and `api.py`'s checks said of them.

It holds questions and never answers. The token is among the bytes: no other caller's request finds them.
A request is remembered by all its bytes, or by those before and after its request id: `questions.py` says why
these ask the same whatever the id is.
"""

from proxy.cache.memory import Kept
from proxy.core.resources import Key
from proxy.edge.prepared import Form

MOST_QUESTIONS = 65_536
MOST_BYTES = 16_777_216
"""Questions that are remembered, and the bytes that are remembered of the requests that ask them."""


class Question:
    """What a request asks; `caller` is the name for metrics and logs. Two are never equal."""

    __slots__ = ("authorization", "caller", "form", "kept", "key")

    def __init__(self, key: Key, form: Form, caller: str) -> None:
        self.key = key
        self.form = form
        self.caller = caller
        self.authorization = ""
        """What the header says, where the question is remembered without its request id."""
        self.kept: Kept | None = None
        """The place in memory where the entry was found last; it is empty once the entry has left memory."""


Bytes = bytes | tuple[bytes, bytes]
"""All bytes of a request, or those before and after its id."""


class Memo:
    """Questions by the bytes that ask them, in two halves: what is asked again moves to the younger one.

    When the younger half is full it becomes the older one, and the older one is dropped.
    """

    __slots__ = ("_bytes", "_old", "young")

    def __init__(self) -> None:
        self.young: dict[Bytes, Question] = {}
        self._old: dict[Bytes, Question] = {}
        self._bytes = 0

    def clear(self) -> None:
        """Forget all."""
        self.young, self._old, self._bytes = {}, {}, 0

    def get(self, data: Bytes) -> Question | None:
        """Give what these very bytes ask, if it is remembered."""
        question = self.young.get(data)
        if question is None and self._old and (question := self._old.pop(data, None)) is not None:
            self.put(data, question)
        return question

    def put(self, data: Bytes, question: Question) -> None:
        """Remember it."""
        size = len(data) if isinstance(data, bytes) else sum(map(len, data)) + len(question.authorization)
        if len(self.young) >= MOST_QUESTIONS // 2 or self._bytes + size > MOST_BYTES // 2:
            self._old, self.young, self._bytes = self.young, {}, 0
        self.young[data] = question
        self._bytes += size

    def __len__(self) -> int:
        return len(self.young) + len(self._old)
