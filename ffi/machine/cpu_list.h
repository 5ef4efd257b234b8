// The kernel's notation for a set of CPUs: "0-3,8,10-11".
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"

namespace hmoe {

// In the order given, repetitions kept. Empty text is the empty list.
Result<std::vector<int>> ParseCpuList(std::string_view text);

std::string CpuListText(const std::vector<int>& cpus);

}  // namespace hmoe
