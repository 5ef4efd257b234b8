// Who computes: the threads, and the instruction set that they use.
#pragma once

#include <memory>
#include <string_view>
#include <utility>

#include "kernels/isa.h"
#include "machine/pool.h"

namespace hmoe {

struct Compute {
  static Result<std::shared_ptr<Compute>> Create(int num_threads, std::string_view isa_name,
                                                 const Topology& topology = DetectTopology()) {
    const auto isa = SelectIsa(isa_name);
    if (!isa.ok()) return isa.error();
    auto pool = ThreadPool::Create(num_threads, topology);
    if (!pool.ok()) return pool.error();
    return std::make_shared<Compute>(Compute{std::move(pool).value(), *isa.value()});
  }

  std::unique_ptr<ThreadPool> pool;
  const Isa& isa;
};

}  // namespace hmoe
