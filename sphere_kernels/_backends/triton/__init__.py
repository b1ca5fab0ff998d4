"""The Triton kernels, one story per file, and the table of their configurations; importing a kernel imports triton.

Names: ``p_`` pointers, ``o_`` offsets, ``m_`` masks, ``i_`` indices, ``b_`` blocks in registers. Every offset is int64
before it is multiplied, every load and store is masked, and no kernel uses atomics: what is summed over tiles is
written per tile and added in a fixed order.
"""
