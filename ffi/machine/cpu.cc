#include "machine/cpu.h"

#include <unistd.h>

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

namespace hmoe {

#if defined(__x86_64__)
namespace {

struct Leaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf ReadLeaf(uint32_t leaf, uint32_t subleaf) {
  Leaf read;
  if (__get_cpuid_max(leaf & 0x80000000u, nullptr) < leaf) return read;
  __cpuid_count(leaf, subleaf, read.eax, read.ebx, read.ecx, read.edx);
  return read;
}

bool Bit(uint32_t word, int bit) { return (word >> bit) & 1; }

// The register states that the operating system saves. A processor may have AVX-512 under a kernel that does
// not save its registers, and then using it corrupts other programs or faults.
uint64_t SavedStates(const Leaf& leaf1) {
  if (!Bit(leaf1.ecx, 27)) return 0;  // OSXSAVE
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

constexpr int kTileData = 18;  // a component of a thread's saved state

bool KernelKnowsTiles() {                // Linux 5.16
  constexpr int kGetSupported = 0x1021;  // ARCH_GET_XCOMP_SUPP
  uint64_t supported = 0;
  return syscall(SYS_arch_prctl, kGetSupported, &supported) == 0 && (supported >> kTileData & 1) != 0;
}

}  // namespace

CpuFeatures DetectCpu() {
  const Leaf leaf1 = ReadLeaf(1, 0), leaf7 = ReadLeaf(7, 0), leaf7_1 = ReadLeaf(7, 1);
  const uint64_t saved = SavedStates(leaf1);
  const bool saves_ymm = (saved & 0x06) == 0x06;  // SSE and upper halves of YMM
  const bool saves_zmm = (saved & 0xe6) == 0xe6;  // and masks, upper halves of ZMM, ZMM16-31

  CpuFeatures features;
  features.avx2 =
      saves_ymm && Bit(leaf1.ecx, 12) && Bit(leaf1.ecx, 28) && Bit(leaf1.ecx, 29) && Bit(leaf7.ebx, 5);
  features.avx512 = features.avx2 && saves_zmm && Bit(leaf7.ebx, 16) && Bit(leaf7.ebx, 17) &&
                    Bit(leaf7.ebx, 30) && Bit(leaf7.ebx, 31);
  features.avx512_bf16 = features.avx512 && Bit(leaf7.ecx, 1) && Bit(leaf7.ecx, 8) && Bit(leaf7_1.eax, 5);
  const bool saves_tiles = (saved >> 17 & 3) == 3;
  features.amx_bf16 =
      features.avx512_bf16 && saves_tiles && Bit(leaf7.edx, 22) && Bit(leaf7.edx, 24) && KernelKnowsTiles();
  return features;
}

bool AskForTiles() {
  constexpr int kRequest = 0x1023;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

std::string CpuName() {
  char name[49] = {};
  for (uint32_t i = 0; i < 3; ++i) {
    const Leaf part = ReadLeaf(0x80000002u + i, 0);
    std::memcpy(name + 16 * i, &part, sizeof part);
  }
  std::string text(name);
  text.erase(0, text.find_first_not_of(' '));
  text.erase(text.find_last_not_of(' ') + 1);
  return text.empty() ? "unknown processor" : text;
}

#else

CpuFeatures DetectCpu() { return {}; }
bool AskForTiles() { return false; }
std::string CpuName() { return "unknown processor"; }

#endif

int64_t SecondCacheBytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  if (const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE); bytes > 0) return bytes;
#endif
  return int64_t{1} << 20;
}

}  // namespace hmoe
