// Linear maps of a few rows on CPUs: y = x W^T + b for several W of one x, each read once, as it lies in memory.
//
// A product of 16 rows is bound by reading W. The rows of x are laid side by side in a vector, so that one element
// of W, broadcast, is multiplied with all of them: W needs no packing and no transposed copy. R rows of W share a
// vector of x; more of them would share too few sets of the first cache when W is a power of two wide.
//
// Compiled by linear_cpu.py, which passes every argument as one array of 64-bit integers.

#include <algorithm>
#include <atomic>
#include <vector>

#include "mlstm_cpu_tiles.h"

namespace {

typedef float Half __attribute__((vector_size(2 * W), may_alias));
constexpr long PANEL = 64, LINE = 16;  // rows of W that one thread takes at once; floats of a cache line
constexpr long BLOCK = 128;  // terms that are added up by themselves, for the rounding

struct Panel {
  const float *weight, *bias;  // bias null: none
  float* y;
  long rows, left;             // rows of this panel; of W from its first one on
};

struct Problem {
  long rows, depth, ldx, ldy;
  const float* xt;  // (depth, ldx), the first `rows` columns of it x
};

// R rows of W with N vectors of rows of x. Beyond `count` the last one is taken again; `next` is read next
template <class Lanes, int N, int R, long LD>
INLINE void product(const Problem& p, const float* xt, const float* rows, long count, const float* next, float* y) {
  constexpr long L = sizeof(Lanes) / 4;
  const float* w[R];
  for (long r = 0; r < R; ++r) w[r] = rows + std::min(r, count - 1) * p.depth;
  for (long k0 = 0; k0 < p.depth; k0 += BLOCK) {
    Lanes a[R][N];
    for (auto& row : a)
      for (Lanes& x : row) x = Lanes{};
    const auto add = [&](long k) LAMBDA {
      for (int n = 0; n < N; ++n) {
        const Lanes x = *reinterpret_cast<const Lanes*>(xt + k * p.ldx + n * L);
        for (int r = 0; r < R; ++r) a[r][n] += w[r][k] * x;
      }
    };
    const long end = std::min(k0 + BLOCK, p.depth);
    long k = k0;
    for (; k + LINE <= end; k += LINE) {
      for (int r = 0; r < R; ++r) __builtin_prefetch(next + r * p.depth + k, 0, 2);
      for (int j = 0; j < LINE; ++j) add(k + j);
    }
    for (; k < end; ++k) add(k);
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) {
        Lanes& to = *reinterpret_cast<Lanes*>(y + r * LD + n * L);
        to = k0 ? to + a[r][n] : a[r][n];
      }
  }
}

// Outputs of a panel for `rows` rows of x, from `first` on
template <class Lanes, int N>
void panel(const Problem& p, const Panel& w, long first, long rows) {
  constexpr int R = N == 1 ? 8 : N == 2 ? MR : MR / 2;  // accumulators that the registers hold
  constexpr long LD = N * W;
  alignas(64) float y[PANEL * LD], yt[LD * PANEL];
  for (long o = 0; o < w.rows; o += R) {
    const float* now = w.weight + o * p.depth;
    const float* next = w.left - o >= 2 * R ? now + R * p.depth : now;
    product<Lanes, N, R, LD>(p, p.xt + first, now, std::min<long>(R, w.rows - o), next, y + o * LD);
  }
  transpose(y, PANEL, LD, LD, yt, PANEL);
  for (long r = 0; r < rows; ++r) {
    const float* from = yt + r * PANEL;
    float* to = w.y + (first + r) * p.ldy;
    if (!w.bias) std::memcpy(to, from, 4 * w.rows);
    else for (long o = 0; o < w.rows; ++o) to[o] = from[o] + w.bias[o];
  }
}

void run(const Problem& p, const Panel& w) {
  for (long first = 0; first < p.rows; first += 4 * W) {
    const long rows = std::min<long>(p.rows - first, 4 * W);
    if (2 * rows <= W) panel<Half, 1>(p, w, first, rows);
    else if (rows <= W) panel<V, 1>(p, w, first, rows);
    else if (rows <= 2 * W) panel<V, 2>(p, w, first, rows);
    else if (rows <= 3 * W) panel<V, 3>(p, w, first, rows);
    else panel<V, 4>(p, w, first, rows);
  }
}

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

}  // namespace

// rows, depth, ldy, threads, x, its row stride, number of weights; of each: weight, bias, outputs, y.
// 0, or 1 when memory ran out
extern "C" int vilma_linear_forward(const int64_t* arguments, void* parallel) try {
  const auto next = [&] { return *arguments++; };
  const auto pointer = [&] { return reinterpret_cast<float*>(*arguments++); };
  Problem p;
  p.rows = next(), p.depth = next(), p.ldy = next();
  const long threads = next();
  const float* x = pointer();
  const long ldx = next(), depth = padded(p.depth);
  p.ldx = padded(p.rows);
  arena.reserve(8 * p.ldx * depth + SLACK);
  float *copy = arena.take(p.ldx * depth), *xt = arena.take(depth * p.ldx);
  std::memset(copy, 0, 4 * p.ldx * depth);
  for (long r = 0; r < p.rows; ++r) std::memcpy(copy + r * depth, x + r * ldx, 4 * p.depth);
  transpose(copy, p.ldx, depth, depth, xt, p.ldx);
  p.xt = xt;
  std::vector<Panel> panels;
  for (long count = next(); count; --count) {
    const float *w = pointer(), *b = pointer();
    const long outputs = next();
    float* y = pointer();
    for (long o = 0; o < outputs; o += PANEL)
      panels.push_back({w + o * p.depth, b ? b + o : nullptr, y + o, std::min(PANEL, outputs - o), outputs - o});
  }
  struct Work {
    const Problem& p;
    const std::vector<Panel>& panels;
    std::atomic<size_t> next{0};
  } work{p, panels};
  const auto share = [](void* data) {
    Work& w = *static_cast<Work*>(data);
    for (size_t j; (j = w.next.fetch_add(1)) < w.panels.size();) run(w.p, w.panels[j]);
  };
  if (parallel && threads > 1) reinterpret_cast<Parallel>(parallel)(share, &work, unsigned(threads), 0);
  else share(&work);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
