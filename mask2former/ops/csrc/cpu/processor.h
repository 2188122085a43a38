// Which kernels this processor runs.
#pragma once

#include <ATen/Version.h>

#include <string>

namespace mask2former {

// The instructions that PyTorch's own kernels use, which ATEN_CPU_CAPABILITY may limit: "AVX2", "AVX512" or others.
inline const std::string& capability() {
  static const std::string name = at::get_cpu_capability();
  return name;
}

// Whether there are vectors with fused multiply-add; without, some kernels would be slower than PyTorch's.
inline bool has_wide_vectors() { return capability() == "AVX2" || capability() == "AVX512"; }

}  // namespace mask2former
