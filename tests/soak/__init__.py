"""Many transfers of random kinds: each is compared to a model, and none may leave anything behind.

``python -m tests.soak --count 100000 --seed 1`` runs as many on whatever devices this machine has
(root has more, and the lab has all); `make soak` runs that here and in the lab. The same seed makes
the same choices on the same machine.
"""

from tests import core  # before dmabuf: the core with the seams for tests

__all__ = ["core"]
