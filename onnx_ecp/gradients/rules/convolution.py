"""Conv, ConvTranspose, pooling by averages: linear in x, so the adjoint is the transposed operator.

A window operator reads ``x`` through windows on the line of covered cells, which begins ``begin``
cells before x and is ``(outputs - 1) stride + dilation (kernel - 1) + 1`` long. Its adjoint fills
the covered cells by ConvTranspose and cuts x out of them.
"""
