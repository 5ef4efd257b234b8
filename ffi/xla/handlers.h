// The functions that XLA programs call by name.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace hmoe {

// hidden [t, d] bf16, ids [t, k] s32, weights [t, k] f32, layer [] s32; attribute store s64; result [t, d]
// f32.
extern XLA_FFI_Handler* const kMoeExpertsHandler;

// The same for programs on a GPU: the CPU computes, the GPU's stream waits.
extern XLA_FFI_Handler* const kMoeExpertsGpuHandler;

// hidden, ids, weights, layer as above, after [] s32; attributes lane and slot s64; result [] s32, a ticket.
// `after` is not looked at: it orders the calls of a program.
extern XLA_FFI_Handler* const kExpertsSubmitHandler;

// ticket [] s32, after [] s32; attributes lane and slot s64; result [t, d] f32.
extern XLA_FFI_Handler* const kExpertsWaitHandler;

// The same for programs on a GPU, whose stream waits and not the host.
extern XLA_FFI_Handler* const kExpertsSubmitGpuHandler;
extern XLA_FFI_Handler* const kExpertsWaitGpuHandler;

// value and after, of any type and shape; result as the value, in its memory.
extern XLA_FFI_Handler* const kInOrderHandler;

// x [t, in] bf16, weight [out, ...] and scale as the checkpoint stores them (no elements where the codec has
// no scales); attributes pool s64, codec string; result [t, out] f32.
extern XLA_FFI_Handler* const kLinearHandler;

// x [t, d] bf16, weight [d] bf16; attribute eps f32; result [t, d] bf16.
extern XLA_FFI_Handler* const kRmsNormHandler;

// nope [t, h, n], rope [t, h, p], key [h, n, r], value [h, v, r] bf16, cache [pages, slots, r + p] u16,
// tables [t, pages each] s32, positions [t] s32; attributes pool s64, scale f32; result [t, h, v] bf16.
extern XLA_FFI_Handler* const kMlaAttentionHandler;

// The same of one sequence: tables [pages] s32.
extern XLA_FFI_Handler* const kMlaPrefillHandler;

// expanded [h, chunks, MlaWidths::words()] u16, key, value, cache, tables [pages], positions [t] s32 as
// above; attribute pool s64; result as `expanded`, in its memory.
extern XLA_FFI_Handler* const kMlaExpandHandler;

// nope, rope, expanded, positions as above; attributes pool s64, scale f32; result [t, h, v] bf16.
extern XLA_FFI_Handler* const kMlaAttendExpandedHandler;

}  // namespace hmoe
