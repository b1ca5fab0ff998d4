"""The check of the GPU kernels on a machine with a GPU: ``make gpu-check``, or ``python -m benchmarks.gpu_check``.

The check needs only torch and triton; without matplotlib the plot is left out. ``--rehearse`` runs the whole check on
the CPU, with Triton's interpreter, at tiny sizes. A rehearsal measures nothing, and its files say so.
"""
