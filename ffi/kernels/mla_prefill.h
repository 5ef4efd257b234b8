// Decompressed multi-head latent attention of a prefill: many tokens of one sequence.
#pragma once

#include "base/result.h"
#include "kernels/mla/table.h"
#include "kernels/mla_attention.h"
#include "kernels/mla_expansion.h"
#include "machine/pool.h"

namespace hmoe {

// As MlaAttention, but all tokens share one table [table_len]. Latents are expanded into every head's keys
// and values, which costs less than absorbing `key` where many queries meet them. The bits of a token's row
// depend on that token and its context alone: not on the other tokens, so not on the pieces that a prompt is
// cut into either. (Of finite latents: 32 queries share a block of positions, and a NaN that one of them may
// see reaches the others.)
Status MlaPrefill(ThreadPool& pool, const MlaKernels& kernels, const MlaAttentionArgs& args);

// The same, to a context that was expanded before, the tokens' own positions included: the same bits. Of
// `args` neither key and value nor the cache are read. Fails as CheckExpanded.
Status MlaAttendExpanded(ThreadPool& pool, const MlaKernels& kernels, const MlaAttentionArgs& args,
                         const MlaExpanded& expanded);

}  // namespace hmoe
