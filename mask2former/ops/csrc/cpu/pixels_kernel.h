// Loops over pixels, on what kernel.h, points_kernel.h and tile_kernel.h have, which are included before.

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

constexpr int64_t kFewPixels = 64;  // in registers and the first cache

// Of up to kFewPixels pixels, see `largest`.
template <typename Place>
void largest_of_few(const float* scores, int64_t count, int64_t step, int64_t size, float* values, Place* places) {
  float best[kFewPixels];
  int32_t place[kFewPixels] = {}, is_none[kFewPixels] = {};
  std::memcpy(best, scores, size * sizeof(float));
  for (int64_t n = 0; n < count; ++n) {
    const float* row = scores + n * step;
    for (int64_t i = 0; i < size; ++i) {
      const float score = row[i];
      place[i] = score > best[i] ? static_cast<int32_t>(n) : place[i];
      is_none[i] |= score != score;
      best[i] = score > best[i] ? score : best[i];
    }
  }
  for (int64_t i = 0; i < size; ++i) {
    if (values != nullptr) values[i] = is_none[i] ? __builtin_nanf("") : best[i];
    places[i] = static_cast<Place>(is_none[i] ? count - 1 : place[i]);
  }
}

void largest(const float* scores, int64_t count, int64_t step, int64_t begin, int64_t end, float* values,
             int64_t* places) {
  for (int64_t at = begin; at < end; at += kFewPixels)
    largest_of_few(scores + at, count, step, end - at < kFewPixels ? end - at : kFewPixels, values + at, places + at);
}

// ---- class scores

inline int64_t class_rows(const ClassScores& p) { return (p.K + kClassRows - 1) / kClassRows * kClassRows; }

int64_t class_scratch(const ClassScores& p) { return kClassPixels * (p.Q + class_rows(p)); }

// Mask probabilities of a task's pixels: panels of kTileColumns pixels, in each query by query. Zeros behind the last pixel.
inline void probabilities(const ClassScores& p, int64_t first, int64_t size, float* to) {
  F factor;
  for (int64_t j = 0; j < kClassPixels; j += kLanes) {
    float* panel = to + j / kTileColumns * kTileColumns * p.Q + j % kTileColumns;
    const int64_t count = size - j < kLanes ? size - j : kLanes;
    for (int64_t q = 0; q < p.Q; ++q) {
      const float* from = p.logits + q * p.step + first + j;
      F probability = {};
      if (count == kLanes)
        probability = sigmoid_of(load(from), factor);
      else if (count > 0)
        probability = sigmoid_of(load_some(from, count), factor);
      store(panel + q * kTileColumns, probability);
    }
  }
}

void class_scores(const ClassScores& p, int64_t begin, int64_t end, float* scratch) {
  static_assert(kClassRows == kTileRows && kClassPixels % kTileColumns == 0 && kClassPixels <= kFewPixels);
  float* sums = scratch + kClassPixels * p.Q;  // (classes, kClassPixels)
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * kClassPixels;
    const int64_t size = p.pixels - first < kClassPixels ? p.pixels - first : kClassPixels;
    probabilities(p, first, size, scratch);
    for (int64_t j = 0; j < kClassPixels; j += kTileColumns)
      for (int64_t k = 0; k < p.K; k += kTileRows) {
        F sum[kTileRows][2];
        tile_sums<kTileRows>(p.probability + k * p.Q, p.Q, scratch + j * p.Q, p.Q, sum);
        for (int i = 0; i < kTileRows; ++i)
          for (int half = 0; half < 2; ++half)
            store(sums + (k + i) * kClassPixels + j + half * kLanes, sum[i][half]);
      }
    if (p.scores != nullptr)
      for (int64_t k = 0; k < p.K; ++k)
        std::memcpy(p.scores + k * p.pixels + first, sums + k * kClassPixels, size * sizeof(float));
    if (p.labels != nullptr) largest_of_few<int32_t>(sums, p.K, kClassPixels, size, nullptr, p.labels + first);
  }
}

// ---- binary masks

void inside(const Inside& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    uint8_t* columns = p.columns + n * p.width;
    std::memset(columns, 0, p.width);
    double sum = 0;
    int64_t area = 0;
    int32_t is_none = 0;
    for (int64_t y = 0; y < p.height; ++y) {
      const float* logits = p.logits + (n * p.height + y) * p.width;
      uint8_t* mask = p.masks + (n * p.height + y) * p.width;
      int32_t in_row = 0;
      for (int64_t x = 0; x < p.width; ++x) {
        mask[x] = logits[x] > 0.0f;
        columns[x] |= mask[x];
        in_row += mask[x];
        is_none |= logits[x] != logits[x];
      }
      p.rows[n * p.height + y] = in_row > 0;
      area += in_row;
      if (in_row == 0) continue;
      F total = {}, factor;
      int64_t x = 0;
      for (; x + kLanes <= p.width; x += kLanes) {
        const F logit = load(logits + x);
        total += logit > 0.0f ? sigmoid_of(logit, factor) : F{};
      }
      if (x < p.width) {
        const F logit = load_some(logits + x, p.width - x);
        total += logit > 0.0f ? sigmoid_of(logit, factor) : F{};
      }
      sum += sum_lanes<float>(total);
    }
    p.areas[n] = area;
    p.sums[n] = is_none ? __builtin_nanf("") : static_cast<float>(sum);
  }
}

}  // namespace

PixelKernels MASK2FORMER_PIXEL_KERNELS() { return {blend_scratch, blend, largest, class_scratch, class_scores, inside}; }

}  // namespace mask2former::cpu
