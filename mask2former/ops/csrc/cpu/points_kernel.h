// The CPU kernels of random points, in vectors of kernel.h, which is included before. Points go in blocks through arrays
// in the cache: places in loops that the compiler vectorises, then reads one by one, then arithmetic in vectors.

namespace mask2former::cpu {
namespace {

constexpr int64_t kBlock = 256;  // a multiple of all lanes, and fewer factors of up to 2 a lane than overflow a float
constexpr int kLanes = Vector<float>::lanes;

struct Pair {
  float left, right;
};

struct Block {
  alignas(64) float fx[kBlock], fy[kBlock];
  alignas(64) int32_t cell[kBlock];
  alignas(64) float value[4][kBlock];
  alignas(64) Pair upper[kBlock], lower[kBlock];  // logits of two cells side by side
  alignas(64) uint16_t above[kBlock], beneath[kBlock];  // two cells of a mask, the left one in the low byte
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
  x = x > -1.0f ? x : -1.0f;  // also of a NaN, which is no place
  return x < high ? x : high;
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
    std::memcpy(&b.upper[k], padded + b.cell[k], sizeof(Pair));
    std::memcpy(&b.lower[k], below + b.cell[k], sizeof(Pair));
  }
#pragma GCC ivdep
  for (int64_t k = 0; k < count; ++k) {
    const float upper = b.upper[k].left * (1 - b.fx[k]) + b.upper[k].right * b.fx[k];
    const float lower = b.lower[k].left * (1 - b.fx[k]) + b.lower[k].right * b.fx[k];
    b.logit[k] = upper * (1 - b.fy[k]) + lower * b.fy[k];
  }
}

// ---- binary masks, zero outside

// The first of two cells side by side that are read along one axis, both within the mask if it has two.
inline Vec<float> first_cell(Vec<float> x, float size) {
  const Vec<float> zero = {}, last = zero + (size - 2);
  Vec<float> first = __builtin_convertvector(__builtin_convertvector(x + 1.0f, VecI32) - 1, Vec<float>);
  first = first < last ? first : last;
  return first > zero ? first : zero;
}

// Of a cell at a position. A neighbour that is no neighbour, at the mask's border, has none.
inline Vec<float> weight_of(Vec<float> cell, Vec<float> x) {
  const Vec<float> zero = {}, way = x - cell;
  const Vec<float> weight = 1.0f - (way < zero ? -way : way);
  return weight > zero ? weight : zero;
}

inline void read_targets(const PointRow& row, const float* points, int64_t count, Block& b) {
  const float width = static_cast<float>(row.mask_width), height = static_cast<float>(row.mask_height);
  const int32_t stride = static_cast<int32_t>(row.mask_width);
  const bool has_right = row.mask_width > 1, has_below = row.mask_height > 1;
#pragma GCC ivdep
  for (int64_t k = 0; k < count; ++k) {
    b.fx[k] = clamped(points[2 * k] * row.canvas_width - 0.5f, width);
    b.fy[k] = clamped(points[2 * k + 1] * row.canvas_height - 0.5f, height);
  }
  for (int64_t k = 0; k < count; k += kLanes) {
    const Vec<float> x = load(b.fx + k), y = load(b.fy + k);
    const Vec<float> column = first_cell(x, width), line = first_cell(y, height);
    const VecI32 cell = __builtin_convertvector(line, VecI32) * stride + __builtin_convertvector(column, VecI32);
    std::memcpy(b.cell + k, &cell, sizeof cell);
    store(b.value[0] + k, weight_of(column, x));
    store(b.value[1] + k, weight_of(column + 1.0f, x));
    store(b.value[2] + k, weight_of(line, y));
    store(b.value[3] + k, weight_of(line + 1.0f, y));
  }
  if (has_right && has_below) {
    for (int64_t k = 0; k < count; ++k) {
      std::memcpy(&b.above[k], row.mask + b.cell[k], 2);
      std::memcpy(&b.beneath[k], row.mask + b.cell[k] + stride, 2);
    }
  } else {
    for (int64_t k = 0; k < count; ++k) {
      const uint8_t* cell = row.mask + b.cell[k];
      b.above[k] = cell[0] + (has_right ? cell[1] << 8 : 0);
      b.beneath[k] = has_below ? cell[stride] + (has_right ? cell[stride + 1] << 8 : 0) : 0;
    }
  }
#pragma GCC ivdep
  for (int64_t k = 0; k < count; ++k) {
    const int32_t above = b.above[k], beneath = b.beneath[k];
    const float upper = b.value[0][k] * (above & 0xff) + b.value[1][k] * (above >> 8);
    const float lower = b.value[0][k] * (beneath & 0xff) + b.value[1][k] * (beneath >> 8);
    b.target[k] = b.value[2][k] * upper + b.value[3][k] * lower;
  }
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

inline void add_pair(float* cells, Pair change) {
  typedef float Half __attribute__((vector_size(sizeof(Pair))));
  Half sum, other;
  std::memcpy(&sum, cells, sizeof sum);
  std::memcpy(&other, &change, sizeof other);
  sum += other;
  std::memcpy(cells, &sum, sizeof sum);
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
      b.upper[k].right = upper * b.fx[k], b.upper[k].left = upper - upper * b.fx[k];
      b.lower[k].right = lower * b.fx[k], b.lower[k].left = lower - lower * b.fx[k];
    }
    for (int64_t k = 0; k < size; ++k) {
      add_pair(scratch + b.cell[k], b.upper[k]);
      add_pair(scratch + b.cell[k] + stride, b.lower[k]);
    }
  }
  for (int64_t i = 0; i < height; ++i)
    std::memcpy(grad_logits + i * width, scratch + (i + 1) * stride + 1, width * sizeof(float));
}

// ---- random points

// Threefry4x32 with 13 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), two points from
// each counter: a point depends on the seed and its place alone, not on the points before it or on threads.
constexpr int kRounds = 13;
constexpr int kTurns[8][2] = {{10, 26}, {11, 21}, {13, 27}, {23, 5}, {6, 20}, {17, 11}, {25, 10}, {18, 20}};

inline uint32_t turned(uint32_t x, int bits) { return x << bits | x >> (32 - bits); }

inline void draw(const PointStream& stream, int64_t first, int64_t count, float* points) {
  const uint32_t low = static_cast<uint32_t>(stream.seed), high = static_cast<uint32_t>(stream.seed >> 32);
  const uint32_t key[5] = {low, high, stream.use, 0, 0x1BD11BDAu ^ low ^ high ^ stream.use};
  const uint32_t row = stream.row, start = static_cast<uint32_t>(first / 2);
#pragma GCC ivdep
  for (int64_t k = 0; k < (count + 1) / 2; ++k) {
    uint32_t x[4] = {start + static_cast<uint32_t>(k) + key[0], row + key[1], key[2], key[3]};
#pragma GCC unroll 13
    for (int round = 0; round < kRounds; ++round) {
      const int one = round % 2 ? 3 : 1, other = 4 - one;
      x[0] += x[one];
      x[one] = turned(x[one], kTurns[round % 8][0]) ^ x[0];
      x[2] += x[other];
      x[other] = turned(x[other], kTurns[round % 8][1]) ^ x[2];
      if (round % 4 == 3) {
        const int turn = (round + 1) / 4;
        for (int i = 0; i < 4; ++i) x[i] += key[(turn + i) % 5];
        x[3] += turn;
      }
    }
    const float scale = 1.0f / (1 << 24);  // the upper 24 bits, as signed numbers, which vectors convert
    for (int i = 0; i < 4; ++i) points[4 * k + i] = static_cast<float>(static_cast<int32_t>(x[i] >> 8)) * scale;
  }
}

// `count` points, at any place in memory.
void draw_points(const PointStream& stream, int64_t count, float* points) {
  float block[2 * kBlock];
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t size = count - first < kBlock ? count - first : kBlock;
    draw(stream, first, size, block);
    std::memcpy(points + 2 * first, block, 2 * size * sizeof(float));
  }
}

// ---- the most uncertain candidates

constexpr int kBucketBits = 20;  // below the exponent and the first three bits of the fraction
constexpr int64_t kBuckets = int64_t{1} << (31 - kBucketBits);

inline int64_t candidate_floats(int64_t height, int64_t width, int64_t count) {
  return map_floats(height, width) + kBuckets + 2 * count + 2 * (count + 1);
}

// How many of the numbers are below a limit.
inline int64_t count_below(const int32_t* numbers, int64_t count, int32_t limit) {
  int32_t below = 0;
  for (int64_t k = 0; k < count; ++k) below += numbers[k] < limit;
  return below;
}

// Of the numbers, all in one bucket, the largest limit with fewer than `kept` below it, bit by bit.
inline int32_t limit_within(const int32_t* numbers, int64_t count, int64_t kept, int32_t bucket) {
  int32_t limit = bucket << kBucketBits;
  for (int bit = kBucketBits - 1; bit >= 0; --bit) {
    const int32_t trial = limit | (1 << bit);
    if (count_below(numbers, count, trial) < kept) limit = trial;
  }
  return limit;
}

// `from` is null if the candidates are to be drawn.
void uncertain(const float* map, int64_t height, int64_t width, const float* from, PointStream stream, int64_t count,
               int64_t kept, float* output, float* scratch) {
  Block b;
  pad_map(map, height, width, scratch);
  // without their sign the bits of floats have the order of the floats; a NaN comes last
  int32_t* sizes = reinterpret_cast<int32_t*>(scratch + map_floats(height, width));  // of buckets
  int32_t *certainty = sizes + kBuckets, *edge = certainty + count;
  float* drawn = reinterpret_cast<float*>(edge + count);
  const float* candidates = from == nullptr ? drawn : from;
  std::memset(sizes, 0, kBuckets * sizeof(int32_t));
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t size = count - first < kBlock ? count - first : kBlock;
    if (from == nullptr) draw(stream, first, size, drawn + 2 * first);
    locate(candidates + 2 * first, size, height, width, b);
    read_logits(scratch, size, width, b);
    std::memcpy(certainty + first, b.logit, size * sizeof(float));
    for (int64_t k = first; k < first + size; ++k) certainty[k] &= 0x7fffffff;
    for (int64_t k = first; k < first + size; ++k) ++sizes[certainty[k] >> kBucketBits];
  }
  int32_t bucket = 0;  // that the limit is in
  int64_t before = 0;  // in the buckets before it
  while (before + sizes[bucket] < kept) before += sizes[bucket++];
  int64_t found = 0, edges = 0;
  for (int64_t k = 0; k < count; ++k) {
    const int32_t number = certainty[k], own = number >> kBucketBits;
    std::memcpy(output + 2 * found, candidates + 2 * k, 2 * sizeof(float));
    found += own < bucket;
    edge[edges] = static_cast<int32_t>(k), certainty[edges] = number;
    edges += own == bucket;
  }
  const int32_t limit = limit_within(certainty, edges, kept - before, bucket);
  int64_t equal = kept - before - count_below(certainty, edges, limit);  // of those at the limit the first ones
  for (int64_t e = 0; found < kept; ++e) {
    const int64_t takes = certainty[e] < limit || (certainty[e] == limit && equal-- > 0);
    std::memcpy(output + 2 * found, candidates + 2 * edge[e], 2 * sizeof(float));
    found += takes;
  }
}

}  // namespace

PointKernels MASK2FORMER_POINT_KERNELS() {
  return {map_floats, candidate_floats, uncertain, draw_points, loss_sums, loss_gradient, sigmoid};
}

}  // namespace mask2former::cpu
