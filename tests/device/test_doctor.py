"""`dmabuf doctor` finds the devices of this machine, and opens each of them."""

import glob

from dmabuf.inspect import examine_machine


def test_each_device_is_found() -> None:
    found = {answer.name: answer for answer in examine_machine().devices}
    for kind, pattern in {
        "NVMe passthrough": "/dev/ng*n*",
        "camera": "/dev/video*",
        "DRM": "/dev/dri/card*",
        "VFIO": "/dev/vfio/vfio",
        "FUSE": "/dev/fuse",
    }.items():
        nodes = glob.glob(pattern)
        assert nodes
        for node in nodes:
            assert found[f"{kind} {node}"].ok and found[f"{kind} {node}"].detail
    assert found["Vulkan"].ok and "llvmpipe" in found["Vulkan"].detail
    assert not found["RDMA"].ok and found["RDMA"].detail == "there is no /dev/infiniband/uverbs*"
