"""Many transfers of random kinds, every byte against a model, and what is left of them: nothing.

``python -m tests.soak --count 100000 --seed 1`` runs as many on whatever devices this machine has
(root has more, and the lab all); `make soak` runs that here and in the lab. The same seed makes
the same choices on the same machine.
"""
