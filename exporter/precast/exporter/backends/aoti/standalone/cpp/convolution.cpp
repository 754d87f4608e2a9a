// Convolutions of one to three dimensions, as products of matrices: a weight with the windows of its input laid side by
// side, a piece at a time (Chellapilla, Puri and Simard 2006). What has one channel per group is summed directly.
//
// Results lie in memory as PyTorch's do, which Inductor's code relies on: channels last where the input or the weight
// has them last, in two dimensions.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>

#include "standalone.h"

#define ABI extern "C"

using namespace precast;

ABI Status aoti_torch_cpu_addmm_out(Tensor out, Tensor added, Tensor a, Tensor b, double beta, double alpha);
ABI Status aoti_torch_empty_strided(
    int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device, int32_t index,
    Tensor* made);

namespace {

constexpr int SPACE = 3;
// Numbers of windows that are laid side by side at a time: 8 MiB of them.
constexpr int64_t MAX_WINDOWS = 2 << 20;

using Sizes = std::array<int64_t, SPACE>;

int64_t product_of(const Sizes& sizes) { return sizes[0] * sizes[1] * sizes[2]; }

// A tensor [batch or rows, channels, …], with dimensions of size 1 before those that it lacks.
struct Image {
  float* data;
  int64_t outer, channels, outer_stride, channel_stride;
  Sizes size, stride;

  explicit Image(const AtenTensorOpaque* tensor)
      : data(reinterpret_cast<float*>(data_of(tensor))), outer(tensor->sizes[0]), channels(tensor->sizes[1]),
        outer_stride(tensor->strides[0]), channel_stride(tensor->strides[1]) {
    size.fill(1), stride.fill(0);
    const int64_t missing = SPACE + 2 - tensor->dims;
    for (int64_t d = 2; d < tensor->dims; ++d)
      size[d - 2 + missing] = tensor->sizes[d], stride[d - 2 + missing] = tensor->strides[d];
  }

  float* at(int64_t index, int64_t channel) const { return data + index * outer_stride + channel * channel_stride; }
};

// A matrix in memory of others.
struct View {
  Storage storage;
  AtenTensorOpaque tensor;

  View(float* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
    storage.data = reinterpret_cast<char*>(data), storage.bytes = 0, storage.owned = false, storage.references = 1;
    tensor.storage = &storage, tensor.dims = 2, tensor.offset = 0, tensor.dtype = FLOAT32;
    tensor.sizes[0] = rows, tensor.sizes[1] = columns;
    tensor.strides[0] = row_stride, tensor.strides[1] = column_stride;
  }
};

struct Convolution {
  Image x, weight, y;
  const float* bias;  // [channels of y], or none
  Sizes step, padding, dilation;
  int64_t groups;
  bool transposed;

  int64_t x_channels() const { return x.channels / groups; }
  int64_t y_channels() const { return y.channels / groups; }
  int64_t taps() const { return product_of(weight.size); }

  Status compute() const {
    if (!transposed && x_channels() == 1) {
      for (int64_t n = 0; n < x.outer; ++n) sum_directly(n);
      return 0;
    }
    for (int64_t g = 0; g < groups; ++g)
      if (const Status status = transposed ? scatter(g) : multiply_windows(g)) return status;
    return 0;
  }

 private:
  struct Free {
    void operator()(float* space) const { std::free(space); }
  };
  using Buffer = std::unique_ptr<float, Free>;

  static Buffer allocate(int64_t count) {
    void* space = std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64);
    if (space == nullptr) throw std::bad_alloc();
    return Buffer(static_cast<float*>(space));
  }

  // The tap's offset from where a window begins, in one dimension.
  int64_t offset(int d, int64_t tap) const { return tap * dilation[d] - padding[d]; }

  Sizes tap_at(int64_t index) const {
    const Sizes& size = weight.size;
    return {index / (size[1] * size[2]), index / size[2] % size[1], index % size[2]};
  }

  const float* weight_at(int64_t row, int64_t channel, const Sizes& tap) const {
    return weight.at(row, channel) + tap[0] * weight.stride[0] + tap[1] * weight.stride[1] + tap[2] * weight.stride[2];
  }

  // The places of an innermost line of `count` windows, in which a tap falls on the input: `begin` to `end`.
  void inside(int64_t tap, int64_t count, int64_t& begin, int64_t& end) const {
    const int64_t first = offset(2, tap), last = x.size[2] - 1 - first;
    begin = first < 0 ? std::min(count, (-first + step[2] - 1) / step[2]) : 0;
    end = last < 0 ? begin : std::clamp(last / step[2] + 1, begin, count);
  }

  // Where a tap of a line of windows falls on the input, its innermost index aside; nullptr where that is padding.
  const float* line_of(int64_t n, int64_t channel, int64_t line, const Sizes& tap) const {
    const int64_t i = line / y.size[1] * step[0] + offset(0, tap[0]), j = line % y.size[1] * step[1] + offset(1, tap[1]);
    if (i < 0 || i >= x.size[0] || j < 0 || j >= x.size[1]) return nullptr;
    return x.at(n, channel) + i * x.stride[0] + j * x.stride[1];
  }

  float* y_line(int64_t n, int64_t channel, int64_t line) const {
    return y.at(n, channel) + line / y.size[1] * y.stride[0] + line % y.size[1] * y.stride[1];
  }

  // ---------------------------------------------------------------- windows

  // y [channels, positions] = weight [channels, taps of all channels] windows [those, positions], of a group.
  Status multiply_windows(int64_t g) const {
    const int64_t width = y.size[2], lines = y.size[0] * y.size[1], most = std::max<int64_t>(MAX_WINDOWS / depth(), 1);
    const int64_t columns = std::min(width, most), at_once = std::clamp<int64_t>(most / width, 1, lines);
    const Buffer copied = is_dense() ? nullptr : gather_weight(g), windows = allocate(depth() * at_once * columns);
    float* const weights = copied ? copied.get() : weight.at(g * y_channels(), 0);
    for (int64_t n = 0; n < x.outer; ++n)
      for (int64_t line = 0; line < lines; line += at_once)
        for (int64_t column = 0; column < width; column += columns) {
          const Piece piece{line, std::min(at_once, lines - line), column, std::min(columns, width - column)};
          lay_windows(n, g, piece, windows.get());
          if (const Status status = multiply(n, g, piece, weights, windows.get())) return status;
        }
    return 0;
  }

  // Whole lines of positions, or a part of one.
  struct Piece {
    int64_t line, lines, column, columns;

    int64_t positions() const { return lines * columns; }
  };

  int64_t depth() const { return x_channels() * taps(); }

  // Whether a row of the weight is [channels of x, taps], without gaps.
  bool is_dense() const {
    const auto& [a, b, c] = weight.stride;
    const Sizes& size = weight.size;
    return weight.outer_stride == depth() && (x_channels() == 1 || weight.channel_stride == taps()) &&
           (size[0] == 1 || a == size[1] * size[2]) && (size[1] == 1 || b == size[2]) && (size[2] == 1 || c == 1);
  }

  // The group's weight [channels of y, channels of x, taps], without gaps.
  Buffer gather_weight(int64_t g) const {
    Buffer found = allocate(y_channels() * depth());
#pragma omp parallel for if (y_channels() * depth() >= MIN_PARALLEL_MACS)
    for (int64_t row = 0; row < y_channels(); ++row) {
      float* to = found.get() + row * depth();
      for (int64_t channel = 0; channel < x_channels(); ++channel)
        for (int64_t tap = 0; tap < taps(); ++tap) *to++ = *weight_at(g * y_channels() + row, channel, tap_at(tap));
    }
    return found;
  }

  void lay_windows(int64_t n, int64_t g, const Piece& piece, float* windows) const {
#pragma omp parallel for if (depth() * piece.positions() >= MIN_PARALLEL_MACS)
    for (int64_t k = 0; k < depth(); ++k)
      lay_tap(n, g * x_channels() + k / taps(), tap_at(k % taps()), piece, windows + k * piece.positions());
  }

  // What a tap meets of a channel in each window.
  void lay_tap(int64_t n, int64_t channel, const Sizes& tap, const Piece& piece, float* to) const {
    const int64_t last = piece.column + piece.columns, apart = step[2] * x.stride[2];
    int64_t begin, end;
    inside(tap[2], y.size[2], begin, end);
    begin = std::clamp(begin, piece.column, last), end = std::clamp(end, begin, last);
    for (int64_t line = piece.line; line < piece.line + piece.lines; ++line) {
      const float* const from = line_of(n, channel, line, tap);
      const int64_t before = from ? begin - piece.column : piece.columns;
      to = std::fill_n(to, before, 0.0f);
      if (from == nullptr) continue;
      const float* const first = from + offset(2, tap[2]) * x.stride[2];
      if (apart == 1)
        to = std::copy(first + begin, first + end, to);
      else
        for (int64_t o = begin; o < end; ++o) *to++ = first[o * apart];
      to = std::fill_n(to, last - end, 0.0f);
    }
  }

  Status multiply(int64_t n, int64_t g, const Piece& piece, float* weights, float* windows) const {
    const int64_t positions = piece.positions();
    View a(weights, y_channels(), depth(), depth(), 1), b(windows, depth(), positions, positions, 1);
    // Lines follow each other without gaps in every output.
    float* const to = y_line(n, g * y_channels(), piece.line) + piece.column * y.stride[2];
    View c(to, y_channels(), positions, y.channel_stride, position_stride());
    return add_product(c, g, a, b);
  }

  Status add_product(View& c, int64_t g, View& a, View& b) const {
    static float none = 0.0f;
    float* const added = bias ? const_cast<float*>(bias) + g * y_channels() : &none;
    View d(added, bias ? y_channels() : 1, 1, 1, 1);
    return aoti_torch_cpu_addmm_out(&c.tensor, &d.tensor, &a.tensor, &b.tensor, bias ? 1 : 0, 1);
  }

  // Between neighbours of an output, all of whose positions follow each other.
  int64_t position_stride() const { return y.channel_stride == 1 && y.channels > 1 ? y.channels : 1; }

  // ------------------------------------------------------- one channel each

  void sum_directly(int64_t n) const {
    const int64_t lines = y.size[0] * y.size[1], width = y.size[2], all = y.channels * lines;
#pragma omp parallel if (all * width * taps() >= MIN_PARALLEL_MACS)
    {
      const Buffer sums = allocate(width);
#pragma omp for
      for (int64_t task = 0; task < all; ++task) sum_line(n, task / lines, task % lines, sums.get());
    }
  }

  void sum_line(int64_t n, int64_t channel, int64_t line, float* sums) const {
    const int64_t width = y.size[2], apart = step[2] * x.stride[2];
    std::fill(sums, sums + width, bias ? bias[channel] : 0.0f);
    for (int64_t index = 0; index < taps(); ++index) {
      const Sizes tap = tap_at(index);
      const float* const from = line_of(n, channel / y_channels(), line, tap);
      if (from == nullptr) continue;
      const float* const first = from + offset(2, tap[2]) * x.stride[2];
      const float w = *weight_at(channel, 0, tap);
      int64_t begin, end;
      inside(tap[2], width, begin, end);
      if (apart == 1)
        for (int64_t o = begin; o < end; ++o) sums[o] += w * first[o];
      else
        for (int64_t o = begin; o < end; ++o) sums[o] += w * first[o * apart];
    }
    float* const to = y_line(n, channel, line);
    for (int64_t o = 0; o < width; ++o) to[o * y.stride[2]] = sums[o];
  }

  // ------------------------------------------------------------- transposed

  // What each position of x adds to a window of y, of a group: [channels of y, taps, positions] = weight^T x.
  Status scatter(int64_t g) const {
    const int64_t positions = product_of(x.size);
    const int64_t at_once = std::clamp<int64_t>(MAX_WINDOWS / (taps() * positions), 1, y_channels());
    const Buffer weights = gather_transposed(g), parts = allocate(at_once * taps() * positions);
    for (int64_t n = 0; n < x.outer; ++n) {
      const Buffer inputs = gather_input(n, g);
      for (int64_t row = 0; row < y_channels(); row += at_once) {
        const int64_t count = std::min(at_once, y_channels() - row);
        View a(weights.get() + row * taps() * x_channels(), count * taps(), x_channels(), x_channels(), 1);
        View b(inputs.get(), x_channels(), positions, positions, 1), c(parts.get(), count * taps(), positions, positions, 1);
        if (const Status status = aoti_torch_cpu_addmm_out(&c.tensor, &c.tensor, &a.tensor, &b.tensor, 0, 1))
          return status;
#pragma omp parallel for if (count * taps() * positions >= MIN_PARALLEL_MACS)
        for (int64_t i = 0; i < count; ++i)
          add_windows(n, g * y_channels() + row + i, parts.get() + i * taps() * positions);
      }
    }
    return 0;
  }

  // The group's weight [channels of y, taps, channels of x]: for these it is stored as [channels of x, channels of y, …].
  Buffer gather_transposed(int64_t g) const {
    Buffer found = allocate(y_channels() * taps() * x_channels());
    float* to = found.get();
    for (int64_t row = 0; row < y_channels(); ++row)
      for (int64_t tap = 0; tap < taps(); ++tap)
        for (int64_t channel = 0; channel < x_channels(); ++channel)
          *to++ = *weight_at(g * x_channels() + channel, row, tap_at(tap));
    return found;
  }

  Buffer gather_input(int64_t n, int64_t g) const {
    Buffer found = allocate(x_channels() * product_of(x.size));
    float* to = found.get();
    for (int64_t channel = 0; channel < x_channels(); ++channel)
      for (int64_t i = 0; i < x.size[0]; ++i)
        for (int64_t j = 0; j < x.size[1]; ++j) {
          const float* const from = x.at(n, g * x_channels() + channel) + i * x.stride[0] + j * x.stride[1];
          for (int64_t k = 0; k < x.size[2]; ++k) *to++ = from[k * x.stride[2]];
        }
    return found;
  }

  void add_windows(int64_t n, int64_t channel, const float* parts) const {
    float* const to = y.at(n, channel);
    const float begin = bias ? bias[channel] : 0.0f;
    for (int64_t i = 0; i < y.size[0]; ++i)
      for (int64_t j = 0; j < y.size[1]; ++j)
        for (int64_t k = 0; k < y.size[2]; ++k) to[i * y.stride[0] + j * y.stride[1] + k * y.stride[2]] = begin;
    for (int64_t index = 0; index < taps(); ++index) {
      const Sizes tap = tap_at(index);
      for (int64_t i = 0; i < x.size[0]; ++i)
        for (int64_t j = 0; j < x.size[1]; ++j)
          for (int64_t k = 0; k < x.size[2]; ++k, ++parts) {
            const Sizes at = {
                i * step[0] + offset(0, tap[0]), j * step[1] + offset(1, tap[1]), k * step[2] + offset(2, tap[2])};
            const auto is_inside = [&](int d) { return at[d] >= 0 && at[d] < y.size[d]; };
            if (is_inside(0) && is_inside(1) && is_inside(2))
              to[at[0] * y.stride[0] + at[1] * y.stride[1] + at[2] * y.stride[2]] += *parts;
          }
    }
  }
};

// Whether strides are those of [N, …, C] seen as [N, C, …], in two or three dimensions: c10/core/MemoryFormat.h's rule,
// to the letter.
bool is_channels_last(int64_t dims, const int64_t* sizes, const int64_t* strides) {
  if (strides[1] == 0) return false;
  int64_t least = 0;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t d = i == 0 ? 1 : i + 1 == dims ? 0 : dims - i;
    if (sizes[d] == 0 || strides[d] < least) return false;
    if (d == 0 && least == strides[1]) return false;
    least = strides[d];
    if (sizes[d] > 1) least *= sizes[d];
  }
  return true;
}

bool is_channels_last(const AtenTensorOpaque* tensor) {
  return is_channels_last(tensor->dims, tensor->sizes, tensor->strides);
}

// Whether PyTorch's result would have channels last. In one dimension it takes the input for contiguous, and looks at the
// weight as one of two dimensions.
bool gives_channels_last(const AtenTensorOpaque* x, const AtenTensorOpaque* w) {
  if (x->dims > 3) return is_channels_last(x) || is_channels_last(w);
  const int64_t sizes[] = {w->sizes[0], w->sizes[1], 1, w->sizes[2]};
  const int64_t strides[] = {w->strides[0], w->strides[1], w->sizes[2] * w->strides[2], w->strides[2]};
  return is_channels_last(4, sizes, strides);
}

// Sizes or steps of the call, with `missing` before those that it lacks.
Sizes pad_front(const int64_t* given, int64_t count, int64_t dims, int64_t missing) {
  Sizes found;
  found.fill(missing);
  // One number stands for all dimensions.
  for (int64_t d = 0; d < dims; ++d) found[SPACE - dims + d] = given[count == 1 ? 0 : d];
  return found;
}

Status make_output(Tensor x, Tensor weight, const Sizes& sizes, int64_t channels, Tensor* made) {
  const int64_t dims = x->dims;
  int64_t size[MAX_DIMS] = {x->sizes[0], channels}, strides[MAX_DIMS], next = 1;
  std::copy(sizes.end() - (dims - 2), sizes.end(), size + 2);
  const bool is_last = gives_channels_last(x, weight);
  if (is_last) strides[1] = 1, next = channels;
  for (int64_t d = dims - 1; d >= 0; --d)
    if (!(is_last && d == 1)) strides[d] = next, next *= size[d];
  return aoti_torch_empty_strided(dims, size, strides, FLOAT32, 0, 0, made);
}

}  // namespace

ABI Status aoti_torch_cpu_convolution(
    Tensor x, Tensor weight, Tensor* bias, const int64_t* stride, int64_t strides, const int64_t* padding,
    int64_t paddings, const int64_t* dilation, int64_t dilations, int32_t transposed, const int64_t* output_padding,
    int64_t output_paddings, int64_t groups, Tensor* made) {
  const int64_t dims = x->dims - 2;
  if (dims < 1 || dims > SPACE || weight->dims != x->dims) return fail(__func__, "not so many dimensions");
  if (x->dtype != FLOAT32 || weight->dtype != FLOAT32 || (bias && (*bias)->dtype != FLOAT32))
    return fail(__func__, "a convolution in another dtype than float32");
  if (bias && ((*bias)->dims != 1 || (*bias)->strides[0] != 1)) return fail(__func__, "a bias with gaps");
  // In three dimensions it depends on more where PyTorch has channels in such a result.
  if (dims == 3 && gives_channels_last(x, weight)) return fail(__func__, "channels that are last");
  const Image from(x), w(weight);
  const int64_t rows = transposed ? w.channels * groups : w.outer;
  const int64_t taken = transposed ? w.outer : w.channels * groups;
  if (groups < 1 || taken != from.channels || rows % groups != 0) return fail(__func__, "channels that do not fit");
  const Sizes step = pad_front(stride, strides, dims, 1), pad = pad_front(padding, paddings, dims, 0);
  const Sizes apart = pad_front(dilation, dilations, dims, 1), more = pad_front(output_padding, output_paddings, dims, 0);
  Sizes size;
  for (int d = 0; d < SPACE; ++d) {
    const int64_t window = apart[d] * (w.size[d] - 1) + 1;
    if (!transposed && from.size[d] + 2 * pad[d] < window) return fail(__func__, "an input smaller than a window");
    size[d] = transposed ? (from.size[d] - 1) * step[d] - 2 * pad[d] + window + more[d]
                         : (from.size[d] + 2 * pad[d] - window) / step[d] + 1;
    if (size[d] < 1) return fail(__func__, "an output without positions");
  }
  if (const Status status = make_output(x, weight, size, rows, made)) return status;
  const float* const added = bias ? reinterpret_cast<const float*>(data_of(*bias)) : nullptr;
  return Convolution{from, w, Image(*made), added, step, pad, apart, groups, transposed != 0}.compute();
}
