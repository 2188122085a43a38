// Which kernels this processor runs.
#pragma once

#include <string>

namespace mask2former {

// The instructions that PyTorch's own kernels use, which ATEN_CPU_CAPABILITY may limit: "AVX2", "AVX512" or others.
const std::string& capability();

// Whether there are vectors with fused multiply-add; without, some kernels would be slower than PyTorch's.
bool has_wide_vectors();

}  // namespace mask2former
