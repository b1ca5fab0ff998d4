"""The check of the GPU kernels on a machine that has a GPU: ``make gpu-check``, or ``python -m benchmarks.gpu_check``.

It needs torch and triton only; without matplotlib the plot is left out. ``--rehearse`` runs all of it on the CPU, with
Triton's interpreter, at tiny sizes: that measures nothing, and what it writes says so.
"""
