// The thread pool as Python owns it.
#pragma once

#include <memory>
#include <string_view>

#include <nanobind/nanobind.h>

#include "python/check.h"
#include "store/registry.h"

namespace hmoe {

class PyThreadPool {
 public:
  PyThreadPool(int num_threads, std::string_view isa) {
    if (num_threads < 1) Check(Fail("num_threads: expected at least 1, got ", num_threads));
    compute_ = std::make_shared<Compute>(num_threads, *Check(SelectIsa(isa)));
    id_ = Pools().Add(compute_);
  }
  ~PyThreadPool() { Close(); }
  PyThreadPool(const PyThreadPool&) = delete;
  PyThreadPool& operator=(const PyThreadPool&) = delete;

  // The threads end when the last store that uses them is gone too.
  void Close() {
    const nanobind::gil_scoped_release unlocked;
    Pools().Remove(id_);
    compute_.reset();
  }

  int64_t id() const { return id_; }

  // Raises when the pool is closed.
  std::shared_ptr<Compute> compute() const { return Check(Pools().Find(id_)); }

 private:
  std::shared_ptr<Compute> compute_;
  int64_t id_ = 0;
};

}  // namespace hmoe
