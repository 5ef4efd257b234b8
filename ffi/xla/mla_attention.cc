// Adapters: XLA buffers to hmoe::MlaAttention, MlaPrefill, MlaExpand and MlaAttendExpanded.

#include "kernels/mla_attention.h"

#include <utility>

#include "kernels/mla_expansion.h"
#include "kernels/mla_prefill.h"
#include "store/registry.h"
#include "xla/arguments.h"
#include "xla/handlers.h"

namespace hmoe {
namespace {

// Each of these reads some of a call's arguments. Sizes come from the first that has them; the others have to
// agree.
Status ReadQueries(const ffi::AnyBuffer& nope, const ffi::AnyBuffer& rope, MlaAttentionArgs& args) {
  if (Status s = CheckArgument("nope", nope, {ffi::BF16}, {kAnySize, kAnySize, kAnySize}); !s.ok()) return s;
  const auto sizes = nope.dimensions();
  args.tokens = sizes[0], args.heads = sizes[1], args.nope_dim = sizes[2];
  if (Status s = CheckArgument("rope", rope, {ffi::BF16}, {args.tokens, args.heads, kAnySize}); !s.ok())
    return s;
  args.rope_dim = rope.dimensions()[2];
  args.nope = DataOf<const uint16_t>(nope);
  args.rope = DataOf<const uint16_t>(rope);
  return {};
}

Status ReadUpProjections(const ffi::AnyBuffer& key, const ffi::AnyBuffer& value, int64_t heads,
                         int64_t nope_dim, MlaAttentionArgs& args) {
  if (Status s = CheckArgument("key", key, {ffi::BF16}, {heads, nope_dim, kAnySize}); !s.ok()) return s;
  const auto sizes = key.dimensions();
  args.heads = sizes[0], args.nope_dim = sizes[1], args.rank = sizes[2];
  if (Status s = CheckArgument("value", value, {ffi::BF16}, {args.heads, kAnySize, args.rank}); !s.ok())
    return s;
  args.value_dim = value.dimensions()[1];
  args.key = DataOf<const uint16_t>(key);
  args.value = DataOf<const uint16_t>(value);
  return {};
}

Status ReadPages(const ffi::AnyBuffer& cache, const ffi::AnyBuffer& tables, bool shared_table, int64_t width,
                 MlaAttentionArgs& args) {
  if (Status s = CheckArgument("cache", cache, {ffi::U16}, {kAnySize, kAnySize, width}); !s.ok()) return s;
  args.num_pages = cache.dimensions()[0], args.page_size = cache.dimensions()[1];
  Status read = shared_table ? CheckArgument("tables", tables, {ffi::S32}, {kAnySize})
                             : CheckArgument("tables", tables, {ffi::S32}, {args.tokens, kAnySize});
  if (!read.ok()) return read;
  args.table_len = tables.dimensions().back();
  args.cache = DataOf<const uint16_t>(cache);
  args.tables = DataOf<const int32_t>(tables);
  return {};
}

Status ReadPositions(const ffi::AnyBuffer& positions, int64_t tokens, MlaAttentionArgs& args) {
  if (Status s = CheckArgument("positions", positions, {ffi::S32}, {tokens}); !s.ok()) return s;
  args.tokens = positions.dimensions()[0];
  args.positions = DataOf<const int32_t>(positions);
  return {};
}

Status ReadExpanded(const ffi::AnyBuffer& buffer, const MlaAttentionArgs& args, MlaExpanded& expanded) {
  if (Status s =
          CheckArgument("expanded", buffer, {ffi::U16}, {args.heads, kAnySize, MlaWidths(args).words()});
      !s.ok())
    return s;
  expanded = {DataOf<uint16_t>(buffer), buffer.dimensions()[1]};
  return {};
}

Status ReadResult(const ffi::AnyBuffer& out, int64_t value_dim, MlaAttentionArgs& args) {
  if (Status s = CheckArgument("result", out, {ffi::BF16}, {args.tokens, args.heads, value_dim}); !s.ok())
    return s;
  args.value_dim = out.dimensions()[2];
  args.out = DataOf<uint16_t>(out);
  return {};
}

struct Operands {
  ffi::AnyBuffer nope, rope, key, value, cache, tables, positions, out;
};

using Kernel = Status (*)(ThreadPool&, const MlaKernels&, const MlaAttentionArgs&);

Status Run(const Operands& given, Kernel kernel, bool shared_table, int64_t pool_id, float scale) {
  const auto pool = Pools().Find(pool_id);
  if (!pool.ok()) return pool.error();
  MlaAttentionArgs args;
  args.scale = scale;
  if (Status s = ReadQueries(given.nope, given.rope, args); !s.ok()) return s;
  if (Status s = ReadUpProjections(given.key, given.value, args.heads, args.nope_dim, args); !s.ok())
    return s;
  const int64_t width = args.rank + args.rope_dim;
  if (Status s = ReadPages(given.cache, given.tables, shared_table, width, args); !s.ok()) return s;
  if (Status s = ReadPositions(given.positions, args.tokens, args); !s.ok()) return s;
  if (Status s = ReadResult(given.out, args.value_dim, args); !s.ok()) return s;
  return kernel(*pool.value()->pool, *pool.value()->isa.mla, args);
}

ffi::Error Attend(ffi::AnyBuffer nope, ffi::AnyBuffer rope, ffi::AnyBuffer key, ffi::AnyBuffer value,
                  ffi::AnyBuffer cache, ffi::AnyBuffer tables, ffi::AnyBuffer positions, int64_t pool,
                  float scale, ffi::Result<ffi::AnyBuffer> out) {
  return ToXla(
      Run({nope, rope, key, value, cache, tables, positions, *out}, MlaAttention, false, pool, scale));
}

ffi::Error Prefill(ffi::AnyBuffer nope, ffi::AnyBuffer rope, ffi::AnyBuffer key, ffi::AnyBuffer value,
                   ffi::AnyBuffer cache, ffi::AnyBuffer tables, ffi::AnyBuffer positions, int64_t pool,
                   float scale, ffi::Result<ffi::AnyBuffer> out) {
  return ToXla(Run({nope, rope, key, value, cache, tables, positions, *out}, MlaPrefill, true, pool, scale));
}

Status RunExpand(ffi::AnyBuffer given, ffi::AnyBuffer key, ffi::AnyBuffer value, ffi::AnyBuffer cache,
                 ffi::AnyBuffer table, ffi::AnyBuffer positions, int64_t pool_id, ffi::AnyBuffer out) {
  const auto pool = Pools().Find(pool_id);
  if (!pool.ok()) return pool.error();
  MlaAttentionArgs args;
  if (Status s = ReadUpProjections(key, value, kAnySize, kAnySize, args); !s.ok()) return s;
  if (Status s = ReadPages(cache, table, true, kAnySize, args); !s.ok()) return s;
  args.rope_dim = cache.dimensions()[2] - args.rank;
  if (args.rope_dim < 0)
    return Fail("cache: expected at least rank ", args.rank, " values for a position, got ",
                cache.dimensions()[2]);
  if (Status s = ReadPositions(positions, kAnySize, args); !s.ok()) return s;
  MlaExpanded before, expanded;
  if (Status s = ReadExpanded(given, args, before); !s.ok()) return s;
  if (Status s = ReadExpanded(out, args, expanded); !s.ok()) return s;
  if (before.data != expanded.data) return Fail("expanded: expected a buffer that is also the result");
  return MlaExpand(*pool.value()->pool, *pool.value()->isa.mla, args, expanded);
}

ffi::Error Expand(ffi::AnyBuffer expanded, ffi::AnyBuffer key, ffi::AnyBuffer value, ffi::AnyBuffer cache,
                  ffi::AnyBuffer table, ffi::AnyBuffer positions, int64_t pool,
                  ffi::Result<ffi::AnyBuffer> out) {
  return ToXla(RunExpand(expanded, key, value, cache, table, positions, pool, *out));
}

Status RunAttendExpanded(ffi::AnyBuffer nope, ffi::AnyBuffer rope, ffi::AnyBuffer buffer,
                         ffi::AnyBuffer positions, int64_t pool_id, float scale, ffi::AnyBuffer out) {
  const auto pool = Pools().Find(pool_id);
  if (!pool.ok()) return pool.error();
  MlaAttentionArgs args;
  args.scale = scale;
  if (Status s = ReadQueries(nope, rope, args); !s.ok()) return s;
  if (Status s = ReadPositions(positions, args.tokens, args); !s.ok()) return s;
  if (Status s = ReadResult(out, kAnySize, args); !s.ok()) return s;
  MlaExpanded expanded;
  if (Status s = ReadExpanded(buffer, args, expanded); !s.ok()) return s;
  return MlaAttendExpanded(*pool.value()->pool, *pool.value()->isa.mla, args, expanded);
}

ffi::Error AttendExpanded(ffi::AnyBuffer nope, ffi::AnyBuffer rope, ffi::AnyBuffer expanded,
                          ffi::AnyBuffer positions, int64_t pool, float scale,
                          ffi::Result<ffi::AnyBuffer> out) {
  return ToXla(RunAttendExpanded(nope, rope, expanded, positions, pool, scale, *out));
}

template <int kCount>
auto Attending() {
  return WithArguments<kCount>(ffi::Ffi::Bind())
      .template Attr<int64_t>("pool")
      .template Attr<float>("scale")
      .template Ret<ffi::AnyBuffer>();
}

XLA_FFI_DEFINE_HANDLER(kAttend, Attend, Attending<7>());
XLA_FFI_DEFINE_HANDLER(kPrefill, Prefill, Attending<7>());
XLA_FFI_DEFINE_HANDLER(kAttendExpanded, AttendExpanded, Attending<4>());
XLA_FFI_DEFINE_HANDLER(kExpand, Expand,
                       WithArguments<6>(ffi::Ffi::Bind()).Attr<int64_t>("pool").Ret<ffi::AnyBuffer>());

}  // namespace

XLA_FFI_Handler* const kMlaAttentionHandler = kAttend;
XLA_FFI_Handler* const kMlaPrefillHandler = kPrefill;
XLA_FFI_Handler* const kMlaExpandHandler = kExpand;
XLA_FFI_Handler* const kMlaAttendExpandedHandler = kAttendExpanded;

}  // namespace hmoe
