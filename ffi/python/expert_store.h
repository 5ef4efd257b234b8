// The expert store as Python owns it: the core's store, and references to the arrays that it points into, if
// it does.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "python/check.h"
#include "python/thread_pool.h"
#include "store/registry.h"

namespace hmoe {

using PyBytes =
    nanobind::ndarray<const uint8_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

using PyIds = nanobind::ndarray<const int32_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
using PyRecords = nanobind::ndarray<uint8_t, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;

// One row of bytes.
template <typename Framework, typename Device>
using PyRow = nanobind::ndarray<Framework, uint8_t, nanobind::ndim<2>, Device>;
using PyRowForHost = PyRow<nanobind::numpy, nanobind::device::cpu>;
// Has __dlpack__. It would be read-only, but JAX asks for a version of DLPack that cannot say so.
using PyRowForGpu = PyRow<nanobind::array_api, nanobind::device::cuda_host>;

// Kept by `owner`; for a GPU by its number.
template <typename Framework, typename Device>
PyRow<Framework, Device> RowOf(std::shared_ptr<const void> owner, std::span<const uint8_t> bytes,
                               int device = 0) {
  using Owner = std::shared_ptr<const void>;
  const nanobind::capsule kept(new Owner(std::move(owner)),
                               [](void* held) noexcept { delete static_cast<Owner*>(held); });
  const std::array<size_t, 2> shape = {1, bytes.size()};
  return PyRow<Framework, Device>(const_cast<uint8_t*>(bytes.data()), shape.size(), shape.data(), kept,
                                  nullptr, nanobind::dtype<uint8_t>(), Device::value, device);
}

// The driver as Python names it: what C++ keeps of it are no references to Python's object.
struct PyGpuDriver {
  std::shared_ptr<const GpuDriver> driver;
};

// Memory on the way from a store that is not pinned to a GPU.
class PyPinnedBuffer {
 public:
  PyPinnedBuffer(int64_t num_bytes, const PyGpuDriver& gpu)
      : num_bytes_(static_cast<size_t>(num_bytes)),
        memory_(std::make_shared<Memory>(num_bytes, gpu.driver)) {}

  PyRowForHost ForHost() const { return RowOf<nanobind::numpy, nanobind::device::cpu>(memory_, bytes()); }
  PyRowForGpu ForGpu(int device) const {
    return RowOf<nanobind::array_api, nanobind::device::cuda_host>(memory_, bytes(), device);
  }

 private:
  struct Memory {
    Memory(int64_t num_bytes, const std::shared_ptr<const GpuDriver>& driver)
        : pages(Check(Pages::Allocate(num_bytes))),
          pinned(Check(PinnedMemory::Create(driver, pages.bytes()))) {}
    Pages pages;
    PinnedMemory pinned;  // goes first
  };

  std::span<const uint8_t> bytes() const { return memory_->pages.bytes().first(num_bytes_); }

  const size_t num_bytes_;
  const std::shared_ptr<Memory> memory_;
};

// Guards an array's memory, and keeps the array.
class PyMappedGuard {
 public:
  explicit PyMappedGuard(PyBytes memory)
      : memory_(std::move(memory)), guard_(std::span(memory_.data(), memory_.size())) {}
  bool was_hit() const { return guard_.was_hit(); }

 private:
  PyBytes memory_;
  MappedGuard guard_;  // goes first
};

class PyExpertStore {
 public:
  PyExpertStore(const PyThreadPool& pool, std::string_view codec, const StoreShape& shape,
                std::string_view residency)
      : PyExpertStore(pool.compute(), codec, shape, residency) {}
  ~PyExpertStore() { Close(); }
  PyExpertStore(const PyExpertStore&) = delete;
  PyExpertStore& operator=(const PyExpertStore&) = delete;

  void Add(int64_t layer, int64_t expert, std::string_view matrix, PyBytes weights,
           std::optional<PyBytes> scales, std::string_view scale_dtype) {
    const auto span = [](const PyBytes& bytes) { return std::span(bytes.data(), bytes.size()); };
    const MatrixName name = Check(FindMatrixName(matrix));
    const ScaleType scale_type = Check(FindScaleType(scale_dtype));
    const auto scale_bytes = scales ? span(*scales) : std::span<const uint8_t>();
    const Status added = [&] {
      const nanobind::gil_scoped_release unlocked;  // it may copy the weights
      return store_->Add(layer, expert, name, span(weights), scale_bytes, scale_type);
    }();
    Check(added);
    if (store_->residency() != Residency::kMmap) return;
    held_.push_back(std::move(weights));
    if (scales) held_.push_back(std::move(*scales));
  }

  void Freeze() { Check(store_->Freeze()); }

  int64_t PinNext(const PyGpuDriver& gpu, int64_t most_bytes) {
    auto pinned = [&] {
      const nanobind::gil_scoped_release unlocked;
      return store_->PinNext(gpu.driver, most_bytes);
    }();
    return Check(std::move(pinned));
  }

  // [1, RecordBytes] of the store's own memory. It stays while the result lives, whenever the store is
  // closed.
  PyRowForGpu Record(int64_t layer, int64_t expert, int device) const {
    const PinnedRecord record = Check(store_->Record(layer, expert));
    return RowOf<nanobind::array_api, nanobind::device::cuda_host>(record.owner, record.bytes, device);
  }

  int64_t RecordBytes() const { return Check(store_->RecordBytes()); }

  void CopyRecords(int64_t layer, const PyIds& experts, const PyRecords& out) const {
    const Status copied = [&] {
      const nanobind::gil_scoped_release unlocked;
      return store_->CopyRecords(layer, std::span(experts.data(), experts.size()),
                                 std::span(out.data(), out.size()));
    }();
    Check(copied);
  }

  // The arrays are let go only when no call reads them any more. They leave held_ in one step under the GIL:
  // their destructors run Python code, which may let another thread in, or close the store itself.
  void Close() {
    {
      const nanobind::gil_scoped_release unlocked;
      Stores().Remove(id_);
      store_->Close(Stores().Closed(id_));
    }
    const std::vector<PyBytes> released = std::exchange(held_, {});
  }

  int64_t id() const { return id_; }
  ExpertStore& store() { return *store_; }

 private:
  PyExpertStore(std::shared_ptr<Compute> compute, std::string_view codec, const StoreShape& shape,
                std::string_view residency)
      : store_(Check(ExpertStore::Create(compute, Check(FindCodec(codec)), shape,
                                         Check(FindResidency(residency, compute->pool->num_nodes()))))),
        id_(Stores().Add(store_)) {}

  std::shared_ptr<ExpertStore> store_;
  int64_t id_;
  std::vector<PyBytes> held_;
};

}  // namespace hmoe
