// The matching cost's sums over points, in vectors of kernel.h and with the reads of points_kernel.h, which are included
// before. A product of embeddings and features is one tile of registers, and is summed up there: the logits of all
// queries at all points are never in memory.

namespace mask2former::cpu {
namespace {

constexpr int kTileRows = 6, kTileVectors = 2;  // with these 12 accumulators, 3 of 16 registers are left for the operands
constexpr int kTilePoints = kTileVectors * kLanes;
constexpr int64_t kFlush = 48;  // tiles, of which the product of the factors of softplus does not overflow

inline int64_t tiles(int64_t count, int64_t size) { return (count + size - 1) / size; }

int64_t tile_points() { return kTilePoints; }

// One channel at all points, in the places that `panels` (tiles, C, kTilePoints) has for it.
void read_channel(const float* map, int64_t height, int64_t width, const float* points, int64_t count, int64_t channels,
                  float* panels, float* scratch) {
  Block b;
  pad_map(map, height, width, scratch);
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t size = count - first < kBlock ? count - first : kBlock;
    locate(points + 2 * first, size, height, width, b);
    read_logits(scratch, size, width, b);
    const int64_t filled = tiles(size, kTilePoints) * kTilePoints;
    for (int64_t k = size; k < filled; ++k) b.logit[k] = 0;
    for (int64_t k = 0; k < filled; k += kTilePoints)
      std::memcpy(panels + (first + k) * channels, b.logit + k, kTilePoints * sizeof(float));
  }
}

// One mask at all points, in the places that `panels` (tiles, N, kTilePoints) has for it, and its sum.
float read_mask(const PointRow& mask, int64_t masks, float* panels) {
  Block b;
  double sum = 0;
  for (int64_t first = 0; first < mask.count; first += kBlock) {
    const int64_t size = mask.count - first < kBlock ? mask.count - first : kBlock;
    read_targets(mask, mask.points + 2 * first, size, b);
    const int64_t filled = tiles(size, kTilePoints) * kTilePoints;
    for (int64_t k = size; k < filled; ++k) b.target[k] = 0;
    for (int64_t k = 0; k < size; ++k) sum += b.target[k];
    for (int64_t k = 0; k < filled; k += kTilePoints)
      std::memcpy(panels + (first + k) * masks, b.target + k, kTilePoints * sizeof(float));
  }
  return static_cast<float>(sum);
}

// What a tile's rows have summed up so far.
struct RowSums {
  Vec<float> positive[kTileRows], predicted[kTileRows], product[kTileRows];
  double softplus[kTileRows];
};

inline void flush(RowSums& sums) {
  for (int i = 0; i < kTileRows; ++i) {
    sums.softplus[i] += sum_lanes<float>(sums.positive[i]) + log_of_lanes(sums.product[i]);
    sums.positive[i] = Vec<float>{};
    sums.product[i] = Vec<float>{} + 1.0f;
  }
}

// Logits of some rows, `packed` (C, kTileRows), at one tile of points, (C, kTilePoints).
inline void multiply(const float* packed, const float* panel, int64_t channels, Vec<float> (&x)[kTileRows][kTileVectors]) {
  Vec<float> sums[kTileRows][kTileVectors] = {};
  for (int64_t c = 0; c < channels; ++c) {
    const Vec<float> left = load(panel + c * kTilePoints), right = load(panel + c * kTilePoints + kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
      const float factor = packed[c * kTileRows + i];
      sums[i][0] += left * factor;
      sums[i][1] += right * factor;
    }
  }
  for (int i = 0; i < kTileRows; ++i)
    for (int v = 0; v < kTileVectors; ++v) x[i][v] = sums[i][v];
}

// Adds a tile to the sums of its rows, and to those with the masks, `shared` (N, 2, kTileRows) vectors.
inline void add_tile(const Vec<float> (&x)[kTileRows][kTileVectors], const float* masks, int64_t count, RowSums& sums,
                     Vec<float>* shared) {
  Vec<float> p[kTileRows][kTileVectors];
  for (int i = 0; i < kTileRows; ++i)
    for (int v = 0; v < kTileVectors; ++v) {
      Vec<float> factor;
      p[i][v] = sigmoid_of(x[i][v], factor);
      sums.positive[i] += x[i][v] < 0.0f ? Vec<float>{} : x[i][v];
      sums.predicted[i] += p[i][v];
      sums.product[i] *= factor;
    }
  for (int64_t n = 0; n < count; ++n) {
    const Vec<float> left = load(masks + n * kTilePoints), right = load(masks + n * kTilePoints + kLanes);
    Vec<float>* of_mask = shared + 2 * kTileRows * n;
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
      of_mask[i] += x[i][0] * left + x[i][1] * right;
      of_mask[kTileRows + i] += p[i][0] * left + p[i][1] * right;
    }
  }
}

int64_t group_bytes(int64_t rows, int64_t channels, int64_t masks) {
  const int64_t number = tiles(rows, kTileRows);
  return 64 + number * (sizeof(RowSums) + 2 * kTileRows * masks * kVectorBytes + kTileRows * channels * sizeof(float));
}

void pair_sums(const MatchingGroup& g, char* block) {
  block += (64 - reinterpret_cast<uintptr_t>(block) % 64) % 64;
  const int64_t number = tiles(g.rows, kTileRows), C = g.channels, N = g.masks;
  RowSums* sums = reinterpret_cast<RowSums*>(block);
  Vec<float>* shared = reinterpret_cast<Vec<float>*>(sums + number);
  float* packed = reinterpret_cast<float*>(shared + number * 2 * kTileRows * N);
  std::memset(block, 0, group_bytes(g.rows, C, N) - 64);
  for (int64_t r = 0; r < g.rows; ++r)
    for (int64_t c = 0; c < C; ++c) packed[(r / kTileRows * C + c) * kTileRows + r % kTileRows] = g.embeddings[r * C + c];
  for (int64_t t = 0; t < number; ++t)
    for (int i = 0; i < kTileRows; ++i) sums[t].product[i] = Vec<float>{} + 1.0f;
  const int64_t last = tiles(g.count, kTilePoints);
  for (int64_t tile = 0; tile < last; ++tile)
    for (int64_t t = 0; t < number; ++t) {
      Vec<float> x[kTileRows][kTileVectors];
      multiply(packed + t * C * kTileRows, g.features + tile * C * kTilePoints, C, x);
      add_tile(x, g.targets + tile * N * kTilePoints, N, sums[t], shared + t * 2 * kTileRows * N);
      if (tile % kFlush == kFlush - 1 || tile == last - 1) flush(sums[t]);
    }
  const double filled = static_cast<double>(last * kTilePoints - g.count);  // points whose logits are 0
  for (int64_t r = 0; r < g.rows; ++r) {
    const RowSums& own = sums[r / kTileRows];
    const int i = static_cast<int>(r % kTileRows);
    g.softplus[r] = static_cast<float>(own.softplus[i] - filled * kLog2);
    g.predicted[r] = static_cast<float>(sum_lanes<float>(own.predicted[i]) - 0.5 * filled);
    for (int64_t n = 0; n < N; ++n) {
      const Vec<float>* of_mask = shared + (r / kTileRows * N + n) * 2 * kTileRows;
      g.inner[r * N + n] = sum_lanes<float>(of_mask[i]);
      g.overlap[r * N + n] = sum_lanes<float>(of_mask[kTileRows + i]);
    }
  }
}

}  // namespace

MatchingKernels MASK2FORMER_MATCHING_KERNELS() {
  return {tile_points, map_floats, read_channel, read_mask, group_bytes, pair_sums};
}

}  // namespace mask2former::cpu
