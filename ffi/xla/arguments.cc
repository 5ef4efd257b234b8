#include "xla/arguments.h"

#include <algorithm>
#include <sstream>

namespace hmoe {
namespace {

std::string DtypeName(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::U8:
      return "uint8";
    case ffi::DataType::U16:
      return "uint16";
    case ffi::DataType::S32:
      return "int32";
    case ffi::DataType::S64:
      return "int64";
    case ffi::DataType::F16:
      return "float16";
    case ffi::DataType::BF16:
      return "bfloat16";
    case ffi::DataType::F32:
      return "float32";
    case ffi::DataType::F64:
      return "float64";
    case ffi::DataType::F8E4M3FN:
      return "float8_e4m3fn";
    default:
      return Text("dtype number ", static_cast<int>(dtype));
  }
}

std::string DtypeNames(std::initializer_list<ffi::DataType> dtypes) {
  std::string text;
  for (const ffi::DataType dtype : dtypes) text += (text.empty() ? "" : " or ") + DtypeName(dtype);
  return text;
}

template <typename Sizes>
std::string ShapeText(const Sizes& sizes) {
  std::ostringstream text;
  const char* comma = "";
  text << '[';
  for (const int64_t size : sizes) {
    text << comma;
    comma = ", ";
    if (size == kAnySize) {
      text << "any";
    } else {
      text << size;
    }
  }
  text << ']';
  return text.str();
}

}  // namespace

Status CheckArgument(const char* name, const ffi::AnyBuffer& buffer,
                     std::initializer_list<ffi::DataType> dtypes, std::initializer_list<int64_t> shape) {
  if (std::find(dtypes.begin(), dtypes.end(), buffer.element_type()) == dtypes.end()) {
    return Fail(name, ": expected dtype ", DtypeNames(dtypes), ", got ", DtypeName(buffer.element_type()));
  }
  const auto sizes = buffer.dimensions();
  const auto fits = [](int64_t size, int64_t expected) { return expected == kAnySize || size == expected; };
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end(), fits)) {
    return Fail(name, ": expected shape ", ShapeText(shape), ", got ", ShapeText(sizes));
  }
  return {};
}

ffi::Error ToXla(const Status& status) {
  return status.ok() ? ffi::Error::Success() : ffi::Error::InvalidArgument(status.error().message);
}

}  // namespace hmoe
