// The recurrent cells on CPUs: one head and a tile of the batch after another, all steps of it inside a cache.
//
// r of a head is packed once, and read once a step for the whole tile. The backward adds dr up for a block of
// steps at a time, from the gradients of the gates that are in the cache anyway. Rows are padded with zeros to
// whole vectors when they are loaded, so nothing below has tails.
//
// Compiled by rnn_cpu.py, which passes every argument as one array of 64-bit integers, in the order in which
// `Problem` and the entry points at the end read them.

#include <algorithm>
#include <atomic>

#include "rnn_cpu_cells.h"

namespace {

struct Reader {
  const int64_t* p;
  int64_t next() { return *p++; }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(next());
  }
};

// A tensor (B, T, G, H, D) of any strides, in bytes; null: none
struct Tensor {
  char* data;
  int64_t b, t, g, h, d;
  explicit Tensor(Reader& r) {
    data = r.pointer<char>();
    for (int64_t* x : {&b, &t, &g, &h, &d}) *x = r.next();
  }
  char* at(long i, long j, long head) const { return data + i * b + j * t + head * h; }

  // `gates` rows of `dim` from there on, each padded to `padded`; what is beyond dim is left alone
  INLINE void load(const char* from, long gates, long dim, float* y, long padded) const {
    for (long k = 0; k < gates; ++k, from += g, y += padded) {
      if (d == 4) std::memcpy(y, from, 4 * dim);
      else
        for (long j = 0; j < dim; ++j) y[j] = *reinterpret_cast<const float*>(from + j * d);
    }
  }
  INLINE void store(char* to, long gates, long dim, const float* y, long padded, bool streams) const {
    for (long k = 0; k < gates; ++k, to += g, y += padded) {
      if (streams)
        for (long j = 0; j < dim; j += W) stream(reinterpret_cast<float*>(to) + j, vec(y + j));
      else std::memcpy(to, y, 4 * dim);
    }
  }
  bool vectors(long dim) const {  // whether its rows are whole vectors, and aligned
    return dim % W == 0 && (int64_t(data) | b | t | g | h) % (4 * W) == 0;
  }
};

struct Problem {
  long batch, steps, heads, dim, reverse, tile, threads;
  Tensor wx, starts;
  const float *r, *b;        // (H, D, R, D), (S, H, D) or null
  const float* state[4];     // (B, H, D) each, or null: from zero
  float* saved;              // (H, T, B, KEEP, whole(D)) or null
  float* h;                  // (B, T, H, D)
  long padded;

  explicit Problem(Reader& q)
      : batch(q.next()), steps(q.next()), heads(q.next()), dim(q.next()), reverse(q.next()), tile(q.next()),
        threads(q.next()), wx(q), starts(q) {
    r = q.pointer<float>(), b = q.pointer<float>();
    for (const float*& x : state) x = q.pointer<float>();
    saved = q.pointer<float>(), h = q.pointer<float>();
    padded = whole(dim);
  }
  long at(long t) const { return reverse ? steps - 1 - t : t; }  // where the t-th step that is run is stored
  bool large(long floats) const { return 4 * steps * batch * heads * floats >= STREAM_BYTES; }
  bool begins(long i, long t) const { return starts.data && *starts.at(i, at(t), 0); }
  float* keep(long head, long t, long i, long slots) const {
    return saved + ((head * steps + at(t)) * batch + i) * slots * padded;
  }
  float* output(long i, long t, long head) const { return h + ((i * steps + at(t)) * heads + head) * dim; }
  long small(long i, long head) const { return (i * heads + head) * dim; }  // in (B, H, D)
};

// Some rows of the batch and one head
struct Task {
  long first, rows, head, tile;
};

// r of one head with rows padded: (D, R, padded)
template <class C>
void load_weight(const Problem& p, long head, float* y) {
  const long row = C::R * p.dim;
  std::memset(y, 0, 4 * p.padded * C::R * p.padded);
  for (long i = 0; i < p.dim; ++i)
    load_matrix(p.r + (head * p.dim + i) * row, C::R, p.dim, y + i * C::R * p.padded, C::R, p.padded);
}

template <class C>
void load_bias(const Problem& p, long head, float* y) {
  std::memset(y, 0, 4 * C::S * p.padded);
  if (p.b)
    for (long k = 0; k < C::S; ++k)
      std::memcpy(y + k * p.padded, p.b + (k * p.heads + head) * p.dim, 4 * p.dim);
}

// rows (B, H, D) of a tile; zero when there are none
void load_rows(const Problem& p, const Task& task, const float* x, float* y) {
  std::memset(y, 0, 4 * ((task.rows + MR - 1) / MR * MR) * p.padded);
  if (x)
    for (long i = 0; i < task.rows; ++i)
      std::memcpy(y + i * p.padded, x + p.small(task.first + i, task.head), 4 * p.dim);
}
void store_rows(const Problem& p, const Task& task, const float* x, float* y) {
  if (y)
    for (long i = 0; i < task.rows; ++i)
      std::memcpy(y + p.small(task.first + i, task.head), x + i * p.padded, 4 * p.dim);
}

template <class C, bool SAVE>
void forward(const Problem& p, const Task& task, float* const* last) {
  const long dp = p.padded, columns = C::R * dp, rows = task.rows, high = (rows + MR - 1) / MR * MR;
  arena.reserve(4 * (2 * dp * columns + C::STATES * high * dp + high * columns + (C::G + C::S) * dp) +
                8 * rows * C::G * (dp / 16 + 1) + SLACK);
  const char** lines = arena.take<const char*>(rows * C::G * (dp / 16 + 1));
  float *plain = arena.take(dp * columns), *packed = arena.take(dp * columns);
  float *X = arena.take(C::STATES * high * dp), *product = arena.take(high * columns);
  float *wx = arena.take(C::G * dp), *bias = arena.take(C::S * dp);
  load_weight<C>(p, task.head, plain);
  pack(plain, p.dim, columns, packed);
  load_bias<C>(p, task.head, bias);
  for (long s = 0; s < C::STATES; ++s) load_rows(p, task, p.state[s], X + s * high * dp);
  std::memset(wx, 0, 4 * C::G * dp);

  const bool streams = p.large(C::KEEP * dp);
  for (long t = 0; t < p.steps; ++t) {
    if (p.starts.data)
      for (long i = 0; i < rows; ++i)
        if (p.begins(task.first + i, t))
          for (long s = 0; s < C::STATES; ++s) std::memset(X + (s * high + i) * dp, 0, 4 * dp);
    Ahead ahead(lines);
    if (t + 1 < p.steps && p.wx.d == 4)
      for (long i = 0; i < rows; ++i) {
        const char* from = p.wx.at(task.first + i, p.at(t + 1), task.head);
        for (int k = 0; k < C::G; ++k, from += p.wx.g) ahead.add(from, 4 * p.dim);
      }
    if (t > 0 || p.state[0]) multiply(rows, X, dp, packed, p.dim, columns, product, columns, ahead);
    else std::memset(product, 0, 4 * rows * columns);
    for (long i = 0; i < rows; ++i) {
      const long row = task.first + i;
      p.wx.load(p.wx.at(row, p.at(t), task.head), C::G, p.dim, wx, dp);
      float* keep = p.keep(task.head, t, row, C::KEEP);
      for (long j = 0; j < dp; j += W) {
        V g[C::S], x[C::STATES], kept[C::KEEP + 1];
        for (int s = 0; s < C::S; ++s) g[s] = vec(bias + s * dp + j);
        for (int s = 0; s < C::R; ++s) g[s] += vec(product + i * columns + s * dp + j);
        for (int s = 0; s < C::G; ++s) g[C::S - C::G + s] += vec(wx + s * dp + j);
        for (int s = 0; s < C::STATES; ++s) x[s] = vec(X + (s * high + i) * dp + j);
        C::forward(g, x, kept);
        for (int s = 0; s < C::STATES; ++s) vec(X + (s * high + i) * dp + j) = x[s];
        if (SAVE && streams)
          for (int s = 0; s < C::KEEP; ++s) stream(keep + s * dp + j, kept[s]);
        else if (SAVE)
          for (int s = 0; s < C::KEEP; ++s) vec(keep + s * dp + j) = kept[s];
      }
      std::memcpy(p.output(row, t, task.head), X + i * dp, 4 * p.dim);
    }
  }
  for (long s = 0; s < C::STATES; ++s) store_rows(p, task, X + s * high * dp, last[s]);
  end_of_streams();
}

// One step, for which r is not worth packing
template <class C>
void step(const Problem& p, const Task& task, float* const* last) {
  const long dp = p.padded, columns = C::R * p.dim, width = whole(columns);
  arena.reserve(4 * (C::STATES * dp + width + (C::R + C::G + C::S) * dp) + SLACK);
  float *X = arena.take(C::STATES * dp), *product = arena.take(width), *read = arena.take(C::R * dp);
  float *wx = arena.take(C::G * dp), *bias = arena.take(C::S * dp);
  load_bias<C>(p, task.head, bias);
  std::memset(read, 0, 4 * C::R * dp), std::memset(wx, 0, 4 * C::G * dp), std::memset(X, 0, 4 * C::STATES * dp);
  for (long i = task.first; i < task.first + task.rows; ++i) {
    if (p.state[0]) {
      for (int s = 0; s < C::STATES; ++s) std::memcpy(X + s * dp, p.state[s] + p.small(i, task.head), 4 * p.dim);
      multiply_row(X, p.r + task.head * p.dim * columns, p.dim, columns, product);
      load_matrix(product, C::R, p.dim, read, C::R, dp);
    }
    p.wx.load(p.wx.at(i, 0, task.head), C::G, p.dim, wx, dp);
    for (long j = 0; j < dp; j += W) {
      V g[C::S], x[C::STATES], kept[C::KEEP + 1];
      for (int s = 0; s < C::S; ++s) g[s] = vec(bias + s * dp + j);
      for (int s = 0; s < C::R; ++s) g[s] += vec(read + s * dp + j);
      for (int s = 0; s < C::G; ++s) g[C::S - C::G + s] += vec(wx + s * dp + j);
      for (int s = 0; s < C::STATES; ++s) x[s] = vec(X + s * dp + j);
      C::forward(g, x, kept);
      for (int s = 0; s < C::STATES; ++s) vec(X + s * dp + j) = x[s];
    }
    std::memcpy(p.output(i, 0, task.head), X, 4 * p.dim);
    for (int s = 0; s < C::STATES; ++s) std::memcpy(last[s] + p.small(i, task.head), X + s * dp, 4 * p.dim);
    if (!p.state[0]) std::memset(X, 0, 4 * C::STATES * dp);
  }
}

struct Gradients {
  Tensor dh, dwx;                 // dh: null where only the last state has a gradient; dh.g unused
  const float* d_last[4];         // (B, H, D) or null
  float *dr, *db, *d_state[4];    // (tiles, H, D, R, D), (tiles, S, H, D) or null, (B, H, D) or null
  double clip;                    // negative: none
  explicit Gradients(Reader& q) : dh(q), dwx(q) {
    for (const float*& x : d_last) x = q.pointer<float>();
    dr = q.pointer<float>(), db = q.pointer<float>();
    for (float*& x : d_state) x = q.pointer<float>();
    const int64_t bits = q.next();
    std::memcpy(&clip, &bits, 8);
  }
};

template <class C>
void backward(const Problem& p, const Task& task, const Gradients& d) {
  const long dp = p.padded, columns = C::R * dp, gates = C::S * dp, rows = task.rows, high = (rows + MR - 1) / MR * MR;
  // steps for which dr is added up at once: enough of them that reading and writing it costs little
  const long block = std::min(p.steps, std::max(1L, std::max(64L, p.dim / 3) / rows));
  arena.reserve(4 * (3 * dp * columns + block * rows * (gates + dp) + 2 * MR * gates +
                     (2 * C::STATES + 2) * high * dp + gates + 4 * dp) +
                8 * rows * (C::KEEP + 2) * (dp / 16 + 1) + SLACK);
  const char** lines = arena.take<const char*>(rows * (C::KEEP + 2) * (dp / 16 + 1));
  float *dR = arena.take(dp * columns), *packed = arena.take(dp * columns), *plain = arena.take(dp * columns);
  float *dG = arena.take((block * rows + MR) * gates), *before = arena.take(block * rows * dp);
  float *X0 = arena.take(C::STATES * high * dp), *dX = arena.take(C::STATES * high * dp);
  float *through = arena.take(high * dp), *db = arena.take(gates);
  float *dh = arena.take(dp), *h = arena.take(dp), *zero = arena.take(dp);
  load_weight<C>(p, task.head, plain);
  transpose(plain, dp, columns, columns, dR, dp);
  pack(dR, columns, dp, packed);
  std::memset(dR, 0, 4 * dp * columns), std::memset(dG, 0, 4 * (block * rows + MR) * gates);
  for (float* x : {dh, h, zero}) std::memset(x, 0, 4 * dp);
  std::memset(before, 0, 4 * block * rows * dp), std::memset(db, 0, 4 * gates);
  std::memset(through, 0, 4 * high * dp);
  for (long s = 0; s < C::STATES; ++s) {
    load_rows(p, task, p.state[s], X0 + s * high * dp);
    load_rows(p, task, d.d_last[s], dX + s * high * dp);
  }
  if constexpr (C::STATES == 4)  // mu: the gradient of m beyond its being the unit of c and n
    for (long i = 0; i < rows; ++i) {
      const float* keep = p.keep(task.head, p.steps - 1, task.first + i, C::KEEP);
      for (long j = 0; j < dp; j += W) {
        V& mu = vec(dX + (3 * high + i) * dp + j);
        for (int s = 1; s < 3; ++s) mu -= vec(keep + (3 + s) * dp + j) * vec(dX + (s * high + i) * dp + j);
      }
    }

  const bool streams = p.large(C::G * p.dim) && d.dwx.vectors(p.dim);
  for (long t = p.steps - 1, filled = 0; t >= 0; --t) {
    float* dg_rows = dG + filled * rows * gates;
    for (long i = 0; i < rows; ++i) {
      const long row = task.first + i;
      const bool begins = p.begins(row, t);
      float *dg = dg_rows + i * gates, *h_before = before + (filled * rows + i) * dp;
      const float* from[C::STATES];
      from[0] = h_before;
      if (begins || (t == 0 && !p.state[0])) {
        std::memset(h_before, 0, 4 * dp);
        for (int s = 1; s < C::STATES; ++s) from[s] = zero;
      } else if (t == 0) {
        std::memcpy(h_before, X0 + i * dp, 4 * dp);
        for (int s = 1; s < C::STATES; ++s) from[s] = X0 + (s * high + i) * dp;
      } else {
        std::memcpy(h_before, p.output(row, t - 1, task.head), 4 * p.dim);
        for (int s = 1; s < C::STATES; ++s) from[s] = p.keep(task.head, t - 1, row, C::KEEP) + (3 + s) * dp;
      }
      if (d.dh.data) d.dh.load(d.dh.at(row, p.at(t), task.head), 1, p.dim, dh, dp);
      if (C::KEEP == 0) std::memcpy(h, p.output(row, t, task.head), 4 * p.dim);
      const float* keep = p.keep(task.head, t, row, C::KEEP);
      for (long j = 0; j < dp; j += W) {
        V dx[C::STATES], kept[C::KEEP + 1], prior[C::STATES], g[C::S];
        for (int s = 0; s < C::STATES; ++s) dx[s] = vec(dX + (s * high + i) * dp + j);
        dx[0] += vec(dh + j) + vec(through + i * dp + j);
        for (int s = 0; s < C::KEEP; ++s) kept[s] = vec(keep + s * dp + j);
        for (int s = 0; s < C::STATES; ++s) prior[s] = vec(from[s < 3 ? s : 0] + j);
        C::backward(dx, kept, vec(h + j), prior, g);
        for (int s = 0; s < C::STATES; ++s) vec(dX + (s * high + i) * dp + j) = dx[s];
        for (int s = 0; s < C::S; ++s) vec(dg + s * dp + j) = g[s], vec(db + s * dp + j) += g[s];
      }
      d.dwx.store(d.dwx.at(row, p.at(t), task.head), C::G, p.dim, dg + (C::S - C::G) * dp, dp, streams);
      if (begins)
        for (long s = 0; s < C::STATES; ++s) std::memset(dX + (s * high + i) * dp, 0, 4 * dp);
    }
    if (t > 0 || p.state[0]) {
      Ahead ahead(lines);
      if (t > 0)
        for (long i = 0; i < rows; ++i) {
          const long row = task.first + i;
          ahead.add(p.keep(task.head, t - 1, row, C::KEEP), 4 * C::KEEP * dp);
          if (d.dh.data && d.dh.d == 4) ahead.add(d.dh.at(row, p.at(t - 1), task.head), 4 * p.dim);
          if (t > 1) ahead.add(p.output(row, t - 2, task.head), 4 * p.dim);
        }
      multiply(rows, dg_rows, gates, packed, columns, dp, through, dp, ahead);
      if (d.clip >= 0.0) {
        const float bound = float(d.clip);
        for (long j = 0; j < rows * dp; j += W) {
          V& x = vec(through + j);
          x = x > bound ? splat(bound) : x;
          x = x < -bound ? splat(-bound) : x;
        }
      }
      for (long i = 0; i < rows; ++i)
        if (p.begins(task.first + i, t)) std::memset(through + i * dp, 0, 4 * dp);
    }
    if (++filled == block || t == 0) {
      add_outer(dp, columns, before, dp, dG, gates, filled * rows, dR, columns);
      filled = 0;
    }
  }

  end_of_streams();
  const long slot = task.tile * p.heads + task.head;
  for (long i = 0; i < p.dim; ++i)
    store_matrix(dR + i * columns, dp, C::R, p.dim, d.dr + (slot * p.dim + i) * C::R * p.dim);
  if (d.db)
    for (long s = 0; s < C::S; ++s)
      std::memcpy(d.db + ((task.tile * C::S + s) * p.heads + task.head) * p.dim, db + s * dp, 4 * p.dim);
  if (!d.d_state[0]) return;
  for (long j = 0; j < rows * dp; j += W) {
    vec(dX + j) += vec(through + j);
    if constexpr (C::STATES == 4)
      for (int s = 1; s < 3; ++s)
        vec(dX + 3 * high * dp + j) += vec(X0 + s * high * dp + j) * vec(dX + s * high * dp + j);
  }
  for (long s = 0; s < C::STATES; ++s) store_rows(p, task, dX + s * high * dp, d.d_state[s]);
}

// GOMP_parallel of the OpenMP runtime that torch has loaded, so that both share one pool of threads
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

template <class F>
int for_tasks(const Problem& p, void* parallel, F f) {
  struct Work {
    const Problem& p;
    F& f;
    long tiles;
    std::atomic<long> next{0};
    std::atomic<int> failed{0};
  } work{p, f, (p.batch + p.tile - 1) / p.tile};
  const auto run = [](void* data) {
    Work& w = *static_cast<Work*>(data);
    for (long j; (j = w.next.fetch_add(1)) < w.tiles * w.p.heads;) try {
        const long tile = j / w.p.heads, first = tile * w.p.tile;
        w.f(Task{first, std::min(w.p.tile, w.p.batch - first), j % w.p.heads, tile});
      } catch (const std::bad_alloc&) {
        w.failed = 1;
      }
  };
  const long threads = std::min(p.threads, work.tiles * p.heads);
  if (parallel && threads > 1) reinterpret_cast<Parallel>(parallel)(run, &work, unsigned(threads), 0);
  else run(&work);
  return work.failed;
}

template <class F>
int for_cell(int64_t cell, F&& f) {
  if (cell == 0) return f(Slstm{});
  if (cell == 1) return f(Lstm{});
  if (cell == 2) return f(Gru{});
  return f(Elman{});
}

}  // namespace

// 0, or 1 when memory ran out
extern "C" int vilma_rnn_forward(const int64_t* arguments, void* parallel) {
  Reader q{arguments};
  const int64_t cell = q.next();
  const Problem p(q);
  float* last[4];
  for (float*& x : last) x = q.pointer<float>();
  return for_cell(cell, [&](auto c) {
    return for_tasks(p, parallel, [&](const Task& task) {
      if (p.saved) forward<decltype(c), true>(p, task, last);
      else forward<decltype(c), false>(p, task, last);
    });
  });
}

extern "C" int vilma_rnn_step(const int64_t* arguments, void* parallel) {
  Reader q{arguments};
  const int64_t cell = q.next();
  const Problem p(q);
  float* last[4];
  for (float*& x : last) x = q.pointer<float>();
  return for_cell(cell, [&](auto c) {
    return for_tasks(p, parallel, [&](const Task& task) { step<decltype(c)>(p, task, last); });
  });
}

extern "C" int vilma_rnn_backward(const int64_t* arguments, void* parallel) {
  Reader q{arguments};
  const int64_t cell = q.next();
  const Problem p(q);
  const Gradients d(q);
  return for_cell(cell, [&](auto c) {
    return for_tasks(p, parallel, [&](const Task& task) { backward<decltype(c)>(p, task, d); });
  });
}
