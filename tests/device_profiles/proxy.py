"""A TCP proxy on loopback that spoils connections: late, slow, reset after some bytes, or silent after some bytes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

RESET = struct.pack("ii", 1, 0)  # SO_LINGER with a time of 0: close() sends RST


@dataclass(eq=False)
class _Pair:
    """One connection through the proxy."""

    client: asyncio.StreamWriter
    device: asyncio.StreamWriter
    sent: int = 0
    silent: bool = False


@dataclass
class Proxy:
    """Passes connections on to a port of this machine; a context manager.

    Args:
        target: port to connect to.
        delay_s: seconds by which everything is late, each way.
        rate: bytes per second, each way; None = as fast as can be.
        cut_after: bytes from the client after which a connection is reset; None = never.
        silence_after: bytes from the client after which nothing passes any more, while both ends stay open.
        spoilt: how many connections suffer that; later ones are fine.
    """

    target: int
    delay_s: float = 0.0
    rate: float | None = None
    cut_after: int | None = None
    silence_after: int | None = None
    spoilt: int = 10**9
    port: int = 0
    connections: int = 0
    _pairs: list[_Pair] = field(default_factory=list)

    def __enter__(self) -> Self:
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), name="proxy")
        self._thread.start()
        started.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def silence(self) -> None:
        """From now on nothing passes on the connections there are."""
        for pair in list(self._pairs):
            pair.silent = True

    def reset(self) -> None:
        """Reset the connections there are."""
        for pair in list(self._pairs):
            self._loop.call_soon_threadsafe(_reset, pair)

    async def _serve(self, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._stop.wait()
        server.close()
        for pair in self._pairs:
            _reset(pair)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        spoilt = self.connections <= self.spoilt
        device_reader, device_writer = await asyncio.open_connection("127.0.0.1", self.target)
        pair = _Pair(writer, device_writer)
        self._pairs.append(pair)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(
                self._pass(pair, reader, device_writer, spoilt), self._pass(pair, device_reader, writer, False)
            )

    async def _pass(
        self, pair: _Pair, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, spoilt: bool
    ) -> None:
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(10_000)
        out = asyncio.create_task(self._deliver(pair, late, writer))
        with contextlib.suppress(OSError):
            while data := await reader.read(16_384):
                if spoilt:
                    pair.sent += len(data)
                    if self.cut_after is not None and pair.sent > self.cut_after:
                        _reset(pair)
                        break
                    pair.silent |= self.silence_after is not None and pair.sent > self.silence_after
                await late.put((self._loop.time() + self.delay_s, data))
        await late.put((0.0, b""))
        await out

    async def _deliver(
        self, pair: _Pair, late: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, data = await late.get()
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                if pair.silent:  # also the end of the connection: the other side hears nothing of it
                    continue
                if not data:
                    break
                writer.write(data)
                await writer.drain()
                if self.rate:
                    await asyncio.sleep(len(data) / self.rate)
            writer.close()


def _reset(pair: _Pair) -> None:
    for writer in (pair.client, pair.device):
        end = writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.transport.abort()
