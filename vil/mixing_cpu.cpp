// What surrounds the mLSTM in a Vision-LSTM layer, on CPUs: convolution, q/k/v and gates before it, norm, skip and
// gate behind it, and the gradients of both. The formulas and names are those of mixing.py.
//
// Blocks of four channels are a lane of a vector: a product of a block is four multiplications of a vector, each
// by one channel spread over its lane. Tokens are taken along a row of the grid, up to TOKENS at once, and the
// weights of one vector of channels stay in registers or the first cache while they pass.
//
// The gates are linear in q, k and v, and these in c and a: the product of both matrices is formed once a call.
//
// Compiled by mixing_cpu.py, which passes every argument as one array of 64-bit integers, in the order in which
// `Mix` and the entry points at the end read them. A 1-D convolution comes as a grid of one row.

#include <algorithm>
#include <atomic>
#include <vector>

#if __has_include("../xlstm/mlstm_cpu_tiles.h")
#include "../xlstm/mlstm_cpu_tiles.h"
#else  // a checkout, whose rooms lie beside the trunk
#include "../vilma/xlstm/mlstm_cpu_tiles.h"
#endif

namespace {

constexpr long TOKENS = 16, MAX_TAPS = 64;
typedef float U __attribute__((vector_size(4 * W), may_alias, aligned(4)));  // a vector at any address

INLINE V ld(const float* p) { return *reinterpret_cast<const U*>(p); }
INLINE void st(float* p, V x) { *reinterpret_cast<U*>(p) = x; }
INLINE V sigmoid(V x) { return 1.0f / (1.0f + exp(-x)); }

// channel I of every block of four, in all four places
template <int I>
INLINE V spread(V x) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(x, x, I, I, I, I, 4 + I, 4 + I, 4 + I, 4 + I, 8 + I, 8 + I, 8 + I, 8 + I, 12 + I,
                                 12 + I, 12 + I, 12 + I);
#elif defined(__AVX__)
  return __builtin_shufflevector(x, x, I, I, I, I, 4 + I, 4 + I, 4 + I, 4 + I);
#else
  return __builtin_shufflevector(x, x, I, I, I, I);
#endif
}
INLINE V product(V x, const V* w, V y) {
  return y + spread<0>(x) * w[0] + spread<1>(x) * w[1] + spread<2>(x) * w[2] + spread<3>(x) * w[3];
}

struct Reader {
  const int64_t* p;
  long next() { return *p++; }
  float* pointer() { return reinterpret_cast<float*>(next()); }
};

using Buffer = std::vector<float>;

struct Mix {
  long batch, height, width, inner, heads, rows, columns, reverse, causal, threads;
  float eps;
  const float *u, *conv, *conv_bias, *weight[3], *bias[3], *gate[2], *gate_bias[2], *norm, *norm_bias, *skip;
  long taps, dim, gates;
  long dy[MAX_TAPS], dx[MAX_TAPS];  // of what a tap reads
  Buffer taps_w, zeros;             // [tap][E]
  Buffer direct[3], turned[3];      // [i][4 g + o] and [o][4 g + i] of weight (g, o, i)
  Buffer folded_c, folded_a, folded_bias;

  explicit Mix(Reader& r) {
    for (long* x : {&batch, &height, &width, &inner, &heads, &rows, &columns, &reverse, &causal, &threads})
      *x = r.next();
    const int64_t bits = r.next();
    double e;
    std::memcpy(&e, &bits, 8);
    eps = float(e);
    u = r.pointer(), conv = r.pointer(), conv_bias = r.pointer();
    for (int j = 0; j < 3; ++j) weight[j] = r.pointer(), bias[j] = r.pointer();
    for (int j = 0; j < 2; ++j) gate[j] = r.pointer(), gate_bias[j] = r.pointer();
    norm = r.pointer(), norm_bias = r.pointer(), skip = r.pointer();
    taps = rows * columns, dim = inner / heads, gates = 2 * heads;
    zeros.assign(inner, 0.0f);
    taps_w.resize(taps * inner);
    for (long i = 0; i < rows; ++i)
      for (long j = 0; j < columns; ++j) {
        const long tap = i * columns + j;
        dy[tap] = i - rows / 2, dx[tap] = causal ? j - (columns - 1) : j - columns / 2;
        if (reverse) dy[tap] = -dy[tap], dx[tap] = -dx[tap];
        for (long c = 0; c < inner; ++c) taps_w[tap * inner + c] = conv[c * taps + tap];
      }
    for (int j = 0; j < 3; ++j) {
      direct[j].resize(4 * inner), turned[j].resize(4 * inner);
      for (long g = 0; g < inner / 4; ++g)
        for (long o = 0; o < 4; ++o)
          for (long i = 0; i < 4; ++i) {
            const float x = weight[j][(g * 4 + o) * 4 + i];
            direct[j][i * inner + 4 * g + o] = x;
            turned[j][o * inner + 4 * g + i] = x;
          }
    }
  }
  const float* gate_row(long j) const { return gate[j / heads] + (j % heads) * 3 * inner; }
  void fold() {
    folded_c.assign(gates * inner, 0.0f), folded_a.assign(gates * inner, 0.0f), folded_bias.resize(gates);
    for (long j = 0; j < gates; ++j) {
      double constant = gate_bias[j / heads][j % heads];
      for (int k = 0; k < 3; ++k) {
        const float* row = gate_row(j) + k * inner;
        float* to = (k < 2 ? folded_c : folded_a).data() + j * inner;
        for (long c = 0; c < inner; c += W) {
          V w[4];
          for (int o = 0; o < 4; ++o) w[o] = ld(turned[k].data() + o * inner + c);
          st(to + c, product(ld(row + c), w, ld(to + c)));
        }
        if (bias[k])
          for (long c = 0; c < inner; ++c) constant += double(row[c]) * bias[k][c];
      }
      folded_bias[j] = float(constant);
    }
  }
  long blocks() const { return (width + TOKENS - 1) / TOKENS; }
  long token(long b, long y, long x) const { return (b * height + y) * width + x; }
  const float* a(long token) const { return u + token * 2 * inner; }
  const float* z(long token) const { return a(token) + inner; }
};

// Runs f(item, share) for all items, a fixed share of them each: sums over a share do not depend on who took it.
// `parallel` is GOMP_parallel of the OpenMP runtime that torch has loaded, so that both have one pool of threads
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

template <class F>
void for_items(long items, long shares, Parallel parallel, F f) {
  struct Work {
    long items, shares;
    F& f;
    std::atomic<long> next{0};
  } work{items, shares, f};
  const auto run = [](void* data) {
    Work& w = *static_cast<Work*>(data);
    for (long s; (s = w.next.fetch_add(1)) < w.shares;)
      for (long j = s * w.items / w.shares; j < (s + 1) * w.items / w.shares; ++j) w.f(j, s);
  };
  if (parallel && shares > 1) parallel(run, &work, unsigned(shares), 0);
  else run(&work);
}

// c (B, N, E), qkv (B, N, 3, E) and either gates (B, N, 2 H) or p (B, N, E), for tokens [x0, x0 + n) of a row
template <int TAPS, int GATES>
void before(const Mix& m, long b, long y, long x0, long n, float* c_out, float* qkv, float* gates, float* p_out) {
  const long E = m.inner, taps = TAPS ? TAPS : m.taps, count = GATES ? GATES : m.gates;
  const float* source[TOKENS][MAX_TAPS];
  alignas(64) float sums[TOKENS * W * (GATES ? GATES : 64)];
  if (gates) std::memset(sums, 0, 4 * n * count * W);
  const long first = m.token(b, y, x0);
  for (long t = 0; t < n; ++t)
    for (long tap = 0; tap < taps; ++tap) {
      const long yy = y + m.dy[tap], xx = x0 + t + m.dx[tap];
      const bool inside = yy >= 0 && yy < m.height && xx >= 0 && xx < m.width;
      source[t][tap] = inside ? m.a(m.token(b, yy, xx)) : m.zeros.data();
    }
  for (long c = 0; c < E; c += W) {
    V w[TAPS ? TAPS : 1], in[3][4], offset[3];
    for (int tap = 0; tap < TAPS; ++tap) w[tap] = ld(m.taps_w.data() + tap * E + c);
    for (int j = 0; j < 3; ++j) {
      for (int i = 0; i < 4; ++i) in[j][i] = ld(m.direct[j].data() + i * E + c);
      offset[j] = m.bias[j] ? ld(m.bias[j] + c) : V{};
    }
    const V start = m.conv_bias ? ld(m.conv_bias + c) : V{};
    for (long t = 0; t < n; ++t) {
      V p = start;
      if (TAPS)
        for (int tap = 0; tap < TAPS; ++tap) p += w[tap] * ld(source[t][tap] + c);
      else
        for (long tap = 0; tap < taps; ++tap) p += ld(m.taps_w.data() + tap * E + c) * ld(source[t][tap] + c);
      const V s = p * sigmoid(p), a = ld(m.a(first + t) + c);
      float* to = qkv + (first + t) * 3 * E + c;
      st(c_out + (first + t) * E + c, s);
      st(to, product(s, in[0], offset[0]));
      st(to + E, product(s, in[1], offset[1]));
      st(to + 2 * E, product(a, in[2], offset[2]));
      if (p_out) st(p_out + (first + t) * E + c, p);
      if (gates) {
        float* sum = sums + t * count * W;
        for (long j = 0; j < count; ++j)
          vec(sum + j * W) += s * ld(m.folded_c.data() + j * E + c) + a * ld(m.folded_a.data() + j * E + c);
      }
    }
  }
  if (gates)
    for (long t = 0; t < n; ++t)
      for (long j = 0; j < count; ++j)
        gates[(first + t) * count + j] = sum(vec(sums + (t * count + j) * W)) + m.folded_bias[j];
}

template <int TAPS>
void before_all(const Mix& m, Parallel parallel, float* c, float* qkv, float* gates, float* p) {
  for_items(m.batch * m.height * m.blocks(), m.threads, parallel, [&](long item, long) {
    const long x0 = item % m.blocks() * TOKENS, row = item / m.blocks();
    const long n = std::min(TOKENS, m.width - x0), b = row / m.height, y = row % m.height;
    if (m.gates == 8) before<TAPS, 8>(m, b, y, x0, n, c, qkv, gates, p);
    else before<TAPS, 0>(m, b, y, x0, n, c, qkv, gates, p);
  });
}

void before_all(const Mix& m, Parallel parallel, float* c, float* qkv, float* gates, float* p) {
  if (m.taps == 9) before_all<9>(m, parallel, c, qkv, gates, p);
  else if (m.taps == 4) before_all<4>(m, parallel, c, qkv, gates, p);
  else before_all<0>(m, parallel, c, qkv, gates, p);
}

struct Moments {
  float mean, rstd;
};

INLINE Moments moments(const float* h, long dim, float eps) {
  V total{};
  for (long c = 0; c < dim; c += W) total += ld(h + c);
  const float mean = sum(total) / dim;
  V square{};
  for (long c = 0; c < dim; c += W) {
    const V x = ld(h + c) - mean;
    square += x * x;
  }
  return {mean, 1.0f / std::sqrt(sum(square) / dim + eps)};
}

// y of one token
void behind(const Mix& m, long token, const float* c, const float* h, float* y) {
  const long E = m.inner;
  const float* z = m.z(token);
  c += token * E, h += token * E, y += token * E;
  for (long head = 0; head < m.heads; ++head) {
    const long lo = head * m.dim, hi = lo + m.dim;
    const Moments s = moments(h + lo, m.dim, m.eps);
    for (long j = lo; j < hi; j += W) {
      const V x = (ld(h + j) - s.mean) * s.rstd, g = ld(z + j);
      V t = x * (1.0f + ld(m.norm + j)) + ld(m.skip + j) * ld(c + j);
      if (m.norm_bias) t += ld(m.norm_bias + j);
      st(y + j, t * (g * sigmoid(g)));
    }
  }
}

// Gradients of the parameters, one set a share of the work; the first one takes the sum
struct Sums {
  float *conv, *conv_bias, *weight[3], *bias[3], *gate_c, *gate_a, *gate_bias, *norm, *norm_bias, *skip;
  Buffer memory;
  explicit Sums(const Mix& m) {
    const long E = m.inner;
    memory.assign((m.taps + 1 + 3 * 5 + 2 * m.gates + 3) * E + m.gates, 0.0f);
    float* p = memory.data();
    const auto take = [&](long n) {
      float* q = p;
      p += n;
      return q;
    };
    conv = take(m.taps * E), conv_bias = take(E);
    for (int j = 0; j < 3; ++j) weight[j] = take(4 * E), bias[j] = take(E);
    gate_c = take(m.gates * E), gate_a = take(m.gates * E), gate_bias = take(m.gates);
    norm = take(E), norm_bias = take(E), skip = take(E);
  }
};

INLINE void add(float* to, V x) { st(to, ld(to) + x); }

// From dy: dz (second half of du), dh, and the part of dc that comes through the skip
void behind_backward(const Mix& m, long token, const float* c, const float* h, const float* dy, float* du, float* dh,
                     float* dc, Sums& g) {
  const long E = m.inner;
  const float* z = m.z(token);
  float* dz = du + token * 2 * E + E;
  c += token * E, h += token * E, dy += token * E, dh += token * E, dc += token * E;
  for (long head = 0; head < m.heads; ++head) {
    const long lo = head * m.dim, hi = lo + m.dim;
    const Moments s = moments(h + lo, m.dim, m.eps);
    V total{}, along{};
    for (long j = lo; j < hi; j += W) {
      const V x = (ld(h + j) - s.mean) * s.rstd, w = 1.0f + ld(m.norm + j), gate = ld(z + j), cj = ld(c + j);
      const V open = sigmoid(gate), up = ld(dy + j), k = ld(m.skip + j);
      V t = x * w + k * cj;
      if (m.norm_bias) t += ld(m.norm_bias + j);
      const V dt = up * (gate * open);
      st(dz + j, up * t * (open * (1.0f + gate * (1.0f - open))));
      st(dc + j, dt * k);
      add(g.skip + j, dt * cj), add(g.norm + j, dt * x), add(g.norm_bias + j, dt);
      const V d = dt * w;
      st(dh + j, d);
      total += d, along += d * x;
    }
    const float mean = sum(total) / m.dim, slope = sum(along) / m.dim;
    for (long j = lo; j < hi; j += W)
      st(dh + j, s.rstd * (ld(dh + j) - mean - (ld(h + j) - s.mean) * s.rstd * slope));
  }
}

// From gradients of q, k, v and the gates: those of a but for the convolution (first half of du), and of p (in the
// place of dc)
template <int N, int GATES>
void before_backward(const Mix& m, long first, const float* c, const float* p, const float* const* d,
                     const float* d_gates, float* du, float* dc, Sums& g) {
  const long E = m.inner, count = GATES ? GATES : m.gates;
  d_gates += first * count;
  for (long j = 0; j < count; ++j)
    for (int t = 0; t < N; ++t) g.gate_bias[j] += d_gates[t * count + j];
  for (long e = 0; e < E; e += W) {
    V x[2][N], back[2][N];  // of c and of a
    for (int t = 0; t < N; ++t) {
      x[0][t] = ld(c + (first + t) * E + e), x[1][t] = ld(m.a(first + t) + e);
      back[0][t] = ld(dc + (first + t) * E + e), back[1][t] = V{};
    }
    for (long j = 0; j < count; ++j) {
      const V to_c = ld(m.folded_c.data() + j * E + e), to_a = ld(m.folded_a.data() + j * E + e);
      V sum_c = ld(g.gate_c + j * E + e), sum_a = ld(g.gate_a + j * E + e);
      for (int t = 0; t < N; ++t) {
        const float up = d_gates[t * count + j];
        back[0][t] += up * to_c, back[1][t] += up * to_a;
        sum_c += up * x[0][t], sum_a += up * x[1][t];
      }
      st(g.gate_c + j * E + e, sum_c), st(g.gate_a + j * E + e, sum_a);
    }
    for (int k = 0; k < 3; ++k) {
      V w[4], s[4], b = ld(g.bias[k] + e);
      for (int i = 0; i < 4; ++i) w[i] = ld(m.turned[k].data() + i * E + e), s[i] = ld(g.weight[k] + i * E + e);
      for (int t = 0; t < N; ++t) {
        const V from = x[k / 2][t], up = ld(d[k] + (first + t) * E + e);
        back[k / 2][t] = product(up, w, back[k / 2][t]);
        s[0] += up * spread<0>(from), s[1] += up * spread<1>(from);
        s[2] += up * spread<2>(from), s[3] += up * spread<3>(from);
        b += up;
      }
      for (int i = 0; i < 4; ++i) st(g.weight[k] + i * E + e, s[i]);
      st(g.bias[k] + e, b);
    }
    for (int t = 0; t < N; ++t) {
      const V y = ld(p + (first + t) * E + e), open = sigmoid(y);
      st(dc + (first + t) * E + e, back[0][t] * (open * (1.0f + y * (1.0f - open))));
      st(du + (first + t) * 2 * E + e, back[1][t]);
    }
  }
}

// From gradients of p: what the convolution adds to those of a, for tokens [x0, x0 + n) of a row
template <int TAPS>
void convolve_backward(const Mix& m, long b, long y, long x0, long n, const float* dp, float* du, Sums& g) {
  const long E = m.inner, taps = TAPS ? TAPS : m.taps, first = m.token(b, y, x0);
  const float* source[TOKENS][MAX_TAPS];
  for (long t = 0; t < n; ++t)
    for (long tap = 0; tap < taps; ++tap) {
      const long yy = y - m.dy[tap], xx = x0 + t - m.dx[tap];
      const bool inside = yy >= 0 && yy < m.height && xx >= 0 && xx < m.width;
      source[t][tap] = inside ? dp + m.token(b, yy, xx) * E : m.zeros.data();
    }
  for (long c = 0; c < E; c += W) {
    V s[TAPS ? TAPS : MAX_TAPS], total = ld(g.conv_bias + c);
    for (long tap = 0; tap < taps; ++tap) s[tap] = ld(g.conv + tap * E + c);
    for (long t = 0; t < n; ++t) {
      const V a = ld(m.a(first + t) + c);
      float* to = du + (first + t) * 2 * E + c;
      V da = ld(to);
      for (long tap = 0; tap < taps; ++tap) {
        const V up = ld(source[t][tap] + c);
        da += up * ld(m.taps_w.data() + tap * E + c);
        s[tap] += up * a;
      }
      st(to, da);
      total += ld(dp + (first + t) * E + c);
    }
    for (long tap = 0; tap < taps; ++tap) st(g.conv + tap * E + c, s[tap]);
    st(g.conv_bias + c, total);
  }
}

void behind_backward_all(const Mix& m, Parallel parallel, const float* dy, const float* c, const float* h, float* du,
                         float* dh, float* dc, std::vector<Sums>& sums) {
  for_items(m.batch * m.height, m.threads, parallel, [&](long row, long share) {
    for (long x = 0; x < m.width; ++x) behind_backward(m, row * m.width + x, c, h, dy, du, dh, dc, sums[share]);
  });
}

void before_backward_all(const Mix& m, Parallel parallel, const float* c, const float* p, const float* const* d,
                         const float* d_gates, float* du, float* dc, std::vector<Sums>& sums) {
  constexpr int GROUP = 4;
  const long tokens = m.height * m.width;
  for_items(m.batch, m.threads, parallel, [&](long b, long share) {
    Sums& g = sums[share];
    long t = b * tokens;
    const long end = t + tokens;
    if (m.gates == 8)
      for (; t + GROUP <= end; t += GROUP) before_backward<GROUP, 8>(m, t, c, p, d, d_gates, du, dc, g);
    for (; t < end; ++t) before_backward<1, 0>(m, t, c, p, d, d_gates, du, dc, g);
    for (long y = 0; y < m.height; ++y)
      for (long x0 = 0; x0 < m.width; x0 += TOKENS) {
        const long n = std::min(TOKENS, m.width - x0);
        if (m.taps == 9) convolve_backward<9>(m, b, y, x0, n, dc, du, g);
        else if (m.taps == 4) convolve_backward<4>(m, b, y, x0, n, dc, du, g);
        else convolve_backward<0>(m, b, y, x0, n, dc, du, g);
      }
  });
}

std::vector<Sums> sums_of(const Mix& m) {
  std::vector<Sums> sums;
  sums.reserve(m.threads);
  for (long j = 0; j < m.threads; ++j) sums.emplace_back(m);
  return sums;
}

Sums& total(std::vector<Sums>& sums) {
  for (size_t j = 1; j < sums.size(); ++j)
    for (size_t i = 0; i < sums[j].memory.size(); ++i) sums[0].memory[i] += sums[j].memory[i];
  return sums[0];
}

void copy(float* to, const float* from, long n) {
  if (to) std::memcpy(to, from, 4 * n);
}

// From gradients of the folded gates: those of the gates, and what comes to the blocks and their biases
void unfold(const Mix& m, Sums& g, float* const* gate) {
  const long E = m.inner;
  for (long j = 0; j < m.gates; ++j)
    for (int k = 0; k < 3; ++k) {
      const float *row = m.gate_row(j) + k * E, *folded = (k < 2 ? g.gate_c : g.gate_a) + j * E;
      float* to = gate[j / m.heads] + (j % m.heads * 3 + k) * E;
      for (long c = 0; c < E; c += W) {
        V w[4];
        for (int i = 0; i < 4; ++i) w[i] = ld(m.direct[k].data() + i * E + c);
        const V x = ld(folded + c), up = ld(row + c);
        st(to + c, product(x, w, m.bias[k] ? g.gate_bias[j] * ld(m.bias[k] + c) : V{}));
        add(g.weight[k] + c, up * spread<0>(x)), add(g.weight[k] + E + c, up * spread<1>(x));
        add(g.weight[k] + 2 * E + c, up * spread<2>(x)), add(g.weight[k] + 3 * E + c, up * spread<3>(x));
        add(g.bias[k] + c, g.gate_bias[j] * up);
      }
    }
}

template <class F>
int guarded(F f) {
  try {
    f();
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // namespace

// 0, or 1 when memory ran out. The arguments are those of `Mix`, then the pointers below in their order

extern "C" int vilma_vil_before(const int64_t* arguments, void* parallel) {
  return guarded([=] {
    Reader r{arguments};
    Mix m(r);
    float *c = r.pointer(), *qkv = r.pointer(), *gates = r.pointer(), *p = r.pointer();
    if (gates) m.fold();
    before_all(m, Parallel(parallel), c, qkv, gates, p);
  });
}

extern "C" int vilma_vil_behind(const int64_t* arguments, void* parallel) {
  return guarded([=] {
    Reader r{arguments};
    const Mix m(r);
    const float *c = r.pointer(), *h = r.pointer();
    float* y = r.pointer();
    for_items(m.batch * m.height, m.threads, Parallel(parallel), [&](long row, long) {
      for (long x = 0; x < m.width; ++x) behind(m, row * m.width + x, c, h, y);
    });
  });
}

extern "C" int vilma_vil_behind_backward(const int64_t* arguments, void* parallel) {
  return guarded([=] {
    Reader r{arguments};
    const Mix m(r);
    const float *dy = r.pointer(), *c = r.pointer(), *h = r.pointer();
    float *du = r.pointer(), *dh = r.pointer(), *dc = r.pointer();
    auto sums = sums_of(m);
    behind_backward_all(m, Parallel(parallel), dy, c, h, du, dh, dc, sums);
    const Sums& g = total(sums);
    for (const float* from : {g.norm, g.norm_bias, g.skip}) copy(r.pointer(), from, m.inner);
  });
}

extern "C" int vilma_vil_before_backward(const int64_t* arguments, void* parallel) {
  return guarded([=] {
    Reader r{arguments};
    Mix m(r);
    m.fold();
    const float *c = r.pointer(), *p = r.pointer(), *d[3];
    for (const float*& x : d) x = r.pointer();
    const float* d_gates = r.pointer();
    float *du = r.pointer(), *dc = r.pointer();
    auto sums = sums_of(m);
    before_backward_all(m, Parallel(parallel), c, p, d, d_gates, du, dc, sums);
    Sums& g = total(sums);
    const long E = m.inner;
    float* conv = r.pointer();
    for (long j = 0; j < E; ++j)
      for (long tap = 0; tap < m.taps; ++tap) conv[j * m.taps + tap] = g.conv[tap * E + j];
    copy(r.pointer(), g.conv_bias, E);
    float *weight[3], *bias[3], *gate[2], *gate_bias[2];
    for (int k = 0; k < 3; ++k) weight[k] = r.pointer(), bias[k] = r.pointer();
    for (int k = 0; k < 2; ++k) gate[k] = r.pointer(), gate_bias[k] = r.pointer();
    unfold(m, g, gate);
    for (int k = 0; k < 3; ++k) {
      for (long j = 0; j < E; ++j)
        for (long i = 0; i < 4; ++i) weight[k][j * 4 + i] = g.weight[k][i * E + j];
      copy(bias[k], g.bias[k], E);
    }
    for (int k = 0; k < 2; ++k) copy(gate_bias[k], g.gate_bias + k * m.heads, m.heads);
  });
}
