// A refusal by the core becomes a ValueError.
#pragma once

#include <utility>

#include <nanobind/nanobind.h>

#include "base/result.h"

namespace hmoe {

inline void Check(const Status& status) {
  if (!status.ok()) throw nanobind::value_error(status.error().message.c_str());
}

template <typename T>
T Check(Result<T> result) {
  if (!result.ok()) throw nanobind::value_error(result.error().message.c_str());
  return std::move(result).value();
}

}  // namespace hmoe
