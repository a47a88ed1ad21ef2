"""What joins two guests: two networks, and QEMU's monitor of the second for the first.

`peer` is the program that uses them in the guests.
"""

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass

NETWORKS = {"link": "192.0.2", "lab": "198.51.100"}
"""The names of the guests' network devices, and their addresses less the last number (RFC 5737).

Tests use link0 and may cut it. lab0 is for lab-peer.
"""

MTU = 9000
"""Bytes: emulated devices take time for each packet, not for each byte."""


@dataclass(frozen=True)
class Wire:
    """One guest's ends of what joins the two."""

    qemu: list[str]
    """Words of QEMU's command line."""
    descriptors: list[int]
    """The descriptors that they name."""
    network: str
    """A line for each network device: hardware address, name, address."""
    environment: dict[bytes, bytes]
    """For COMMAND: the addresses of this guest and of the other one."""


@contextlib.contextmanager
def wires() -> Iterator[list[Wire]]:
    """Give the ends for the first and for the second guest.

    A packet that nobody takes is lost, as on a cable: the sockets of networks are datagram sockets.
    They stay open here, so that a guest that was ended can be started again with the same ends.
    """
    kinds = [*((name, socket.SOCK_DGRAM) for name in NETWORKS), ("monitor", socket.SOCK_STREAM)]
    with contextlib.ExitStack() as stack:
        pairs = {name: socket.socketpair(socket.AF_UNIX, kind) for name, kind in kinds}
        for pair in pairs.values():
            for end in pair:
                stack.enter_context(end)
        yield [_wire({name: pair[i].fileno() for name, pair in pairs.items()}, i) for i in (0, 1)]


def _wire(ends: dict[str, int], index: int) -> Wire:
    words, lines = list[str](), ""
    for number, (name, network) in enumerate(NETWORKS.items(), 1):
        mac = f"52:54:00:00:0{number}:0{index + 1}"
        words += ["-netdev", f"dgram,id={name},local.type=fd,local.str={ends[name]}"]
        device = f"virtio-net-pci,bus=pcie.0,netdev={name},mac={mac},host_mtu={MTU},romfile="
        words += ["-device", device]
        lines += f"{mac} {name}0 {network}.{index + 1}\n"
    words += ["-chardev", f"socket,id=second,fd={ends['monitor']}"]
    if index == 0:
        words += ["-device", "virtserialport,nr=4,name=lab-peer,chardev=second"]
    else:
        words += ["-mon", "chardev=second,mode=control"]
    here, there = (f"{NETWORKS['link']}.{number}".encode() for number in (index + 1, 2 - index))
    environment = {b"DMABUF_TEST_HOST": here, b"DMABUF_TEST_PEER": there}
    return Wire(words, list(ends.values()), lines, environment)
