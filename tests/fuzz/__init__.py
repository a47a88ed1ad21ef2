"""Random input for everything that parses what others write.

``python -m tests.fuzz --seconds 60 --seed 1`` tries each target of targets.py in turn. `make fuzz`
also runs the C core on its virtual kernel by libFuzzer, which looks for choices of the simulator
that reach new branches.
"""
