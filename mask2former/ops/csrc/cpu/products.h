// What the CPU kernels of products of float32 matrices work on: plain data, for the reason that problem.h gives.
#pragma once

#include <cstdint>

namespace mask2former::cpu {

// kReluOfSum comes after the residual, the others before.
enum class Activation : int64_t { kNone = 0, kRelu = 1, kGelu = 2, kReluOfSum = 3 };

// Rows that may lie anywhere: row r is at first + (r / (height * width)) * image + (r / width % height) * down + (r % width) * right.
struct RowPlaces {
  const float* first;
  int64_t height, width;       // of the grid that the rows are
  int64_t image, down, right;  // steps in floats
};

// out = activation(x w^T + bias) + residual, for M rows x of K numbers and N rows w. `weight` is packed.
struct Linear {
  RowPlaces x;
  int64_t M, K, N;
  const float* weight;
  const float* bias;      // (N) or null
  const float* residual;  // rows of `out_step` numbers, or null
  float* out;
  int64_t out_step;
  Activation activation;
};

// out = act(x w1^T + b1) w2^T + b2 + residual, with F numbers a row in between, which never leave the cache.
struct FeedForward {
  RowPlaces x;
  int64_t M, K, F, N;
  const float *weight1, *bias1, *weight2, *bias2;
  const float* residual;
  float* out;
  int64_t out_step;
  Activation activation;
};

// 3x3 convolution, step 1, one pixel of zeros around the map; maps (B, height, width, channels).
struct Convolution3x3 {
  const float* x;
  int64_t B, height, width, K, N;
  const float* weight;  // transformed, and packed for each of its places
  const float* bias;    // (N) or null
  float* out;
  bool relu;
};

// Each function does a range of its tasks; tasks write to different places, and no number depends on the range.
struct ProductKernels {
  // Packed weights: floats, and panels of rows of the weight, the tasks of `pack`.
  int64_t (*packed_floats)(int64_t N, int64_t K);
  int64_t (*panels)(int64_t N);
  void (*pack)(const float* weight, int64_t N, int64_t K, float* packed, int64_t begin, int64_t end);
  int64_t (*linear_scratch)(const Linear& problem);
  void (*linear)(const Linear& problem, int64_t begin, int64_t end, float* scratch);  // rows
  int64_t (*feed_forward_scratch)(const FeedForward& problem);
  void (*feed_forward)(const FeedForward& problem, int64_t begin, int64_t end, float* scratch);  // rows
  // Winograd's algorithm. Tasks of `transform` are panels; of `convolution` the blocks of tiles of all images.
  int64_t (*transformed_floats)(int64_t N, int64_t K);
  void (*transform)(const float* weight, int64_t N, int64_t K, float* transformed, int64_t begin, int64_t end);
  int64_t (*convolution_scratch)(const Convolution3x3& problem);
  int64_t (*convolution_blocks)(const Convolution3x3& problem);
  void (*convolution)(const Convolution3x3& problem, int64_t begin, int64_t end, float* scratch);
};

#if defined(__x86_64__)
ProductKernels product_kernels_avx2();
#endif

}  // namespace mask2former::cpu
