"""The transfer room: moving bytes between an open file and a Buffer.

`File` is the public face of an open `Target`. A `Link` knows everything about one file, one buffer
and one direction; it plans, runs and judges a transfer on an `Engine`. What enters here decides how
bytes move; what makes memory belongs to `memory`, and what copies between any two ends to
`copying`.

The modules `audit`, `growth` and `stream` belong to the face, too.
"""

from dmabuf.transfer import audit, growth, stream
from dmabuf.transfer.audit import (
    device_of,
)
from dmabuf.transfer.compare import (
    Findings,
    Mismatch,
    first_difference,
)
from dmabuf.transfer.engine import (
    Backend,
    Engine,
    Job,
)
from dmabuf.transfer.file import (
    BaseFile,
    File,
    Mode,
    Verbs,
    open,  # noqa: A004 - dmabuf.open is the API
)
from dmabuf.transfer.growth import (
    Growth,
)
from dmabuf.transfer.link import (
    Link,
)
from dmabuf.transfer.plan import (
    ALLOWED,
    SMALL,
    Audit,
    Direction,
    Plan,
    Prefer,
    Require,
    Route,
    Terms,
    Transfer,
    check_given,
    plan_in_order,
    terms_of,
)
from dmabuf.transfer.reference import (
    BLOCK,
    NamespaceReference,
    Reference,
    open_reference,
)
from dmabuf.transfer.ring import (
    Refusal,
    Ring,
    no_native_kernel,
    why_no_uring,
)
from dmabuf.transfer.run import (
    BLOCKING,
    Progress,
    Segments,
    complete,
    in_transfer,
    late,
    part_of,
    segments_of,
    stopping,
)
from dmabuf.transfer.shared_pages import RETRY_PAUSE, SharedPagesLock
from dmabuf.transfer.together import read_together

__all__ = [
    "ALLOWED",
    "BLOCK",
    "BLOCKING",
    "RETRY_PAUSE",
    "SMALL",
    "Audit",
    "Backend",
    "BaseFile",
    "Direction",
    "Engine",
    "File",
    "Findings",
    "Growth",
    "Job",
    "Link",
    "Mismatch",
    "Mode",
    "NamespaceReference",
    "Plan",
    "Prefer",
    "Progress",
    "Reference",
    "Refusal",
    "Require",
    "Ring",
    "Route",
    "Segments",
    "SharedPagesLock",
    "Terms",
    "Transfer",
    "Verbs",
    "audit",
    "check_given",
    "complete",
    "device_of",
    "first_difference",
    "growth",
    "in_transfer",
    "late",
    "no_native_kernel",
    "open",
    "open_reference",
    "part_of",
    "plan_in_order",
    "read_together",
    "segments_of",
    "stopping",
    "stream",
    "terms_of",
    "why_no_uring",
]
