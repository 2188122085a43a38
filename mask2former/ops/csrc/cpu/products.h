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

// Normalisation of rows; none if `weight` is null.
struct LayerNorm {
  const float *weight, *bias;
  float eps;
};

// The rows of a product, and what is made of each before it.
struct Rows {
  RowPlaces places;
  int64_t count, size;
  const float* added;  // (period, size), to row r the row r % period, or null
  int64_t period;
  LayerNorm norm;
};

// What is made of the sums of a product: sums * scale + bias, activation, + residual, normalisation. Each pointer may be
// null. The rows of `out` and `residual` are `step` numbers apart; columns n lie at n / head * head_step + n % head.
struct Output {
  const float *scale, *bias, *residual;
  float* out;
  int64_t step, head, head_step;
  Activation activation;
  LayerNorm norm;  // only if head is N
};

// Rows x of K numbers times N rows of K weights. `weight` is packed for the function `linear`, and as it is, (N, K), for
// `few_rows`.
struct Linear {
  Rows x;
  int64_t N;
  const float* weight;
  Output output;
};

// Two linear maps, with F numbers a row in between, which never leave the cache.
struct FeedForward {
  Rows x;
  int64_t F, N;
  const float *weight1, *bias1, *weight2;
  Activation activation;  // of the numbers in between
  Output output;
};

// A convolution as a linear map of windows. The rows are the pixels of the output, (B, height, width), their numbers the
// channels of the window, each (rows, columns) side by side as in the weight; linear.x.places is not used.
struct Windows {
  Linear linear;
  const float* maps;                      // (B, source_height, source_width, channels)
  int64_t source_height, source_width, channels;
  int64_t height, width;                  // of the output
  int64_t rows, columns;                  // of the window
  int64_t down, right;                    // steps of the window
  int64_t above, left;                    // zeros around the maps
};

// 3x3 convolution, step 1, one pixel of zeros around the map; maps (B, height, width, channels).
struct Convolution3x3 {
  const float* x;
  int64_t B, height, width, K, N;
  const float* weight;  // transformed, and packed for each of its places
  const float *scale, *bias;  // (N) or null
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
  // Packs each panel where it is used, which pays for few rows. Tasks are panels.
  int64_t (*few_rows_scratch)(const Linear& problem);
  void (*few_rows)(const Linear& problem, int64_t begin, int64_t end, float* scratch);
  void (*windows)(const Windows& problem, int64_t begin, int64_t end, float* scratch);  // as `linear`
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
