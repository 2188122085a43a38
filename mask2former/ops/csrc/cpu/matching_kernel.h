// The sums of the matching cost over points, in vectors of kernel.h and with the reads of points_kernel.h, which stand
// before. A product of embeddings and features is one tile of registers, and is summed up there: the logits of all
// queries at all points are never in memory.

namespace mask2former::cpu {
namespace {

constexpr int kRowsOfTile = 6, kVectorsOfTile = 2;  // 12 accumulators leave 4 of 16 registers for the operands
constexpr int kPointsOfTile = kVectorsOfTile * kLanes;
constexpr int64_t kFlush = 48;  // tiles, of which the product of the factors of softplus does not overflow

using Tile = Vec<float>[kRowsOfTile][kVectorsOfTile];

inline int64_t tiles(int64_t count, int64_t size) { return (count + size - 1) / size; }

int64_t tile_points() { return kPointsOfTile; }

// One channel at all points, in the places that `panels` (tiles, C, kPointsOfTile) has for it.
void read_channel(const float* map, int64_t height, int64_t width, const float* points, int64_t count, int64_t channels,
                  float* panels, float* scratch) {
  Block b;
  pad_map(map, height, width, scratch);
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t size = count - first < kBlock ? count - first : kBlock;
    locate(points + 2 * first, size, height, width, b);
    read_logits(scratch, size, width, b);
    const int64_t filled = tiles(size, kPointsOfTile) * kPointsOfTile;
    for (int64_t k = size; k < filled; ++k) b.logit[k] = 0;
    for (int64_t k = 0; k < filled; k += kPointsOfTile)
      std::memcpy(panels + (first + k) * channels, b.logit + k, kPointsOfTile * sizeof(float));
  }
}

// One mask at all points, in the places that `panels` (tiles, N, kPointsOfTile) has for it, and its sum.
float read_mask(const PointRow& mask, int64_t masks, float* panels) {
  Block b;
  double sum = 0;
  for (int64_t first = 0; first < mask.count; first += kBlock) {
    const int64_t size = mask.count - first < kBlock ? mask.count - first : kBlock;
    read_targets(mask, mask.points + 2 * first, size, b);
    const int64_t filled = tiles(size, kPointsOfTile) * kPointsOfTile;
    for (int64_t k = size; k < filled; ++k) b.target[k] = 0;
    for (int64_t k = 0; k < size; ++k) sum += b.target[k];
    for (int64_t k = 0; k < filled; k += kPointsOfTile)
      std::memcpy(panels + (first + k) * masks, b.target + k, kPointsOfTile * sizeof(float));
  }
  return static_cast<float>(sum);
}

// What a tile's rows have summed up so far.
struct RowSums {
  Vec<float> positive[kRowsOfTile], predicted[kRowsOfTile], product[kRowsOfTile];
  double softplus[kRowsOfTile];
};

inline void flush(RowSums& sums) {
  for (int i = 0; i < kRowsOfTile; ++i) {
    sums.softplus[i] += sum_lanes<float>(sums.positive[i]) + log_of_lanes(sums.product[i]);
    sums.positive[i] = Vec<float>{};
    sums.product[i] = Vec<float>{} + 1.0f;
  }
}

// Logits of some rows, `packed` (C, kRowsOfTile), at one tile of points, (C, kPointsOfTile).
inline void multiply(const float* packed, const float* panel, int64_t channels, Tile& x) {
  Tile sums = {};
  for (int64_t c = 0; c < channels; ++c) {
    const Vec<float> left = load(panel + c * kPointsOfTile), right = load(panel + c * kPointsOfTile + kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kRowsOfTile; ++i) {
      const float factor = packed[c * kRowsOfTile + i];
      sums[i][0] += left * factor;
      sums[i][1] += right * factor;
    }
  }
  for (int i = 0; i < kRowsOfTile; ++i)
    for (int v = 0; v < kVectorsOfTile; ++v) x[i][v] = sums[i][v];
}

// Adds a tile to the sums of its rows, and to those with the masks, `shared` (N, 2, kRowsOfTile) vectors.
inline void add_tile(const Tile& x, const float* masks, int64_t count, RowSums& sums, Vec<float>* shared) {
  Tile p;
  for (int i = 0; i < kRowsOfTile; ++i)
    for (int v = 0; v < kVectorsOfTile; ++v) {
      Vec<float> factor;
      p[i][v] = sigmoid_of(x[i][v], factor);
      sums.positive[i] += x[i][v] < 0.0f ? Vec<float>{} : x[i][v];
      sums.predicted[i] += p[i][v];
      sums.product[i] *= factor;
    }
  for (int64_t n = 0; n < count; ++n) {
    const Vec<float> left = load(masks + n * kPointsOfTile), right = load(masks + n * kPointsOfTile + kLanes);
    Vec<float>* of_mask = shared + 2 * kRowsOfTile * n;
#pragma GCC unroll 6
    for (int i = 0; i < kRowsOfTile; ++i) {
      of_mask[i] += x[i][0] * left + x[i][1] * right;
      of_mask[kRowsOfTile + i] += p[i][0] * left + p[i][1] * right;
    }
  }
}

int64_t group_bytes(int64_t rows, int64_t channels, int64_t masks) {
  const int64_t number = tiles(rows, kRowsOfTile);
  const int64_t shared = 2 * kRowsOfTile * masks * kVectorBytes, packed = kRowsOfTile * channels * sizeof(float);
  return 64 + number * (sizeof(RowSums) + shared + packed);
}

void pair_sums(const MatchingGroup& g, char* block) {
  block += (64 - reinterpret_cast<uintptr_t>(block) % 64) % 64;
  const int64_t number = tiles(g.rows, kRowsOfTile), C = g.channels, N = g.masks;
  RowSums* sums = reinterpret_cast<RowSums*>(block);
  Vec<float>* shared = reinterpret_cast<Vec<float>*>(sums + number);
  float* packed = reinterpret_cast<float*>(shared + number * 2 * kRowsOfTile * N);
  std::memset(block, 0, group_bytes(g.rows, C, N) - 64);
  for (int64_t r = 0; r < g.rows; ++r)
    for (int64_t c = 0; c < C; ++c)
      packed[(r / kRowsOfTile * C + c) * kRowsOfTile + r % kRowsOfTile] = g.embeddings[r * C + c];
  for (int64_t t = 0; t < number; ++t)
    for (int i = 0; i < kRowsOfTile; ++i) sums[t].product[i] = Vec<float>{} + 1.0f;
  const int64_t last = tiles(g.count, kPointsOfTile);
  for (int64_t tile = 0; tile < last; ++tile)
    for (int64_t t = 0; t < number; ++t) {
      Tile x;
      multiply(packed + t * C * kRowsOfTile, g.features + tile * C * kPointsOfTile, C, x);
      add_tile(x, g.targets + tile * N * kPointsOfTile, N, sums[t], shared + t * 2 * kRowsOfTile * N);
      if (tile % kFlush == kFlush - 1 || tile == last - 1) flush(sums[t]);
    }
  const double filled = static_cast<double>(last * kPointsOfTile - g.count);  // points whose logits are 0
  for (int64_t r = 0; r < g.rows; ++r) {
    const RowSums& own = sums[r / kRowsOfTile];
    const int i = static_cast<int>(r % kRowsOfTile);
    g.softplus[r] = static_cast<float>(own.softplus[i] - filled * kLog2);
    g.predicted[r] = static_cast<float>(sum_lanes<float>(own.predicted[i]) - 0.5 * filled);
    for (int64_t n = 0; n < N; ++n) {
      const Vec<float>* of_mask = shared + (r / kRowsOfTile * N + n) * 2 * kRowsOfTile;
      g.inner[r * N + n] = sum_lanes<float>(of_mask[i]);
      g.overlap[r * N + n] = sum_lanes<float>(of_mask[kRowsOfTile + i]);
    }
  }
}

}  // namespace

MatchingKernels MASK2FORMER_MATCHING_KERNELS() {
  return {tile_points, map_floats, read_channel, read_mask, group_bytes, pair_sums};
}

}  // namespace mask2former::cpu
