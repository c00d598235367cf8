// Vectors, tiles of matrix products and the work space of mlstm_cpu.cpp, for any width of vector.
//
// GCC 12 or newer, or clang: vector extensions and __builtin_shufflevector. Rows and columns are multiples of a
// vector throughout, and memory is aligned to one; what is loaded is padded with zeros until that holds.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#define INLINE inline __attribute__((always_inline))
#define LAMBDA __attribute__((always_inline))

namespace {

// MR x NR accumulators, NR operands and one scalar fill the vector registers.
#if defined(__AVX512F__)
constexpr int W = 16, MR = 8;
#elif defined(__AVX__)
constexpr int W = 8, MR = 4;
#elif defined(__aarch64__)
constexpr int W = 4, MR = 8;
#else
constexpr int W = 4, MR = 4;
#endif
constexpr int PAD = W > MR ? W : MR;
constexpr long MAX_BLOCK = 64;

typedef float V __attribute__((vector_size(4 * W), may_alias));
typedef int32_t VI __attribute__((vector_size(4 * W), may_alias));

INLINE V splat(float x) { return x - V{}; }
INLINE const V& vec(const float* p) { return *reinterpret_cast<const V*>(p); }
INLINE V& vec(float* p) { return *reinterpret_cast<V*>(p); }
INLINE float sum(V x) {
  float s = 0;
  for (int j = 0; j < W; ++j) s += x[j];
  return s;
}
INLINE long padded(long n) { return (n + PAD - 1) / PAD * PAD; }

// exp: relative error 1e-7, exact 0 and infinity beyond the range, NaN kept
INLINE V exp(V x) {
  const V low = splat(-87.33f), high = splat(88.37f);
  V y = x < low ? low : x;
  y = y > high ? high : y;
  const V t = y * 1.44269504f + 12582912.0f;
  const V n = t - 12582912.0f;
  const V r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = r * 1.9841270e-4f + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  p = (V)((VI)p + ((VI)t << 23));
  p = x < low ? V{} : p;
  p = x > high ? splat(std::numeric_limits<float>::infinity()) : p;
  return x == x ? p : x;
}

// exp(x) for x <= 0 and log(1 + x) for 0 <= x <= 1, in plain scalars so that loops over them vectorise
INLINE double exp_negative(double x) {
  x = x < -700.0 ? -700.0 : x;
  const double t = x * 1.4426950408889634 + 0x1.8p52, n = t - 0x1.8p52;
  const double r = (x - n * 0x1.62e42fefa0000p-1) - n * 0x1.cf79abc9e3b3ap-40;
  double p = 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r * r + r + 1.0;
  uint64_t bits, shift;
  std::memcpy(&bits, &p, 8);
  std::memcpy(&shift, &t, 8);
  bits += shift << 52;
  std::memcpy(&p, &bits, 8);
  return p;
}
INLINE double log1p(double x) {
  const double z = x / (2.0 + x), z2 = z * z;
  double p = 1.0 / 31;
  for (int j = 29; j > 0; j -= 2) p = p * z2 + 1.0 / j;
  return 2.0 * z * p;
}
INLINE double log_sigmoid(double x) {
  const double y = (x < 0.0 ? x : 0.0) - log1p(exp_negative(x < 0.0 ? x : -x));
  return y < -1e4 ? -1e4 : y;  // zero as a gate, and sums keep their precision
}
INLINE double sigmoid(double x) {
  const double e = exp_negative(x < 0.0 ? x : -x);
  return (x < 0.0 ? e : 1.0) / (1.0 + e);
}

void exp_all(float* x, long n) {  // n a multiple of W
  for (long j = 0; j < n; j += W) vec(x + j) = exp(vec(x + j));
}

// MR rows and N vectors of columns of a matrix product
template <int N>
struct Tile {
  V a[MR][N];

  INLINE void zero() {
    for (auto& row : a)
      for (V& x : row) x = V{};
  }
  INLINE void load(const float* p, long ld) {
    for (int m = 0; m < MR; ++m)
      for (int n = 0; n < N; ++n) a[m][n] = vec(p + m * ld + n * W);
  }
  INLINE void store(float* p, long ld) const {
    for (int m = 0; m < MR; ++m)
      for (int n = 0; n < N; ++n) vec(p + m * ld + n * W) = a[m][n];
  }
  INLINE void scale(float s) {
    for (auto& row : a)
      for (V& x : row) x *= s;
  }
  INLINE void scale_rows(const float* s) {
    for (int m = 0; m < MR; ++m)
      for (V& x : a[m]) x *= s[m];
  }
  // += A B over `depth`: A(m, k) at A[m * ld + k]
  INLINE void add(const float* A, long ld, const float* B, long ldb, long depth) {
    for (long k = 0; k < depth; ++k, B += ldb) {
      V b[N];
      for (int n = 0; n < N; ++n) b[n] = vec(B + n * W);
      for (int m = 0; m < MR; ++m) {
        const float x = A[m * ld + k];
        for (int n = 0; n < N; ++n) a[m][n] += x * b[n];
      }
    }
  }
  // += A^T B: A(m, k) at A[k * ld + m]
  INLINE void add_transposed(const float* A, long ld, const float* B, long ldb, long depth) {
    for (long k = 0; k < depth; ++k, A += ld, B += ldb) {
      V b[N];
      for (int n = 0; n < N; ++n) b[n] = vec(B + n * W);
      for (int m = 0; m < MR; ++m)
        for (int n = 0; n < N; ++n) a[m][n] += A[m] * b[n];
    }
  }
};

// Call f(tile, row, column) for every tile of a matrix; the columns of one panel stay in the first cache
template <class F>
INLINE void for_tiles(long rows, long columns, F&& f) {
  for (long v = 0, left = columns / W; left > 0;) {
    if (left == 3 || left > 4) {
      Tile<3> t;
      for (long r = 0; r < rows; r += MR) f(t, r, v * W);
      v += 3, left -= 3;
    } else if (left > 1) {
      Tile<2> t;
      for (long r = 0; r < rows; r += MR) f(t, r, v * W);
      v += 2, left -= 2;
    } else {
      Tile<1> t;
      for (long r = 0; r < rows; r += MR) f(t, r, v * W);
      v += 1, left -= 1;
    }
  }
}

// One stage of a transposition: x[j] and x[j + W / 2] interleaved become x[2 j] and x[2 j + 1]
INLINE void interleave(const V& a, const V& b, V& low, V& high) {
#if defined(__AVX512F__)
  low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX__)
  low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// y (columns, ldy) = x^T, x (rows, ldx); rows and columns multiples of W
void transpose(const float* x, long rows, long columns, long ldx, float* y, long ldy) {
  for (long r = 0; r < rows; r += W)
    for (long c = 0; c < columns; c += W) {
      V a[W], b[W];
      for (int j = 0; j < W; ++j) a[j] = vec(x + (r + j) * ldx + c);
      for (int stage = 1; stage < W; stage *= 2) {
        for (int j = 0; j < W / 2; ++j) interleave(a[j], a[j + W / 2], b[2 * j], b[2 * j + 1]);
        for (int j = 0; j < W; ++j) a[j] = b[j];
      }
      for (int j = 0; j < W; ++j) vec(y + (c + j) * ldy + r) = a[j];
    }
}

INLINE float dot(const float* x, const float* y, long n) {
  V s{};
  for (long j = 0; j < n; j += W) s += vec(x + j) * vec(y + j);
  return sum(s);
}
INLINE void scale_row(float* x, float s, long n) {
  for (long j = 0; j < n; j += W) vec(x + j) *= s;
}
INLINE void add_row(float* y, float s, const float* x, long n) {
  for (long j = 0; j < n; j += W) vec(y + j) += s * vec(x + j);
}

INLINE float from_bfloat16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

// Memory of one thread, kept between calls
struct Arena {
  char* data = nullptr;
  size_t size = 0, used = 0;
  ~Arena() { std::free(data); }
  void reserve(size_t bytes) {
    used = 0;
    if (bytes <= size) return;
    std::free(data);
    data = nullptr, size = 0;  // what a failure leaves
    bytes = (bytes + 4095) / 4096 * 4096;
    data = static_cast<char*>(std::aligned_alloc(4096, bytes));
    if (!data) throw std::bad_alloc();
    size = bytes;
  }
  template <class T = float>
  T* take(size_t count) {
    T* p = reinterpret_cast<T*>(data + used);
    used += (count * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};
thread_local Arena arena;

constexpr size_t SLACK = 64 * 64;  // of a reserve, for the rounding of its pieces

void load_matrix(const float* x, long rows, long columns, float* y, long padded_rows, long ld) {
  std::memset(y, 0, 4 * padded_rows * ld);
  for (long r = 0; r < rows; ++r) std::memcpy(y + r * ld, x + r * columns, 4 * columns);
}
void store_matrix(const float* x, long ld, long rows, long columns, float* y) {
  for (long r = 0; r < rows; ++r) std::memcpy(y + r * columns, x + r * ld, 4 * columns);
}

}  // namespace
