#include "kernels/packed.h"

#include <memory>
#include <new>

namespace hmoe {

uint8_t* Workspace() {
  constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(uint8_t* memory) const { ::operator delete(memory, kAlign); }
  };
  thread_local const std::unique_ptr<uint8_t, Free> memory(
      static_cast<uint8_t*>(::operator new(kWorkspaceBytes, kAlign)));
  return memory.get();
}

}  // namespace hmoe
