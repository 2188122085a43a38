// The CPU kernels of random points, in vectors of kernel.h, which is included before. Points go in blocks through arrays
// in the cache: places in loops that the compiler vectorises, then reads one by one, then arithmetic in vectors.

namespace mask2former::cpu {
namespace {

constexpr int64_t kBlock = 256;  // a multiple of all lanes, and fewer factors of up to 2 a lane than overflow a float
constexpr int kLanes = Vector<float>::lanes;

struct Block {
  alignas(64) float fx[kBlock], fy[kBlock];
  alignas(64) int32_t cell[kBlock], right[kBlock], below[kBlock], both[kBlock];
  alignas(64) float value[4][kBlock];
  alignas(64) float logit[kBlock], target[kBlock];
};

// ---- maps of logits, with a border of zeros, so that no place is outside

inline int64_t map_floats(int64_t height, int64_t width) { return (height + 2) * (width + 2); }

inline void pad_map(const float* map, int64_t height, int64_t width, float* padded) {
  const int64_t stride = width + 2;
  std::memset(padded, 0, stride * sizeof(float));
  for (int64_t i = 0; i < height; ++i) {
    float* row = padded + (i + 1) * stride;
    row[0] = row[stride - 1] = 0;
    std::memcpy(row + 1, map + i * width, width * sizeof(float));
  }
  std::memset(padded + (height + 1) * stride, 0, stride * sizeof(float));
}

inline float clamped(float x, float high) {
  x = x < -1.0f ? -1.0f : x;
  return x > high ? high : x;
}

// Cells of the padded map and fractions.
inline void locate(const float* points, int64_t count, int64_t height, int64_t width, Block& b) {
  const float w = static_cast<float>(width), h = static_cast<float>(height);
  const int32_t stride = static_cast<int32_t>(width) + 2;
  const int32_t last_column = static_cast<int32_t>(width), last_line = static_cast<int32_t>(height);
#pragma GCC ivdep
  for (int64_t k = 0; k < count; ++k) {
    const float x = clamped(points[2 * k] * w - 0.5f, w), y = clamped(points[2 * k + 1] * h - 0.5f, h);
    // not negative after adding 1, so that cutting off is rounding down
    int32_t column = static_cast<int32_t>(x + 1), line = static_cast<int32_t>(y + 1);
    column = column < last_column ? column : last_column;
    line = line < last_line ? line : last_line;
    b.fx[k] = x - static_cast<float>(column - 1);
    b.fy[k] = y - static_cast<float>(line - 1);
    b.cell[k] = line * stride + column;
  }
}

inline void read_logits(const float* padded, int64_t count, int64_t width, Block& b) {
  const float* below = padded + width + 2;
  for (int64_t k = 0; k < count; ++k) {
    const int32_t cell = b.cell[k];
    b.value[0][k] = padded[cell];
    b.value[1][k] = padded[cell + 1];
    b.value[2][k] = below[cell];
    b.value[3][k] = below[cell + 1];
  }
#pragma GCC ivdep
  for (int64_t k = 0; k < count; ++k) {
    const float upper = b.value[0][k] * (1 - b.fx[k]) + b.value[1][k] * b.fx[k];
    const float lower = b.value[2][k] * (1 - b.fx[k]) + b.value[3][k] * b.fx[k];
    b.logit[k] = upper * (1 - b.fy[k]) + lower * b.fy[k];
  }
}

// ---- binary masks, zero outside

inline void read_targets(const PointRow& row, const float* points, int64_t count, Block& b) {
  const float limit_x = static_cast<float>(row.mask_width), limit_y = static_cast<float>(row.mask_height);
  const int32_t width = static_cast<int32_t>(row.mask_width), height = static_cast<int32_t>(row.mask_height);
#pragma GCC ivdep
  for (int64_t k = 0; k < count; ++k) {
    const float x = clamped(points[2 * k] * row.canvas_width - 0.5f, limit_x);
    const float y = clamped(points[2 * k + 1] * row.canvas_height - 0.5f, limit_y);
    const int32_t left = static_cast<int32_t>(x + 1) - 1, top = static_cast<int32_t>(y + 1) - 1;
    const float fx = x - static_cast<float>(left), fy = y - static_cast<float>(top);
    const float in_left = left >= 0 && left < width ? 1 - fx : 0.0f, in_right = left + 1 < width ? fx : 0.0f;
    const float in_top = top >= 0 && top < height ? 1 - fy : 0.0f, in_bottom = top + 1 < height ? fy : 0.0f;
    const int32_t j0 = left < 0 ? 0 : (left < width ? left : width - 1), j1 = left + 1 < width ? left + 1 : width - 1;
    const int32_t i0 = top < 0 ? 0 : (top < height ? top : height - 1), i1 = top + 1 < height ? top + 1 : height - 1;
    b.cell[k] = i0 * width + j0, b.right[k] = i0 * width + j1;
    b.below[k] = i1 * width + j0, b.both[k] = i1 * width + j1;
    b.value[0][k] = in_top * in_left, b.value[1][k] = in_top * in_right;
    b.value[2][k] = in_bottom * in_left, b.value[3][k] = in_bottom * in_right;
  }
  for (int64_t k = 0; k < count; ++k)
    b.target[k] = b.value[0][k] * row.mask[b.cell[k]] + b.value[1][k] * row.mask[b.right[k]] +
                  b.value[2][k] * row.mask[b.below[k]] + b.value[3][k] * row.mask[b.both[k]];
}

// ---- arithmetic

inline Vec<float> sigmoid_of(Vec<float> x, Vec<float>& factor) {
  const VecI32 is_negative = x < 0.0f;
  const Vec<float> e = exp_of(is_negative ? x : -x);
  factor = e + 1.0f;
  return (is_negative ? e : Vec<float>{} + 1.0f) / factor;
}

// softplus(x) = max(x, 0) + log(1 + exp(-|x|)); the logarithms of a block are one logarithm of their product.
inline double log_of_lanes(Vec<float> product) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += __builtin_log(static_cast<double>(product[i]));
  return sum;
}

// Zeros behind the points of a block that is not full: their softplus is log 2, which the caller takes off.
inline int64_t fill_block(float* values, int64_t count) {
  const int64_t end = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t k = count; k < end; ++k) values[k] = 0;
  return end;
}

constexpr double kLog2 = 0.693147180559945309;

float sigmoid(const float* x, int64_t count, float* probability) {
  double sum = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t size = count - first < kBlock ? count - first : kBlock;
    Vec<float> positive = {}, product = Vec<float>{} + 1.0f, factor;
    int64_t k = 0;
    for (; k + kLanes <= size; k += kLanes) {
      const Vec<float> v = load(x + first + k);
      store(probability + first + k, sigmoid_of(v, factor));
      positive += v > 0.0f ? v : Vec<float>{};
      product *= factor;
    }
    if (k < size) {
      const Vec<float> v = load_some(x + first + k, size - k);
      store_some(probability + first + k, sigmoid_of(v, factor), size - k);
      positive += v > 0.0f ? v : Vec<float>{};
      product *= factor;
      sum -= static_cast<double>(kLanes - (size - k)) * kLog2;
    }
    sum += sum_lanes<float>(positive) + log_of_lanes(product);
  }
  return static_cast<float>(sum);
}

void loss_sums(const PointRow& row, float* sums, float* probability, float* target, float* scratch) {
  Block b;
  pad_map(row.logits, row.height, row.width, scratch);
  double totals[kPointSums] = {};
  for (int64_t first = 0; first < row.count; first += kBlock) {
    const int64_t size = row.count - first < kBlock ? row.count - first : kBlock;
    const float* points = row.points + 2 * first;
    locate(points, size, row.height, row.width, b);
    read_logits(scratch, size, row.width, b);
    read_targets(row, points, size, b);
    const int64_t end = fill_block(b.logit, size);
    fill_block(b.target, size);
    Vec<float> entropy = {}, both = {}, predicted = {}, wanted = {}, product = Vec<float>{} + 1.0f, factor;
    for (int64_t k = 0; k < end; k += kLanes) {
      const Vec<float> x = load(b.logit + k), t = load(b.target + k);
      const Vec<float> p = sigmoid_of(x, factor);
      store(b.logit + k, p);
      product *= factor;
      entropy += (x < 0.0f ? Vec<float>{} : x) - x * t;
      both += p * t;
      predicted += p;
      wanted += t;
    }
    std::memcpy(probability + first, b.logit, size * sizeof(float));
    std::memcpy(target + first, b.target, size * sizeof(float));
    const double filled = static_cast<double>(end - size);
    totals[0] += sum_lanes<float>(entropy) + log_of_lanes(product) - filled * kLog2;
    totals[1] += sum_lanes<float>(both);
    totals[2] += sum_lanes<float>(predicted) - 0.5 * filled;
    totals[3] += sum_lanes<float>(wanted);
  }
  for (int i = 0; i < kPointSums; ++i) sums[i] = static_cast<float>(totals[i]);
}

void loss_gradient(const float* gradient, const float* probability, const float* target, const float* points,
                   int64_t count, int64_t height, int64_t width, float* grad_logits, float* scratch) {
  Block b;
  const int64_t stride = width + 2;
  const float of_entropy = gradient[0], of_both = gradient[1], of_predicted = gradient[2];
  std::memset(scratch, 0, map_floats(height, width) * sizeof(float));
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t size = count - first < kBlock ? count - first : kBlock;
    locate(points + 2 * first, size, height, width, b);
#pragma GCC ivdep
    for (int64_t k = 0; k < size; ++k) {
      const float p = probability[first + k], t = target[first + k];
      const float slope = (p - t) * of_entropy + (t * of_both + of_predicted) * p * (1 - p);
      const float lower = slope * b.fy[k], upper = slope - lower;
      b.value[1][k] = upper * b.fx[k], b.value[0][k] = upper - b.value[1][k];
      b.value[3][k] = lower * b.fx[k], b.value[2][k] = lower - b.value[3][k];
    }
    for (int64_t k = 0; k < size; ++k) {
      float* cell = scratch + b.cell[k];
      cell[0] += b.value[0][k];
      cell[1] += b.value[1][k];
      cell[stride] += b.value[2][k];
      cell[stride + 1] += b.value[3][k];
    }
  }
  for (int64_t i = 0; i < height; ++i)
    std::memcpy(grad_logits + i * width, scratch + (i + 1) * stride + 1, width * sizeof(float));
}

// ---- the most uncertain candidates

inline int64_t candidate_floats(int64_t height, int64_t width, int64_t count) {
  return map_floats(height, width) + count;
}

// How many of the numbers are below a limit.
inline int64_t count_below(const int32_t* numbers, int64_t count, int32_t limit) {
  int32_t below = 0;
  for (int64_t k = 0; k < count; ++k) below += numbers[k] < limit;
  return below;
}

void uncertain(const float* map, int64_t height, int64_t width, const float* candidates, int64_t count, int64_t kept,
               float* output, float* scratch) {
  Block b;
  pad_map(map, height, width, scratch);
  // without their sign the bits of floats have the order of the floats; a NaN comes last
  int32_t* certainty = reinterpret_cast<int32_t*>(scratch + map_floats(height, width));
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t size = count - first < kBlock ? count - first : kBlock;
    locate(candidates + 2 * first, size, height, width, b);
    read_logits(scratch, size, width, b);
    for (int64_t k = 0; k < size; ++k) {
      int32_t bits;
      std::memcpy(&bits, b.logit + k, sizeof bits);
      certainty[first + k] = bits & 0x7fffffff;
    }
  }
  int32_t limit = 0;  // bit by bit the largest number with fewer than `kept` below it
  for (int bit = 30; bit >= 0; --bit) {
    const int32_t trial = limit | (1 << bit);
    if (count_below(certainty, count, trial) < kept) limit = trial;
  }
  int64_t equal = kept - count_below(certainty, count, limit), found = 0;  // of those at the limit the first ones
  for (int64_t k = 0; k < count && found < kept; ++k) {
    const int64_t takes = certainty[k] < limit || (certainty[k] == limit && equal-- > 0);
    std::memcpy(output + 2 * found, candidates + 2 * k, 2 * sizeof(float));
    found += takes;
  }
}

}  // namespace

PointKernels MASK2FORMER_POINT_KERNELS() {
  return {map_floats, candidate_floats, uncertain, loss_sums, loss_gradient, sigmoid};
}

}  // namespace mask2former::cpu
