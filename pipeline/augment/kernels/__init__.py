"""The Triton kernels of the "triton" backend, one module per pass.

`pipeline.augment.triton` launches them.

They follow Pillow's C code: bytes between operations, and in each operation Pillow's rounding.
Colours are computed in integers, or in float32 operations with IEEE rounding, and give Pillow's
bytes. Launch with enable_fp_fusion=False: a fused multiply-add rounds once, Pillow rounds twice.
The resize across and the blur are products with band matrices, on the tensor cores: bytes are exact
in float16, so is each of the two parts of a weight, and all sums are integers below 2^24.

A view is one row of parameters, number v * B + b. S is its side in pixels, i and j its lines and
columns, y and x the lines and columns of its source. Colours are int32 levels 0..255, one tensor
per channel.
"""
