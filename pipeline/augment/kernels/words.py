"""A row of parameters in words of 32 bits; `pipeline.augment.triton` packs it."""

import triton.language as tl

X0 = tl.constexpr(0)
Y0 = tl.constexpr(1)
WIDTH = tl.constexpr(2)
HEIGHT = tl.constexpr(3)
FLIPPED = tl.constexpr(4)
GREY = tl.constexpr(5)
SOLARIZED = tl.constexpr(6)
ORDER = tl.constexpr(7)  # the jitter's operations in order, four bits each; 15: none
CONTRAST_POSITION = tl.constexpr(8)  # position of the contrast in ORDER; 4: no contrast
HUE = tl.constexpr(9)  # levels to add
FACTORS = tl.constexpr(10)  # float32: brightness, contrast, saturation
BOX = tl.constexpr(13)  # pixels of full weight on either side in a box of the blur; -1: no blur
BOX_NEAR = tl.constexpr(14)  # weight of these pixels, in 2^-24
BOX_FAR = tl.constexpr(15)  # weight of the next pixel on either side
FIRST_LINE = tl.constexpr(16)  # where the view begins among the lines of all crops
LOW_BITS = tl.constexpr(17)  # of a weight's two parts in the resize across
WORDS = tl.constexpr(18)
