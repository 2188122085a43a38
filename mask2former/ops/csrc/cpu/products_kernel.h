// Products of float32 matrices with what follows them, on the vectors of kernel.h and points_kernel.h, which are included before.
//
// The innermost loop keeps kTileRows x kTileColumns sums in registers and reads kTileColumns weights, which lie side by
// side, and one number of each row a step. The weights are packed for that: panels of kTileColumns rows of the matrix,
// each panel cut into pieces of at most kDepth columns, which fit the first cache with the rows of a tile. Blocks of rows
// are copied into scratch memory, which makes rows of any place dense and keeps them in the second cache. A row's sums
// are added up in one order, wherever the row is.

namespace mask2former::cpu {
namespace {

using F = Vec<float>;
constexpr int64_t kTileRows = 6;
constexpr int64_t kTileColumns = 2 * kLanes;
constexpr int64_t kDepth = 256;
constexpr int64_t kBlockRows = 8 * kTileRows;
constexpr int64_t kRowPad = 16;  // rows at steps of a power of two would share few sets of the cache

inline int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// Columns of each piece of K; the last may have fewer.
inline int64_t depth_of(int64_t K) { return parts(K, parts(K, kDepth)); }

// ---- weights

int64_t panels(int64_t N) { return parts(N, kTileColumns); }

int64_t packed_floats(int64_t N, int64_t K) { return panels(N) * kTileColumns * K; }

// Piece by piece, in each panel by panel, in each column by column: kTileColumns numbers. `at(n, k)` gives a weight.
template <typename At>
void pack_with(At at, int64_t N, int64_t K, float* packed, int64_t begin, int64_t end) {
  const int64_t depth = depth_of(K), all = panels(N) * kTileColumns;
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t k0 = 0; k0 < K; k0 += depth) {
      const int64_t k1 = k0 + depth < K ? k0 + depth : K;
      float* to = packed + k0 * all + panel * kTileColumns * (k1 - k0);
      for (int64_t kk = k0; kk < k1; kk += 16)
        for (int64_t j = 0; j < kTileColumns; ++j) {
          const int64_t n = panel * kTileColumns + j, stop = kk + 16 < k1 ? kk + 16 : k1;
          for (int64_t k = kk; k < stop; ++k) to[(k - k0) * kTileColumns + j] = n < N ? at(n, k) : 0.0f;
        }
    }
}

void pack(const float* weight, int64_t N, int64_t K, float* packed, int64_t begin, int64_t end) {
  pack_with([=](int64_t n, int64_t k) { return weight[n * K + k]; }, N, K, packed, begin, end);
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

struct After {
  const float* bias;      // of the tile's first column, or null
  const float* residual;  // of the tile's first number, or null
  int64_t residual_step;
  Activation activation;
};

inline F finish(F sum, const float* bias, const float* residual, Activation activation) {
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
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < 2; ++j) {
      F total = sum[i][j];
      if (!starts) total += load(out + i * out_step + j * kLanes);
      if (after != nullptr)
        total = finish(total, after->bias == nullptr ? nullptr : after->bias + j * kLanes,
                       after->residual == nullptr ? nullptr : after->residual + i * after->residual_step + j * kLanes,
                       after->activation);
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
  float sums[kTileRows * kTileColumns], added[kTileRows * kTileColumns] = {}, bias[kTileColumns] = {};
  After own = {};
  if (after != nullptr) {
    own = *after;
    if (own.bias != nullptr) std::memcpy(bias, own.bias, columns * sizeof(float));
    own.bias = own.bias == nullptr ? nullptr : bias;
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

// out (rows, N) = what follows (a (rows, K) times the packed weight).
void block(const float* a, int64_t a_step, int64_t rows, int64_t K, int64_t N, const float* weight, float* out,
           int64_t out_step, const After& after) {
  const int64_t depth = depth_of(K), all = panels(N) * kTileColumns;
  for (int64_t k0 = 0; k0 < K; k0 += depth) {
    const int64_t piece = k0 + depth < K ? depth : K - k0;
    const bool starts = k0 == 0, ends = k0 + depth >= K;
    for (int64_t n = 0; n < N; n += kTileColumns) {
      const float* b = weight + k0 * all + n * piece;
      for (int64_t r = 0; r < rows; r += kTileRows) {
        const int64_t count = rows - r < kTileRows ? rows - r : kTileRows;
        const After here = {after.bias == nullptr ? nullptr : after.bias + n,
                            after.residual == nullptr ? nullptr : after.residual + r * after.residual_step + n,
                            after.residual_step, after.activation};
        const float* from = a + r * a_step + k0;
        float* to = out + r * out_step + n;
        fetch(b + kTileColumns * piece, kTileColumns * piece, r / kTileRows, kBlockRows / kTileRows);
        if (N - n >= kTileColumns)
          tile_of(count, from, a_step, b, piece, to, out_step, starts, ends ? &here : nullptr);
        else
          narrow_tile(count, N - n, from, a_step, b, piece, to, out_step, starts, ends ? &here : nullptr);
      }
    }
  }
}

void copy_rows(const RowPlaces& places, int64_t begin, int64_t count, int64_t K, float* to) {
  for (int64_t r = begin; r < begin + count; ++r, to += K + kRowPad) {
    const int64_t line = r / places.width;
    const float* from = places.first + line / places.height * places.image + line % places.height * places.down +
                        r % places.width * places.right;
    std::memcpy(to, from, K * sizeof(float));
  }
}

// ---- linear maps

int64_t linear_scratch(const Linear& p) { return kBlockRows * (p.K + kRowPad); }

void linear(const Linear& p, int64_t begin, int64_t end, float* scratch) {
  for (int64_t r = begin; r < end; r += kBlockRows) {
    const int64_t count = end - r < kBlockRows ? end - r : kBlockRows;
    copy_rows(p.x, r, count, p.K, scratch);
    const After after = {p.bias, p.residual == nullptr ? nullptr : p.residual + r * p.out_step, p.out_step,
                         p.activation};
    block(scratch, p.K + kRowPad, count, p.K, p.N, p.weight, p.out + r * p.out_step, p.out_step, after);
  }
}

int64_t feed_forward_scratch(const FeedForward& p) {
  return kBlockRows * (p.K + kRowPad + panels(p.F) * kTileColumns + kRowPad);
}

void feed_forward(const FeedForward& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t hidden_step = panels(p.F) * kTileColumns + kRowPad;
  float* hidden = scratch + kBlockRows * (p.K + kRowPad);
  for (int64_t r = begin; r < end; r += kBlockRows) {
    const int64_t count = end - r < kBlockRows ? end - r : kBlockRows;
    copy_rows(p.x, r, count, p.K, scratch);
    block(scratch, p.K + kRowPad, count, p.K, p.F, p.weight1, hidden, hidden_step,
          {p.bias1, nullptr, 0, p.activation});
    const After after = {p.bias2, p.residual == nullptr ? nullptr : p.residual + r * p.out_step, p.out_step,
                         Activation::kNone};
    block(hidden, hidden_step, count, p.F, p.N, p.weight2, p.out + r * p.out_step, p.out_step, after);
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

int64_t transformed_floats(int64_t N, int64_t K) { return kPlaces * packed_floats(N, K); }

// The weight is (N, K, 3, 3); of each place a matrix (N, K), packed.
void transform(const float* weight, int64_t N, int64_t K, float* transformed, int64_t begin, int64_t end) {
  const int64_t depth = depth_of(K), all = panels(N) * kTileColumns, size = packed_floats(N, K);
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t k = 0; k < K; ++k) {
      const int64_t k0 = k / depth * depth, piece = k0 + depth < K ? depth : K - k0;
      float* to = transformed + k0 * all + panel * kTileColumns * piece + (k - k0) * kTileColumns;
      float taps[3][3][kTileColumns] = {};
      for (int64_t j = 0; j < kTileColumns && panel * kTileColumns + j < N; ++j)
        for (int64_t at = 0; at < 9; ++at)
          taps[at / 3][at % 3][j] = weight[((panel * kTileColumns + j) * K + k) * 9 + at];
      for (int64_t j = 0; j < kTileColumns; j += kLanes) {
        F w[3][3], half[kWindow][3], points[kWindow][kWindow];
        for (int64_t at = 0; at < 9; ++at) w[at / 3][at % 3] = load(&taps[at / 3][at % 3][j]);
        for (int64_t x = 0; x < 3; ++x) weights_at_points(&w[0][x], 3, &half[0][x], 3);
        for (int64_t y = 0; y < kWindow; ++y) weights_at_points(half[y], 1, points[y], 1);
        for (int64_t place = 0; place < kPlaces; ++place)
          store(to + place * size + j, points[place / kWindow][place % kWindow]);
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
        if (p.bias != nullptr) result += load(p.bias + n);
        if (p.relu) result = relu(result);
        store(p.out + at, result);
      }
  }
}

// K and N are multiples of kLanes.
void convolution(const Convolution3x3& p, int64_t begin, int64_t end, float* scratch) {
  const Tiles tiles(p);
  const int64_t outputs = panels(p.N) * kTileColumns, step = p.K + kRowPad, size = packed_floats(p.N, p.K);
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
      block(inputs + place * input_step, step, count, p.K, p.N, p.weight + place * size, sums + place * sum_step, outputs,
            {nullptr, nullptr, 0, Activation::kNone});
    for (int64_t t = 0; t < count; ++t) place_of(t, write_tile, sums + t * outputs, sum_step);
  }
}

}  // namespace

ProductKernels MASK2FORMER_PRODUCT_KERNELS() {
  return {packed_floats,      panels,    pack,
          linear_scratch,     linear,    feed_forward_scratch,
          feed_forward,       transformed_floats, transform,
          convolution_scratch, convolution_blocks, convolution};
}

}  // namespace mask2former::cpu
