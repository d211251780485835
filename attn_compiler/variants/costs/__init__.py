"""What variants cost, one file of formulas for each, in the letters of `cost.letters`.

    variants/el.py        what may be asked, which sizes are best: plain numbers, for every door
    variants/costs/el.py  what it costs: sympy, which only a question about costs may load

All formulas of one work are of one layer, so that variants can be compared; they count what each
file says it replaces (a core, a site, a block). `share` is the part of the T x S pairs that a
kernel visits: 1, 1/2 under a causal mask where T = S, rho for a pattern of blocks. In decoding, B
samples have K beams each and T new rows, usually one, and S is the length of the cache.

Bytes: every tensor once for each kernel that reads or writes it; weights are as wide as
activations. `other` counts only what a variant adds to the arithmetic of a softmax.
"""
