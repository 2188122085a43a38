// A file of its own, as the header that it includes takes seconds to compile.
#include "processor.h"

#include <ATen/Version.h>

namespace mask2former {

const std::string& capability() {
  static const std::string name = at::get_cpu_capability();
  return name;
}

bool has_wide_vectors() { return capability() == "AVX2" || capability() == "AVX512"; }

}  // namespace mask2former
