"""A stand-in for nixl_cu13._api: agents that carry out over TCP what a peer asks for, as UCX does.

`install` makes a package of this file, because the pumps import it in processes of their own.
"""

import ctypes
import fcntl
import json
import os
import shutil
import socket
import struct
import threading
from pathlib import Path

_HEADER = struct.Struct("!I")
_SIOCGIFADDR = 0x8915


class nixlRemoteDisconnectError(Exception):  # noqa: N801 - NIXL's name
    pass


class nixlNotFoundError(Exception):  # noqa: N801 - NIXL's name
    pass


def install(folder, monkeypatch):
    """Have this process and its children find it as nixl_cu13."""
    package = folder / "nixl_cu13"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(Path(__file__), package / "_api.py")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))


def nixl_agent_config(backends):
    return backends


def _address():
    """The address of the network interface that UCX may use."""
    name = os.environ["UCX_NET_DEVICES"].encode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name))[20:24])


def _receive(connection, size):
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        got = connection.recv_into(rest)
        if not got:
            raise ConnectionResetError
        rest = rest[got:]
    return data


class _Transfer:
    def __init__(self, move):
        self.state, self._move = "PROC", move

    def start(self):
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        try:
            self._move()
            self.state = "DONE"
        except OSError:
            self.state = "LOST"

    def release(self):
        pass


class nixl_agent:  # noqa: N801 - NIXL's name
    def __init__(self, name, config):
        assert config == ["UCX"]
        self._name, self._lock, self._regions, self._peers = name, threading.Lock(), [], {}
        self._listener = socket.create_server((_address(), 0), backlog=64)
        threading.Thread(target=self._serve, daemon=True).start()

    def register_memory(self, descriptors, kind):
        [(address, size, _, _)] = descriptors
        assert kind == "DRAM"
        region = address, size
        with self._lock:
            self._regions.append(region)
        return region

    def deregister_memory(self, region):
        with self._lock:
            self._regions.remove(region)

    def get_agent_metadata(self):
        where = self._listener.getsockname()
        return json.dumps([self._name, where, self._regions]).encode()

    def add_remote_agent(self, metadata):
        name, where, regions = json.loads(metadata)
        assert name not in self._peers
        self._peers[name] = tuple(where), regions
        return name.encode()

    def remove_remote_agent(self, name):
        del self._peers[name]

    def get_xfer_descs(self, descriptors, kind):
        return [(address, size) for address, size, _ in descriptors]

    def initialize_xfer(self, operation, here, there, peer):
        where, regions = self._peers[peer]
        with self._lock:
            self._check(here, self._regions)
        self._check(there, regions)
        return _Transfer(lambda: self._move(operation, here, there, where))

    def transfer(self, transfer):
        transfer.start()
        return transfer.state

    def check_xfer_state(self, transfer):
        if transfer.state == "LOST":
            raise nixlRemoteDisconnectError("NIXL_ERR_REMOTE_DISCONNECT")
        return transfer.state

    @staticmethod
    def _check(parts, regions):
        for address, size in parts:
            if not any(at <= address and address + size <= at + most for at, most in regions):
                raise nixlNotFoundError("NIXL_ERR_NOT_FOUND")

    def _move(self, operation, here, there, where):
        with socket.create_connection(where) as peer:
            text = json.dumps([operation, there]).encode()
            peer.sendall(_HEADER.pack(len(text)) + text)
            if operation == "WRITE":
                for address, size in here:
                    peer.sendall(self._get(address, size))
                _receive(peer, 1)
            else:
                for address, size in here:
                    self._put(address, _receive(peer, size))

    def _serve(self):
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._answer, args=[connection], daemon=True).start()

    def _answer(self, connection):
        with connection:
            try:
                [size] = _HEADER.unpack(_receive(connection, _HEADER.size))
                operation, parts = json.loads(_receive(connection, size))
                for address, size in parts:
                    if operation == "WRITE":
                        self._put(address, _receive(connection, size))
                    else:
                        connection.sendall(self._get(address, size))
                if operation == "WRITE":
                    connection.sendall(b"1")
            except (OSError, nixlNotFoundError):
                pass  # the peer finds the connection closed

    def _get(self, address, size):
        with self._lock:
            self._check([(address, size)], self._regions)
            return ctypes.string_at(address, size)

    def _put(self, address, data):
        with self._lock:
            self._check([(address, len(data))], self._regions)
            ctypes.memmove(address, bytes(data), len(data))
