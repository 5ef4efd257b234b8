"""A group of experts on an accelerator: tokens sorted by expert, then one of several ways to multiply them.

`batched`, `looped` and `ragged` do the same; `moe_experts_reference` says what. The first is used where nobody measured
which is the fastest, the second takes the least memory, the third multiplies no padding where XLA has a program for it.
"""
