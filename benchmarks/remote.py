"""dmabuf.remote beside sendfile(2) and a plain recv(2), between two network namespaces; as root.

    python benchmarks/remote.py --size 1GiB --rounds 7 --rate 1gbit

Two namespaces are joined by a veth pair: one is the storage node, in the other this measures. Each
round takes turns between the two, into the same memory, for the same bytes:

- a file in the page cache: File.read_into, beside a process that sends it by sendfile(2);
- names of 256 KiB in the store: Node.fetch_many, beside a process that sends the same bytes from
  one memory file by sendfile(2);
- with TLS, where openssl is installed, without a counterpart;
- the link limited to a rate by tc-tbf(8): what arrives of it, and bytes that the interface counted.

CPU time is that of both processes by their clocks, softirqs that ran in their place included. The
last column is of the whole machine, and means something on an idle one only. The time to the first
tensor is from connect() until the header of a model and its first tensor have arrived.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import GIB, MIB, SkippedError, Spread, machine, stop_tidily

import dmabuf
from dmabuf import remote
from dmabuf.sizes import parse_size

NODE, WORKER = "dmabuf-node", "dmabuf-worker"
HOST, CLIENT = "10.77.77.1", "10.77.77.2"
FILE, MEMORY, TCP, TLS, NIXL = 7701, 7702, 7703, 7704, 7705
OBJECT = 256 << 10
TENSOR = 16 * MIB
MODEL = 2 * GIB


def main() -> None:
    """Make the namespaces, measure in one of them, and remove them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=parse_size, default=GIB, help="bytes (default: 1GiB)")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of measurements (default: 7)")
    parser.add_argument("--rate", default="1gbit", help="of the limited link (default: 1gbit)")
    parser.add_argument("--folder", default=".", help="where the files are made (default: .)")
    parser.add_argument("--nixl", action="store_true", help="the engine nixl beside NIXL alone")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role in ("file", "memory"):
        send_plainly(args.folder, args.role)
    elif args.role == "nixl":
        write_by_nixl(args.folder)
    elif args.role == "worker":
        (measure_nixl if args.nixl else measure)(args)
    else:
        stop_tidily()
        print("\n".join(machine()))
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder)))
            stack.enter_context(namespaces())
            pids = start_servers(stack, folder, args.size, by_nixl=args.nixl)
            command = ["--nixl"] * args.nixl + [
                "--role",
                "worker",
                "--size",
                args.size,
                "--rounds",
                args.rounds,
            ]
            words = [*command, "--rate", args.rate, "--folder", folder]
            environment = os.environ | {"PIDS": json.dumps(pids)}
            inside(WORKER, sys.executable, __file__, *words, env=environment).wait()


# -- the machine


def ip(*words: object) -> None:
    """Run ip(8)."""
    subprocess.run(["ip", *map(str, words)], check=True)


@contextlib.contextmanager
def namespaces() -> Iterator[None]:
    """Join two network namespaces."""
    if os.geteuid():
        raise SkippedError("network namespaces need root")
    try:
        for name in (NODE, WORKER):
            ip("netns", "add", name)
        ip("link", "add", "dmabuf0", "netns", NODE, "type", "veth", "peer", "dmabuf1")
        ip("link", "set", "dmabuf1", "netns", WORKER)
        for name, link, address in ((NODE, "dmabuf0", HOST), (WORKER, "dmabuf1", CLIENT)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in (NODE, WORKER):
            subprocess.run(["ip", "netns", "delete", name], check=False)


def inside(name: str, *words: object, **how: object) -> subprocess.Popen[str]:
    """Start a program in a namespace; ip(8) becomes that program."""
    command = ["ip", "netns", "exec", name, *map(str, words)]
    return subprocess.Popen(command, text=True, **how)  # type: ignore[call-overload,no-any-return]


def start_servers(
    stack: contextlib.ExitStack, folder: Path, size: int, *, by_nixl: bool
) -> dict[str, int]:
    """Start the plain sender and nodes, and return their process numbers."""
    served = folder / "served"
    served.mkdir()
    with (served / "large").open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
    header = {"first": {"dtype": "U8", "shape": [TENSOR], "data_offsets": [0, TENSOR]}}
    rest = MODEL - TENSOR
    header["rest"] = {"dtype": "U8", "shape": [rest], "data_offsets": [TENSOR, MODEL]}
    text = json.dumps(header).encode()
    with (served / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + MODEL)
    commands: dict[str, list[object]] = {
        role: [__file__, "--role", role, "--folder", served / "large"]
        for role in (["nixl"] if by_nixl else ["file", "memory"])
    }
    serve = ["-m", "dmabuf.cli", "serve", "--max-memory", size + GIB, "--files", served]
    open_node = ["--socket", folder / "a", "--listen", f"{HOST}:{TCP}", "--trusted-network"]
    commands["tcp"] = [*serve, *open_node]
    with contextlib.suppress(FileNotFoundError):
        options = certify(folder)
        commands["tls"] = [*serve, "--socket", folder / "b", "--listen", f"{HOST}:{TLS}", *options]
    pids = {}
    for name, command in commands.items():
        process = inside(NODE, sys.executable, *command, stderr=subprocess.PIPE)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        assert process.stderr
        while "listening" not in (line := process.stderr.readline()):
            if not line:
                raise SkippedError(f"{name} did not start")
        pids[name] = process.pid
    return pids


def certify(folder: Path) -> list[object]:
    """Make an authority and a certificate for both ends; return the options for the node."""
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"]
    new += ["-pkeyopt", "ec_paramgen_curve:P-256"]
    leaf = [*new, "-CA", "ca.pem", "-CAkey", "ca.key", "-addext", f"subjectAltName=IP:{HOST}"]
    leaf += ["-addext", "basicConstraints=critical,CA:FALSE"]
    for command, name in ((new, "ca"), (leaf, "node")):
        words = [*command, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem"]
        subprocess.run(words, check=True, cwd=folder, capture_output=True)
    names = {"--certificate": "node.pem", "--key": "node.key", "--authority": "ca.pem"}
    return [word for option, name in names.items() for word in (option, folder / name)]


# -- the plain pair


def send_plainly(path: str, role: str) -> None:
    """Send a file, or its content from memory, by sendfile(2) to each client after the other."""
    with contextlib.ExitStack() as stack:
        fd = os.open(path, os.O_RDONLY) if role == "file" else os.memfd_create("dmabuf benchmark")
        stack.callback(os.close, fd)
        if role == "memory":
            dmabuf.copy(path, fd)
        listener = stack.enter_context(
            socket.create_server((HOST, FILE if role == "file" else MEMORY))
        )
        print("listening", file=sys.stderr, flush=True)
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(ConnectionError):  # it needs only a part
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                done, size = 0, os.fstat(fd).st_size
                while done < size:
                    done += os.sendfile(connection.fileno(), fd, done, size - done)


def receive_plainly(view: memoryview, size: int, port: int) -> None:
    """Receive the file into memory."""
    with socket.create_connection((HOST, port)) as connection:
        done = 0
        while done < size:
            done += connection.recv_into(view[done:size])


# -- measuring


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one transfer took, in seconds."""

    wall: float
    cpu: float
    """Of both processes."""
    machine: float
    """Of the whole machine."""


def cost_of(act: Callable[[], object], pid: int) -> Cost:
    """Measure a call and the process at the other end."""
    other = (~pid << 3) | 2  # the process's CPU clock: clock_getcpuclockid(3)
    begun = time.perf_counter(), time.process_time(), time.clock_gettime(other), busy()
    act()
    ended = time.perf_counter(), time.process_time(), time.clock_gettime(other), busy()
    wall, here, there, everything = (late - early for early, late in zip(begun, ended, strict=True))
    return Cost(wall, here + there, everything)


def busy() -> float:
    """Return the seconds that the machine's processors were not idle, softirqs included."""
    fields = [int(one) for one in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def measure(args: argparse.Namespace) -> None:
    """Measure in the namespace of the worker, and print a line for each thing."""
    pids, size = json.loads(os.environ["PIDS"]), args.size
    with (
        dmabuf.allocate(size) as buffer,
        remote.connect(f"{HOST}:{TCP}", engine="tcp", trusted_network=True) as node,
        node.open("large") as file,
    ):
        with buffer.map("r+") as view:
            view[:] = bytes(1) * size
        print(f"transport   {node.transport}, {size / GIB:g} GiB, {args.rounds} rounds\n")

        def compare(what: str, act: Callable[[], object], node: str, plain: str) -> None:
            def plainly() -> None:
                with buffer.map("r+") as view:
                    receive_plainly(view, size, FILE if plain == "file" else MEMORY)

            pairs = []
            for number in range(args.rounds + 1):
                pair = cost_of(plainly, pids[plain]), cost_of(act, pids[node])
                pairs += [pair] if number else []  # the first warms up
            print(
                f"{what}: {Spread.of([size / 1e9 / one.wall for _, one in pairs])} GB/s; "
                f"of sendfile and recv: rate "
                f"{Spread.of([one.wall / other.wall for one, other in pairs])}, "
                f"CPU {Spread.of([other.cpu / one.cpu for one, other in pairs])}, "
                f"the machine's CPU "
                f"{Spread.of([other.machine / one.machine for one, other in pairs])}",
                flush=True,
            )

        compare("file", lambda: file.read_into(buffer), "tcp", "file")
        assert Path(args.folder, "served/large").read_bytes() == buffer.pread(size, 0)
        count = size // OBJECT
        for number in range(count):
            node.publish(f"kv-{number}", buffer, OBJECT, buffer_offset=number * OBJECT)
        wanted = [(f"kv-{number}", number * OBJECT, OBJECT) for number in range(count)]
        fetch = lambda: node.fetch_many(wanted, buffer)  # noqa: E731
        compare(f"{count} names of 256 KiB", fetch, "tcp", "memory")
        if "tls" in pids:
            names = [str(Path(args.folder, one)) for one in ("node.pem", "node.key", "ca.pem")]
            known = remote.Certificates(*names)
            with remote.connect(f"{HOST}:{TLS}", certificates=known) as secret:
                with secret.open("large") as other:
                    compare("file, TLS", lambda: other.read_into(buffer), "tls", "file")
        tensors = [first_tensor(buffer) for _ in range(args.rounds)]
        print(f"time to the first tensor of 16 MiB: {Spread.of(tensors)} s")
        limited(args, buffer, file)


def measure_nixl(args: argparse.Namespace) -> None:
    """Print how fast a name arrives by the engine nixl, and as many bytes by NIXL alone."""
    size = args.size
    with (
        dmabuf.allocate(size, exporter="memfd") as ours,
        dmabuf.allocate(size, exporter="memfd") as plain,
        remote.connect(f"{HOST}:{TCP}", engine="nixl", trusted_network=True) as node,
        node.open("large") as file,
        socket.create_connection((HOST, NIXL)) as other,
    ):
        file.read_into(ours)
        node.publish("large", ours, size)
        expected = ours.pread(size, 0)
        agent, address = nixl_agent("dmabuf1"), plain.address
        registered = agent.register_memory([(address, size, 0, "")], "DRAM")
        other.sendall(f"{address} {agent.get_agent_metadata().hex()}\n".encode())
        pairs = []
        for number in range(args.rounds + 1):
            for buffer in (ours, plain):
                buffer.pwrite(bytes(size), 0)
            begun = time.perf_counter()
            other.sendall(b"!")
            assert other.recv(1) == b"!"
            alone = time.perf_counter() - begun
            begun = time.perf_counter()
            done = node.fetch("large", ours, audit="off")
            took = time.perf_counter() - begun
            assert ours.pread(size, 0) == expected == plain.pread(size, 0)
            pairs += [(alone, took)] if number else []  # the first warms up
        agent.deregister_memory(registered)
        rates = [Spread.of([size / 1e9 / one[which] for one in pairs]) for which in (1, 0)]
        print(f"{done.transport}, one name of {size / MIB:g} MiB: {rates[0]} GB/s")
        print(f"NIXL alone: {rates[1]} GB/s; rate of it: {Spread.of([a / b for a, b in pairs])}")


def nixl_agent(device: str) -> Any:
    """Return an agent of NIXL, over TCP."""
    os.environ |= {"UCX_TLS": "tcp", "UCX_NET_DEVICES": device}
    api = importlib.import_module("nixl_cu13._api")
    return api.nixl_agent(device, api.nixl_agent_config(backends=["UCX"]))


def write_by_nixl(path: str) -> None:
    """Write the content of a file from memory into that of a peer, each time it asks for it."""
    size, agent = os.path.getsize(path), nixl_agent("dmabuf0")
    with (
        dmabuf.allocate(size, exporter="memfd") as memory,
        socket.create_server((HOST, NIXL)) as listener,
    ):
        with dmabuf.open(path) as file:
            file.read_into(memory, size)
        agent.register_memory([(memory.address, size, 0, "")], "DRAM")
        print("listening", file=sys.stderr, flush=True)
        connection, _ = listener.accept()
        address, metadata = connection.makefile().readline().split()
        peer = agent.add_remote_agent(bytes.fromhex(metadata)).decode()
        ends = [[(at, size, 0)] for at in (memory.address, int(address))]
        here, there = (agent.get_xfer_descs(one, "DRAM") for one in ends)
        while connection.recv(1):
            transfer = agent.initialize_xfer("WRITE", here, there, peer)
            state = agent.transfer(transfer)
            while state == "PROC":
                time.sleep(50e-6)  # a processor for NIXL's own thread
                state = agent.check_xfer_state(transfer)
            assert state == "DONE"
            transfer.release()
            connection.sendall(b"!")


def first_tensor(buffer: dmabuf.Buffer) -> float:
    """Return the seconds until the header of a model and its first tensor are here."""
    begun = time.perf_counter()
    with remote.connect(f"{HOST}:{TCP}", engine="tcp", trusted_network=True) as node:
        with node.open("model.safetensors") as file:
            file.read_into(buffer, 8)
            length = int.from_bytes(buffer.pread(8, 0), "little")
            file.read_into(buffer, length, file_offset=8)
            start, end = json.loads(buffer.pread(length, 0))["first"]["data_offsets"]
            file.read_into(buffer, end - start, file_offset=8 + length + start)
            return time.perf_counter() - begun


def limited(args: argparse.Namespace, buffer: dmabuf.Buffer, file: remote.RemoteFile) -> None:
    """Print what arrives of a link of a limited rate."""
    tbf = ["tbf", "rate", args.rate, "burst", "256kb", "latency", "20ms"]
    qdisc = ["tc", "-n", NODE, "qdisc", "add", "dev", "dmabuf0", "root", *tbf]
    if subprocess.run(qdisc, check=False, capture_output=True).returncode:
        print("limited link: tc-tbf(8) is not possible here")
        return
    scale = {"mbit": 1e6, "gbit": 1e9}
    bits = float(args.rate[:-4]) * scale[args.rate[-4:]]
    size, ours, plain, counted = min(args.size, 512 * MIB), [], [], []
    for _ in range(args.rounds):
        before, begun = received(), time.perf_counter()
        file.read_into(buffer, size)
        ours.append(8 * size / (time.perf_counter() - begun) / bits)
        counted.append((received() - before) / size)
        begun = time.perf_counter()
        with buffer.map("r+") as view:
            receive_plainly(view, size, FILE)
        plain.append(8 * size / (time.perf_counter() - begun) / bits)
    print(f"of a link of {args.rate}: {Spread.of(ours)}; sendfile and recv: {Spread.of(plain)}")
    print(f"bytes that the interface received for each byte of the file: {Spread.of(counted)}")


def received() -> int:
    """Return the bytes that the interface of this namespace has received."""
    return int(Path("/sys/class/net/dmabuf1/statistics/rx_bytes").read_text())


if __name__ == "__main__":
    try:
        main()
    except SkippedError as why:
        sys.exit(f"skipped: {why}")
