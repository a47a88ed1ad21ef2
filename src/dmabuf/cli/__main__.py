"""`python -m dmabuf.cli` is `dmabuf`."""

import sys

from dmabuf.cli import main

sys.exit(main())
