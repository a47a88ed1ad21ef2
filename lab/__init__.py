"""A guest with a real kernel and real devices, to run the tests in. Never imports dmabuf."""
