// The innermost loop of products of float32 matrices, on the vectors of kernel.h and points_kernel.h, which are included
// before. It keeps kTileRows x kTileColumns sums in registers, and reads kTileColumns numbers of the second matrix, which
// are packed side by side, and one number of each row of the first a step.

namespace mask2former::cpu {
namespace {

using F = Vec<float>;
constexpr int64_t kTileRows = 6;
constexpr int64_t kTileColumns = 2 * kLanes;

// sum (R, kTileColumns) = a (R, depth) b (depth, kTileColumns).
template <int R>
inline void tile_sums(const float* a, int64_t a_step, const float* b, int64_t depth, F (&sum)[R][2]) {
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < 2; ++j) sum[i][j] = F{};
  for (int64_t k = 0; k < depth; ++k) {
    const F left = load(b + k * kTileColumns), right = load(b + k * kTileColumns + kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const float x = a[i * a_step + k];
      sum[i][0] += x * left;
      sum[i][1] += x * right;
    }
  }
}

}  // namespace
}  // namespace mask2former::cpu
