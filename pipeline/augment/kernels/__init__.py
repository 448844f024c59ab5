"""The Triton kernels of the "triton" backend, one module per pass.

`pipeline.augment.triton` launches them.

They follow Pillow's C code: bytes between operations, and in each operation Pillow's rounding.
Colours are computed in integers, or in float32 operations with IEEE rounding, and give Pillow's
bytes. Launch with enable_fp_fusion=False: a fused multiply-add rounds once, Pillow rounds twice. A
filter is a product with a band matrix, on the tensor cores: bytes are exact in float16, and each
weight is the sum of two float16 numbers, which is as precise as Pillow's 22 bits.

A view is one row of parameters, number v * B + b. S is its side in pixels, i and j its lines and
columns, y and x the lines and columns of its source. Colours are int32 levels 0..255, one tensor
per channel.
"""
