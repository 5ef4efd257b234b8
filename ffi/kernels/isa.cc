#include "kernels/isa.h"

#include "machine/cpu.h"

namespace hmoe {
namespace {

struct Entry {
  Isa isa;
  bool (*offered)(const CpuFeatures&);
  bool (*prepare)() = [] { return true; };  // before its first use; false where the system refuses
};

// In order of preference. Where the compiler cannot build an ISA its row is absent, and its name is still
// known.
constexpr Entry kEntries[] = {
#if defined(__x86_64__)
    {{"amx", &kAmxKernels, &kAmxMla}, [](const CpuFeatures& cpu) { return cpu.amx_bf16; }, AskForTiles},
    {{"avx512_bf16", &kAvx512Bf16Kernels, &kAvx512Bf16Mla},
     [](const CpuFeatures& cpu) { return cpu.avx512_bf16; }},
    {{"avx512", &kAvx512Kernels, &kAvx512Mla}, [](const CpuFeatures& cpu) { return cpu.avx512; }},
    {{"avx2", &kAvx2Kernels, &kAvx2Mla}, [](const CpuFeatures& cpu) { return cpu.avx2; }},
#endif
    {{"scalar", &kScalarKernels, &kScalarMla}, [](const CpuFeatures&) { return true; }},
};
constexpr const char* kNames[] = {"amx", "avx512_bf16", "avx512", "avx2", "scalar"};

std::vector<const Entry*> Offered() {
  const CpuFeatures cpu = DetectCpu();
  std::vector<const Entry*> offered;
  for (const Entry& entry : kEntries) {
    if (entry.offered(cpu)) offered.push_back(&entry);
  }
  return offered;
}

std::string Join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

std::vector<std::string> AllIsaNames() { return {std::begin(kNames), std::end(kNames)}; }

std::vector<std::string> OfferedIsaNames() {
  std::vector<std::string> names;
  for (const Entry* entry : Offered()) names.emplace_back(entry->isa.name);
  return names;
}

Result<const Isa*> SelectIsa(std::string_view name) {
  for (const Entry* entry : Offered()) {
    if (name != "auto" && name != entry->isa.name) continue;
    if (entry->prepare()) return &entry->isa;
    if (name != "auto") return Fail("isa '", name, "': the system does not let this process use it");
  }
  for (const char* known : kNames) {
    if (name == known) {
      return Fail("isa '", name, "' is not available on this machine, which offers ",
                  Join(OfferedIsaNames()));
    }
  }
  return Fail("isa '", name, "' is unknown: expected auto, ", Join(AllIsaNames()));
}

}  // namespace hmoe
