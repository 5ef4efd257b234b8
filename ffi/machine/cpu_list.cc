#include "machine/cpu_list.h"

#include <charconv>
#include <system_error>

namespace hmoe {
namespace {

// The most that Linux can be built for; keeps a slip like "0-9999999999" from filling the memory.
constexpr int kMaxCpus = 8192;

// Takes a number from the front of `text`; -1 where there is none.
int TakeNumber(std::string_view& text) {
  int number = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || number < 0 || number >= kMaxCpus) return -1;
  text.remove_prefix(static_cast<size_t>(end - text.data()));
  return number;
}

bool TakeCharacter(std::string_view& text, char wanted) {
  if (text.empty() || text.front() != wanted) return false;
  text.remove_prefix(1);
  return true;
}

}  // namespace

Result<std::vector<int>> ParseCpuList(std::string_view text) {
  std::vector<int> cpus;
  std::string_view rest = text;
  while (!rest.empty()) {
    const int first = TakeNumber(rest);
    const int last = TakeCharacter(rest, '-') ? TakeNumber(rest) : first;
    const bool more = TakeCharacter(rest, ',');
    if (first < 0 || last < first || more == rest.empty()) {
      return Fail("expected CPUs below ", kMaxCpus, " like \"0-3,8\", got \"", text, "\"");
    }
    for (int cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
  }
  return cpus;
}

std::string CpuListText(const std::vector<int>& cpus) {
  std::string text;
  for (size_t i = 0; i < cpus.size();) {
    size_t last = i;
    while (last + 1 < cpus.size() && cpus[last + 1] == cpus[last] + 1) ++last;
    if (i > 0) text += ',';
    text += std::to_string(cpus[i]);
    if (last > i) text += '-' + std::to_string(cpus[last]);
    i = last + 1;
  }
  return text;
}

}  // namespace hmoe
