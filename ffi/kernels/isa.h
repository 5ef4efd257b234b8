// The choice of instruction set at start: the best one that this machine offers, or the one asked for by
// name.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "codec/codec.h"
#include "kernels/mla/table.h"
#include "kernels/table.h"

namespace hmoe {

struct Isa {
  const char* name;
  const IsaKernels* kernels;
  const MlaKernels* mla;

  const CodecKernels& For(CodecId codec) const { return kernels->codec[static_cast<int>(codec)]; }
};

// Every name that SelectIsa knows, and those that this machine offers; both best first.
std::vector<std::string> AllIsaNames();
std::vector<std::string> OfferedIsaNames();

// "auto" takes the best. The returned pointer lives as long as the program.
Result<const Isa*> SelectIsa(std::string_view name);

}  // namespace hmoe
