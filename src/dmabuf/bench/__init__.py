"""`dmabuf bench`, the parts that measure: every way into and out of a Buffer, side by side."""
