// All that the C++ tests need: CHECK prints what failed and goes on, and main returns how many did.
#pragma once

#include <iostream>
#include <string>

namespace hmoe::test {

inline int failures = 0;

template <typename A, typename B>
void CheckEqual(const char* file, int line, const char* text, const A& actual, const B& expected) {
  if (actual == expected) return;
  ++failures;
  std::cerr << file << ':' << line << ": " << text << ": got " << actual << ", expected " << expected << '\n';
}

inline void CheckContains(const char* file, int line, const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return;
  ++failures;
  std::cerr << file << ':' << line << ": \"" << text << "\" does not contain \"" << part << "\"\n";
}

}  // namespace hmoe::test

#define CHECK_EQ(actual, expected) ::hmoe::test::CheckEqual(__FILE__, __LINE__, #actual, actual, expected)
#define CHECK(condition) CHECK_EQ(static_cast<bool>(condition), true)
#define CHECK_CONTAINS(text, part) ::hmoe::test::CheckContains(__FILE__, __LINE__, text, part)
