"""One module per operation of kernels/: its cases for the bench and its launches for the resource table."""
