"""Are the kernels right on this GPU (`check`), and which configurations are fastest (`tune`)? Needs triton."""
