// The mLSTM on CPUs: chunkwise forward and exact backward, one head after another inside a core's cache.
//
// The formulas and names are those of mlstm_chunkwise.py. Inside a chunk the rows are taken in blocks of
// `block` steps. Columns before the block see its rows through a rank-one gate matrix: with R = M of the step
// before the block, D_ts = exp(R - M_t) exp(u_s - R), both factors at most 1. Only the square on the diagonal
// needs an exponential for each entry. Resets keep this form: sequences are contiguous, so a 0 in either factor
// masks what belongs to another one.
//
// Everything is padded with zeros to whole vectors when it is loaded (any strides, either direction, float32 or
// bfloat16), so the matrix products below have no tails. Gates are added up in float64.
//
// Compiled by mlstm_cpu.py, which passes every argument as one array of 64-bit integers, in the order in which
// `Problem` and the entry points at the end read them.

#include <algorithm>
#include <atomic>

#include "mlstm_cpu_tiles.h"

namespace {

// A tensor (B, H, T, D) of any strides, as the caller has it
struct Tensor {
  char* data;
  int64_t b, h, t, d;
};

struct Reader {
  const int64_t* p;
  int64_t next() { return *p++; }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(next());
  }
  Tensor tensor() {
    Tensor x;
    x.data = pointer<char>();
    x.b = next(), x.h = next(), x.t = next(), x.d = next();
    return x;
  }
};

struct Problem {
  long batch, heads, steps, dim_qk, dim_v, chunk, block, exponential, normalize, reverse, bfloat16, threads;
  float eps, scale;
  Tensor q, k, v, i, f, starts;        // i, f float32; starts bool or null
  const float *c0, *n0, *m0;           // null: from zero
  float *den, *c_inner, *n_inner, *m_inner;  // (B, H, T) and (B, H, chunks - 1, ...)
  long kp, vp, lp;                     // sizes padded to vectors; lp of a chunk

  explicit Problem(Reader& r) {
    for (long* x : {&batch, &heads, &steps, &dim_qk, &dim_v, &chunk, &block, &exponential, &normalize, &reverse,
                    &bfloat16, &threads})
      *x = r.next();
    const int64_t bits = r.next();
    double e;
    std::memcpy(&e, &bits, 8);
    eps = float(e);
    scale = float(1.0 / std::sqrt(double(dim_qk)));
    for (Tensor* x : {&q, &k, &v, &i, &f, &starts}) *x = r.tensor();
    for (const float** x : {&c0, &n0, &m0}) *x = r.pointer<float>();
    for (float** x : {&den, &c_inner, &n_inner, &m_inner}) *x = r.pointer<float>();
    chunk = std::min(chunk, steps);
    block = std::min((block + PAD - 1) / PAD * PAD, MAX_BLOCK);
    kp = padded(dim_qk), vp = padded(dim_v), lp = padded(chunk);
  }
  long chunks() const { return (steps + chunk - 1) / chunk; }
  long at(long t) const { return reverse ? steps - 1 - t : t; }  // where the t-th step that is run is stored

  void load(const Tensor& x, long b, long h, long lo, long n, long dim, float* y, long ld) const {
    for (long t = 0; t < n; ++t, y += ld) {
      const char* row = x.data + b * x.b + h * x.h + at(lo + t) * x.t;
      if (bfloat16) {
        if (x.d == 2)
          for (long j = 0; j < dim; ++j) y[j] = from_bfloat16(reinterpret_cast<const uint16_t*>(row)[j]);
        else
          for (long j = 0; j < dim; ++j) y[j] = from_bfloat16(*reinterpret_cast<const uint16_t*>(row + j * x.d));
      } else if (x.d == 4) {
        std::memcpy(y, row, 4 * dim);
      } else {
        for (long j = 0; j < dim; ++j) y[j] = *reinterpret_cast<const float*>(row + j * x.d);
      }
      for (long j = dim; j < ld; ++j) y[j] = 0.0f;
    }
    const long end = padded(n);
    std::memset(y, 0, 4 * ld * (end - n));
  }
  // the last axis of what is written is contiguous
  void store(const Tensor& x, long b, long h, long lo, long n, long dim, const float* y, long ld) const {
    for (long t = 0; t < n; ++t, y += ld) {
      char* row = x.data + b * x.b + h * x.h + at(lo + t) * x.t;
      if (bfloat16)
        for (long j = 0; j < dim; ++j) reinterpret_cast<uint16_t*>(row)[j] = to_bfloat16(y[j]);
      else
        std::memcpy(row, y, 4 * dim);
    }
  }
  float gate(const Tensor& x, long b, long h, long t) const {
    return *reinterpret_cast<const float*>(x.data + b * x.b + h * x.h + at(t) * x.t);
  }
};

// Gate quantities of one chunk; steps are numbered in the order in which they are run
struct Gates {
  double *u, *M, *b, *work;
  float *u_high, *u_low, *M_high, *M_low;  // both in two halves, for differences in float32
  float *start, *floor, *write;            // weight of the initial state, exp(-m_t), weight in the last state
  float *column, *row;                     // of one block: exp(u_s - R), exp(R - M_t)
  int32_t *source, *segment, *first;       // step that attains M_t (-1: initial m); sequence and its first step
  float keep, last_m;

  static size_t bytes(const Problem& p) { return (4 * 8 + 9 * 4 + 3 * 4) * p.lp + SLACK; }
  explicit Gates(const Problem& p) {
    for (double** x : {&u, &M, &b, &work}) *x = arena.take<double>(p.lp);
    for (float** x : {&u_high, &u_low, &M_high, &M_low, &start, &floor, &write, &column, &row})
      *x = arena.take(p.lp);
    for (int32_t** x : {&source, &segment, &first}) *x = arena.take<int32_t>(p.lp);
  }

  void chunk(const Problem& p, long batch, long head, long lo, long n, float m) {
    const long end = padded(n);
    for (long t = 0; t < n; ++t) b[t] = p.gate(p.f, batch, head, lo + t);
    for (long t = 0; t < n; ++t) u[t] = p.gate(p.i, batch, head, lo + t);
    for (long t = 0; t < n; ++t) b[t] = log_sigmoid(b[t]);
    if (p.exponential)
      for (long t = 0; t < n; ++t) u[t] = u[t] < -1e30 ? -1e30 : u[t];
    else
      for (long t = 0; t < n; ++t) u[t] = log_sigmoid(u[t]);
    double sum = 0.0, max = m;
    int32_t from = -1, sequence = 0, begin = 0;
    for (long t = 0; t < n; ++t) {
      if (p.starts.data && p.starts.data[batch * p.starts.b + p.at(lo + t) * p.starts.t]) {
        sum = max = 0.0;
        from = -1, sequence += 1, begin = int32_t(t);
      }
      b[t] = sum += b[t];
      u[t] -= sum;
      if (!p.exponential) max = -sum;
      else if (!(u[t] < max)) max = u[t], from = int32_t(t);
      M[t] = max;
      source[t] = from, segment[t] = sequence, first[t] = begin;
    }
    last_m = float(b[n - 1] + M[n - 1]);
    // the last state is in units of m as it is handed on, rounded to float32
    const double unit = last_m - b[n - 1];
    for (long t = 0; t < n; ++t) {
      u_high[t] = float(u[t]), u_low[t] = float(u[t] - u_high[t]);
      M_high[t] = float(M[t]), M_low[t] = float(M[t] - M_high[t]);
      start[t] = float(m - M[t]), floor[t] = float(-b[t] - M[t]), write[t] = float(u[t] - unit);
    }
    for (long t = n; t < end; ++t) {
      u_high[t] = -std::numeric_limits<float>::infinity(), u_low[t] = 0.0f;
      M_high[t] = M_high[n - 1], M_low[t] = M_low[n - 1];
      start[t] = floor[t] = write[t] = 0.0f;
      M[t] = M[n - 1], segment[t] = -1, first[t] = 0;
    }
    exp_all(start, end), exp_all(floor, end), exp_all(write, end);
    keep = float(std::exp(m - unit));
    if (p.starts.data) {
      for (long t = 0; t < n; ++t) {
        if (segment[t] != 0) start[t] = 0.0f;
        if (segment[t] != sequence) write[t] = 0.0f;
      }
      if (sequence != 0) keep = 0.0f;
    }
  }

  // factors of the columns before the block of rows [t0, t1)
  void factors(const Problem& p, long t0, long t1) {
    if (t0 == 0) return;
    const double R = M[t0 - 1];
    for (long s = 0; s < t0; ++s) column[s] = float(u[s] - R);
    for (long t = t0; t < t1; ++t) row[t] = float(R - M[t]);
    exp_all(column, t0);
    for (long t = t0; t < t1; t += W) vec(row + t) = exp(vec(row + t));
    if (p.starts.data) {
      const int32_t sequence = segment[t0 - 1];
      for (long s = 0; s < t0; ++s)
        if (segment[s] != sequence) column[s] = 0.0f;
      for (long t = t0; t < t1; ++t)
        if (segment[t] != sequence) row[t] = 0.0f;
    }
  }
};

INLINE long seen(long r) { return (r + MR + W - 1) / W * W; }  // columns of the diagonal square that rows r.. see

// P (rows, t0 + rows) = Q K^T D for the block of rows [t0, t0 + rows); D of the diagonal square is kept
void scores(const Problem& p, Gates& g, const float* Q, const float* KT, long t0, long rows, float* P, float* D) {
  g.factors(p, t0, t0 + (rows + W - 1) / W * W);
  const float* q = Q + t0 * p.kp;
  for_tiles(rows, t0, [&](auto& t, long r, long c) LAMBDA {
    t.zero();
    t.add(q + r * p.kp, p.kp, KT + c, p.lp, p.kp);
    for (auto& a : t.a) {
      const float s = g.row[t0 + r + (&a - t.a)];
      for (auto& x : a) x *= s * vec(g.column + c + (&x - a) * W);
    }
    t.store(P + r * p.lp + c, p.lp);
  });
  VI iota;
  for (int j = 0; j < W; ++j) iota[j] = j;
  for (long r0 = 0; r0 < rows; r0 += MR) {
    for_tiles(MR, seen(r0), [&](auto& t, long, long c) LAMBDA {
      t.zero();
      t.add(q + r0 * p.kp, p.kp, KT + t0 + c, p.lp, p.kp);
      t.store(P + r0 * p.lp + t0 + c, p.lp);
    });
    for (long r = r0; r < r0 + MR; ++r) {
      const long t = t0 + r;
      float* x = P + r * p.lp + t0;
      const int32_t first = std::max<int32_t>(0, g.first[t] - int32_t(t0));
      for (long c = 0; c < seen(r0); c += W) {
        const V high = vec(g.u_high + t0 + c) - g.M_high[t], low = vec(g.u_low + t0 + c) - g.M_low[t];
        const VI s = iota + int32_t(c);
        V d = exp(high + low);
        d = s <= int32_t(r) ? d : V{};
        d = s >= first ? d : V{};
        vec(D + r * MAX_BLOCK + c) = d;
        vec(x + c) *= d;
      }
    }
  }
}

void forward(const Problem& p, long b, long h, const Tensor& out, float* c_last, float* n_last, float* m_last) {
  const long head = b * p.heads + h, kp = p.kp, vp = p.vp, lp = p.lp;
  arena.reserve(Gates::bytes(p) + SLACK +
                4 * (3 * lp * kp + lp * vp + MAX_BLOCK * (lp + vp + MAX_BLOCK + 2) + kp * vp + kp));
  Gates g(p);
  float *Q = arena.take(lp * kp), *K = arena.take(lp * kp), *KT = arena.take(lp * kp), *X = arena.take(lp * vp);
  float *P = arena.take(MAX_BLOCK * lp), *H = arena.take(MAX_BLOCK * vp), *D = arena.take(MAX_BLOCK * MAX_BLOCK);
  float *factor = arena.take(MAX_BLOCK), *C = arena.take(kp * vp), *N = arena.take(kp);

  bool have = p.c0;
  float m = 0.0f;
  std::memset(N, 0, 4 * kp);
  if (have) {
    load_matrix(p.c0 + head * p.dim_qk * p.dim_v, p.dim_qk, p.dim_v, C, kp, vp);
    std::memcpy(N, p.n0 + head * p.dim_qk, 4 * p.dim_qk);
    if (p.exponential) m = p.m0[head];
  }
  for (long lo = 0, index = 0; lo < p.steps; lo += p.chunk, ++index) {
    const long n = std::min(p.chunk, p.steps - lo), end = padded(n);
    const bool last = lo + n == p.steps;
    g.chunk(p, b, h, lo, n, m);
    p.load(p.q, b, h, lo, n, p.dim_qk, Q, kp);
    p.load(p.k, b, h, lo, n, p.dim_qk, K, kp);
    p.load(p.v, b, h, lo, n, p.dim_v, X, vp);
    transpose(K, end, kp, kp, KT, lp);
    for (long t0 = 0; t0 < n; t0 += p.block) {
      const long valid = std::min(p.block, n - t0), rows = (valid + MR - 1) / MR * MR;
      scores(p, g, Q, KT, t0, rows, P, D);
      for (long r = 0; r < valid; ++r) {
        const long t = t0 + r;
        if (!p.normalize) {
          factor[r] = p.scale / g.floor[t];
          continue;
        }
        V total{};
        const long columns = t0 + seen(r / MR * MR);
        for (long c = 0; c < columns; c += W) total += vec(P + r * lp + c);
        float den = sum(total);
        if (have) den += g.start[t] * dot(Q + t * kp, N, kp);
        den *= p.scale;
        if (p.den) p.den[head * p.steps + p.at(lo + t)] = den;
        factor[r] = p.scale / (std::max(std::fabs(den), g.floor[t]) + p.eps);
      }
      for (long r = valid; r < rows; ++r) factor[r] = 0.0f;
      for_tiles(rows, vp, [&](auto& t, long r, long c) LAMBDA {
        t.zero();
        if (have) {
          t.add(Q + (t0 + r) * kp, kp, C + c, vp, kp);
          t.scale_rows(g.start + t0 + r);
        }
        t.add(P + r * lp, lp, X + c, vp, t0 + r + MR);
        t.scale_rows(factor + r);
        t.store(H + r * vp + c, vp);
      });
      p.store(out, b, h, lo + t0, valid, p.dim_v, H, vp);
    }
    if (last && !c_last) break;
    scale_row(N, g.keep, kp);
    for (long t = 0; t < n; ++t) {
      add_row(N, g.write[t], K + t * kp, kp);
      scale_row(X + t * vp, g.write[t], vp);
    }
    for_tiles(kp, vp, [&](auto& t, long r, long c) LAMBDA {
      t.zero();
      if (have) {
        t.load(C + r * vp + c, vp);
        t.scale(g.keep);
      }
      t.add_transposed(K + r, kp, X + c, vp, n);
      t.store(C + r * vp + c, vp);
    });
    have = true;
    m = p.exponential ? g.last_m : 0.0f;
    float *c_to = c_last, *n_to = n_last, *m_to = m_last;
    long slot = head;
    if (!last) c_to = p.c_inner, n_to = p.n_inner, m_to = p.m_inner, slot = head * (p.chunks() - 1) + index;
    if (c_to) {
      store_matrix(C, vp, p.dim_qk, p.dim_v, c_to + slot * p.dim_qk * p.dim_v);
      std::memcpy(n_to + slot * p.dim_qk, N, 4 * p.dim_qk);
      if (p.exponential) m_to[slot] = m;
    }
  }
}

struct Gradients {
  Tensor dh, dq, dk, dv;  // dh: null where only the last state has a gradient
  const float *c_last, *n_last, *dc, *dn, *dm;
  float *di, *df, *dc0, *dn0, *dm0;
  explicit Gradients(Reader& r) {
    for (Tensor* x : {&dh, &dq, &dk, &dv}) *x = r.tensor();
    for (const float** x : {&c_last, &n_last, &dc, &dn, &dm}) *x = r.pointer<float>();
    for (float** x : {&di, &df, &dc0, &dn0, &dm0}) *x = r.pointer<float>();
  }
};

void backward(const Problem& p, long b, long h, const Gradients& d) {
  const long head = b * p.heads + h, kp = p.kp, vp = p.vp, lp = p.lp, state = p.dim_qk * p.dim_v;
  arena.reserve(Gates::bytes(p) + SLACK +
                4 * (4 * lp * kp + 4 * lp * vp + MAX_BLOCK * (2 * lp + 2 * kp + MAX_BLOCK) + 4 * kp * vp + 2 * kp +
                     2 * lp) +
                8 * 4 * lp);
  Gates g(p);
  float *Q = arena.take(lp * kp), *K = arena.take(lp * kp), *KT = arena.take(lp * kp), *dK = arena.take(lp * kp);
  float *X = arena.take(lp * vp), *XT = arena.take(lp * vp), *G = arena.take(lp * vp), *dV = arena.take(lp * vp);
  float *P = arena.take(MAX_BLOCK * lp), *S = arena.take(MAX_BLOCK * lp), *D = arena.take(MAX_BLOCK * MAX_BLOCK);
  float *read = arena.take(MAX_BLOCK * kp), *dQ = arena.take(MAX_BLOCK * kp);
  float *C = arena.take(kp * vp), *CT = arena.take(kp * vp), *dC = arena.take(kp * vp), *dCT = arena.take(kp * vp);
  float *N = arena.take(kp), *dN = arena.take(kp), *delta = arena.take(lp), *factor = arena.take(lp);
  double *di = arena.take<double>(lp), *df = arena.take<double>(lp), *mu = arena.take<double>(lp);
  double* to_step = arena.take<double>(lp);

  // product: <C, dC> + <n, dn>; mu_last: what m adds beyond being the unit of C and n
  bool flows = d.dc || d.dn;
  double product = 0.0, mu_last = d.dm ? d.dm[head] : 0.0;
  std::memset(dC, 0, 4 * kp * vp), std::memset(dN, 0, 4 * kp);
  if (d.dc) load_matrix(d.dc + head * state, p.dim_qk, p.dim_v, dC, kp, vp);
  if (d.dn) std::memcpy(dN, d.dn + head * p.dim_qk, 4 * p.dim_qk);
  if (flows) {
    for (long j = 0; j < p.dim_qk; ++j) {
      if (d.dn) product += double(d.n_last[head * p.dim_qk + j]) * dN[j];
      if (d.dc)
        for (long l = 0; l < p.dim_v; ++l)
          product += double(d.c_last[head * state + j * p.dim_v + l]) * dC[j * vp + l];
    }
    mu_last -= product;
  }

  for (long index = p.chunks() - 1; index >= 0; --index) {
    const long lo = index * p.chunk, n = std::min(p.chunk, p.steps - lo), end = padded(n);
    const bool have = index > 0 || p.c0;
    float m = 0.0f;
    if (have) {
      const long slot = index > 0 ? head * (p.chunks() - 1) + index - 1 : head;
      load_matrix((index > 0 ? p.c_inner : p.c0) + slot * state, p.dim_qk, p.dim_v, C, kp, vp);
      load_matrix((index > 0 ? p.n_inner : p.n0) + slot * p.dim_qk, 1, p.dim_qk, N, 1, kp);
      if (p.exponential) m = (index > 0 ? p.m_inner : p.m0)[slot];
      transpose(C, kp, vp, vp, CT, kp);
    }
    g.chunk(p, b, h, lo, n, m);
    p.load(p.q, b, h, lo, n, p.dim_qk, Q, kp);
    p.load(p.k, b, h, lo, n, p.dim_qk, K, kp);
    p.load(p.v, b, h, lo, n, p.dim_v, X, vp);
    transpose(K, end, kp, kp, KT, lp);
    transpose(X, end, vp, vp, XT, lp);
    if (d.dh.data) p.load(d.dh, b, h, lo, n, p.dim_v, G, vp);
    else std::memset(G, 0, 4 * end * vp);
    const float* den = p.normalize ? p.den + head * p.steps : nullptr;
    for (long t = 0; t < n; ++t) {
      const float divisor = den ? std::max(std::fabs(den[p.at(lo + t)]), g.floor[t]) + p.eps : g.floor[t];
      factor[t] = p.scale / divisor;
      scale_row(G + t * vp, factor[t], vp);
    }
    if (flows) {
      transpose(dC, kp, vp, vp, dCT, kp);
      for_tiles(end, vp, [&](auto& t, long r, long c) LAMBDA {
        t.zero();
        t.add(K + r * kp, kp, dC + c, vp, kp);
        t.scale_rows(g.write + r);
        t.store(dV + r * vp + c, vp);
      });
      for_tiles(end, kp, [&](auto& t, long r, long c) LAMBDA {
        t.zero();
        t.add(X + r * vp, vp, dCT + c, kp, vp);
        for (auto& a : t.a)
          for (auto& x : a) x += vec(dN + c + (&x - a) * W);
        t.scale_rows(g.write + r);
        t.store(dK + r * kp + c, kp);
      });
    }
    bool fresh = !flows;  // the block that is run first reaches every step before it
    for (long t0 = (n - 1) / p.block * p.block; t0 >= 0; t0 -= p.block) {
      const long valid = std::min(p.block, n - t0), rows = (valid + MR - 1) / MR * MR;
      const float* G_ = G + t0 * vp;
      scores(p, g, Q, KT, t0, rows, P, D);
      const auto upstream = [&](auto& t, long r, long c) LAMBDA {
        t.zero();
        t.add(G_ + r * vp, vp, XT + c, lp, vp);
        t.store(S + r * lp + c, lp);
      };
      for_tiles(rows, t0, upstream);
      for (long r0 = 0; r0 < rows; r0 += MR)
        for_tiles(MR, seen(r0), [&](auto& t, long, long c) LAMBDA { upstream(t, r0, t0 + c); });
      if (have)
        for_tiles(rows, kp, [&](auto& t, long r, long c) LAMBDA {
          t.zero();
          t.add(G_ + r * vp, vp, CT + c, kp, vp);
          t.store(read + r * kp + c, kp);
        });
      for (long r = 0; r < rows; ++r) {
        const long t = t0 + r, columns = seen(r / MR * MR);
        float *x = S + r * lp, shift = 0.0f;
        if (r < valid) {
          mu[t] = 0.0;
          if (den) {
            V total{};
            for (long c = 0; c < t0 + columns; c += W) total += vec(x + c) * vec(P + r * lp + c);
            float s = sum(total);
            if (have) s += g.start[t] * dot(Q + t * kp, read + r * kp, kp);
            s *= factor[t];
            const float y = den[p.at(lo + t)];
            if (std::fabs(y) > g.floor[t]) shift = y > 0.0f ? -s : s;
            if (p.exponential) mu[t] = -double(s) * p.eps / p.scale;
          }
          delta[t] = shift;
        }
        if (t0 > 0)
          for (long c = 0; c < t0; c += W) vec(x + c) = (vec(x + c) + shift) * (g.row[t] * vec(g.column + c));
        for (long c = 0; c < columns; c += W)
          vec(x + t0 + c) = (vec(x + t0 + c) + shift) * vec(D + r * MAX_BLOCK + c);
        if (have) {
          add_row(read + r * kp, shift, N, kp);
          scale_row(read + r * kp, g.start[t], kp);
        }
      }
      for_tiles(rows, kp, [&](auto& t, long r, long c) LAMBDA {
        if (have) t.load(read + r * kp + c, kp);
        else t.zero();
        t.add(S + r * lp, lp, K + c, kp, t0 + r + MR);
        t.store(dQ + r * kp + c, kp);
      });
      p.store(d.dq, b, h, lo + t0, valid, p.dim_qk, dQ, kp);
      for (long r = 0; r < valid; ++r) df[t0 + r] = dot(Q + (t0 + r) * kp, dQ + r * kp, kp);
      for_tiles(t0 + rows, vp, [&](auto& t, long s, long c) LAMBDA {
        if (fresh) t.zero();
        else t.load(dV + s * vp + c, vp);
        const long r = std::max(0L, s - t0);  // rows before it do not see s
        t.add_transposed(P + r * lp + s, lp, G_ + r * vp + c, vp, rows - r);
        t.store(dV + s * vp + c, vp);
      });
      for_tiles(t0 + rows, kp, [&](auto& t, long s, long c) LAMBDA {
        if (fresh) t.zero();
        else t.load(dK + s * kp + c, kp);
        const long r = std::max(0L, s - t0);
        t.add_transposed(S + r * lp + s, lp, Q + (t0 + r) * kp + c, kp, rows - r);
        t.store(dK + s * kp + c, kp);
      });
      fresh = false;
    }
    p.store(d.dk, b, h, lo, n, p.dim_qk, dK, kp);
    p.store(d.dv, b, h, lo, n, p.dim_v, dV, vp);

    // m_t goes to what attains the maximum, and to every forget gate since then
    double mu_start = 0.0;
    mu[n - 1] += mu_last;
    for (long t = 0; t < n; ++t) to_step[t] = 0.0;
    if (p.exponential)
      for (long t = 0; t < n; ++t) {
        if (g.source[t] >= 0) to_step[g.source[t]] += mu[t];
        else if (g.segment[t] == 0) mu_start += mu[t];
      }
    else
      for (long t = 0; t < n; ++t) mu[t] = 0.0;
    for (long t = 0; t < n; ++t) {
      di[t] = dot(K + t * kp, dK + t * kp, kp);
      df[t] += mu[t] - di[t] - to_step[t];
      di[t] += to_step[t];
    }
    double sum = product;
    for (long t = n - 1; t >= 0; --t) {
      const double x = sum += df[t];
      df[t] = x * sigmoid(-double(p.gate(p.f, b, h, lo + t)));
      if (t > 0 && g.segment[t] != g.segment[t - 1]) sum = 0.0;
      const long to = head * p.steps + p.at(lo + t);
      d.df[to] = float(df[t]);
      d.di[to] = float(p.exponential ? di[t] : di[t] * sigmoid(-double(p.gate(p.i, b, h, lo + t))));
    }
    if (!have) break;

    scale_row(dN, g.keep, kp);
    for (long t = 0; t < n; ++t) {
      if (den) add_row(dN, g.start[t] * delta[t], Q + t * kp, kp);
      scale_row(G + t * vp, g.start[t], vp);
    }
    for_tiles(kp, vp, [&](auto& t, long r, long c) LAMBDA {
      t.load(dC + r * vp + c, vp);
      t.scale(g.keep);
      t.add_transposed(Q + r, kp, G + c, vp, n);
      t.store(dC + r * vp + c, vp);
    });
    product = dot(N, dN, kp);
    for (long r = 0; r < p.dim_qk; ++r) product += dot(C + r * vp, dC + r * vp, vp);
    mu_last = mu_start;
    flows = true;
  }
  if (d.dc0) {
    store_matrix(dC, vp, p.dim_qk, p.dim_v, d.dc0 + head * state);
    std::memcpy(d.dn0 + head * p.dim_qk, dN, 4 * p.dim_qk);
    if (d.dm0) d.dm0[head] = float(product + mu_last);
  }
}

// One step of every head: state (B, H, ...) contiguous, read from c0, n0, m0 and written to the last three
void step(const Problem& p, long b, long h, const Tensor& out, float* c_last, float* n_last, float* m_last) {
  const long head = b * p.heads + h, state = p.dim_qk * p.dim_v;
  arena.reserve(4 * (2 * p.kp + 2 * p.vp) + SLACK);
  float *q = arena.take(p.kp), *k = arena.take(p.kp), *v = arena.take(p.vp), *num = arena.take(p.vp);
  Problem one = p;
  one.steps = 1, one.reverse = 0;
  one.load(p.q, b, h, 0, 1, p.dim_qk, q, p.kp);
  one.load(p.k, b, h, 0, 1, p.dim_qk, k, p.kp);
  one.load(p.v, b, h, 0, 1, p.dim_v, v, p.vp);
  double log_f = log_sigmoid(one.gate(p.f, b, h, 0)), log_i = one.gate(p.i, b, h, 0), m = 0.0;
  if (p.exponential) {
    log_i = log_i < -1e30 ? -1e30 : log_i;
    log_f += p.m0 ? p.m0[head] : 0.0f;
    m = float(log_i < log_f ? log_f : log_i);
    m_last[head] = float(m);
  } else {
    log_i = log_sigmoid(log_i);
  }
  const float forget = float(std::exp(log_f - m)), input = float(std::exp(log_i - m));
  const float floor = float(std::exp(-m));
  std::memset(num, 0, 4 * p.vp);
  float den = 0.0f;
  const float *c = p.c0 ? p.c0 + head * state : nullptr, *n = p.n0 ? p.n0 + head * p.dim_qk : nullptr;
  for (long j = 0; j < p.dim_qk; ++j) {
    const float write = input * k[j], s = q[j];
    float* to = c_last + head * state + j * p.dim_v;
    if (c) {
      const float* from = c + j * p.dim_v;
      for (long l = 0; l < p.dim_v; ++l) {
        const float x = forget * from[l] + write * v[l];
        to[l] = x;
        num[l] += s * x;
      }
    } else {
      for (long l = 0; l < p.dim_v; ++l) {
        const float x = write * v[l];
        to[l] = x;
        num[l] += s * x;
      }
    }
    const float x = (n ? forget * n[j] : 0.0f) + write;
    n_last[head * p.dim_qk + j] = x;
    den += s * x;
  }
  const float divisor = p.normalize ? std::max(std::fabs(den * p.scale), floor) + p.eps : floor;
  for (long l = 0; l < p.dim_v; ++l) num[l] *= p.scale / divisor;
  one.store(out, b, h, 0, 1, p.dim_v, num, p.vp);
}

// GOMP_parallel of the OpenMP runtime that torch has loaded, so that both share one pool of threads
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

template <class F>
int for_heads(const Problem& p, Parallel parallel, F f) {
  struct Work {
    const Problem& p;
    F& f;
    std::atomic<long> next{0};
    std::atomic<int> failed{0};
  } work{p, f};
  const auto run = [](void* data) {
    Work& w = *static_cast<Work*>(data);
    for (long j; (j = w.next.fetch_add(1)) < w.p.batch * w.p.heads;) try {
        w.f(j / w.p.heads, j % w.p.heads);
      } catch (const std::bad_alloc&) {
        w.failed = 1;
      }
  };
  const long threads = std::min(p.threads, p.batch * p.heads);
  if (parallel && threads > 1) parallel(run, &work, unsigned(threads), 0);
  else run(&work);
  return work.failed;
}

}  // namespace

// 0, or 1 when memory ran out
extern "C" int vilma_mlstm_forward(const int64_t* arguments, void* parallel) {
  Reader r{arguments};
  const Problem p(r);
  const Tensor out = r.tensor();
  float *c = r.pointer<float>(), *n = r.pointer<float>(), *m = r.pointer<float>();
  return for_heads(p, Parallel(parallel), [&](long b, long h) { forward(p, b, h, out, c, n, m); });
}

extern "C" int vilma_mlstm_backward(const int64_t* arguments, void* parallel) {
  Reader r{arguments};
  const Problem p(r);
  const Gradients d(r);
  return for_heads(p, Parallel(parallel), [&](long b, long h) { backward(p, b, h, d); });
}

extern "C" int vilma_mlstm_step(const int64_t* arguments, void* parallel) {
  Reader r{arguments};
  const Problem p(r);
  const Tensor out = r.tensor();
  float *c = r.pointer<float>(), *n = r.pointer<float>(), *m = r.pointer<float>();
  return for_heads(p, Parallel(parallel), [&](long b, long h) { step(p, b, h, out, c, n, m); });
}
