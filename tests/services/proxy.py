"""A TCP proxy that can break the network between two processes: cut, swallow or delay what passes through it."""

from __future__ import annotations

import ctypes
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Self

_CHUNK = 65_536
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close sends a reset
_ATTACH_FILTER, _DETACH_FILTER = 26, 27  # SO_ATTACH_FILTER and SO_DETACH_FILTER of socket(7)
_PASS_NOTHING = (ctypes.c_char * 8).from_buffer_copy(struct.pack("HBBI", 0x06, 0, 0, 0))  # return 0 bytes of a packet


class TcpProxy:
    """Listens on a port of this machine and passes everything on to a server.

    It starts out open. Connections that were made before a fault meet it too, not only new ones.
    """

    def __init__(self, target_host: str, target_port: int, port: int = 0) -> None:
        """Listen on `port`, or on any; the server need not be there yet."""
        self._target = (target_host, target_port)
        self._lock = threading.Lock()
        self._open = threading.Event()
        self._open.set()
        self._restored = threading.Event()
        self._refusing = False
        self._delay = 0.0
        self._change: Callable[[bytes], bytes] = lambda chunk: chunk
        self._held_back: bytes | None = None
        self.holds = threading.Event()
        """Set once there is something that is held back."""
        self._closed = False
        self._sockets: set[socket.socket] = set()
        self._silent: set[socket.socket] = set()  # their peer has said all it has to say
        self._abandoned: list[socket.socket] = []
        self._unplugged = False
        self._listener = socket.create_server(("127.0.0.1", port), backlog=100)
        self.port: int = self._listener.getsockname()[1]
        """Where clients find it."""
        threading.Thread(target=self._accept, name=f"proxy {self.port}", daemon=True).start()

    @property
    def connections(self) -> int:
        """How many connections pass through it."""
        with self._lock:
            return (len(self._sockets) + len(self._silent)) // 2

    def cut(self) -> None:
        """Reset every connection, and every new one until it is restored."""
        self._refusing = True
        self._open.set()
        self.reset()

    def reset(self) -> None:
        """Reset every connection; new ones pass."""
        with self._lock:
            sockets = self._sockets | self._silent
            self._sockets, self._silent = set(), set()
        for one in sockets:
            _reset(one)

    def black_hole(self) -> None:
        """Let nothing through, in either direction, without a word: connections stay, new ones hang."""
        self._open.clear()

    def unplug(self) -> None:
        """Let every packet vanish, as where a cable is pulled: unlike in a black hole, nothing is acknowledged."""
        with self._lock:
            self._unplugged = True
            self._open.clear()
            for one in (self._listener, *self._sockets):
                _drop_packets(one)

    def half_open(self) -> None:
        """Let every packet of the connections there are vanish, for good; new ones pass."""
        with self._lock:
            for one in self._sockets:
                _drop_packets(one)
            self._abandoned += self._sockets
            self._sockets = set()

    def delay(self, seconds: float) -> None:
        """Let everything arrive so much later."""
        self._delay = seconds

    def hold_back(self, text: bytes) -> None:
        """Let what a client says with a text in it, and all that it says behind it, arrive when it is restored.

        It arrives then also where the client is gone meanwhile, as what was on its way in a network does.
        """
        self._held_back = text
        self._restored.clear()

    def tamper(self, change: Callable[[bytes], bytes]) -> None:
        """Let what comes from the server, in whatever pieces, arrive as `change` makes it."""
        self._change = change

    def restore(self) -> None:
        """Let everything through again, also what a black hole has kept; what was cut stays cut."""
        self._refusing = False
        self._delay = 0.0
        self._held_back = None
        self._restored.set()
        with self._lock:
            if self._unplugged:
                self._unplugged = False
                for one in (self._listener, *self._sockets):
                    with suppress(OSError):
                        one.setsockopt(socket.SOL_SOCKET, _DETACH_FILTER, 0)
        self._open.set()

    def close(self) -> None:
        """Stop listening and end every connection."""
        self._closed = True
        self._restored.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._open.set()
        with self._lock:
            self._sockets |= set(self._abandoned)
        self.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        self._open.wait()
        if self._turns_away():
            _reset(client)
            return
        try:
            server = socket.create_connection(self._target, timeout=10)
        except OSError:
            _reset(client)
            return
        server.settimeout(None)
        for one in (client, server):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            refused = self._turns_away()
            if not refused:
                self._sockets |= {client, server}
        if refused:
            _reset(client)
            _reset(server)
            return
        for source, target in ((client, server), (server, client)):
            threading.Thread(target=self._pump, args=(source, target, source is server), daemon=True).start()

    def _turns_away(self) -> bool:
        return self._refusing or self._closed

    def _pump(self, source: socket.socket, target: socket.socket, from_server: bool) -> None:
        try:
            while chunk := source.recv(_CHUNK):
                if self._delay:
                    time.sleep(self._delay)
                self._open.wait()
                if not from_server and self._held_back is not None and self._held_back in chunk:
                    self.holds.set()
                    self._restored.wait()
                target.sendall(self._change(chunk) if from_server else chunk)
        except OSError:
            self._end(source, target)
            return
        with self._lock:
            if source not in self._sockets:
                return  # it was reset
            self._sockets.remove(source)
            both_said_all = target in self._silent
            self._silent.discard(target)
            if not both_said_all:
                self._silent.add(source)
        if both_said_all:
            source.close()
            target.close()
            return
        with suppress(OSError):
            # One side has said all it has to say; the other may still be speaking.
            target.shutdown(socket.SHUT_WR)

    def _end(self, *pair: socket.socket) -> None:
        with self._lock:
            self._sockets.difference_update(pair)
            self._silent.difference_update(pair)
        for one in pair:
            _reset(one)


def _reset(one: socket.socket) -> None:
    with suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    with suppress(OSError):
        # Wakes the thread that waits in recv; close alone would not.
        one.shutdown(socket.SHUT_RD)
    one.close()


def _drop_packets(one: socket.socket) -> None:
    """Let the kernel drop what comes for a socket before TCP sees it."""
    program = struct.pack("HP", 1, ctypes.addressof(_PASS_NOTHING))
    with suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)
