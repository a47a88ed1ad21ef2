"""Use one named buffer of a store in three processes: a camera, a GPU and NumPy.

    python examples/three_processes.py /dev/video0

It starts a store (`dmabuf serve`), creates the buffer `picture` there, and runs itself three times.
The camera's driver writes a frame into the buffer, a compute shader swaps the bytes of each word,
and NumPy reads it. The picture is never copied, and each process ends before the next starts.
Needs pip install dmabuf[v4l2,vulkan,arrays], and a Vulkan driver.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack

import dmabuf.store

WIDTH, HEIGHT, FORMAT = 320, 180, "RGB3"
SIZE = WIDTH * HEIGHT * 3


def camera(store: dmabuf.store.Store, device: str) -> None:
    from dmabuf.devices import v4l2

    shape = {"width": WIDTH, "height": HEIGHT, "format": FORMAT}
    with store.open("picture", "r+") as buffer, dmabuf.allocate(SIZE, exporter="udmabuf") as spare:
        with v4l2.capture(device, buffers=[buffer, spare], **shape) as source:  # two at least
            frame = next(source)
            while frame.buffer is not buffer:
                frame.release()
                frame = next(source)
            print(f"camera {os.getpid()}: frame {frame.sequence} written into {buffer!r}")


def gpu(store: dmabuf.store.Store, device: str) -> None:
    import vulkan as vk
    from gpu_swap import record

    from dmabuf.devices import vulkan

    with vulkan.open() as card, store.open("picture", "r+") as buffer, ExitStack() as undo:
        memory = undo.enter_context(card.import_buffer(buffer))
        about = vk.VkSubmitInfo(pCommandBuffers=[record(card, memory, undo)])
        vk.vkQueueSubmit(card.queue, 1, [about], vk.VK_NULL_HANDLE)
        card.wait_idle()
        print(f"gpu {os.getpid()}: words swapped by {card.name}")


def reader(store: dmabuf.store.Store, device: str) -> None:
    with store.open("picture") as buffer:
        picture = buffer.asarray(shape=(HEIGHT, WIDTH, 3))
        digest = hashlib.sha256(picture).hexdigest()
        print(f"reader {os.getpid()}: a picture of {picture.shape}, sha256 {digest}")
        del picture


def main(device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "store.sock")
        serve = [sys.executable, "-m", "dmabuf.cli", "serve", "--socket", path]
        with subprocess.Popen(serve, stderr=subprocess.PIPE) as server:
            try:
                server.stderr.readline()
                with dmabuf.store.connect(path) as store:
                    store.create("picture", SIZE, exporter="udmabuf").close()
                    for role in ("camera", "gpu", "reader"):
                        command = [sys.executable, __file__, device, role, path]
                        subprocess.run(command, check=True)
            finally:
                server.terminate()


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        with dmabuf.store.connect(sys.argv[3]) as store:
            {"camera": camera, "gpu": gpu, "reader": reader}[sys.argv[2]](store, sys.argv[1])
