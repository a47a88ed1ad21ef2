"""The devices that `--devices` adds to the guest: what each needs of QEMU and of the kernel.

What the guest's programs and Python need for one stands in packages.py, and is always there; only
large packages for Python stand here.
"""

from collections.abc import Collection
from dataclasses import dataclass

from lab.processors import Processor


@dataclass(frozen=True)
class Device:
    """One name of `--devices`."""

    about: str
    qemu: tuple[str, ...] = ()
    """Words of QEMU's command line; "{memory}" is the size of --memory."""
    memory: int = 0
    """MiB of memory that these words give the guest beyond --memory."""
    kernel: tuple[str, ...] = ()
    """Words of the kernel's command line."""
    files: tuple[tuple[str, int], ...] = ()
    """Files for QEMU in its working folder, each by name and size in bytes."""
    modules: tuple[str, ...] = ()
    """What modprobe loads before COMMAND, each with its parameters."""
    built: tuple[str, ...] = ()
    """Those of them that Debian's kernels lack: names in modules.py, which builds them."""
    python: tuple[str, ...] = ()
    """Packages that pip installs for the guest, without their dependencies."""
    alone: bool = False
    """Whether "all" leaves it out, because `make test` does not need it."""
    iommu: bool = False
    """Whether an IOMMU has to be there."""
    both: bool = False
    """Whether the second of two guests has it, too. They share its files."""
    excludes: tuple[str, ...] = ()
    """Other names that a guest cannot have together with it."""
    setup: str = ""
    """What bash runs in the guest after that, before COMMAND."""


_DIMMS = ("-m", "slots=4,maxmem=16G")

_ONLINE = """\
for state in /sys/devices/system/node/node2/memory[0-9]*/state; do
    echo online_movable > "$state"
done
"""

_TO_DAX = """\
dax=$(< dax_seed)
echo ram > "$dax/mode"
echo 2097152 > "$dax/align"
echo 64616b73-6861-4265-8000-6c6162646178 > "$dax/uuid" # the same one in each guest
echo namespace0.0 > "$dax/namespace"
echo "$dax" > /sys/bus/nd/drivers/dax_pmem/bind
"""

_DEVDAX = f"""\
# As ndctl create-namespace --mode devdax does. Another guest with the same memory may have done it.
for ((i = 0; i < 300; i++)); do
    [ -e /dev/dax0.0 ] || [ -e /sys/bus/nd/drivers/nd_pmem/namespace0.0 ] && break
    sleep 0.1
done
if [ ! -e /dev/dax0.0 ]; then
cd /sys/bus/nd/devices/region0
echo namespace0.0 > /sys/bus/nd/drivers/nd_pmem/unbind
{_TO_DAX}
fi
"""

_RXE = """\
net=link0
if [ ! -e /sys/class/net/link0 ]; then
    net=rdma0
    ip link add rdma0 mtu 9000 type veth peer name rdma1 mtu 9000
    ip address add 198.18.0.1/24 dev rdma0
    ip link set rdma0 up
    ip link set rdma1 up
fi
rdma link add rxe0 type rxe netdev $net
"""

_CXL = f"""\
# As cxl create-region --type pmem and ndctl create-namespace --mode devdax do.
cd /sys/bus/cxl/devices
for ((i = 0; i < 300; i++)); do # devices are probed in the background
    [ -e decoder2.0/dpa_size ] && break
    sleep 0.1
done
region=$(< decoder0.0/create_pmem_region)
echo "$region" > decoder0.0/create_pmem_region
echo pmem > decoder2.0/mode
echo 0x10000000 > decoder2.0/dpa_size
cat /proc/sys/kernel/random/uuid > "$region/uuid"
echo 256 > "$region/interleave_granularity"
echo 1 > "$region/interleave_ways"
echo 0x10000000 > "$region/size"
echo decoder2.0 > "$region/target0"
echo 1 > "$region/commit"
echo "$region" > /sys/bus/cxl/drivers/cxl_region/bind
cd /sys/bus/nd/devices
for ((i = 0; i < 300; i++)); do
    [ -e namespace0.0/uuid ] && break
    sleep 0.1
done
echo 64616b73-6861-4265-8000-6d656d6f7279 > namespace0.0/uuid # the same one in each guest
echo 0x10000000 > namespace0.0/size
cd region0
{_TO_DAX}
"""

DEVICES = {
    "vivid": Device(
        "three cameras by the kernel's vivid: one of a single plane with an output and a metadata "
        "node beside it, one of several planes, one that takes contiguous memory only",
        modules=(
            "vivid n_devs=3 node_types=0x20101,0x1,0x1 multiplanar=1,2,1 allocators=0,0,1 "
            "num_inputs=1,1,1 input_types=0,0,0 num_outputs=1,0,0 no_error_inj=1",
        ),
    ),
    "codecs": Device(
        "an encoder, a stateful and a stateless decoder by the kernel's vicodec, and a converter "
        "by vim2m, which are built from Debian's kernel source",
        modules=("v4l2-mem2mem", "vicodec", "vim2m"),
        built=("v4l2-mem2mem", "vicodec", "vim2m"),
    ),
    "drm": Device(
        "a display by bochs, a GPU without 3D by virtio-gpu and one without a screen by vgem; "
        "QEMU's monitor and a drive that it may dump the screen to",
        qemu=(
            *("-device", "bochs-display,id=lab-screen", "-device", "virtio-gpu-pci"),
            *("-chardev", "socket,id=monitor,path=monitor,server=on,wait=off"),
            *("-mon", "chardev=monitor,mode=control"),
            *("-chardev", "socket,id=monitor-port,path=monitor"),
            *("-device", "virtserialport,nr=3,name=lab-monitor,chardev=monitor-port"),
            *("-drive", "id=lab-screen,file=screen,if=none,format=raw,read-only=on"),
            *("-device", "virtio-blk-pci,drive=lab-screen,serial=lab-screen"),
        ),
        files=(("screen", 8 << 20),),
        modules=("vgem", "bochs", "virtio-gpu"),
    ),
    "vfio": Device(
        "a PCI device with 1 MiB of memory, in vfio-pci's hands, behind an IOMMU",
        qemu=(
            *("-object", "memory-backend-ram,id=lab-bar,size=1M,share=on"),
            *("-device", "ivshmem-plain,memdev=lab-bar"),
        ),
        modules=("vfio-pci ids=1af4:1110",),
        iommu=True,
    ),
    "nvmf": Device(
        "a target and a host of NVMe over TCP, with nothing connected",
        modules=("nvmet-tcp", "nvme-tcp"),
        both=True,
    ),
    "rdma": Device(
        "a network card with RDMA by the kernel's rxe (soft RoCE), and NIXL for Python",
        modules=("rdma_rxe",),
        python=("nixl-cu13==1.5.1",),
        alone=True,
        both=True,
        setup=_RXE,
    ),
    "numa": Device(
        "two NUMA nodes without processors: node 1 of ordinary memory, node 2 of ZONE_MOVABLE",
        qemu=(
            *_DIMMS,
            *("-object", "memory-backend-ram,id=lab-ram,size={memory}"),
            *("-numa", "node,nodeid=0,cpus=0-1,memdev=lab-ram"),
            *("-object", "memory-backend-ram,id=lab-far,size=256M"),
            *("-numa", "node,nodeid=1,memdev=lab-far"),
            *("-object", "memory-backend-ram,id=lab-movable,size=256M"),
            *("-numa", "node,nodeid=2", "-device", "pc-dimm,memdev=lab-movable,node=2"),
        ),
        memory=256,
        kernel=("memhp_default_state=offline",),
        setup=_ONLINE,
    ),
    "dax": Device(
        "persistent memory of 256 MiB by nvdimm, as /dev/dax0.0; two guests have the same memory",
        qemu=(
            *_DIMMS,
            *("-machine", "nvdimm=on"),
            *("-object", "memory-backend-file,id=lab-dax,mem-path=dax,size=256M,share=on"),
            *("-device", "nvdimm,memdev=lab-dax"),
        ),
        files=(("dax", 256 << 20),),
        modules=("nfit", "nd_pmem", "dax_pmem", "device_dax"),
        both=True,
        setup=_DEVDAX,
    ),
    "cxl": Device(
        "a CXL memory device (type 3) of 256 MiB, whose persistent memory is /dev/dax0.0; two "
        "guests have the same memory",
        qemu=(
            # The kernel programs the decoders only where it takes the machine for a real one, and
            # qboot lacks the tables of ACPI.
            *("-machine", "cxl=on", "-cpu", "max,hypervisor=off", "-bios", "bios-256k.bin"),
            *("-object", "memory-backend-ram,id=lab-ram,size={memory}"),
            *("-numa", "node,nodeid=0,cpus=0-1,memdev=lab-ram"),
            *("-object", "memory-backend-file,id=lab-cxl,mem-path=cxl,size=256M,share=on"),
            *("-object", "memory-backend-ram,id=lab-cxl-labels,size=1M,share=on"),
            *("-device", "pxb-cxl,bus_nr=128,bus=pcie.0,id=lab-cxl-bus"),
            *("-device", "cxl-rp,port=0,bus=lab-cxl-bus,id=lab-cxl-port,chassis=20,slot=2"),
            *("-device", "cxl-type3,bus=lab-cxl-port,memdev=lab-cxl,lsa=lab-cxl-labels,sn=1"),
            *("-machine", "cxl-fmw.0.targets.0=lab-cxl-bus,cxl-fmw.0.size=4G"),
        ),
        # QEMU 7.2 has no interrupts for the device's events, which only an operating system asks
        # for that controls PCIe ports.
        kernel=("pcie_ports=compat", "memhp_default_state=offline"),
        files=(("cxl", 256 << 20),),
        modules=(
            *("cxl_acpi", "cxl_port", "cxl_mem", "cxl_pci", "cxl_pmem"),
            *("nd_pmem", "dax_pmem", "device_dax"),
        ),
        alone=True,
        both=True,
        excludes=("numa", "dax"),
        setup=_CXL,
    ),
    "p2pmem": Device(
        "two NVMe drives behind one PCIe switch, the first with 16 MiB of memory (CMB)",
        qemu=(
            *("-device", "pcie-root-port,id=lab-port,chassis=9,slot=9"),
            *("-device", "x3130-upstream,id=lab-switch,bus=lab-port"),
            *("-device", "xio3130-downstream,id=lab-down0,bus=lab-switch,chassis=10,slot=1"),
            *("-device", "xio3130-downstream,id=lab-down1,bus=lab-switch,chassis=11,slot=2"),
            *("-drive", "id=lab-cmb,file=cmb,if=none,format=raw,cache=unsafe"),
            *("-device", "nvme,serial=lab-cmb,drive=lab-cmb,cmb_size_mb=16,bus=lab-down0"),
            *("-drive", "id=lab-peer,file=peer,if=none,format=raw,cache=unsafe"),
            *("-device", "nvme,serial=lab-peer,drive=lab-peer,bus=lab-down1"),
        ),
        files=(("cmb", 64 << 20), ("peer", 64 << 20)),
    ),
}


def named(value: str, processor: Processor) -> tuple[Device, ...]:
    """Return the devices in a value of `--devices`: "all", or names with commas between them.

    Raises ValueError for a name that is unknown, that a guest with this processor lacks, or that
    another one of them excludes.
    """
    there = {name: device for name, device in DEVICES.items() if name not in processor.lacks}
    wanted = list(filter(None, value.split(",")))
    if value == "all":
        wanted = [name for name, device in there.items() if not device.alone]
    for name in wanted:
        if name not in there:
            known = ", ".join(there)
            raise ValueError(f"no {name!r} with {processor.name}: all, or some of {known}")
        for other in there[name].excludes:
            if other in wanted:
                raise ValueError(f"a guest with {name!r} cannot have {other!r}: use two runs")
    return tuple(there[name] for name in dict.fromkeys(wanted))


def lacked(devices: Collection[Device], processor: Processor) -> list[str]:
    """Return the names of devices that a guest with these lacks; tests that need one are skipped.

    They are those that the processor lacks, and those that cannot be together with one of these.
    """
    excluded = {
        name
        for name, device in DEVICES.items()
        if any(DEVICES[other] in devices for other in device.excludes)
        or any(name in one.excludes for one in devices)
    }
    return sorted({*processor.lacks, *excluded})
