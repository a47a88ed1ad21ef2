"""Ray on two nodes: an actor on one loads a file, and an actor on the other gets the Buffer.

    sudo python examples/ray_two_nodes.py model.safetensors [auto | tcp | nixl]

The nodes are two network namespaces, joined by a pair of virtual interfaces. The storage actor
reads the file into a Buffer and returns it. The worker gets the bytes by dmabuf.remote: as an
argument, into a Buffer that Ray's transport makes, and once into a Buffer that it had before.
"""

import contextlib
import hashlib
import os
import secrets
import subprocess
import sys
import tempfile

STORAGE, WORKER = ("dmabuf-ray-a", "10.77.79.1"), ("dmabuf-ray-b", "10.77.79.2")
PORT = "6399"


@contextlib.contextmanager
def two_nodes():
    """Two namespaces in which Ray runs, with the resources "storage" and "worker"."""
    ip = ["ip"]
    try:
        for name, _ in (STORAGE, WORKER):
            subprocess.run([*ip, "netns", "add", name], check=True)
        pair = ["ray0", "netns", STORAGE[0], "type", "veth", "peer", "ray1", "netns", WORKER[0]]
        subprocess.run([*ip, "link", "add", *pair], check=True)
        for (name, address), link in ((STORAGE, "ray0"), (WORKER, "ray1")):
            inside = [*ip, "-n", name]
            subprocess.run([*inside, "address", "add", f"{address}/24", "dev", link], check=True)
            for one in (link, "lo"):
                subprocess.run([*inside, "link", "set", one, "up"], check=True)
        with tempfile.TemporaryDirectory(prefix="ray") as folder:
            start = ["--num-cpus=2", "--disable-usage-stats", "--object-store-memory=100000000"]
            first = [
                "--head",
                f"--port={PORT}",
                f"--temp-dir={folder}/a",
                "--include-dashboard=false",
            ]
            first += ['--resources={"storage": 1}']
            second = [f"--address={STORAGE[1]}:{PORT}", '--resources={"worker": 1}']
            with contextlib.ExitStack() as stack:
                for (name, address), how in ((STORAGE, first), (WORKER, second)):
                    command = ["netns", "exec", name, sys.executable, "-m", "ray.scripts.scripts"]
                    words = ["start", "--block", f"--node-ip-address={address}", *start, *how]
                    log = stack.enter_context(open(f"{folder}/{name}.log", "w"))
                    started = subprocess.Popen([*ip, *command, *words], stdout=log, stderr=log)
                    stack.callback(started.wait)
                    stack.callback(started.terminate)
                yield
    finally:
        for name, _ in (STORAGE, WORKER):
            subprocess.run([*ip, "netns", "delete", name], check=False)


def drive(path, engine="auto"):
    """Create the actors and pass the Buffer on; this runs in the first namespace."""
    import ray

    import dmabuf
    import dmabuf.ray

    dmabuf.ray.use(engine=engine, trusted_network=True)  # before the actors
    connect(ray)

    @ray.remote(enable_tensor_transport=True, resources={"storage": 1})
    class Storage:
        @ray.method(tensor_transport="DMABUF")
        def load(self, path):
            with dmabuf.open(path) as file:
                buffer = dmabuf.allocate(file.size)
                file.read_into(buffer, file.size)
            return buffer

    @ray.remote(enable_tensor_transport=True, resources={"worker": 1})
    class Worker:
        def digest(self, buffer, size):
            received = int(open("/sys/class/net/ray1/statistics/rx_bytes").read())
            found = hashlib.sha256(buffer.pread(size, 0)).hexdigest()
            return buffer.exporter, found, received

        def into_own(self, refs, size):
            with dmabuf.allocate(size) as buffer:
                dmabuf.ray.get(refs[0], into=buffer)
                return self.digest(buffer, size)

    size = os.path.getsize(path)
    with open(path, "rb") as file:
        expected = hashlib.file_digest(file, "sha256").hexdigest()
    storage, worker = Storage.remote(), Worker.remote()
    ref = storage.load.remote(path)
    for index, what in enumerate(("an argument", "its own Buffer"), 1):
        result = (
            worker.into_own.remote([ref], size) if index > 1 else worker.digest.remote(ref, size)
        )
        exporter, found, received = ray.get(result)  # a list only once the object is there
        print(f"{what}: {exporter}, sha256 {found}, {received} bytes received by the interface")
        assert found == expected and received > index * size


def connect(ray):
    """Connect to Ray as soon as both nodes are there."""
    import time

    until = time.monotonic() + 120
    while True:
        try:
            ray.init(
                address=f"{STORAGE[1]}:{PORT}", _node_ip_address=STORAGE[1], log_to_driver=False
            )
            break
        except ConnectionError:
            if time.monotonic() > until:
                raise
            time.sleep(1)
    while "worker" not in ray.cluster_resources():
        if time.monotonic() > until:
            raise TimeoutError("the second node does not come")
        time.sleep(0.5)


if __name__ == "__main__":
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if os.environ.get("DMABUF_RAY_DRIVER"):
        drive(os.path.abspath(sys.argv[1]), *sys.argv[2:])
    else:
        with two_nodes():
            command = ["ip", "netns", "exec", STORAGE[0], sys.executable, __file__, *sys.argv[1:]]
            environment = os.environ | {"DMABUF_RAY_DRIVER": "1"}
            sys.exit(subprocess.run(command, env=environment, check=False).returncode)
