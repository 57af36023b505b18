"""Triton kernels of Gated Delta Rule-2: `launch.forward`, `launch.backward`, `launch.step`. They need triton."""
