// The CPU kernels. Included once for each instruction set, with MASK2FORMER_VECTOR_BYTES and MASK2FORMER_KERNELS set; all
// is in an unnamed namespace, so that each inclusion keeps its own code.
//
// One row is one (image, query, head). Its L * P samples are first turned into four cells and four factors each, in
// loops over the samples that the compiler vectorises; then the cells' channels, which lie side by side, are read and
// summed in vectors. Cells outside of a map read from a row of zeros (and their gradients go to a row that nobody reads),
// so that neither an infinity at the map's edge nor a branch is met.

#if defined(__clang__)
#define MASK2FORMER_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t Mask2formerShuffle __attribute__((vector_size(16)));
#define MASK2FORMER_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Mask2formerShuffle{__VA_ARGS__})
#endif

namespace mask2former::cpu {
namespace {

constexpr int kVectorBytes = MASK2FORMER_VECTOR_BYTES;
constexpr int kMaxVectors = kVectorBytes == 16 ? 8 : 4;  // accumulators that fit the registers
constexpr int64_t kPad = 16;                             // loops over samples have no remainder

template <typename A>
struct Vector {
  typedef A type __attribute__((vector_size(kVectorBytes)));
  static constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(A));
};
template <typename A>
using Vec = typename Vector<A>::type;

// Whole numbers as wide as A, as comparisons of Vec<A> give them.
template <typename A>
using Int = std::conditional_t<std::is_same_v<A, float>, int32_t, int64_t>;
template <typename A>
struct IntVector {
  typedef Int<A> type __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using IntVec = typename IntVector<A>::type;

typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfVecU16 __attribute__((vector_size(kVectorBytes / 2)));

// ---- loads and stores; channels of any type become vectors of the type that is summed in

inline Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec<float> load(const BFloat16* p) {
  HalfVecU16 bits;
  std::memcpy(&bits, p, sizeof bits);
  return (Vec<float>)(__builtin_convertvector(bits, VecU32) << 16);
}

inline void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }

inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }

inline void store(BFloat16* p, Vec<float> v) {  // to nearest, ties to even
  const VecU32 bits = (VecU32)v;
  const VecU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU32 is_nan = (VecU32)(v != v);
  const VecU32 result = (rounded & ~is_nan) | (0x7fc0u & is_nan);
  const HalfVecU16 half = __builtin_convertvector(result, HalfVecU16);
  std::memcpy(p, &half, sizeof half);
}

// The first `count` channels, fewer than a vector.
template <typename T>
inline auto load_some(const T* p, int64_t count) {
  T buffer[Vector<typename SumType<T>::type>::lanes] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}

template <typename T, typename A = typename SumType<T>::type>
inline void store_some(T* p, Vec<A> v, int64_t count) {
  T buffer[Vector<A>::lanes];
  store(buffer, v);
  std::memcpy(p, buffer, count * sizeof(T));
}

// ---- small maths

template <typename A>
inline A sum_lanes(Vec<A> v) {
  A lanes[Vector<A>::lanes];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = Vector<A>::lanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Sums of the lanes of four vectors that lie side by side in memory.
inline void sum_lanes_of_four(const Vec<double>* vectors, double* sums) {
  for (int i = 0; i < 4; ++i) sums[i] = sum_lanes<double>(vectors[i]);
}

inline void sum_lanes_of_four(const Vec<float>* vectors, float* sums) {
  typedef float Quad __attribute__((vector_size(16)));
  Quad folded[4];
  for (int i = 0; i < 4; ++i) {
    const char* bytes = reinterpret_cast<const char*>(vectors + i);
    std::memcpy(&folded[i], bytes, 16);
    for (int at = 16; at < kVectorBytes; at += 16) {
      Quad part;
      std::memcpy(&part, bytes + at, 16);
      folded[i] += part;
    }
  }
  const Quad low = MASK2FORMER_SHUFFLE(folded[0], folded[1], 0, 4, 1, 5) +  // 0x+0z 1x+1z 0y+0w 1y+1w
                   MASK2FORMER_SHUFFLE(folded[0], folded[1], 2, 6, 3, 7);
  const Quad high = MASK2FORMER_SHUFFLE(folded[2], folded[3], 0, 4, 1, 5) +
                    MASK2FORMER_SHUFFLE(folded[2], folded[3], 2, 6, 3, 7);
  const Quad all = MASK2FORMER_SHUFFLE(low, high, 0, 1, 4, 5) + MASK2FORMER_SHUFFLE(low, high, 2, 3, 6, 7);
  std::memcpy(sums, &all, sizeof all);
}

// exp of numbers that are not positive. 2^n * e^r with |r| <= ln 2 / 2; the series to r^7 leaves a relative error of 5e-9.
inline Vec<float> exp_of(Vec<float> x) {
  const Vec<float> zero = {};
  const VecI32 underflow = x < -87.0f;
  const Vec<float> clamped = underflow ? zero - 87.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
  const Vec<float> n = (clamped * 1.44269504f + magic) - magic;
  const Vec<float> r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> series = r * (1.0f / 5040) + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const VecI32 exponent = (__builtin_convertvector(n, VecI32) + 127) << 23;
  return underflow ? zero : series * (Vec<float>)exponent;
}

inline Vec<double> exp_of(Vec<double> x) {
  for (int i = 0; i < Vector<double>::lanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// ---- the samples of one row

// Arrays over samples, carved out of one block of memory.
template <typename T>
struct Scratch {
  using A = typename SumType<T>::type;
  A *width, *height;                          // of each sample's level, all L * P
  A* xy;                                      // points as they are in memory
  A *x, *y, *weight;                          // pixels; attention weights, all L * P
  A *fx, *fy;                                 // fractions
  A* factor[4];                               // bilinear factor times attention weight: 00, 01 (right), 10 (below), 11
  Int<A>*start;                               // of each sample's level
  Int<A>* cell[4];                            // -1: outside
  Vec<A>* dots;                               // (L * P, 4)
  T* zeros;                                   // (D)
  A* ignored;                                 // (D)

  static int64_t padded(int64_t n) { return (n + 2 * kPad - 1) / kPad * kPad; }

  static int64_t bytes(const Problem<T>& p) {
    const int64_t samples = padded(p.L * p.P), channels = padded(p.D);
    return 64 + samples * (13 * sizeof(A) + 5 * sizeof(Int<A>) + 4 * kVectorBytes) +
           channels * (sizeof(A) + sizeof(T));
  }

  // `block` is zeroed; it holds bytes(p).
  Scratch(const Problem<T>& p, char* block) {
    block += (64 - reinterpret_cast<uintptr_t>(block) % 64) % 64;
    const int64_t samples = padded(p.L * p.P), channels = padded(p.D);
    const auto take = [&block](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(block);
      block += count * sizeof(*pointer);
    };
    take(dots, 4 * samples);
    for (A** array : {&width, &height, &x, &y, &weight, &fx, &fy, &factor[0], &factor[1], &factor[2], &factor[3]})
      take(*array, samples);
    for (Int<A>** array : {&start, &cell[0], &cell[1], &cell[2], &cell[3]}) take(*array, samples);
    take(xy, 2 * samples);
    take(ignored, channels);
    take(zeros, channels);
    for (int64_t k = 0; k < p.L * p.P; ++k) {
      const int64_t level = k / p.P;
      width[k] = static_cast<A>(p.widths[level]);
      height[k] = static_cast<A>(p.heights[level]);
      start[k] = p.starts[level];
    }
  }
};

// Softmax over the row's scores, into `weight`, all L * P.
template <typename A>
inline void softmax(const A* scores, int64_t count, A* weight) {
  constexpr int lanes = Vector<A>::lanes;
  std::memcpy(weight, scores, count * sizeof(A));
  const int64_t padded = (count + lanes - 1) / lanes * lanes;
  for (int64_t k = count; k < padded; ++k) weight[k] = -static_cast<A>(__builtin_inff());
  Vec<A> high = load(weight);
  for (int64_t k = lanes; k < padded; k += lanes) {
    const Vec<A> next = load(weight + k);
    high = next > high ? next : high;
  }
  A top = high[0];
  for (int i = 1; i < lanes; ++i) top = high[i] > top ? high[i] : top;
  Vec<A> sum = {};
  for (int64_t k = 0; k < padded; k += lanes) {
    const Vec<A> e = exp_of(load(weight + k) - top);
    store(weight + k, e);
    sum += e;
  }
  const A scale = 1 / sum_lanes<A>(sum);
  for (int64_t k = 0; k < padded; k += lanes) store(weight + k, load(weight + k) * scale);
}

struct Row {
  int64_t b, q, m;
};

// Fills x, y (pixels) and weight of the samples [first, first + count) of a row, and some behind them.
template <typename T>
inline void read_samples(const Problem<T>& p, Row row, int64_t first, int64_t count, const Scratch<T>& s) {
  using A = typename SumType<T>::type;
  const int64_t samples = p.L * p.P;
  const int64_t at = ((row.b * p.Q + row.q) * p.M + row.m) * samples;
  std::memcpy(s.xy, p.points + 2 * (at + first), 2 * count * sizeof(A));
  const A* __restrict xy = s.xy;
  A* __restrict x = s.x + first;
  A* __restrict y = s.y + first;
  const A* __restrict width = s.width + first;
  const A* __restrict height = s.height + first;
  if (!p.fused) {
    std::memcpy(s.weight + first, p.scores + at + first, count * sizeof(A));
    for (int64_t k = 0; k < count; k += kPad)
      for (int64_t i = k; i < k + kPad; ++i) {
        x[i] = xy[2 * i] * width[i] - A(0.5);
        y[i] = xy[2 * i + 1] * height[i] - A(0.5);
      }
    return;
  }
  softmax(p.scores + at, samples, s.weight);
  int64_t level = 0;
  while (level + 1 < p.L && row.q >= p.starts[level + 1]) ++level;
  const int32_t cell = static_cast<int32_t>(row.q) - p.starts[level];
  // times the width before the division: on the query's own level the result is exact
  const A own_width = static_cast<A>(p.widths[level]), own_height = static_cast<A>(p.heights[level]);
  const A column = static_cast<A>(cell % p.widths[level]) + A(0.5);
  const A line = static_cast<A>(cell / p.widths[level]) + A(0.5);
  for (int64_t k = 0; k < count; k += kPad)
    for (int64_t i = k; i < k + kPad; ++i) {
      x[i] = column * width[i] / own_width - A(0.5) + xy[2 * i];
      y[i] = line * height[i] / own_height - A(0.5) + xy[2 * i + 1];
    }
}

// Keeps NaN. Far outside is as good as just outside, and fits an integer.
template <typename A>
inline Vec<A> clamp(Vec<A> x, Vec<A> size) {
  const Vec<A> low = Vec<A>{} - 2, high = size + 1;
  x = x < low ? low : x;
  return x > high ? high : x;
}

// Cells and factors of the samples [first, first + count), and of some behind them.
template <typename T>
inline void find_cells(int64_t first, int64_t count, const Scratch<T>& s) {
  using A = typename SumType<T>::type;
  constexpr int lanes = Vector<A>::lanes;
  const Vec<A> outside = Vec<A>{} - 2;
  for (int64_t k = first; k < first + count; k += lanes) {
    const Vec<A> width = load(s.width + k), height = load(s.height + k), weight = load(s.weight + k);
    const Vec<A> x = clamp<A>(load(s.x + k), width), y = clamp<A>(load(s.y + k), height);
    // a NaN is no place: outside, and its factors spread it; from here -2 is the least, and adding 2 makes
    // cutting off the same as rounding down
    const IntVec<A> j = __builtin_convertvector((x == x ? x : outside) + 2, IntVec<A>) - 2;
    const IntVec<A> i = __builtin_convertvector((y == y ? y : outside) + 2, IntVec<A>) - 2;
    const IntVec<A> w = __builtin_convertvector(width, IntVec<A>), h = __builtin_convertvector(height, IntVec<A>);
    const Vec<A> fx = x - __builtin_convertvector(j, Vec<A>), fy = y - __builtin_convertvector(i, Vec<A>);
    const Vec<A> below = weight * fy, above = weight - below;
    store(s.fx + k, fx);
    store(s.fy + k, fy);
    store(s.factor[0] + k, above - above * fx);
    store(s.factor[1] + k, above * fx);
    store(s.factor[2] + k, below - below * fx);
    store(s.factor[3] + k, below * fx);
    IntVec<A> start;
    std::memcpy(&start, s.start + k, sizeof start);
    const IntVec<A> cell = start + i * w + j;
    const IntVec<A> in_left = (j >= 0) & (j < w), in_right = (j >= -1) & (j + 1 < w);
    const IntVec<A> in_top = (i >= 0) & (i < h), in_bottom = (i >= -1) & (i + 1 < h);
    const IntVec<A> cells[4] = {cell | ~(in_top & in_left), (cell + 1) | ~(in_top & in_right),
                                (cell + w) | ~(in_bottom & in_left), (cell + w + 1) | ~(in_bottom & in_right)};
    for (int corner = 0; corner < 4; ++corner) std::memcpy(s.cell[corner] + k, &cells[corner], sizeof start);
  }
}

// ---- forward

// N vectors of channels of one row. `map` is the head's first channel in cell 0, `stride` the way to the next cell.
template <typename T, int N>
inline void sum_samples(const T* map, int64_t stride, int64_t samples, const Scratch<T>& s, const T* zeros, T* output) {
  using A = typename SumType<T>::type;
  constexpr int lanes = Vector<A>::lanes;
  Vec<A> sums[N] = {};
  for (int64_t k = 0; k < samples; ++k) {
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t cell = s.cell[corner][k];
      const T* channels = cell < 0 ? zeros : map + cell * stride;
      const A factor = s.factor[corner][k];
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) sums[i] += load(channels + i * lanes) * factor;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) store(output + i * lanes, sums[i]);
}

// The last channels, fewer than a vector.
template <typename T>
inline void sum_samples_rest(const T* map, int64_t stride, int64_t samples, const Scratch<T>& s, int64_t count,
                             T* output) {
  Vec<typename SumType<T>::type> sum = {};
  for (int64_t k = 0; k < samples; ++k)
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t cell = s.cell[corner][k];
      const T* channels = cell < 0 ? s.zeros : map + cell * stride;
      sum += load_some(channels, count) * s.factor[corner][k];
    }
  store_some(output, sum, count);
}

template <typename T>
inline void forward_row(const Problem<T>& p, Row row, const Scratch<T>& s) {
  constexpr int lanes = Vector<typename SumType<T>::type>::lanes;
  const int64_t samples = p.L * p.P, stride = p.D;
  read_samples(p, row, 0, samples, s);
  find_cells(0, samples, s);
  const T* map = p.value + (row.b * p.M + row.m) * p.S * stride;
  T* output = p.output + ((row.b * p.Q + row.q) * p.M + row.m) * p.D;
  int64_t c = 0;
  for (; c + kMaxVectors * lanes <= p.D; c += kMaxVectors * lanes)
    sum_samples<T, kMaxVectors>(map + c, stride, samples, s, s.zeros + c, output + c);
  if constexpr (kMaxVectors > 4)
    for (; c + 4 * lanes <= p.D; c += 4 * lanes)
      sum_samples<T, 4>(map + c, stride, samples, s, s.zeros + c, output + c);
  for (; c + 2 * lanes <= p.D; c += 2 * lanes)
    sum_samples<T, 2>(map + c, stride, samples, s, s.zeros + c, output + c);
  for (; c + lanes <= p.D; c += lanes) sum_samples<T, 1>(map + c, stride, samples, s, s.zeros + c, output + c);
  if (c < p.D) sum_samples_rest(map + c, stride, samples, s, p.D - c, output + c);
}

// Neighbouring queries of one head read nearly the same cells, so a head does a block of them before the next head.
template <typename T>
void forward(const Problem<T>& p, int64_t begin, int64_t end, char* block) {
  const Scratch<T> s(p, block);
  const int64_t blocks = p.query_blocks();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t m = task % p.M, b = task / p.M / blocks, first = task / p.M % blocks * p.kQueryBlock;
    const int64_t last = first + p.kQueryBlock < p.Q ? first + p.kQueryBlock : p.Q;
    for (int64_t q = first; q < last; ++q) forward_row(p, Row{b, q, m}, s);
  }
}

// ---- backward

// Adds to the value's gradient, and to `dots` the products of output gradient and cells, for N vectors of channels.
template <typename T, int N>
inline void spread_gradient(const T* map, typename SumType<T>::type* grad_map, int64_t stride, int64_t first,
                            int64_t count, const Scratch<T>& s, const T* grad_output) {
  using A = typename SumType<T>::type;
  constexpr int lanes = Vector<A>::lanes;
  Vec<A> gradient[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) gradient[i] = load(grad_output + i * lanes);
  for (int64_t k = first; k < first + count; ++k) {
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t cell = s.cell[corner][k];
      const T* channels = cell < 0 ? s.zeros : map + cell * stride;
      A* target = cell < 0 ? s.ignored : grad_map + cell * stride;
      const A factor = s.factor[corner][k];
      Vec<A> dot = s.dots[4 * k + corner];
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        dot += load(channels + i * lanes) * gradient[i];
        store(target + i * lanes, load(target + i * lanes) + gradient[i] * factor);
      }
      s.dots[4 * k + corner] = dot;
    }
  }
}

template <typename T>
inline void spread_gradient_rest(const T* map, typename SumType<T>::type* grad_map, int64_t stride, int64_t first,
                                 int64_t count, const Scratch<T>& s, int64_t channels_left, const T* grad_output) {
  using A = typename SumType<T>::type;
  const Vec<A> gradient = load_some(grad_output, channels_left);
  for (int64_t k = first; k < first + count; ++k)
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t cell = s.cell[corner][k];
      if (cell < 0) continue;
      s.dots[4 * k + corner] += load_some(map + cell * stride, channels_left) * gradient;
      A* target = grad_map + cell * stride;
      store_some(target, load_some(target, channels_left) + gradient * s.factor[corner][k], channels_left);
    }
}

// Gradients of points and scores from the dots of the samples [first, first + count).
template <typename T>
inline void finish_samples(const Problem<T>& p, int64_t at, int64_t first, int64_t count, const Scratch<T>& s) {
  using A = typename SumType<T>::type;
  for (int64_t k = first; k < first + count; ++k) {
    A dots[4];
    sum_lanes_of_four(s.dots + 4 * k, dots);
    const A d00 = dots[0], d01 = dots[1], d10 = dots[2], d11 = dots[3];
    const A fx = s.fx[k], fy = s.fy[k], weight = s.weight[k];
    const A top = d00 + (d01 - d00) * fx, bottom = d10 + (d11 - d10) * fx;
    const A along_x = (d01 - d00) * (1 - fy) + (d11 - d10) * fy;
    p.grad_scores[at + k] = top + (bottom - top) * fy;
    p.grad_points[2 * (at + k)] = weight * along_x * (p.fused ? A(1) : s.width[k]);
    p.grad_points[2 * (at + k) + 1] = weight * (bottom - top) * (p.fused ? A(1) : s.height[k]);
  }
}

template <typename T>
void backward(const Problem<T>& p, int64_t begin, int64_t end, char* block) {
  using A = typename SumType<T>::type;
  constexpr int lanes = Vector<A>::lanes;
  const Scratch<T> s(p, block);
  const int64_t samples = p.L * p.P, stride = p.D;
  while (begin < end) {  // all levels of one head that are in the range, together
    const int64_t head = begin / p.L, level = begin % p.L;
    const int64_t levels = p.L - level < end - begin ? p.L - level : end - begin;
    const int64_t first = level * p.P, count = levels * p.P;
    const int64_t b = head / p.M, m = head % p.M;
    const int64_t map_at = head * p.S * stride;
    for (int64_t q = 0; q < p.Q; ++q) {
      const int64_t row = (b * p.Q + q) * p.M + m;
      read_samples(p, Row{b, q, m}, first, count, s);
      find_cells(first, count, s);
      std::memset(s.dots + 4 * first, 0, 4 * count * kVectorBytes);
      const T* map = p.value + map_at;
      A* grad_map = p.grad_value + map_at;
      const T* gradient = p.grad_output + row * p.D;
      int64_t c = 0;
      for (; c + 2 * lanes <= p.D; c += 2 * lanes)
        spread_gradient<T, 2>(map + c, grad_map + c, stride, first, count, s, gradient + c);
      for (; c + lanes <= p.D; c += lanes)
        spread_gradient<T, 1>(map + c, grad_map + c, stride, first, count, s, gradient + c);
      if (c < p.D) spread_gradient_rest(map + c, grad_map + c, stride, first, count, s, p.D - c, gradient + c);
      finish_samples(p, row * samples, first, count, s);
    }
    begin += levels;
  }
}

template <typename T>
void softmax_backward(const Problem<T>& p, int64_t begin, int64_t end, char* block) {
  using A = typename SumType<T>::type;
  const Scratch<T> s(p, block);
  const int64_t samples = p.L * p.P;
  for (int64_t row = begin; row < end; ++row) {
    softmax(p.scores + row * samples, samples, s.weight);
    A* gradient = p.grad_scores + row * samples;
    A mean = 0;
    for (int64_t k = 0; k < samples; ++k) mean += s.weight[k] * gradient[k];
    for (int64_t k = 0; k < samples; ++k) gradient[k] = s.weight[k] * (gradient[k] - mean);
  }
}

template <typename T>
int64_t scratch_bytes(const Problem<T>& p) {
  return Scratch<T>::bytes(p);
}

}  // namespace

template <typename T>
Kernels<T> MASK2FORMER_KERNELS() {
  return {scratch_bytes<T>, forward<T>, backward<T>, softmax_backward<T>};
}
template Kernels<float> MASK2FORMER_KERNELS<float>();
template Kernels<double> MASK2FORMER_KERNELS<double>();
template Kernels<BFloat16> MASK2FORMER_KERNELS<BFloat16>();

}  // namespace mask2former::cpu
