// Attention on the vectors of kernel.h and points_kernel.h, which are included before.
//
// One head of some queries is a task. Keys and values come in blocks that stay in the caches: keys turned, so that a
// panel of them lies side by side for each of a head's numbers. A few queries at a time get their scores with a block,
// and the softmax's numerators, and add the values up in these proportions; what the earlier blocks gave is scaled to
// the largest score so far (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). A query's sums
// are added up in one order, wherever the query is.

namespace mask2former::cpu {
namespace {

using AttentionVec = Vec<float>;
typedef float Four __attribute__((vector_size(16)));
constexpr int64_t kTileQueries = 6;  // times two vectors: sums that fit the registers; at most kLanes
constexpr int64_t kPanel = 2 * kLanes;
constexpr int64_t kLine = 16;  // of the cache

constexpr int64_t rounded_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

constexpr int64_t kKeys = rounded_up(144, kPanel);  // of a block
constexpr int64_t kScoreStep = kKeys + 16;          // rows at steps of a power of two would share few sets of the cache

// Scratch memory of a task.
struct Head {
  int64_t rows, dim, columns;  // queries; numbers of a head, and those rounded up to whole vectors
  float *q, *k, *v;            // (rows, dim), scaled; panels; (kKeys, columns)
  float *out, *top, *sum;      // (rows, columns), (rows), (rows): sums so far, largest scores, sums of the proportions
  float* scores;               // (kTileQueries, kScoreStep)

  static int64_t floats(int64_t rows, int64_t dim) {
    const int64_t columns = rounded_up(dim, kLanes);
    return rows * (dim + columns + 2) + kKeys * (dim + columns) + kTileQueries * kScoreStep + 7 * kLine;
  }

  Head(int64_t rows, int64_t dim, float* memory) : rows(rows), dim(dim), columns(rounded_up(dim, kLanes)) {
    const auto take = [&memory](float*& pointer, int64_t count) {
      pointer = memory;
      memory += rounded_up(count, kLine);
    };
    take(k, kKeys * dim);
    take(v, kKeys * columns);
    take(scores, kTileQueries * kScoreStep);
    take(out, rows * columns);
    take(q, rows * dim);
    take(top, rows);
    take(sum, rows);
  }
};

// ---- blocks

// Four rows of four numbers, rows to columns.
inline void turn(Four* x) {
  const Four low = MASK2FORMER_SHUFFLE(x[0], x[1], 0, 4, 1, 5), high = MASK2FORMER_SHUFFLE(x[0], x[1], 2, 6, 3, 7);
  const Four low2 = MASK2FORMER_SHUFFLE(x[2], x[3], 0, 4, 1, 5), high2 = MASK2FORMER_SHUFFLE(x[2], x[3], 2, 6, 3, 7);
  x[0] = MASK2FORMER_SHUFFLE(low, low2, 0, 1, 4, 5);
  x[1] = MASK2FORMER_SHUFFLE(low, low2, 2, 3, 6, 7);
  x[2] = MASK2FORMER_SHUFFLE(high, high2, 0, 1, 4, 5);
  x[3] = MASK2FORMER_SHUFFLE(high, high2, 2, 3, 6, 7);
}

// Ask for numbers of a row. Rows are far apart: without, each would be waited for. GCC leaves out calls of a function
// that does nothing else, so that there must be none.
__attribute__((always_inline)) inline void fetch_row(const float* row, int64_t count) {
  for (int64_t d = 0; d < count; d += kLine) __builtin_prefetch(row + d);
}

// key(i) and value(i) point to the numbers of the block's i-th key. Behind the last key of a panel are copies of it.
template <typename Key, typename Value>
inline void pack_block(const Head& h, int64_t count, Key key, Value value) {
  for (int64_t n = 0; n < count; ++n) {
    fetch_row(key(n), h.dim);
    fetch_row(value(n), h.dim);
  }
  for (int64_t n = 0; n < rounded_up(count, kLanes); n += 4) {
    const float* rows[4];
    for (int64_t i = 0; i < 4; ++i) rows[i] = key(n + i < count ? n + i : count - 1);
    float* to = h.k + n / kPanel * kPanel * h.dim + n % kPanel;
    int64_t d = 0;
    for (; d + 4 <= h.dim; d += 4) {
      Four part[4];
      for (int64_t i = 0; i < 4; ++i) std::memcpy(part + i, rows[i] + d, sizeof(Four));
      turn(part);
      for (int64_t i = 0; i < 4; ++i) std::memcpy(to + (d + i) * kPanel, part + i, sizeof(Four));
    }
    for (; d < h.dim; ++d)
      for (int64_t i = 0; i < 4; ++i) to[d * kPanel + i] = rows[i][d];
  }
  for (int64_t n = 0; n < count; ++n) {
    const float* from = value(n);
    int64_t c = 0;
    for (; c + kLanes <= h.dim; c += kLanes) store(h.v + n * h.columns + c, load(from + c));
    if (c < h.dim) store(h.v + n * h.columns + c, load_some(from + c, h.dim - c));
  }
}

// ---- products

// out (R, V vectors) = a (R, depth) b (depth, V vectors), plus `out` times a number a row if there is one.
template <int R, int V>
inline void product(const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t depth, const float* kept,
                    float* out, int64_t out_step) {
  AttentionVec sum[R][V];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < V; ++j)
      sum[i][j] = kept == nullptr ? AttentionVec{} : load(out + i * out_step + j * kLanes) * kept[i];
  for (int64_t k = 0; k < depth; ++k) {
    AttentionVec right[V];
    for (int j = 0; j < V; ++j) right[j] = load(b + k * b_step + j * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const float left = a[i * a_step + k];
      for (int j = 0; j < V; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < V; ++j) store(out + i * out_step + j * kLanes, sum[i][j]);
}

template <int V>
inline void product_of(int64_t rows, const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t depth,
                       const float* kept, float* out, int64_t out_step) {
  switch (rows) {
    case 1: return product<1, V>(a, a_step, b, b_step, depth, kept, out, out_step);
    case 2: return product<2, V>(a, a_step, b, b_step, depth, kept, out, out_step);
    case 3: return product<3, V>(a, a_step, b, b_step, depth, kept, out, out_step);
    case 4: return product<4, V>(a, a_step, b, b_step, depth, kept, out, out_step);
    case 5: return product<5, V>(a, a_step, b, b_step, depth, kept, out, out_step);
    default: return product<6, V>(a, a_step, b, b_step, depth, kept, out, out_step);
  }
}

// The same for any number of columns, rounded up to whole vectors; from panel to panel of b it is `panel_step`.
inline void product_of(int64_t rows, int64_t columns, const float* a, int64_t a_step, const float* b, int64_t b_step,
                       int64_t panel_step, int64_t depth, const float* kept, float* out, int64_t out_step) {
  for (int64_t n = 0; n < columns; n += kPanel, b += panel_step)
    if (columns - n > kLanes)
      product_of<2>(rows, a, a_step, b, b_step, depth, kept, out + n, out_step);
    else
      product_of<1>(rows, a, a_step, b, b_step, depth, kept, out + n, out_step);
}

// ---- softmax

inline AttentionVec larger(AttentionVec a, AttentionVec b) { return a > b ? a : b; }

// The largest of a row's scores, whole vectors, and of `least`.
inline float largest_of(const float* scores, int64_t count, float least) {
  AttentionVec even = load(scores), odd = even;
  int64_t k = kLanes;
  for (; k + kLanes < count; k += 2 * kLanes) {
    even = larger(load(scores + k), even);
    odd = larger(load(scores + k + kLanes), odd);
  }
  if (k < count) even = larger(load(scores + k), even);
  const AttentionVec both = larger(even, odd);
  for (int i = 0; i < kLanes; ++i) least = both[i] > least ? both[i] : least;
  return least;
}

// Scores become proportions. Returns their sum.
inline float soften(float* scores, int64_t count, float largest) {
  AttentionVec total = {};
  for (int64_t k = 0; k < count; k += kLanes) {
    const AttentionVec e = exp_of(load(scores + k) - largest);
    store(scores + k, e);
    total += e;
  }
  return sum_lanes<float>(total);
}

// All queries with a block of keys. adjust(r, scores) changes the scores of query r.
template <typename Adjust>
inline void attend(const Head& h, int64_t count, bool is_first, Adjust adjust) {
  const int64_t tiles = (h.rows + kTileQueries - 1) / kTileQueries, whole = rounded_up(count, kLanes);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * h.rows / tiles, rows = (tile + 1) * h.rows / tiles - first;  // nearly equal tiles
    float *top = h.top + first, *sum = h.sum + first, kept[kLanes] = {};
    product_of(rows, whole, h.q + first * h.dim, h.dim, h.k, kPanel, kPanel * h.dim, h.dim, nullptr, h.scores,
               kScoreStep);
    for (int64_t i = 0; i < rows; ++i) {
      float* scores = h.scores + i * kScoreStep;
      adjust(first + i, scores);
      for (int64_t k = count; k < whole; ++k) scores[k] = -__builtin_inff();
      const float largest = largest_of(scores, whole, top[i]);
      kept[i] = top[i] - largest;
      top[i] = largest;
    }
    store(kept, exp_of(load(kept)));
    for (int64_t i = 0; i < rows; ++i) sum[i] = sum[i] * kept[i] + soften(h.scores + i * kScoreStep, whole, top[i]);
    product_of(rows, h.columns, h.scores, kScoreStep, h.v, h.columns, kPanel, count, is_first ? nullptr : kept,
               h.out + first * h.columns, h.columns);
  }
}

inline void start_row(const Head& h, int64_t r, const float* q, float scale) {
  int64_t d = 0;
  for (; d + kLanes <= h.dim; d += kLanes) store(h.q + r * h.dim + d, load(q + d) * scale);
  if (d < h.dim) store_some(h.q + r * h.dim + d, load_some(q + d, h.dim - d) * scale, h.dim - d);
  h.top[r] = -__FLT_MAX__;  // an infinity minus itself would be no number
  h.sum[r] = 0;
}

inline void finish_row(const Head& h, int64_t r, float* out) {
  const float scale = 1 / h.sum[r], *from = h.out + r * h.columns;
  int64_t c = 0;
  for (; c + kLanes <= h.dim; c += kLanes) store(out + c, load(from + c) * scale);
  if (c < h.dim) store_some(out + c, load(from + c) * scale, h.dim - c);
}

// Keys of a block: as equal as whole panels can be.
inline int64_t block_of(int64_t S) {
  const int64_t blocks = (S + kKeys - 1) / kKeys;
  return rounded_up((S + blocks - 1) / blocks, kPanel);
}

// ---- attention of sequences

int64_t query_blocks(const Attention& p) { return (p.Q + p.queries - 1) / p.queries; }

int64_t attention_scratch(const Attention& p) { return Head::floats(p.queries, p.dim); }

int64_t attention_tasks(const Attention& p) { return p.B * p.heads * query_blocks(p); }

// Minus infinity where a score is blocked.
inline AttentionVec blocked_scores(const bool* blocked, AttentionVec scores) {
  int32_t wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = -static_cast<int32_t>(blocked[i]);
  VecI32 mask;
  std::memcpy(&mask, wide, sizeof mask);
  return mask ? AttentionVec{} - __builtin_inff() : scores;
}

inline void block_scores(const bool* blocked, int64_t count, float* scores) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) store(scores + k, blocked_scores(blocked + k, load(scores + k)));
  if (k == count) return;
  bool rest[kLanes] = {};
  std::memcpy(rest, blocked + k, count - k);
  store(scores + k, blocked_scores(rest, load(scores + k)));
}

void attention(const Attention& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t blocks = query_blocks(p), C = p.heads * p.dim, most = block_of(p.S);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task % blocks * p.queries, head = task / blocks % p.heads, b = task / blocks / p.heads;
    const Head h(p.Q - first < p.queries ? p.Q - first : p.queries, p.dim, scratch);
    const auto at = [&](const AttentionRows& rows, int64_t r) {
      return rows.first + b * rows.image + r * rows.row + head * p.dim;
    };
    for (int64_t r = 0; r < h.rows; ++r) start_row(h, r, at(p.q, first + r), p.scale);
    for (int64_t s = 0; s < p.S; s += most) {
      const int64_t count = p.S - s < most ? p.S - s : most;
      pack_block(h, count, [&](int64_t i) { return at(p.k, s + i); }, [&](int64_t i) { return at(p.v, s + i); });
      attend(h, count, s == 0, [&](int64_t r, float* scores) {
        for (int64_t i = s + most + r; i < s + 2 * most && i < p.S; i += h.rows) {  // ask for the next block's
          fetch_row(at(p.k, i), p.dim);
          fetch_row(at(p.v, i), p.dim);
        }
        if (p.blocked == nullptr) return;
        const bool* blocked = p.blocked + (b * p.Q + first + r) * p.S + s;
        // of the tile after this one: from row to row it is far, too
        for (int64_t k = 0; k < count; k += 64) __builtin_prefetch(blocked + kTileQueries * p.S + k);
        block_scores(blocked, count, scores);
      });
    }
    for (int64_t r = 0; r < h.rows; ++r) finish_row(h, r, p.out + (b * p.Q + first + r) * C + head * p.dim);
  }
}

// ---- attention in windows

int64_t windows_along(int64_t length, int64_t side) { return (length + side - 1) / side; }

// Where a window's tokens are, of those on the map also as a list.
struct Window {
  int64_t tokens, queries = 0;
  bool is_mixed = false;   // tokens from both ends of the map
  int64_t *place, *query;  // (tokens): which token of the map, -1 beyond it; (queries): which token of the window
  float* region;           // (tokens)

  static int64_t floats(int64_t side) { return rounded_up(5 * side * side, kLine); }

  Window(const WindowAttention& p, int64_t window, float* memory) : tokens(p.side * p.side) {
    place = reinterpret_cast<int64_t*>(memory);
    query = place + tokens;
    region = reinterpret_cast<float*>(query + tokens);
    const int64_t down = windows_along(p.height, p.side), across = windows_along(p.width, p.side);
    const int64_t b = window / across / down, top = window / across % down * p.side + p.shift;
    const int64_t left = window % across * p.side + p.shift, height = down * p.side, width = across * p.side;
    for (int64_t t = 0, i = 0; i < p.side; ++i)
      for (int64_t j = 0; j < p.side; ++j, ++t) {
        const bool wraps_y = top + i >= height, wraps_x = left + j >= width;
        const int64_t y = top + i - wraps_y * height, x = left + j - wraps_x * width;
        const bool is_there = y < p.height && x < p.width;
        place[t] = is_there ? (b * p.height + y) * p.width + x : -1;
        region[t] = 2 * wraps_y + wraps_x;
        is_mixed |= region[t] != region[0];
        if (is_there) query[queries++] = t;
      }
  }
};

int64_t windows_scratch(const WindowAttention& p) {
  return 2 * Window::floats(p.side) + Head::floats(p.side * p.side, p.dim);
}

int64_t windows_tasks(const WindowAttention& p) {
  return p.B * windows_along(p.height, p.side) * windows_along(p.width, p.side) * p.heads;
}

void attend_windows(const WindowAttention& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t C = p.heads * p.dim, T = p.side * p.side, most = block_of(T);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task % p.heads;
    const Window w(p, task / p.heads, scratch);
    const int64_t following = task + 1 < end ? task + 1 : task;  // its numbers are asked for while this one is computed
    const Window next(p, following / p.heads, scratch + Window::floats(p.side));
    const Head h(w.queries, p.dim, scratch + 2 * Window::floats(p.side));
    const auto at = [&](int64_t t, int64_t part) {
      return (w.place[t] < 0 ? p.padding : p.qkv + w.place[t] * 3 * C) + part * C + head * p.dim;
    };
    const auto out = [&](int64_t r) { return p.out + w.place[w.query[r]] * C + head * p.dim; };
    for (int64_t r = 0; r < h.rows; ++r) start_row(h, r, at(w.query[r], 0), p.scale);
    for (int64_t s = 0; s < T; s += most) {
      const int64_t count = T - s < most ? T - s : most;
      pack_block(h, count, [&](int64_t i) { return at(s + i, 1); }, [&](int64_t i) { return at(s + i, 2); });
      attend(h, count, s == 0, [&](int64_t r, float* __restrict scores) {
        fetch_row(out(r), p.dim);
        const int64_t next_place = s == 0 ? next.place[w.query[r]] : -1;
        for (int64_t part = 0; part < 3 && next_place >= 0; ++part)
          fetch_row(p.qkv + (next_place * 3 + part) * C + following % p.heads * p.dim, p.dim);
        const float* __restrict bias = p.bias + (head * T + w.query[r]) * T + s;
        const float* __restrict region = w.region + s;
        for (int64_t k = 0; k < count; ++k) scores[k] += bias[k];
        if (!w.is_mixed) return;
        const float own = w.region[w.query[r]];
        for (int64_t k = 0; k < count; ++k) scores[k] -= region[k] != own ? 100.0f : 0.0f;
      });
    }
    for (int64_t r = 0; r < h.rows; ++r) finish_row(h, r, out(r));
  }
}

}  // namespace

AttentionKernels MASK2FORMER_ATTENTION_KERNELS() {
  return {attention_scratch, attention_tasks, attention, windows_scratch, windows_tasks, attend_windows};
}

}  // namespace mask2former::cpu
