// Loops over pixels that the compiler vectorises, on what kernel.h and points_kernel.h have, which are included before.

namespace mask2former::cpu {
namespace {

// first times its weight plus the rounded product of the other two: as F.interpolate rounds.
inline float blended(float first, float first_weight, float second, float second_weight) {
  const float product = second * second_weight;
  return __builtin_fmaf(first, first_weight, product);
}

int64_t blend_scratch(const Blend& p) { return p.height * p.columns.size; }

void blend(const Blend& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t W = p.columns.size;
  for (int64_t n = begin; n < end; ++n) {
    const float* map = p.maps + n * p.map_step;
    const float* source = map;
    int64_t step = p.row_step;
    if (p.columns.first != nullptr) {
      for (int64_t y = 0; y < p.height; ++y)
        for (int64_t x = 0; x < W; ++x)
          scratch[y * W + x] = blended(map[y * p.row_step + p.columns.first[x]], p.columns.first_weight[x],
                                       map[y * p.row_step + p.columns.second[x]], p.columns.second_weight[x]);
      source = scratch;
      step = W;
    }
    for (int64_t y = 0; y < p.rows.size; ++y) {
      float* __restrict out = p.out + (n * p.rows.size + y) * W;
      if (p.rows.first == nullptr) {
        std::memcpy(out, source + y * step, W * sizeof(float));
        continue;
      }
      const float *first = source + p.rows.first[y] * step, *second = source + p.rows.second[y] * step;
      const float first_weight = p.rows.first_weight[y], second_weight = p.rows.second_weight[y];
      for (int64_t x = 0; x < W; ++x) out[x] = blended(first[x], first_weight, second[x], second_weight);
    }
  }
}

void largest(const float* scores, int64_t count, int64_t step, int64_t begin, int64_t end, float* values,
             int64_t* places) {
  constexpr int64_t kPixels = 64;  // at a time, in registers and the first cache
  for (int64_t start = begin; start < end; start += kPixels) {
    const int64_t size = end - start < kPixels ? end - start : kPixels;
    float best[kPixels];
    int32_t place[kPixels] = {}, is_none[kPixels] = {};
    std::memcpy(best, scores + start, size * sizeof(float));
    for (int64_t n = 0; n < count; ++n) {
      const float* row = scores + n * step + start;
      for (int64_t i = 0; i < size; ++i) {
        const float score = row[i];
        place[i] = score > best[i] ? static_cast<int32_t>(n) : place[i];
        is_none[i] |= score != score;
        best[i] = score > best[i] ? score : best[i];
      }
    }
    for (int64_t i = 0; i < size; ++i) {
      values[start + i] = is_none[i] ? __builtin_nanf("") : best[i];
      places[start + i] = is_none[i] ? count - 1 : place[i];
    }
  }
}

}  // namespace

PixelKernels MASK2FORMER_PIXEL_KERNELS() { return {blend_scratch, blend, largest}; }

}  // namespace mask2former::cpu
