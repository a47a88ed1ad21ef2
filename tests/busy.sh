#!/bin/sh
# Run a command, such as the unit tests, beside eight busy loops and a process that keeps the disk
# busy: tests that depend on a quiet machine fail. `make unit-busy` runs it.
set -eu

[ $# -gt 0 ] || { echo "usage: tests/busy.sh COMMAND [ARGUMENT ...]" >&2; exit 2; }

folder=$(mktemp -d /var/tmp/dmabuf-busy-XXXXXX)
pids=
stop() {
    # The process ids are words on purpose.
    # shellcheck disable=SC2086
    kill -KILL $pids 2>/dev/null || true # a child that has just begun may ignore TERM
    wait
    rm -rf "$folder"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for _ in 1 2 3 4 5 6 7 8; do
    sh -c 'while :; do :; done' &
    pids="$pids $!"
done
sh -c 'while dd if=/dev/zero of="$1/data" bs=1M count=256 conv=fsync 2>/dev/null; do :; done' \
    busy "$folder" &
pids="$pids $!"

"$@"
