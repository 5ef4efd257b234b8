// Absorbed multi-head latent attention of a decode step: one new token for each of many sequences, over their
// pages of the cache.
#pragma once

#include <cstdint>

#include "base/result.h"
#include "kernels/mla/table.h"
#include "machine/pool.h"

namespace hmoe {

// All matrices are row-major bfloat16. A token's latent is [rank + rope]: the first part is expanded by `key`
// into what meets `nope`, and by `value` into the output; the second meets `rope`.
struct MlaAttentionArgs {
  const uint16_t* nope = nullptr;      // [tokens, heads, nope_dim]
  const uint16_t* rope = nullptr;      // [tokens, heads, rope_dim]
  const uint16_t* key = nullptr;       // [heads, nope_dim, rank]
  const uint16_t* value = nullptr;     // [heads, value_dim, rank]
  const uint16_t* cache = nullptr;     // [num_pages, page_size, rank + rope_dim]
  const int32_t* tables = nullptr;     // [tokens, table_len]: page numbers
  const int32_t* positions = nullptr;  // [tokens]: a token sees the slots up to its position, itself included
  uint16_t* out = nullptr;             // [tokens, heads, value_dim]
  int64_t tokens = 0, heads = 0, nope_dim = 0, rope_dim = 0, rank = 0, value_dim = 0;
  int64_t num_pages = 0, page_size = 0, table_len = 0;
  float scale = 1.0f;  // of the scores
};

// Fails for a position that the table does not cover and for a page that the cache does not have.
Status CheckPages(const MlaAttentionArgs& args, bool shared_table);

// Fails as CheckPages. The bits of a token's row depend on that token and its sequence alone: not on the
// others, nor on the number of threads.
Status MlaAttention(ThreadPool& pool, const MlaKernels& kernels, const MlaAttentionArgs& args);

}  // namespace hmoe
