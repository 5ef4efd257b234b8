"""A group of experts on an accelerator: tokens sorted by expert, then one of several ways to multiply them.

`batched` and `looped` do the same; `moe_experts_reference` says what. The first is used, the second takes the least
memory.
"""
