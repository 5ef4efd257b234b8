// The Python module hmoe_jax.kernels._native.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "kernels/isa.h"
#include "kernels/read_bandwidth.h"
#include "machine/cpu.h"
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

// For tests: the values of stored weights by the decode that the kernels use, without scales.
std::vector<float> Decode(std::string_view codec_name, std::string_view isa_name, const PyBytes& bytes) {
  const Codec codec = Check(FindCodec(codec_name));
  const Isa* isa = Check(SelectIsa(isa_name));
  const auto size = static_cast<int64_t>(bytes.size());
  if (size % (kBlock * codec.bytes_per_weight) != 0) {
    Check(Fail("bytes: expected a multiple of ", kBlock, " weights, got ", size, " bytes"));
  }
  std::vector<float> values(static_cast<size_t>(size / codec.bytes_per_weight));
  isa->For(codec.id).decode(bytes.data(), std::ssize(values), values.data());
  return values;
}

nb::dict Stats(PyExpertStore& self) {
  const StoreStats stats = self.store().stats();
  nb::dict result;
  result["calls"] = stats.calls;
  result["bytes"] = stats.bytes;
  result["seconds"] = stats.seconds;
  return result;
}

void BindThreadPool(nb::module_& m) {
  nb::class_<PyThreadPool>(m, "ThreadPool")
      .def(nb::init<int, std::string_view>(), "num_threads"_a, "isa"_a)
      .def_prop_ro("id", &PyThreadPool::id)
      .def_prop_ro("isa", [](const PyThreadPool& self) { return self.compute()->isa.name; })
      .def_prop_ro("num_threads",
                   [](const PyThreadPool& self) { return self.compute()->pool->num_threads(); })
      .def("close", &PyThreadPool::Close);
}

void BindExpertStore(nb::module_& m) {
  const auto init = [](PyExpertStore* self, const PyThreadPool& pool, std::string_view codec,
                       int64_t num_layers, int64_t num_experts, int64_t hidden, int64_t ffn) {
    new (self) PyExpertStore(pool, codec, {num_layers, num_experts, hidden, ffn});
  };
  nb::class_<PyExpertStore>(m, "ExpertStore")
      .def("__init__", init, "pool"_a, "codec"_a, nb::kw_only(), "num_layers"_a, "num_experts"_a, "hidden"_a,
           "ffn"_a)
      .def("add", &PyExpertStore::Add, "layer"_a, "expert"_a, "matrix"_a, "weights"_a.noconvert(),
           "scales"_a.noconvert().none())
      .def("freeze", &PyExpertStore::Freeze)
      .def("close", &PyExpertStore::Close)
      .def_prop_ro("id", &PyExpertStore::id)
      .def("stats", &Stats)
      .def("reset_stats", [](PyExpertStore& self) { self.store().ResetStats(); });
}

}  // namespace
}  // namespace hmoe

NB_MODULE(_native, m) {
  using namespace hmoe;
  m.def("moe_experts", [] { return Capsule(kMoeExpertsHandler); });
  m.def("linear", [] { return Capsule(kLinearHandler); });
  m.def("mla_prefill", [] { return Capsule(kMlaPrefillHandler); });
  m.def("mla_attention", [] { return Capsule(kMlaAttentionHandler); });
  m.def("isa_names", &OfferedIsaNames);
  m.def("all_isa_names", &AllIsaNames);
  m.def("cpu_name", &CpuName);
  m.def("read_bandwidth", &MeasureReads, "pool"_a, "megabytes"_a);
  m.def("decode", &Decode, "codec"_a, "isa"_a, "bytes"_a.noconvert());
  BindThreadPool(m);
  BindExpertStore(m);
}
