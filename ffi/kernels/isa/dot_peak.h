// How many multiply-adds one core can do per second: each ISA's own dot instruction, fed from registers
// alone.
//
// Included by the per-ISA files; which of the loops below exist follows from their compiler flags. `Dot`
// names an instruction: one Step multiplies and adds kProducts pairs. kChains independent sums hide its
// latency. Every operand is finite and no sum becomes subnormal, which some processors would be slow at.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AMX_TILE__)
#include "kernels/isa/amx/tiles.h"
#endif

namespace hmoe {
namespace {

// Does `rounds` rounds of kChains steps and returns the number of multiply-adds in them. What lands in `sink`
// only keeps the compiler from leaving them out.
template <typename Dot>
int64_t MultiplyAdds(int64_t rounds, float* sink) {
  typename Dot::Sum sums[Dot::kChains];
  // Sums that start alike would stay alike, and the compiler would make one of them.
#pragma GCC unroll 16
  for (int i = 0; i < Dot::kChains; ++i) sums[i] = Dot::Start(static_cast<float>(i));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (auto& sum : sums) sum = Dot::Step(sum);
  }
  *sink = 0;
#pragma GCC unroll 16
  for (auto& sum : sums) *sink += Dot::First(sum);
  return rounds * Dot::kChains * Dot::kProducts;
}

// A multiplication and an addition in the vectors that every processor of the platform has. Both depend on
// the sum: a product that does not would be moved out of the loop.
struct DotPlain {
  typedef float Sum __attribute__((vector_size(16)));
  static constexpr int kChains = 12, kProducts = 4;
  static Sum Start(float value) { return Sum{} + value; }
  static Sum Step(Sum sum) { return sum * 0.5f + 1.0f; }
  static float First(Sum sum) { return sum[0]; }
};

#if defined(__AVX2__) && defined(__FMA__)
struct DotFma256 {
  using Sum = __m256;
  static constexpr int kChains = 12, kProducts = 8;
  static Sum Start(float value) { return _mm256_set1_ps(value); }
  static Sum Step(Sum sum) { return _mm256_fmadd_ps(sum, _mm256_set1_ps(0.5f), _mm256_set1_ps(1.0f)); }
  static float First(Sum sum) { return _mm256_cvtss_f32(sum); }
};
#endif

#if defined(__AVX512F__)
struct DotFma512 {
  using Sum = __m512;
  static constexpr int kChains = 12, kProducts = 16;
  static Sum Start(float value) { return _mm512_set1_ps(value); }
  static Sum Step(Sum sum) { return _mm512_fmadd_ps(sum, _mm512_set1_ps(0.5f), _mm512_set1_ps(1.0f)); }
  static float First(Sum sum) { return _mm512_cvtss_f32(sum); }
};
#endif

#if defined(__AVX512BF16__)
struct DotBf16 {
  using Sum = __m512;
  static constexpr int kChains = 12, kProducts = 32;
  static Sum Start(float value) { return _mm512_set1_ps(value); }
  static Sum Step(Sum sum) {
    const __m512i ones = _mm512_set1_epi16(0x3f80);  // 1 in bfloat16
    return _mm512_dpbf16_ps(sum, (__m512bh)ones, (__m512bh)ones);
  }
  static float First(Sum sum) { return _mm512_cvtss_f32(sum); }
};
#endif

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
// Tiles are no values to C++, so this is a function and not a `Dot`. A step multiplies 16 x 32 by 32 x 16;
// the four sums each have a tile, as a kernel of 2 x 2 tiles has. The process must have been given the tile
// registers.
inline int64_t MultiplyAddsOfTiles(int64_t rounds, float* sink) {
  constexpr int kSums = 4, kProducts = 16 * 16 * 32;
  const TileUse use;
  alignas(64) uint16_t ones[16 * 32];
  for (auto& one : ones) one = 0x3f80;
  FinishStores();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, ones, 64);
  _tile_loadd(5, ones, 64);
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float sums[16 * 16];
  *sink = 0;
  _tile_stored(0, sums, 64);
  *sink += sums[0];
  _tile_stored(1, sums, 64);
  *sink += sums[0];
  _tile_stored(2, sums, 64);
  *sink += sums[0];
  _tile_stored(3, sums, 64);
  *sink += sums[0];
  return rounds * kSums * kProducts;
}
#endif

}  // namespace
}  // namespace hmoe
