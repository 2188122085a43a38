// What the CPU kernels of attention work on: plain data, for the reason that problem.h gives.
#pragma once

#include <cstdint>

namespace mask2former::cpu {

// Rows of C = heads * dim numbers side by side: row r of image b is at first + b * image + r * row.
struct AttentionRows {
  const float* first;
  int64_t image, row;  // steps in floats
};

struct Attention {
  AttentionRows q, k, v;
  int64_t B, Q, S, heads, dim;
  float scale;
  const bool* blocked;  // (B, Q, S) or null
  float* out;           // (B, Q, C)
  int64_t queries;      // of a task
};

// Attention inside of the windows of a map, which is padded behind its end to whole windows, and shifted cyclically.
struct WindowAttention {
  const float* qkv;      // (B, height, width, 3 * heads * dim)
  const float* padding;  // (3 * heads * dim), the qkv of a token that is not there
  const float* bias;     // (heads, side^2, side^2), added to the scores
  int64_t B, height, width, heads, dim, side, shift;
  float scale;
  float* out;  // (B, height, width, heads * dim)
};

// Each function does a range of its tasks; tasks write to different places, and no number depends on the range.
struct AttentionKernels {
  int64_t (*attention_scratch)(const Attention& problem);
  int64_t (*attention_tasks)(const Attention& problem);
  void (*attention)(const Attention& problem, int64_t begin, int64_t end, float* scratch);
  int64_t (*windows_scratch)(const WindowAttention& problem);
  int64_t (*windows_tasks)(const WindowAttention& problem);
  void (*windows)(const WindowAttention& problem, int64_t begin, int64_t end, float* scratch);
};

#if defined(__x86_64__)
AttentionKernels attention_kernels_avx2();
AttentionKernels attention_kernels_avx512();
#endif

}  // namespace mask2former::cpu
