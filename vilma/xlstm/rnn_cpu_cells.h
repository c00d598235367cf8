// The recurrent cells of rnn_cpu.cpp on vectors, and products of a few rows with a packed matrix.
//
// A cell has G gates in wx, R in r and S in b: the gates of r are the first and those of wx the last of S. `keep`
// is what its backward reads: see `forward` of each. The formulas and names are those of rnn_torch.py.

#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "mlstm_cpu_tiles.h"

namespace {

// A store past the caches, of what is not read again before it would have left them; p aligned to a vector
INLINE void stream(float* p, V x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX__)
  _mm256_stream_ps(p, (__m256)x);
#else
  vec(p) = x;
#endif
}
// Others see what was streamed once their thread is told of the end; this orders the two
INLINE void end_of_streams() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}
constexpr long STREAM_BYTES = 4 << 20;  // of a tensor for which that pays

constexpr long ALIGN = 16;  // sizes are padded to it, whatever the width of a vector
INLINE long whole(long n) { return (n + ALIGN - 1) / ALIGN * ALIGN; }

INLINE V choose(VI condition, V a, V b) { return condition ? a : b; }
INLINE V absolute(V x) { return (V)((VI)x & 0x7fffffff); }
INLINE V least(V x, float bound) { return x > bound ? splat(bound) : x; }

// exp for x <= 80: relative error 1e-7, 1e-38 where it would be smaller, NaN kept
INLINE V exp_below(V x) {
  const V low = splat(-87.33f), y = x < low ? low : x;
  const V t = y * 1.44269504f + 12582912.0f;
  const V n = t - 12582912.0f;
  const V r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = r * 1.9841270e-4f + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  return choose(x == x, (V)((VI)p + ((VI)t << 23)), x);
}

// exp(-|x|), and sigmoid(x) and sigmoid(-x) from it: no overflow, no cancellation
INLINE V decay(V x) { return exp_below(-absolute(x)); }
INLINE V sigmoid(V x, V e) { return choose(x < 0.0f, e, splat(1.0f)) / (1.0f + e); }
INLINE V sigmoid_of_minus(V x, V e) { return choose(x < 0.0f, splat(1.0f), e) / (1.0f + e); }
INLINE V sigmoid(V x) { return sigmoid(x, decay(x)); }
INLINE V log_sigmoid(V x, V e) {
  const V z = e / (2.0f + e), y = z * z;
  V p = y * (1.0f / 13) + 1.0f / 11;
  p = p * y + 1.0f / 9;
  p = p * y + 1.0f / 7;
  p = p * y + 1.0f / 5;
  p = p * y + 1.0f / 3;
  p = p * y + 1.0f;
  return choose(x > 0.0f, V{}, x) - 2.0f * z * p;
}
INLINE V tanh(V x) {
  const V e = exp_below(-2.0f * absolute(x)), y = x * x;
  const V size = (1.0f - e) / (1.0f + e);
  V p = y * (62.0f / 2835) - 17.0f / 315;
  p = p * y + 2.0f / 15;
  p = p * y - 1.0f / 3;
  const V small = x + x * y * p;
  const V large = (V)((VI)size | ((VI)x & (int32_t)0x80000000));
  return choose(absolute(x) < 0.25f, small, large);
}

struct Slstm {
  static constexpr int G = 4, R = 4, S = 4, STATES = 4, KEEP = 6;  // i, f, z, o; h, c, n, m

  static INLINE VI takes_i(V d, V n) { return (n == 0.0f) | (d >= 0.0f); }
  // F and I from d = i - (log f + m): the larger of them is 1, unless n is 0
  static INLINE void gates(V d, V n, V& forget, V& input, VI& i_wins) {
    i_wins = takes_i(d, n);
    const V e = exp_below(least(choose(i_wins, -d, d), 80.0f)), one = splat(1.0f);
    forget = choose(i_wins, e, one), input = choose(i_wins, one, e);
  }
  // keep: d, sigmoid(-f), z, o, c, n
  static INLINE void forward(const V* g, V* x, V* keep) {
    const V e = decay(g[1]), kept = log_sigmoid(g[1], e) + x[3], d = g[0] - kept;
    const V z = tanh(g[2]), o = sigmoid(g[3]);
    V forget, input;
    VI i_wins;
    gates(d, x[2], forget, input, i_wins);
    const V c = forget * x[1] + input * z;
    V n = forget * x[2] + input;
    n = n < 1.0f ? splat(1.0f) : n;
    x[3] = choose(i_wins, g[0], kept);
    x[0] = o * c / n, x[1] = c, x[2] = n;
    keep[0] = d, keep[1] = sigmoid_of_minus(g[1], e), keep[2] = z, keep[3] = o, keep[4] = c, keep[5] = n;
  }
  // dx: of h, c, n and mu; of the states before this step afterwards
  static INLINE void backward(V* dx, const V* keep, V, const V* before, V* dg) {
    const V z = keep[2], o = keep[3], per_n = 1.0f / keep[5], ratio = keep[4] * per_n;
    V forget, input;
    VI i_wins;
    gates(keep[0], before[2], forget, input, i_wins);
    const V to_c = dx[0] * o * per_n;
    const V dc = dx[1] + to_c;
    V dn = dx[2] - to_c * ratio, mu = dx[3];
    const VI below = forget * before[2] + input < 1.0f;
    mu += choose(below, dn, V{});
    dn = choose(below, V{}, dn);
    const V to_i = choose(i_wins, mu, V{});
    mu = choose(i_wins, V{}, mu);
    dg[0] = (dc * z + dn) * input + to_i;
    dg[1] = ((dc * before[1] + dn * before[2]) * forget + mu) * keep[1];
    dg[2] = dc * input * (1.0f - z * z);
    dg[3] = dx[0] * ratio * o * (1.0f - o);
    dx[0] = V{}, dx[1] = dc * forget, dx[2] = dn * forget, dx[3] = mu;
  }
};

struct Lstm {
  static constexpr int G = 4, R = 4, S = 4, STATES = 2, KEEP = 5;  // i, f, z, o; h, c

  // keep: the gates, c
  static INLINE void forward(const V* g, V* x, V* keep) {
    const V i = sigmoid(g[0]), f = sigmoid(g[1]), z = tanh(g[2]), o = sigmoid(g[3]);
    x[1] = f * x[1] + i * z;
    x[0] = o * tanh(x[1]);
    keep[0] = i, keep[1] = f, keep[2] = z, keep[3] = o, keep[4] = x[1];
  }
  static INLINE void backward(V* dx, const V* keep, V, const V* before, V* dg) {
    const V i = keep[0], f = keep[1], z = keep[2], o = keep[3], y = tanh(keep[4]);
    const V dc = dx[1] + dx[0] * o * (1.0f - y * y);
    dg[0] = dc * z * i * (1.0f - i);
    dg[1] = dc * before[1] * f * (1.0f - f);
    dg[2] = dc * i * (1.0f - z * z);
    dg[3] = dx[0] * y * o * (1.0f - o);
    dx[0] = V{}, dx[1] = dc * f;
  }
};

struct Gru {
  static constexpr int G = 3, R = 3, S = 4, STATES = 1, KEEP = 4;  // g, r, z, n; h

  // keep: R_g h + b_g, and the other gates
  static INLINE void forward(const V* g, V* x, V* keep) {
    const V r = sigmoid(g[1]), z = sigmoid(g[2]), n = tanh(g[3] + r * g[0]);
    x[0] = n + z * (x[0] - n);
    keep[0] = g[0], keep[1] = r, keep[2] = z, keep[3] = n;
  }
  static INLINE void backward(V* dx, const V* keep, V, const V* before, V* dg) {
    const V r = keep[1], z = keep[2], n = keep[3];
    dg[3] = dx[0] * (1.0f - z) * (1.0f - n * n);
    dg[2] = dx[0] * (before[0] - n) * z * (1.0f - z);
    dg[1] = dg[3] * keep[0] * r * (1.0f - r);
    dg[0] = dg[3] * r;
    dx[0] *= z;
  }
};

struct Elman {
  static constexpr int G = 1, R = 1, S = 1, STATES = 1, KEEP = 0;  // g; h

  static INLINE void forward(const V* g, V* x, V*) { x[0] = tanh(g[0]); }
  static INLINE void backward(V* dx, const V*, V h, const V*, V* dg) {
    dg[0] = dx[0] * (1.0f - h * h);
    dx[0] = V{};
  }
};

typedef float Unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
INLINE V load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }

// Cache lines that the next step will read, asked for a few at a time while a product keeps the core busy
struct Ahead {
  const char **next, **end;
  explicit Ahead(const char** lines) : next(lines), end(lines) {}
  INLINE void add(const void* p, long bytes) {
    const char* line = static_cast<const char*>(p);
    for (long j = 0; j < bytes; j += 64) *end++ = line + j;
  }
  INLINE void ask() {
    if (next != end) __builtin_prefetch(*next++, 0, 2);
  }
};

// Vectors of the next panel of a packed matrix, of those that are left
INLINE long panel(long left) { return left == 3 || left > 4 ? 3 : left > 1 ? 2 : 1; }

// M rows and N vectors: C = A B, or C += A^T B, with A(m, k) at A[m * ld + k] or A[k * ld + m]
template <int M, int N, bool TRANSPOSED>
INLINE void product(const float* A, long ld, const float* B, long ldb, long depth, float* C, long ldc,
                    Ahead* ahead = nullptr) {
  V a[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) a[m][n] = TRANSPOSED ? vec(C + m * ldc + n * W) : V{};
  for (long k = 0; k < depth; ++k, B += ldb) {
    V b[N];
    for (int n = 0; n < N; ++n) b[n] = load(B + n * W);
    if (ahead) ahead->ask();
    for (int m = 0; m < M; ++m) {
      const float x = TRANSPOSED ? A[k * ld + m] : A[m * ld + k];
      for (int n = 0; n < N; ++n) a[m][n] += x * b[n];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) vec(C + m * ldc + n * W) = a[m][n];
}

template <int N>
INLINE void rows_of(long rows, const float* A, long lda, const float* B, long depth, float* C, long ldc,
                    Ahead& ahead) {
  for (; rows > MR / 2; rows -= MR, A += MR * lda, C += MR * ldc)
    product<MR, N, false>(A, lda, B, N * W, depth, C, ldc, &ahead);
  if (rows > 2) product<4, N, false>(A, lda, B, N * W, depth, C, ldc, &ahead);
  else if (rows == 2) product<2, N, false>(A, lda, B, N * W, depth, C, ldc, &ahead);
  else if (rows == 1) product<1, N, false>(A, lda, B, N * W, depth, C, ldc, &ahead);
}

// C (rows, columns) = A B, B packed; up to MR - 1 rows beyond are read and written
inline void multiply(long rows, const float* A, long lda, const float* B, long depth, long columns, float* C,
                     long ldc, Ahead& ahead) {
  for (long v = 0, left = columns / W, n; left > 0; v += n, left -= n) {
    n = panel(left);
    if (n == 3) rows_of<3>(rows, A, lda, B, depth, C + v * W, ldc, ahead);
    else if (n == 2) rows_of<2>(rows, A, lda, B, depth, C + v * W, ldc, ahead);
    else rows_of<1>(rows, A, lda, B, depth, C + v * W, ldc, ahead);
    B += n * W * depth;
  }
}

// C (columns) = a B for one row, B (depth, columns) as it is: each row of it is read through
inline void multiply_row(const float* a, const float* B, long depth, long columns, float* C) {
  const long ldb = columns;
  for (; columns >= 8 * W; columns -= 8 * W, B += 8 * W, C += 8 * W)
    product<1, 8, false>(a, 0, B, ldb, depth, C, 0);
  for (; columns >= W; columns -= W, B += W, C += W) product<1, 1, false>(a, 0, B, ldb, depth, C, 0);
  for (long j = 0; j < columns; ++j) C[j] = 0.0f;
  for (long k = 0; k < depth; ++k)
    for (long j = 0; j < columns; ++j) C[j] += a[k] * B[k * ldb + j];
}

// C (rows, columns) += A^T B; rows a multiple of MR
inline void add_outer(long rows, long columns, const float* A, long lda, const float* B, long ldb, long depth,
                      float* C, long ldc) {
  for (long v = 0, left = columns / W, n; left > 0; v += n, left -= n) {
    n = panel(left);
    for (long r = 0; r < rows; r += MR) {
      float* to = C + r * ldc + v * W;
      if (n == 3) product<MR, 3, true>(A + r, lda, B + v * W, ldb, depth, to, ldc);
      else if (n == 2) product<MR, 2, true>(A + r, lda, B + v * W, ldb, depth, to, ldc);
      else product<MR, 1, true>(A + r, lda, B + v * W, ldb, depth, to, ldc);
    }
  }
}

// x (rows, columns) as `multiply` reads it: one panel of columns after another
inline void pack(const float* x, long rows, long columns, float* y) {
  for (long v = 0, left = columns / W, n; left > 0; v += n, left -= n) {
    n = panel(left);
    for (long r = 0; r < rows; ++r, y += n * W) std::memcpy(y, x + r * columns + v * W, 4 * n * W);
  }
}

}  // namespace
