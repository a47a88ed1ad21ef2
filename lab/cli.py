"""The command line of lab/run."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from lab import devices, guest, host, modules, packages, prepare, project
from lab.cache import Cache
from lab.devices import Device
from lab.host import LabError
from lab.processors import PROCESSORS, Processor

CHECKOUT = Path(__file__).resolve().parent.parent


def parser() -> argparse.ArgumentParser:
    """Return the parser of the words before the `--`."""
    result = argparse.ArgumentParser(
        prog="lab/run",
        usage="lab/run [options] -- COMMAND [ARGS...]",
        description="Run COMMAND in a QEMU guest with a real kernel, dma-buf exporters and two "
        "scratch NVMe drives, in a copy of this checkout with the project installed.",
        epilog=f"Exit status: COMMAND's; {guest.LOGGED} if only the kernel log tells of trouble, "
        f"{guest.TIMED_OUT} out of time, {guest.BROKEN} if the lab or the guest failed.",
        allow_abbrev=False,
    )
    result.add_argument(
        "--kernel",
        default="backports",
        metavar="KERNEL",
        help=f"the newest of Debian {packages.SUITE}-backports (backports, the default), "
        f"{packages.SUITE}'s own (stable), or the path of a bzImage, for arm64 of an Image",
    )
    result.add_argument(
        "--arch",
        choices=PROCESSORS,
        default=packages.NATIVE,
        help=f"the guest's processor (default {packages.NATIVE})",
    )
    result.add_argument(
        "--page-size",
        choices=PROCESSORS["arm64"].flavours,
        default="4k",
        help="the pages of an arm64 guest, by the flavour of Debian's kernel (default 4k)",
    )
    result.add_argument(
        "--devices",
        default="",
        metavar="NAMES",
        help="what else the guest has: all, or with commas between them "
        + "; ".join(f"{name}, {device.about}" for name, device in devices.DEVICES.items()),
    )
    result.add_argument(
        "--guests",
        type=int,
        choices=(1, 2),
        default=1,
        help="2 adds a guest and a network to it; `lab-peer COMMAND` runs COMMAND there",
    )
    result.add_argument("--memory", default="3G", metavar="SIZE", help="each guest's (default 3G)")
    result.add_argument(
        "--timeout",
        type=float,
        default=1800,
        metavar="SECONDS",
        help="for boot and COMMAND together (default 1800)",
    )
    result.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to put what COMMAND leaves in the folder $LAB_OUT",
    )
    result.add_argument("--prepare", action="store_true", help="only make what a run needs")
    result.add_argument(
        "--apt-packages", action="store_true", help="print the packages the host needs, and end"
    )
    return result


def main(argv: Sequence[str]) -> int:
    """Do what the command line says and return the exit status."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parse = parser()
    options = parse.parse_args(argv[:cut])
    command = argv[cut + 1 :]
    host.add_sbin_to_path()
    processor = PROCESSORS[options.arch]
    if options.apt_packages:
        print("\n".join(host.apt_packages(processor)))
        return 0
    if options.page_size not in processor.flavours:
        parse.error(f"--page-size {options.page_size}: {processor.name} has only pages of 4k")
    if bool(command) == options.prepare:
        parse.error("give a COMMAND after --, or --prepare")
    try:
        wanted = devices.named(options.devices, processor)
    except ValueError as error:
        parse.error(f"--devices: {error}")
    try:
        with guest.signals_stop():
            return _run(options, processor, wanted, command)
    except guest.Stopped as stopped:
        return stopped.status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except LabError as error:
        host.say(str(error))
        return guest.BROKEN


def _run(
    options: argparse.Namespace,
    processor: Processor,
    wanted: tuple[Device, ...],
    command: Sequence[str],
) -> int:
    host.check_prerequisites(processor)
    cache = Cache.default()
    with cache.lock():
        cache.forget()
        root = prepare.root(cache, processor)
        flavour = processor.flavours[options.page_size]
        kernel = prepare.kernel(cache, options.kernel, processor, flavour, refresh=options.prepare)
        lacking = [name for device in wanted for name in device.built]
        built = modules.built(cache, root, kernel, [*processor.built, *lacking])
        alone = [name for device in wanted for name in device.python]
        ready = project.prepare(cache, root, CHECKOUT, alone)
    if options.prepare:
        return 0
    job = guest.Run(
        command,
        root,
        kernel,
        ready,
        options.memory,
        options.timeout,
        options.out,
        wanted,
        built,
        options.guests,
    )
    return guest.run(cache, job)
