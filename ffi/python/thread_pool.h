// The thread pool as Python names it; the registry owns it.
#pragma once

#include <memory>
#include <string_view>

#include <nanobind/nanobind.h>

#include "python/check.h"
#include "store/registry.h"

namespace hmoe {

class PyThreadPool {
 public:
  PyThreadPool(int num_threads, std::string_view isa, std::string_view topology)
      : id_(Pools().Add(Check(Compute::Create(num_threads, isa, Check(FindTopology(topology)))))) {}
  ~PyThreadPool() { Close(); }
  PyThreadPool(const PyThreadPool&) = delete;
  PyThreadPool& operator=(const PyThreadPool&) = delete;

  // The threads end when the last store that uses them is gone too.
  void Close() {
    const nanobind::gil_scoped_release unlocked;
    Pools().Remove(id_);
  }

  int64_t id() const { return id_; }

  // Raises when the pool is closed.
  std::shared_ptr<Compute> compute() const { return Check(Pools().Find(id_)); }

 private:
  const int64_t id_;
};

}  // namespace hmoe
