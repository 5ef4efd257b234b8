// The Python module hmoe_jax.kernels._native.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "bench/naive_experts.h"
#include "kernels/dot_peak.h"
#include "kernels/isa.h"
#include "kernels/mla_expansion.h"
#include "kernels/read_bandwidth.h"
#include "machine/cpu.h"
#include "python/expert_lane.h"
#include "python/expert_store.h"
#include "python/thread_pool.h"
#include "xla/handlers.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace hmoe {
namespace {

nb::capsule Capsule(XLA_FFI_Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

double MeasureReads(const PyThreadPool& pool, int64_t megabytes) {
  const auto compute = pool.compute();
  const nb::gil_scoped_release unlocked;
  return Check(ReadBandwidth(*compute, megabytes));
}

double MeasureDots(const PyThreadPool& pool) {
  const auto compute = pool.compute();
  const nb::gil_scoped_release unlocked;
  return DotPeak(*compute);
}

// Of what `mla_expand` fills.
nb::tuple ExpandedShape(int64_t heads, int64_t nope, int64_t rope, int64_t value, int64_t positions) {
  MlaAttentionArgs args;
  args.nope_dim = nope, args.rope_dim = rope, args.value_dim = value;
  return nb::make_tuple(heads, CeilDiv(positions, kMlaChunk), MlaWidths(args).words());
}

// For tests: the values of stored weights by the decode that the kernels use, without scales.
std::vector<float> Decode(std::string_view codec_name, std::string_view isa_name, const PyBytes& bytes) {
  const Codec codec = Check(FindCodec(codec_name));
  const Isa* isa = Check(SelectIsa(isa_name));
  const auto size = static_cast<int64_t>(bytes.size());
  if (size % codec.WeightBytes(1, kBlock) != 0) {
    Check(Fail("bytes: expected a multiple of ", kBlock, " weights, got ", size, " bytes"));
  }
  std::vector<float> values(static_cast<size_t>(size * 8 / codec.bits_per_weight));
  isa->For(codec.id).decode(bytes.data(), std::ssize(values), values.data());
  return values;
}

std::vector<std::string> CodecNames() {
  std::vector<std::string> names;
  for (const Codec& codec : AllCodecs()) names.emplace_back(codec.name);
  return names;
}

template <typename T>
using PyMatrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// For benchmarks: layer 0 of the store by the loop that the kernels are measured against.
void RunNaiveExperts(PyExpertStore& store, const PyMatrix<const float>& hidden,
                     const PyMatrix<const int32_t>& ids, const PyMatrix<const float>& weights,
                     const PyMatrix<float>& out) {
  const size_t tokens = hidden.shape(0), width = static_cast<size_t>(store.store().shape().hidden);
  const auto expect = [](const char* name, const auto& array, size_t rows, size_t cols) {
    if (array.shape(0) == rows && array.shape(1) == cols) return;
    Check(Fail(name, ": expected shape [", rows, ", ", cols, "], got [", array.shape(0), ", ", array.shape(1),
               "]"));
  };
  expect("hidden", hidden, tokens, width);
  expect("ids", ids, tokens, ids.shape(1));
  expect("weights", weights, tokens, ids.shape(1));
  expect("out", out, tokens, width);
  const Routing routing{ids.data(), weights.data(), static_cast<int64_t>(tokens),
                        static_cast<int64_t>(ids.shape(1))};
  const nb::gil_scoped_release unlocked;
  Check(NaiveExperts(store.store(), 0, hidden.data(), routing, out.data()));
}

nb::dict Stats(PyExpertStore& self) {
  const StoreStats stats = self.store().stats();
  nb::dict result;
  result["calls"] = stats.calls;
  result["bytes"] = stats.bytes;
  result["seconds"] = stats.seconds;
  return result;
}

// `asked` is null for "auto".
int NumThreads(std::optional<int> asked, std::string_view topology) {
  return Check(ResolveNumThreads(Check(FindTopology(topology)), asked));
}

void BindThreadPool(nb::module_& m) {
  m.def("resolve_num_threads", &NumThreads, "asked"_a.none(), "topology"_a);
  nb::class_<PyThreadPool>(m, "ThreadPool")
      .def(nb::init<int, std::string_view, std::string_view>(), "num_threads"_a, "isa"_a, "topology"_a)
      .def_prop_ro("id", &PyThreadPool::id)
      .def_prop_ro("isa", [](const PyThreadPool& self) { return self.compute()->isa.name; })
      .def_prop_ro("num_threads",
                   [](const PyThreadPool& self) { return self.compute()->pool->num_threads(); })
      .def_prop_ro("num_nodes", [](const PyThreadPool& self) { return self.compute()->pool->num_nodes(); })
      .def("close", &PyThreadPool::Close);
}

void BindGpuDriver(nb::module_& m) {
  const auto init = [](PyGpuDriver* self, const std::string& library) {
    new (self) PyGpuDriver{Check(GpuDriver::Open(library))};
  };
  nb::class_<PyGpuDriver>(m, "GpuDriver").def("__init__", init, "library"_a = kGpuDriverLibrary);
  nb::class_<PyPinnedBuffer>(m, "PinnedBuffer")
      .def(nb::init<int64_t, const PyGpuDriver&>(), "num_bytes"_a, "driver"_a)
      .def("for_host", &PyPinnedBuffer::ForHost)
      .def("for_gpu", &PyPinnedBuffer::ForGpu, "device"_a);
}

void BindExpertStore(nb::module_& m) {
  nb::class_<PyMappedGuard>(m, "MappedGuard")
      .def(nb::init<PyBytes>(), "memory"_a.noconvert())
      .def_prop_ro("was_hit", &PyMappedGuard::was_hit);
  const auto init = [](PyExpertStore* self, const PyThreadPool& pool, std::string_view codec,
                       int64_t num_layers, int64_t num_experts, int64_t hidden, int64_t ffn,
                       std::string_view residency) {
    new (self) PyExpertStore(pool, codec, {num_layers, num_experts, hidden, ffn}, residency);
  };
  nb::class_<PyExpertStore>(m, "ExpertStore")
      .def("__init__", init, "pool"_a, "codec"_a, nb::kw_only(), "num_layers"_a, "num_experts"_a, "hidden"_a,
           "ffn"_a, "residency"_a = "mmap")
      .def("add", &PyExpertStore::Add, "layer"_a, "expert"_a, "matrix"_a, "weights"_a.noconvert(),
           "scales"_a.noconvert().none(), "scale_dtype"_a = "float32")
      .def("freeze", &PyExpertStore::Freeze)
      .def("pin_next", &PyExpertStore::PinNext, "driver"_a, "most_bytes"_a)
      .def("record", &PyExpertStore::Record, "layer"_a, "expert"_a, "device"_a)
      .def("copy_records", &PyExpertStore::CopyRecords, "layer"_a, "experts"_a.noconvert(),
           "out"_a.noconvert())
      .def_prop_ro("record_bytes", &PyExpertStore::RecordBytes)
      .def("close", &PyExpertStore::Close)
      .def_prop_ro("id", &PyExpertStore::id)
      .def_prop_ro("residency", [](PyExpertStore& self) { return ResidencyName(self.store().residency()); })
      .def_prop_ro("placement_refusal", [](PyExpertStore& self) { return self.store().placement_refusal(); })
      .def("stats", &Stats)
      .def("reset_stats", [](PyExpertStore& self) { self.store().ResetStats(); });
}

void BindExpertLane(nb::module_& m) {
  nb::class_<PyExpertLane>(m, "ExpertLane")
      .def(nb::init<PyExpertStore&, int, int64_t>(), "store"_a, "num_slots"_a, "patience_ms"_a)
      .def("submit", &PyExpertLane::Submit, "slot"_a, "layer"_a, "hidden"_a.noconvert(), "ids"_a.noconvert(),
           "weights"_a.noconvert())
      .def("wait", &PyExpertLane::Wait, "slot"_a, "ticket"_a, "out"_a.noconvert())
      .def("is_done", &PyExpertLane::IsDone, "slot"_a, "ticket"_a)
      .def("check", &PyExpertLane::CheckFailure)
      .def("jobs", &PyExpertLane::Jobs)
      .def_prop_ro("busy_s", &PyExpertLane::BusySeconds)
      .def_prop_ro("waited_s", &PyExpertLane::WaitedSeconds)
      .def("close", &PyExpertLane::Close)
      .def_prop_ro("id", &PyExpertLane::id);
}

}  // namespace
}  // namespace hmoe

NB_MODULE(_native, m) {
  using namespace hmoe;
  m.def("moe_experts", [] { return Capsule(kMoeExpertsHandler); });
  m.def("moe_experts_gpu", [] { return Capsule(kMoeExpertsGpuHandler); });
  m.def("experts_submit", [] { return Capsule(kExpertsSubmitHandler); });
  m.def("experts_wait", [] { return Capsule(kExpertsWaitHandler); });
  m.def("experts_submit_gpu", [] { return Capsule(kExpertsSubmitGpuHandler); });
  m.def("experts_wait_gpu", [] { return Capsule(kExpertsWaitGpuHandler); });
  m.def("in_order", [] { return Capsule(kInOrderHandler); });
  m.def("linear", [] { return Capsule(kLinearHandler); });
  m.def("rms_norm", [] { return Capsule(kRmsNormHandler); });
  m.def("mla_prefill", [] { return Capsule(kMlaPrefillHandler); });
  m.def("mla_attention", [] { return Capsule(kMlaAttentionHandler); });
  m.def("mla_expand", [] { return Capsule(kMlaExpandHandler); });
  m.def("mla_attend_expanded", [] { return Capsule(kMlaAttendExpandedHandler); });
  m.def("mla_expanded_shape", &ExpandedShape, "heads"_a, "nope"_a, "rope"_a, "value"_a, "positions"_a);
  m.def("isa_names", &OfferedIsaNames);
  m.def("all_isa_names", &AllIsaNames);
  m.def("codec_names", &CodecNames);
  m.def("cpu_name", &CpuName);
  m.def("read_bandwidth", &MeasureReads, "pool"_a, "megabytes"_a);
  m.def("dot_peak", &MeasureDots, "pool"_a);
  m.def("decode", &Decode, "codec"_a, "isa"_a, "bytes"_a.noconvert());
  m.def("naive_experts", &RunNaiveExperts, "store"_a, "hidden"_a.noconvert(), "ids"_a.noconvert(),
        "weights"_a.noconvert(), "out"_a.noconvert());
  BindThreadPool(m);
  BindGpuDriver(m);
  BindExpertStore(m);
  BindExpertLane(m);
}
