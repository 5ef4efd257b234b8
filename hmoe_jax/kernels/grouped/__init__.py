"""A group of experts on an accelerator: tokens sorted by expert, then one of several ways to multiply them.

All do the same; `moe_experts_reference` says what. `batched` is used where nobody measured which is the fastest;
`looped` takes the least memory; `ragged` multiplies no padding where XLA has a program for it; `kernel` unpacks FP8 on
a GPU's chip.
"""
