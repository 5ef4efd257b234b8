// What a function that can be refused returns: a value, or one sentence for the caller.
#pragma once

#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <variant>

namespace hmoe {

struct Error {
  std::string message;
};

// Builds a text from its parts: Text("layer ", 3).
template <typename... Parts>
std::string Text(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Builds the sentence from its parts: Fail("expected ", 3, " rows, got ", rows).
template <typename... Parts>
Error Fail(const Parts&... parts) {
  return Error{Text(parts...)};
}

// Exceptions do not cross the XLA border, so errors are values from the start. std::expected is C++23.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : held_(std::in_place_index<0>, std::move(value)) {}
  Result(Error error) : held_(std::in_place_index<1>, std::move(error)) {}

  bool ok() const { return held_.index() == 0; }
  T& value() & { return std::get<0>(held_); }
  T&& value() && { return std::get<0>(std::move(held_)); }
  const T& value() const& { return std::get<0>(held_); }
  const Error& error() const { return std::get<1>(held_); }

 private:
  std::variant<T, Error> held_;
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Error error) : error_(std::move(error)) {}

  bool ok() const { return !error_.has_value(); }
  const Error& error() const { return *error_; }

 private:
  std::optional<Error> error_;
};

}  // namespace hmoe
