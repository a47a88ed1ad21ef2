"""The guest of `lab/run --devices all` has what lab/README.md says."""

from tests.guards import needs, vfio_address, vgem_node, vivid_node


@needs("cameras")
def test_vivid_has_its_nodes() -> None:
    nodes = {kind: vivid_node(kind) for kind in ("vid-cap", "vid-out", "meta-cap")}
    nodes |= {f"vid-cap {number}": vivid_node("vid-cap", number) for number in (1, 2)}
    assert None not in nodes.values()
    assert len(set(nodes.values())) == len(nodes)


@needs("display", "virtio_gpu", "vgem", "vfio")
def test_displays_and_a_pci_device() -> None:
    assert vgem_node() and vfio_address()
