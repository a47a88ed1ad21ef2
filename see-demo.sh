set -u
modprobe vgem
cat > /tmp/hold.py <<'E'
import os, sys, time, mmap, fcntl, struct, socket
import dmabuf
from tests.kernel.conftest import vgem
from tests.kernel.test_exporters import heap_fd
frames = [dmabuf.allocate("8MiB", exporter="udmabuf", name="frames") for _ in range(2)]
open("/proc/self/comm","w").write("camera")
if os.fork() == 0:
    open("/proc/self/comm","w").write("encoder")
    frames[0].close()
    from dmabuf.devices import drm
    tex = heap_fd(4<<20, os.O_RDWR)
    from dmabuf import _uapi
    _uapi.set_name(tex, b"texture")
    node = [p for p in sorted(os.listdir("/dev/dri")) if p.startswith("card")][-1]
    card = os.open("/dev/dri/"+node, os.O_RDWR)
    fcntl.ioctl(card, 0xC00C642E, struct.pack("=IIi", 0, 0, tex))
    os.close(tex)
    print("ready", flush=True); time.sleep(600)
print("ready", flush=True); time.sleep(600)
E
python3 /tmp/hold.py > /tmp/h & sleep 25; cat /tmp/h
echo '$ dmabuf ls --system'; dmabuf ls --system
echo '$ json'; dmabuf ls --system --json --exporter system
cat > /tmp/leak.py <<'E'
import time, dmabuf
open("/proc/self/comm","w").write("leaky")
kept = []
print("x", flush=True)
while True:
    kept.append(dmabuf.allocate("1MiB", exporter="system"))
    time.sleep(1)
E
python3 /tmp/leak.py & sleep 8
echo '$ top'; dmabuf top --sort first --interval 5 --count 3
echo '$ top json'; dmabuf top --process leaky --json --interval 2 --count 2
echo '$ as nobody'; setpriv --reuid 65534 --regid 65534 --clear-groups dmabuf ls --system
python3 - <<'E'
from dmabuf import system
census = system.census()
for process, total in census.by_process().items():
    print(process, total.buffers, total.nbytes, total.share)
for buffer in census.buffers:
    print(buffer.inode, buffer.size, buffer.exporter, buffer.unseen, buffer.devices)
before = census
import time; time.sleep(5)
for process, total in system.census().by_process().items():
    print(process, total - before.by_process().get(process, system.Total()))
E
umount /sys/kernel/debug; dmabuf ls --system | tail -1
kill %1 %2
