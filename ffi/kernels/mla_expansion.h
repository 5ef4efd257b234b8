// Latents of one sequence, expanded into every head's keys and values as products take them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/result.h"
#include "codec/codec.h"
#include "kernels/mla/table.h"
#include "kernels/mla_attention.h"
#include "machine/pool.h"

namespace hmoe {

// Positions whose keys and values of one head lie together: 330 KB for DeepSeek-V3.
inline constexpr int64_t kMlaChunk = 512;
inline constexpr int64_t kMlaChunkPanels = kMlaChunk / kPanel;

// From row to row of floats that are as wide as a chunk: a cache line more, since rows 2 KB apart share two
// sets of the L1.
inline constexpr int64_t kMlaStride = kMlaChunk + 16;

// Of a chunk, keys and values of one head. What is behind the last expanded position is zero up to a multiple
// of kDepth positions.
struct MlaChunk {
  uint16_t* keys;    // tiles of the transpose, [nope + rope, kMlaChunk]
  uint16_t* values;  // tiles of [kMlaChunk, value]
};

// The widths of heads, padded for tiles.
struct MlaWidths {
  explicit MlaWidths(const MlaAttentionArgs& args);

  int64_t key_words() const { return kMlaChunk * (nope + rope); }
  int64_t words() const { return key_words() + kMlaChunk * value; }
  MlaChunk ChunkAt(uint16_t* words) const { return {words, words + key_words()}; }

  int64_t nope, rope, rank, value;
};

// All chunks of all heads: [heads, num_chunks, MlaWidths::words()].
struct MlaExpanded {
  MlaChunk At(const MlaWidths& widths, int64_t head, int64_t chunk) const {
    return widths.ChunkAt(data + (head * num_chunks + chunk) * widths.words());
  }

  uint16_t* data = nullptr;
  int64_t num_chunks = 0;
};

// Expands positions `begin .. end - 1`, and those that share a tile with the first of them. The bits of a
// position's key and value depend on its latent alone.
class MlaExpansion {
 public:
  // Some positions of a chunk, as all heads read them.
  struct Latents {
    int64_t chunk, first_panel, num_panels;
    uint16_t* rows;        // [num_panels * kPanel, rank]
    uint16_t* rope;        // the same of the rotated parts
    uint16_t* rank_tiles;  // of the rows' transpose
    uint16_t* rope_tiles;
  };

  // Memory of one thread.
  struct Workspace {
    const uint16_t* key;             // [nope, rank]
    uint16_t* padded_key = nullptr;  // where it needs padding
    uint16_t* padded;                // 16 rows of the value
    uint16_t* value_tiles;           // of the transpose, [rank, value]
    float* expanded;                 // keys' transpose [nope, kMlaChunk], or values [kMlaChunk, value]
  };

  MlaExpansion(const MlaKernels& kernels, const MlaAttentionArgs& args, ThreadPool::Session& session,
               int64_t begin, int64_t end);

  const std::vector<Latents>& latents() const { return latents_; }
  Workspace TakeWorkspace() const;
  void ReadLatents();
  void LoadHead(int64_t head, Workspace& space) const;
  // With the head that was loaded.
  void Expand(const Latents& latents, const Workspace& space, const MlaChunk& to) const;

 private:
  bool PadsKey() const { return widths_.nope != args_.nope_dim || widths_.rank != args_.rank; }
  void ReadPanel(const Latents& latents, int64_t panel) const;

  const MlaKernels& kernels_;
  const MlaAttentionArgs& args_;
  ThreadPool::Session& session_;
  const MlaWidths widths_;
  const int64_t end_;
  std::vector<Latents> latents_;
};

// Of the calling op: its `args` without queries and results; `positions` say what to expand. Fails as
// CheckPages, and for a position that `expanded` has no place for.
Status MlaExpand(ThreadPool& pool, const MlaKernels& kernels, const MlaAttentionArgs& args,
                 const MlaExpanded& expanded);

// Fails for a position that `expanded` has no place for.
Status CheckExpanded(const MlaAttentionArgs& args, const MlaExpanded& expanded);

}  // namespace hmoe
