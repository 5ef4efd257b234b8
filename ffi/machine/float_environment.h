// The rounding and denormal modes that a result may depend on.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace hmoe {

// The default floating-point environment. XLA's threads flush denormals and new threads inherit that: without
// this the bits of a result would depend on which thread computed it.
class DefaultFloatEnvironment {
 public:
#if defined(__SSE__)
  DefaultFloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatEnvironment() { _mm_setcsr(saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  unsigned saved_;
#else
  DefaultFloatEnvironment() {}
#endif
};

}  // namespace hmoe
