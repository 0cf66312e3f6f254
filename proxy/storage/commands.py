"""What is sent to Redis: commands, and Lua scripts that are called by the digest of their text.

Each script is one `.lua` file beside this one, read once, when the module that uses it is imported. A call
names the script by the SHA-1 of its text (EVALSHA), so that the text is not sent each time. A server that
does not know the digest (it is new, has restarted, or got SCRIPT FLUSH) replies NOSCRIPT and has run
nothing; `Link` then sends the same call once more with the text (EVAL), and from then on the server knows
it.

A constant that a script shares with Python is defined in Python. `Script.load` writes it before the text,
into the file's first line, as `local NAME = value`: so the server's errors name the lines of the file.
"""

from collections.abc import Sequence
from hashlib import sha1
from importlib.resources import files
from typing import ClassVar, Final, NamedTuple

Command = tuple[str | bytes | int, ...]
"""The name of a command, and its arguments."""


class PubSub(NamedTuple):
    """The commands of a channel, and how a message on it begins."""

    subscribe: str
    publish: str
    message: bytes


PUBLISHED: Final = PubSub("SUBSCRIBE", "PUBLISH", b"message")
SHARDED: Final = PubSub("SSUBSCRIBE", "SPUBLISH", b"smessage")
"""In a Cluster the channel belongs to the node that owns the slot of its name, as a key does: that node
delivers in order what it was sent."""


class Script:
    """One Lua script, by its text."""

    _texts: ClassVar[dict[str, str]] = {}
    """All scripts of this process, by digest."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.digest = sha1(text.encode(), usedforsecurity=False).hexdigest()
        self._texts[self.digest] = text

    @classmethod
    def load(cls, name: str, **constants: float | str) -> "Script":
        """Read `<name>.lua`, with these constants before its text."""
        text = files(__package__).joinpath(f"{name}.lua").read_text(encoding="utf-8")
        if constants:
            text = f"local {', '.join(constants)} = {', '.join(map(repr, constants.values()))} {text}"
        return cls(text)

    def call(self, keys: Sequence[bytes | str], *arguments: str | bytes | int) -> Command:
        """Give the command that runs it on `keys`."""
        return ("EVALSHA", self.digest, len(keys), *keys, *arguments)

    @classmethod
    def with_key(cls, call: Command, key: bytes, argument: bytes) -> Command:
        """Give the same call with one more key, and one more argument."""
        name, digest, number, *rest = call
        assert isinstance(number, int)
        return (name, digest, number + 1, *rest[:number], key, *rest[number:], argument)

    @classmethod
    def with_text(cls, call: Command) -> Command:
        """Give the same call for a server that does not know the digest yet."""
        _, digest, *rest = call
        return ("EVAL", cls._texts[str(digest)], *rest)

    @staticmethod
    def is_unknown(reply: object) -> bool:
        """Tell whether a reply says that the server does not know the digest."""
        return isinstance(reply, Exception) and str(reply).startswith("NOSCRIPT")
