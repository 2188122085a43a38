// Products of float32 matrices with what follows them, in the tiles of tile_kernel.h, which is included before.
//
// The weights are packed: panels of kTileColumns rows of the matrix, each panel cut into pieces of at most kDepth columns,
// which fit the first cache with the rows of a tile. Blocks of rows are copied into scratch memory, which makes rows of
// any place dense and keeps them in the second cache. A row's sums are added up in one order, wherever the row is.

#if defined(__clang__)
#define MASK2FORMER_SHUFFLE_EIGHT(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t Mask2formerShuffleEight __attribute__((vector_size(32)));
#define MASK2FORMER_SHUFFLE_EIGHT(a, b, ...) __builtin_shuffle(a, b, Mask2formerShuffleEight{__VA_ARGS__})
#endif

namespace mask2former::cpu {
namespace {

constexpr int64_t kDepth = 256;
constexpr int64_t kBlockRows = 8 * kTileRows;
constexpr int64_t kRowPad = 16;  // rows at steps of a power of two would share few sets of the cache

inline int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Columns of each piece of K, whole panels of a matrix that has K rows; the last piece may have fewer.
inline int64_t depth_of(int64_t K) { return parts(parts(K, parts(K, kDepth)), kTileColumns) * kTileColumns; }

inline int64_t piece_at(int64_t k0, int64_t K) { return smaller(depth_of(K), K - k0); }

// ---- weights

int64_t panels(int64_t N) { return parts(N, kTileColumns); }

int64_t packed_floats(int64_t N, int64_t K) { return panels(N) * kTileColumns * K; }

// Eight vectors of eight numbers, rows to columns.
inline void transpose(F* x) {
  static_assert(kLanes == 8);
  F pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = MASK2FORMER_SHUFFLE_EIGHT(x[i], x[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    pairs[i + 1] = MASK2FORMER_SHUFFLE_EIGHT(x[i], x[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = i; j < i + 2; ++j) {
      fours[j] = MASK2FORMER_SHUFFLE_EIGHT(pairs[j], pairs[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      fours[j + 2] = MASK2FORMER_SHUFFLE_EIGHT(pairs[j], pairs[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int j = 0; j < 4; ++j) {
    x[j] = MASK2FORMER_SHUFFLE_EIGHT(fours[j], fours[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    x[j + 4] = MASK2FORMER_SHUFFLE_EIGHT(fours[j], fours[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// Piece by piece, in each panel by panel, in each column by column: kTileColumns numbers.
void pack(const float* weight, int64_t N, int64_t K, float* packed, int64_t begin, int64_t end) {
  const int64_t all = panels(N) * kTileColumns;
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t k0 = 0; k0 < K; k0 += depth_of(K)) {
      const int64_t k1 = k0 + piece_at(k0, K), first = panel * kTileColumns;
      float* to = packed + k0 * all + first * (k1 - k0);
      int64_t k = k0;
      if (first + kTileColumns <= N)
        for (; k + kLanes <= k1; k += kLanes)
          for (int64_t j = 0; j < kTileColumns; j += kLanes) {
            F rows[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) rows[i] = load(weight + (first + j + i) * K + k);
            transpose(rows);
            for (int64_t i = 0; i < kLanes; ++i) store(to + (k - k0 + i) * kTileColumns + j, rows[i]);
          }
      for (; k < k1; ++k)
        for (int64_t j = 0; j < kTileColumns; ++j)
          to[(k - k0) * kTileColumns + j] = first + j < N ? weight[(first + j) * K + k] : 0.0f;
    }
}

// ---- what follows a product

inline F relu(F x) { return x < 0.0f ? F{} : x; }  // keeps what is not a number

// x times the normal distribution's probability of less than x. The error function by formula 7.1.26 of Abramowitz and
// Stegun, wrong by 1.5e-7 at most.
inline F gelu(F x) {
  const F zero = {}, magnitude = (x < 0.0f ? -x : x) * 0.707106781f;
  const F t = 1.0f / (1.0f + 0.3275911f * magnitude);
  F series = t * 1.061405429f - 1.453152027f;
  series = series * t + 1.421413741f;
  series = series * t - 0.284496736f;
  series = series * t + 0.254829592f;
  const F tail = 0.5f * series * t * exp_of(zero - magnitude * magnitude);  // the probability of more than |x|
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// Pointers are those of the tile's first column or number, or null.
struct After {
  const float *scale, *bias, *residual;
  int64_t residual_step;
  Activation activation;
};

inline const float* moved(const float* pointer, int64_t by) { return pointer == nullptr ? nullptr : pointer + by; }

inline F finish(F sum, const float* scale, const float* bias, const float* residual, Activation activation) {
  if (scale != nullptr) sum *= load(scale);
  if (bias != nullptr) sum += load(bias);
  if (activation == Activation::kRelu) sum = relu(sum);
  if (activation == Activation::kGelu) sum = gelu(sum);
  if (residual != nullptr) sum += load(residual);
  return activation == Activation::kReluOfSum ? relu(sum) : sum;
}

// ---- one tile

// out (R, kTileColumns) = or += a (R, depth) b (depth, kTileColumns), then what follows if `after` is not null.
template <int R>
inline void tile(const float* a, int64_t a_step, const float* b, int64_t depth, float* out, int64_t out_step,
                 bool starts, const After* after) {
  F sum[R][2];
  tile_sums<R>(a, a_step, b, depth, sum);
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < 2; ++j) {
      F total = sum[i][j];
      if (!starts) total += load(out + i * out_step + j * kLanes);
      if (after != nullptr)
        total = finish(total, moved(after->scale, j * kLanes), moved(after->bias, j * kLanes),
                       moved(after->residual, i * after->residual_step + j * kLanes), after->activation);
      store(out + i * out_step + j * kLanes, total);
    }
}

inline void tile_of(int64_t rows, const float* a, int64_t a_step, const float* b, int64_t depth, float* out,
                    int64_t out_step, bool starts, const After* after) {
  switch (rows) {
    case 1: return tile<1>(a, a_step, b, depth, out, out_step, starts, after);
    case 2: return tile<2>(a, a_step, b, depth, out, out_step, starts, after);
    case 3: return tile<3>(a, a_step, b, depth, out, out_step, starts, after);
    case 4: return tile<4>(a, a_step, b, depth, out, out_step, starts, after);
    case 5: return tile<5>(a, a_step, b, depth, out, out_step, starts, after);
    default: return tile<6>(a, a_step, b, depth, out, out_step, starts, after);
  }
}

// The last panel of a matrix whose rows are no multiple of kTileColumns: sums go through a tile of its own.
void narrow_tile(int64_t rows, int64_t columns, const float* a, int64_t a_step, const float* b, int64_t depth,
                 float* out, int64_t out_step, bool starts, const After* after) {
  float sums[kTileRows * kTileColumns], added[kTileRows * kTileColumns] = {};
  float scale[kTileColumns] = {}, bias[kTileColumns] = {};
  After own = {};
  if (after != nullptr) {
    own = *after;
    const auto widened = [columns](const float*& numbers, float* wide) {
      if (numbers == nullptr) return;
      std::memcpy(wide, numbers, columns * sizeof(float));
      numbers = wide;
    };
    widened(own.scale, scale);
    widened(own.bias, bias);
    if (own.residual != nullptr) {
      for (int64_t i = 0; i < rows; ++i)
        std::memcpy(added + i * kTileColumns, own.residual + i * own.residual_step, columns * sizeof(float));
      own.residual = added;
      own.residual_step = kTileColumns;
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    std::memset(sums + i * kTileColumns, 0, kTileColumns * sizeof(float));
    if (!starts) std::memcpy(sums + i * kTileColumns, out + i * out_step, columns * sizeof(float));
  }
  tile_of(rows, a, a_step, b, depth, sums, kTileColumns, starts, after == nullptr ? nullptr : &own);
  for (int64_t i = 0; i < rows; ++i)
    std::memcpy(out + i * out_step, sums + i * kTileColumns, columns * sizeof(float));
}

// ---- one block of rows

// Ask for a part of the weights that come next, while a tile is computed.
inline void fetch(const float* weights, int64_t count, int64_t part, int64_t parts) {
  const int64_t step = count / parts;
  for (int64_t at = part * step; at < (part + 1) * step; at += 16) __builtin_prefetch(weights + at, 0, 2);
}

// Where sums of some columns go; see Output.
struct Sink {
  float* out;
  int64_t step, head, head_step;
  After after;
};

Sink sink_of(const Output& o, int64_t row) {
  return {o.out + row * o.step, o.step, o.head, o.head_step,
          {o.scale, o.bias, moved(o.residual, row * o.step), o.step, o.activation}};
}

// sink (rows, N) = or += a (rows, depth) b (depth, N), with b in panels, then what follows if it ends.
void block_piece(const float* a, int64_t a_step, int64_t rows, int64_t depth, const float* b, int64_t N,
                 const Sink& sink, bool starts, bool ends) {
  for (int64_t n = 0; n < N; n += kTileColumns, b += depth * kTileColumns) {
    const int64_t column = n / sink.head * sink.head_step + n % sink.head;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t count = smaller(kTileRows, rows - r);
      float* to = sink.out + r * sink.step + column;
      const After after = {moved(sink.after.scale, n), moved(sink.after.bias, n),
                           moved(sink.after.residual, r * sink.step + column), sink.step, sink.after.activation};
      fetch(b + kTileColumns * depth, kTileColumns * depth, r / kTileRows, kBlockRows / kTileRows);
      for (int64_t i = 0; i < count; ++i) {
        __builtin_prefetch(to + i * sink.step, 1);
        if (after.residual != nullptr) __builtin_prefetch(after.residual + i * sink.step);
      }
      if (N - n >= kTileColumns)
        tile_of(count, a + r * a_step, a_step, b, depth, to, sink.step, starts, ends ? &after : nullptr);
      else
        narrow_tile(count, N - n, a + r * a_step, a_step, b, depth, to, sink.step, starts, ends ? &after : nullptr);
    }
  }
}

// sink (rows, stop - first) = what follows (a (rows, K) times rows first to stop of the packed weight), which are panels.
void block(const float* a, int64_t a_step, int64_t rows, int64_t K, int64_t N, const float* weight, int64_t first,
           int64_t stop, const Sink& sink) {
  const int64_t all = panels(N) * kTileColumns;
  for (int64_t k0 = 0; k0 < K; k0 += depth_of(K)) {
    const int64_t depth = piece_at(k0, K);
    block_piece(a + k0, a_step, rows, depth, weight + k0 * all + first * depth, stop - first, sink, k0 == 0,
                k0 + depth == K);
  }
}

// ---- rows

// Mean of the row's numbers less `centre`, or of their squares.
float mean_of(const float* row, int64_t size, float centre, bool squared) {
  const int64_t whole = size / kLanes * kLanes;
  F sums = {};
  for (int64_t k = 0; k < whole; k += kLanes) {
    const F x = load(row + k) - centre;
    sums += squared ? x * x : x;
  }
  float sum = sum_lanes<float>(sums);
  for (int64_t k = whole; k < size; ++k) sum += squared ? (row[k] - centre) * (row[k] - centre) : row[k] - centre;
  return sum / static_cast<float>(size);
}

void normalise(const LayerNorm& norm, float* row, int64_t size) {
  const float mean = mean_of(row, size, 0, false);
  const float factor = 1.0f / __builtin_sqrtf(mean_of(row, size, mean, true) + norm.eps);
  for (int64_t k = 0; k < size; ++k) row[k] = (row[k] - mean) * factor * norm.weight[k] + norm.bias[k];
}

void copy_rows(const Rows& x, int64_t begin, int64_t count, float* to) {
  const RowPlaces& p = x.places;
  for (int64_t r = begin; r < begin + count; ++r, to += x.size + kRowPad) {
    const int64_t line = r / p.width;
    const float* from = p.first + line / p.height * p.image + line % p.height * p.down + r % p.width * p.right;
    if (x.added == nullptr) {
      std::memcpy(to, from, x.size * sizeof(float));
    } else {
      const float* added = x.added + r % x.period * x.size;
      for (int64_t k = 0; k < x.size; ++k) to[k] = from[k] + added[k];
    }
    if (x.norm.weight != nullptr) normalise(x.norm, to, x.size);
  }
}

void finish_rows(const Output& o, int64_t begin, int64_t count, int64_t N) {
  if (o.norm.weight == nullptr) return;
  for (int64_t r = begin; r < begin + count; ++r) normalise(o.norm, o.out + r * o.step, N);
}

// ---- linear maps

int64_t linear_scratch(const Linear& p) { return kBlockRows * (p.x.size + kRowPad); }

template <typename Read>
void linear_of(const Linear& p, int64_t begin, int64_t end, float* scratch, Read read) {
  for (int64_t r = begin; r < end; r += kBlockRows) {
    const int64_t count = smaller(kBlockRows, end - r), K = p.x.size;
    read(r, count);
    block(scratch, K + kRowPad, count, K, p.N, p.weight, 0, p.N, sink_of(p.output, r));
    finish_rows(p.output, r, count, p.N);
  }
}

void linear(const Linear& p, int64_t begin, int64_t end, float* scratch) {
  linear_of(p, begin, end, scratch, [&](int64_t r, int64_t count) { copy_rows(p.x, r, count, scratch); });
}

int64_t few_rows_scratch(const Linear& p) { return p.x.size * kTileColumns + p.x.count * (p.x.size + kRowPad); }

void few_rows(const Linear& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t K = p.x.size;
  float* rows = scratch + K * kTileColumns;
  copy_rows(p.x, 0, p.x.count, rows);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t n = panel * kTileColumns, columns = smaller(kTileColumns, p.N - n);
    Sink sink = sink_of(p.output, 0);
    sink.out += n;
    sink.after = {moved(sink.after.scale, n), moved(sink.after.bias, n), moved(sink.after.residual, n), sink.step,
                  sink.after.activation};
    pack(p.weight + n * K, columns, K, scratch, 0, 1);
    block(rows, K + kRowPad, p.x.count, K, columns, scratch, 0, columns, sink);
  }
}

void copy_windows(const Windows& p, int64_t begin, int64_t count, float* to) {
  const int64_t taps = p.rows * p.columns;
  for (int64_t r = begin; r < begin + count; ++r, to += p.linear.x.size + kRowPad) {
    const int64_t line = r / p.width;
    const int64_t y0 = line % p.height * p.down - p.above, x0 = r % p.width * p.right - p.left;
    const float* image = p.maps + line / p.height * p.source_height * p.source_width * p.channels;
    if (taps == 1 && p.above == 0 && p.left == 0) {
      std::memcpy(to, image + (y0 * p.source_width + x0) * p.channels, p.channels * sizeof(float));
      continue;
    }
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t y = y0 + tap / p.columns, x = x0 + tap % p.columns;
      const float* from = image + (y * p.source_width + x) * p.channels;
      if (y >= 0 && y < p.source_height && x >= 0 && x < p.source_width)
        for (int64_t c = 0; c < p.channels; ++c) to[c * taps + tap] = from[c];
      else
        for (int64_t c = 0; c < p.channels; ++c) to[c * taps + tap] = 0;
    }
  }
}

void windows(const Windows& p, int64_t begin, int64_t end, float* scratch) {
  linear_of(p.linear, begin, end, scratch, [&](int64_t r, int64_t count) { copy_windows(p, r, count, scratch); });
}

int64_t feed_forward_scratch(const FeedForward& p) {
  return kBlockRows * (p.x.size + kRowPad + depth_of(p.F) + kRowPad);
}

// A piece of the hidden numbers at a time, which stays in the second cache beside the rows and their sums.
void feed_forward(const FeedForward& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t K = p.x.size, all = panels(p.N) * kTileColumns, hidden_step = depth_of(p.F) + kRowPad;
  float* hidden = scratch + kBlockRows * (K + kRowPad);
  for (int64_t r = begin; r < end; r += kBlockRows) {
    const int64_t count = smaller(kBlockRows, end - r);
    copy_rows(p.x, r, count, scratch);
    const Sink sink = sink_of(p.output, r);
    for (int64_t f0 = 0; f0 < p.F; f0 += depth_of(p.F)) {
      const int64_t piece = piece_at(f0, p.F);
      block(scratch, K + kRowPad, count, K, p.F, p.weight1, f0, f0 + piece,
            {hidden, hidden_step, hidden_step, 0, {nullptr, moved(p.bias1, f0), nullptr, 0, p.activation}});
      block_piece(hidden, hidden_step, count, piece, p.weight2 + f0 * all, p.N, sink, f0 == 0, f0 + piece == p.F);
    }
    finish_rows(p.output, r, count, p.N);
  }
}

// ---- 3x3 convolutions: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), F(4 x 4, 3 x 3)
//
// A tile of 4 x 4 results comes from 6 x 6 pixels. Both sides are evaluated at the same six points an axis (0, 1, -1, 2,
// -2 and infinity), where a convolution is a product of single numbers: 36 products of matrices instead of 144.

constexpr int64_t kTile = 4, kWindow = 6, kPlaces = kWindow * kWindow;
constexpr int64_t kBlockTiles = 8 * kTileRows;

// Three weights at the six points.
inline void weights_at_points(const F* w, int64_t step, F* to, int64_t to_step) {
  const F a = w[0], b = w[step], c = w[2 * step];
  const F ends = a + c, wide = (a + 4.0f * c) * (1.0f / 24), slope = b * (1.0f / 12);
  to[0] = a * 0.25f;
  to[to_step] = (ends + b) * (-1.0f / 6);
  to[2 * to_step] = (ends - b) * (-1.0f / 6);
  to[3 * to_step] = wide + slope;
  to[4 * to_step] = wide - slope;
  to[5 * to_step] = c;
}

// From a place's matrix to the next one's: at steps of a power of two, all places would share a set of the cache.
int64_t place_step(int64_t N, int64_t K) { return packed_floats(N, K) + kRowPad; }

int64_t transformed_floats(int64_t N, int64_t K) { return kPlaces * place_step(N, K); }

// The weight is (N, K, 3, 3), N and K multiples of kLanes; of each place a matrix (N, K), packed.
void transform(const float* weight, int64_t N, int64_t K, float* transformed, int64_t begin, int64_t end) {
  const int64_t all = panels(N) * kTileColumns, step = place_step(N, K);
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t k0 = 0; k0 < K; k0 += kLanes)
      for (int64_t j = 0; j < kTileColumns; j += kLanes) {
        const int64_t n = panel * kTileColumns + j, depth = depth_of(K), piece = k0 / depth * depth;
        float* to = transformed + piece * all + panel * kTileColumns * piece_at(piece, K) +
                    (k0 - piece) * kTileColumns + j;
        F taps[kLanes * 9] = {};  // of kLanes rows: kLanes channels times 9
        if (n < N)
          for (int64_t part = 0; part < 9; ++part) {
            for (int64_t i = 0; i < kLanes; ++i)
              taps[part * kLanes + i] = load(weight + ((n + i) * K + k0) * 9 + part * kLanes);
            transpose(taps + part * kLanes);
          }
        for (int64_t k = 0; k < kLanes; ++k, to += kTileColumns) {
          F half[kWindow][3], points[kWindow][kWindow];
          for (int64_t x = 0; x < 3; ++x) weights_at_points(taps + k * 9 + x, 3, &half[0][x], 3);
          for (int64_t y = 0; y < kWindow; ++y) weights_at_points(half[y], 1, points[y], 1);
          for (int64_t place = 0; place < kPlaces; ++place)
            store(to + place * step, points[place / kWindow][place % kWindow]);
        }
      }
}

// Six pixels at the six points.
inline void pixels_at_points(const F* x, int64_t step, F* to, int64_t to_step) {
  const F a = x[0], b = x[step], c = x[2 * step], d = x[3 * step], e = x[4 * step], f = x[5 * step];
  const F even = e - 4.0f * c, odd = d - 4.0f * b, wide = e - c, skew = 2.0f * (d - b);
  to[0] = 4.0f * a - 5.0f * c + e;
  to[to_step] = even + odd;
  to[2 * to_step] = even - odd;
  to[3 * to_step] = wide + skew;
  to[4 * to_step] = wide - skew;
  to[5 * to_step] = 4.0f * b - 5.0f * d + f;
}

// Products at the six points to four results.
inline void results_of_points(const F* x, int64_t step, F* to, int64_t to_step) {
  const F a = x[0], b = x[step], c = x[2 * step], d = x[3 * step], e = x[4 * step], f = x[5 * step];
  const F near = b + c, tilt = b - c, far = d + e, slope = d - e;
  to[0] = a + near + far;
  to[to_step] = tilt + 2.0f * slope;
  to[2 * to_step] = near + 4.0f * far;
  to[3 * to_step] = tilt + 8.0f * slope + f;
}

struct Tiles {
  int64_t down, across, all;
  explicit Tiles(const Convolution3x3& p)
      : down(parts(p.height, kTile)), across(parts(p.width, kTile)), all(p.B * down * across) {}
};

int64_t convolution_blocks(const Convolution3x3& p) { return parts(Tiles(p).all, kBlockTiles); }

int64_t convolution_scratch(const Convolution3x3& p) {
  const int64_t outputs = panels(p.N) * kTileColumns;
  return kPlaces * (kBlockTiles * (p.K + kRowPad + outputs) + 2 * kRowPad);
}

// The 6 x 6 pixels around a tile, at the points: `places` rows of K numbers, `step` apart. K is a multiple of kLanes.
void read_tile(const Convolution3x3& p, int64_t image, int64_t y0, int64_t x0, float* to, int64_t step) {
  for (int64_t k = 0; k < p.K; k += kLanes) {
    F window[kWindow][kWindow], half[kWindow][kWindow], points[kWindow][kWindow];
    for (int64_t y = 0; y < kWindow; ++y)
      for (int64_t x = 0; x < kWindow; ++x) {
        const int64_t yy = y0 + y - 1, xx = x0 + x - 1;
        const bool inside = yy >= 0 && yy < p.height && xx >= 0 && xx < p.width;
        window[y][x] = inside ? load(p.x + ((image * p.height + yy) * p.width + xx) * p.K + k) : F{};
      }
    for (int64_t x = 0; x < kWindow; ++x) pixels_at_points(&window[0][x], kWindow, &half[0][x], kWindow);
    for (int64_t y = 0; y < kWindow; ++y) pixels_at_points(half[y], 1, points[y], 1);
    for (int64_t place = 0; place < kPlaces; ++place)
      store(to + place * step + k, points[place / kWindow][place % kWindow]);
  }
}

void write_tile(const Convolution3x3& p, int64_t image, int64_t y0, int64_t x0, const float* from, int64_t step) {
  for (int64_t n = 0; n < p.N; n += kLanes) {
    F points[kWindow][kWindow], half[kTile][kWindow], results[kTile][kTile];
    for (int64_t place = 0; place < kPlaces; ++place)
      points[place / kWindow][place % kWindow] = load(from + place * step + n);
    for (int64_t x = 0; x < kWindow; ++x) results_of_points(&points[0][x], kWindow, &half[0][x], kWindow);
    for (int64_t y = 0; y < kTile; ++y) results_of_points(half[y], 1, results[y], 1);
    for (int64_t y = 0; y < kTile && y0 + y < p.height; ++y)
      for (int64_t x = 0; x < kTile && x0 + x < p.width; ++x) {
        const int64_t at = ((image * p.height + y0 + y) * p.width + x0 + x) * p.N + n;
        F result = results[y][x];
        if (p.scale != nullptr) result *= load(p.scale + n);
        if (p.bias != nullptr) result += load(p.bias + n);
        if (p.relu) result = relu(result);
        store(p.out + at, result);
      }
  }
}

// K and N are multiples of kLanes.
void convolution(const Convolution3x3& p, int64_t begin, int64_t end, float* scratch) {
  const Tiles tiles(p);
  const int64_t outputs = panels(p.N) * kTileColumns, step = p.K + kRowPad;
  const int64_t input_step = kBlockTiles * step + kRowPad, sum_step = kBlockTiles * outputs + kRowPad;  // of a place
  float *inputs = scratch, *sums = scratch + kPlaces * input_step;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t first = at * kBlockTiles;
    const int64_t count = tiles.all - first < kBlockTiles ? tiles.all - first : kBlockTiles;
    const auto place_of = [&](int64_t t, auto function, float* data, int64_t data_step) {
      const int64_t line = (first + t) / tiles.across;
      function(p, line / tiles.down, line % tiles.down * kTile, (first + t) % tiles.across * kTile, data, data_step);
    };
    for (int64_t t = 0; t < count; ++t) place_of(t, read_tile, inputs + t * step, input_step);
    for (int64_t place = 0; place < kPlaces; ++place)
      block(inputs + place * input_step, step, count, p.K, p.N, p.weight + place * place_step(p.N, p.K), 0, p.N,
            {sums + place * sum_step, outputs, outputs, 0, {}});
    for (int64_t t = 0; t < count; ++t) place_of(t, write_tile, sums + t * outputs, sum_step);
  }
}

}  // namespace

ProductKernels MASK2FORMER_PRODUCT_KERNELS() {
  return {packed_floats,      panels,
          pack,               linear_scratch,
          linear,             few_rows_scratch,
          few_rows,           windows,
          feed_forward_scratch,
          feed_forward,       transformed_floats,
          transform,          convolution_scratch,
          convolution_blocks, convolution};
}

}  // namespace mask2former::cpu
