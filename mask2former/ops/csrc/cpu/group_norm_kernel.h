// Group normalisation of maps in channels-last order, on the vectors of kernel.h, which is included before. Channels are a
// multiple of kLanes.

namespace mask2former::cpu {
namespace {

constexpr int64_t kPixels = 16;  // are added up in float32, then in float64

void channel_sums(const float* x, int64_t count, int64_t channels, const float* pivot, double* sums) {
  for (int64_t first = 0; first < count; first += kPixels) {
    const int64_t last = first + kPixels < count ? first + kPixels : count;
    for (int64_t c = 0; c < channels; c += kLanes) {
      const Vec<float> origin = load(pivot + c);
      Vec<float> sum = {}, squares = {};
      for (int64_t p = first; p < last; ++p) {
        const Vec<float> difference = load(x + p * channels + c) - origin;
        sum += difference;
        squares += difference * difference;
      }
      for (int64_t k = 0; k < kLanes; ++k) sums[c + k] += sum[k], sums[channels + c + k] += squares[k];
    }
  }
}

// Two neighbours and the weight of the second, as F.interpolate(mode="bilinear", align_corners=False) has them.
struct Between {
  int64_t first, second;
  float weight;
};

inline Between between(int64_t at, int64_t size, int64_t source) {
  float place = (static_cast<float>(at) + 0.5f) * (static_cast<float>(source) / static_cast<float>(size)) - 0.5f;
  place = place < 0 ? 0 : place;
  const int64_t whole = static_cast<int64_t>(place), first = whole < source - 1 ? whole : source - 1;
  return {first, first + 1 < source ? first + 1 : first, place - static_cast<float>(whole)};
}

void map_rows(const MapRows& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / p.height;
    const float *scale = p.scale + image * C, *shift = p.shift + image * C;
    const bool resizes = p.coarse.first != nullptr;
    const Between down = resizes ? between(row % p.height, p.height, p.coarse.height) : Between{};
    const float* above = p.coarse.first + (image * p.coarse.height + down.first) * p.coarse.width * C;
    const float* below = p.coarse.first + (image * p.coarse.height + down.second) * p.coarse.width * C;
    for (int64_t i = 0; i < p.width; ++i) {
      float* x = p.x + (row * p.width + i) * C;
      const Between along = resizes ? between(i, p.width, p.coarse.width) : Between{};
      const int64_t left = along.first * C, right = along.second * C;
      for (int64_t c = 0; c < C; c += kLanes) {
        Vec<float> result = load(x + c) * load(scale + c) + load(shift + c);
        if (resizes) {
          const Vec<float> top = load(above + left + c) * (1 - along.weight) + load(above + right + c) * along.weight;
          const Vec<float> low = load(below + left + c) * (1 - along.weight) + load(below + right + c) * along.weight;
          result += top * (1 - down.weight) + low * down.weight;
        }
        if (p.relu) result = result < 0.0f ? Vec<float>{} : result;
        store(x + c, result);
      }
    }
  }
}

}  // namespace

GroupNormKernels MASK2FORMER_GROUP_NORM_KERNELS() { return {channel_sums, map_rows}; }

}  // namespace mask2former::cpu
