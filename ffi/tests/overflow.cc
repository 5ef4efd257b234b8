// Undefined on purpose: returns 0 unless the sanitizer ends it.

#include <limits>

int main(int argc, char**) {
  volatile int sum = std::numeric_limits<int>::max();
  sum = sum + argc;
  return 0;
}
