// Adapter: XLA buffers to hmoe::MlaAttention and hmoe::MlaPrefill.

#include "kernels/mla_attention.h"

#include "kernels/mla_prefill.h"
#include "store/registry.h"
#include "xla/arguments.h"
#include "xla/handlers.h"

namespace hmoe {
namespace {

struct Operands {
  ffi::AnyBuffer nope, rope, key, value, cache, tables, positions, out;
};

// Sizes come from the arguments that have all of their dimensions free; the others have to agree.
Status ReadSizes(const Operands& given, bool shared_table, MlaAttentionArgs& args) {
  if (Status s = CheckArgument("nope", given.nope, {ffi::BF16}, {kAnySize, kAnySize, kAnySize}); !s.ok())
    return s;
  const auto nope = given.nope.dimensions();
  args.tokens = nope[0], args.heads = nope[1], args.nope_dim = nope[2];
  if (Status s = CheckArgument("rope", given.rope, {ffi::BF16}, {args.tokens, args.heads, kAnySize}); !s.ok())
    return s;
  args.rope_dim = given.rope.dimensions()[2];
  if (Status s = CheckArgument("key", given.key, {ffi::BF16}, {args.heads, args.nope_dim, kAnySize}); !s.ok())
    return s;
  args.rank = given.key.dimensions()[2];
  if (Status s = CheckArgument("value", given.value, {ffi::BF16}, {args.heads, kAnySize, args.rank}); !s.ok())
    return s;
  args.value_dim = given.value.dimensions()[1];
  const int64_t width = args.rank + args.rope_dim;
  if (Status s = CheckArgument("cache", given.cache, {ffi::U16}, {kAnySize, kAnySize, width}); !s.ok())
    return s;
  args.num_pages = given.cache.dimensions()[0], args.page_size = given.cache.dimensions()[1];
  Status tables = shared_table ? CheckArgument("tables", given.tables, {ffi::S32}, {kAnySize})
                               : CheckArgument("tables", given.tables, {ffi::S32}, {args.tokens, kAnySize});
  if (!tables.ok()) return tables;
  args.table_len = given.tables.dimensions().back();
  if (Status s = CheckArgument("positions", given.positions, {ffi::S32}, {args.tokens}); !s.ok()) return s;
  return CheckArgument("result", given.out, {ffi::BF16}, {args.tokens, args.heads, args.value_dim});
}

using Kernel = Status (*)(ThreadPool&, const MlaKernels&, const MlaAttentionArgs&);

Status Run(const Operands& given, Kernel kernel, bool shared_table, int64_t pool_id, float scale) {
  const auto pool = Pools().Find(pool_id);
  if (!pool.ok()) return pool.error();
  MlaAttentionArgs args;
  if (Status s = ReadSizes(given, shared_table, args); !s.ok()) return s;
  args.nope = DataOf<const uint16_t>(given.nope);
  args.rope = DataOf<const uint16_t>(given.rope);
  args.key = DataOf<const uint16_t>(given.key);
  args.value = DataOf<const uint16_t>(given.value);
  args.cache = DataOf<const uint16_t>(given.cache);
  args.tables = DataOf<const int32_t>(given.tables);
  args.positions = DataOf<const int32_t>(given.positions);
  args.out = DataOf<uint16_t>(given.out);
  args.scale = scale;
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

auto Binding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Attr<int64_t>("pool")
      .Attr<float>("scale")
      .Ret<ffi::AnyBuffer>();
}

XLA_FFI_DEFINE_HANDLER(kAttend, Attend, Binding());
XLA_FFI_DEFINE_HANDLER(kPrefill, Prefill, Binding());

}  // namespace

XLA_FFI_Handler* const kMlaAttentionHandler = kAttend;
XLA_FFI_Handler* const kMlaPrefillHandler = kPrefill;

}  // namespace hmoe
