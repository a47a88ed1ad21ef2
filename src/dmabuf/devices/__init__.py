"""Devices that share a Buffer's memory, one module for each of their worlds.

Each is built on the library that its world already uses, which is loaded when it is first needed
and named, with the command that installs it, where it is missing. `import dmabuf` loads none.
"""
