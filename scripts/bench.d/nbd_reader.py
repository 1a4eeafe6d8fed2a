"""The floor of an incremental backup: reads known extents of an NBD export and drops them.

A client of its own, on purpose: it shares no code with what is measured. It asks for the export, then
keeps requests under way on one connection, with simple replies (the NBD protocol document,
"Fixed newstyle negotiation" and "Transmission phase")."""

import socket
import struct

from settings import BenchError

DEPTH = 16
LIMIT_S = 60
_FLAGS_FIXED_NO_ZEROES = 0b11
_OPT_GO, _REPLY_ACK = 7, 1
_MAGIC_OPTION, _MAGIC_OPTION_REPLY = 0x49484156454F5054, 0x3E889045565A9
_MAGIC_REQUEST, _MAGIC_REPLY = 0x25609513, 0x67446698
_READ, _DISCONNECT = 0, 2


def read_extents(path, export, extents, length):
    """Reads `length` bytes at each offset; returns the bytes read."""
    with socket.socket(socket.AF_UNIX) as server:
        server.settimeout(LIMIT_S)
        server.connect(str(path))
        _negotiate(server, export.encode())
        buffer = memoryview(bytearray(length))
        sent = done = 0
        while done < len(extents):
            requests = b""
            while sent < len(extents) and sent - done < DEPTH:
                requests += struct.pack(">IHHQQI", _MAGIC_REQUEST, 0, _READ, sent, extents[sent], length)
                sent += 1
            server.sendall(requests)
            magic, error, _ = struct.unpack(">IIQ", _exactly(server, 16))
            if magic != _MAGIC_REPLY or error:
                raise BenchError(f"the NBD server answered with magic {magic:x}, error {error}")
            _fill(server, buffer)
            done += 1
        server.sendall(struct.pack(">IHHQQI", _MAGIC_REQUEST, 0, _DISCONNECT, sent, 0, 0))
    return done * length


def _negotiate(server, name):
    _exactly(server, 18)  # two magic numbers and the handshake flags
    server.sendall(struct.pack(">I", _FLAGS_FIXED_NO_ZEROES))
    data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    server.sendall(struct.pack(">QII", _MAGIC_OPTION, _OPT_GO, len(data)) + data)
    while True:
        magic, _, kind, length = struct.unpack(">QIII", _exactly(server, 20))
        text = _exactly(server, length)
        if magic != _MAGIC_OPTION_REPLY or kind & 1 << 31:
            raise BenchError(f"the NBD server refuses the export: {text!r}")
        if kind == _REPLY_ACK:
            return


def _exactly(server, length):
    buffer = bytearray(length)
    _fill(server, memoryview(buffer))
    return bytes(buffer)


def _fill(server, view):
    while len(view):
        count = server.recv_into(view)
        if not count:
            raise BenchError("the NBD server hung up")
        view = view[count:]
