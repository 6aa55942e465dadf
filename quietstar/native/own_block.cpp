// Attention of block tokens to their own block, on CPUs: thousands of tiny causal problems.
//
// What quietstar/engine/own_block.py does with batched products, without their copies and calls:
// each problem is read once from where its tokens lie, worked on in a cache, and written back. One
// thread works on all heads that share keys, for all thoughts of a position, so that the gradients
// of the shared start token need no locks.
//
// Letters: X and Y some split of (texts, positions), K thoughts, W tokens of a block, H heads,
// Hkv heads of keys and values, d head size. The last axis of every tensor has stride 1.

#include <vector>

#include "lanes.h"

namespace {

inline float dot(const float* a, const float* b, i64 d) {
  Lanes total = {};
  i64 i = 0;
  for (; i + LANES <= d; i += LANES) total += read(a + i) * read(b + i);
  float rest = 0;
  for (; i < d; ++i) rest += a[i] * b[i];
  return sum(total) + rest;
}

typedef float Four __attribute__((vector_size(16)));

// The sums of four vectors, as one.
inline Four sums(const Lanes& a, const Lanes& b, const Lanes& c, const Lanes& e) {
  Four parts[4][4];
  std::memcpy(parts[0], &a, sizeof a);
  std::memcpy(parts[1], &b, sizeof b);
  std::memcpy(parts[2], &c, sizeof c);
  std::memcpy(parts[3], &e, sizeof e);
  Four row[4];
  for (int n = 0; n < 4; ++n) row[n] = (parts[n][0] + parts[n][1]) + (parts[n][2] + parts[n][3]);
  const Four ab_low = {row[0][0], row[1][0], row[0][1], row[1][1]};
  const Four ab_high = {row[0][2], row[1][2], row[0][3], row[1][3]};
  const Four ce_low = {row[2][0], row[3][0], row[2][1], row[3][1]};
  const Four ce_high = {row[2][2], row[3][2], row[2][3], row[3][3]};
  const Four ab = ab_low + ab_high, ce = ce_low + ce_high;
  const Four even = {ab[0], ab[1], ce[0], ce[1]}, odd = {ab[2], ab[3], ce[2], ce[3]};
  return even + odd;
}

// to[j] = scale * (row . rows[j]) for j < n; rows are `stride` apart.
inline void dots(float* to, const float* row, const float* rows, i64 stride, i64 n, i64 d,
                 float scale) {
  i64 j = 0;
  if (d % LANES == 0)
    for (; j + 4 <= n; j += 4) {
      const float* from = rows + j * stride;
      Lanes a = {}, b = {}, c = {}, e = {};
      for (i64 i = 0; i < d; i += LANES) {
        const Lanes x = read(row + i);
        a += x * read(from + i);
        b += x * read(from + stride + i);
        c += x * read(from + 2 * stride + i);
        e += x * read(from + 3 * stride + i);
      }
      const Four found = scale * sums(a, b, c, e);
      std::memcpy(to + j, &found, sizeof found);
    }
  for (; j < n; ++j) to[j] = scale * dot(row, rows + j * stride, d);
}

// to = share * to + sum over j < n of weights[j] * rows[j]: sums stay in registers.
inline void weighted_sum(float* to, float share, const float* weights, const float* rows,
                         i64 stride, i64 n, i64 d) {
  i64 i = 0;
  for (; i + 4 * LANES <= d; i += 4 * LANES) {
    Lanes a = share * read(to + i), b = share * read(to + i + LANES);
    Lanes c = share * read(to + i + 2 * LANES), e = share * read(to + i + 3 * LANES);
    for (i64 j = 0; j < n; ++j) {
      const float* row = rows + j * stride + i;
      const float weight = weights[j];
      a += weight * read(row);
      b += weight * read(row + LANES);
      c += weight * read(row + 2 * LANES);
      e += weight * read(row + 3 * LANES);
    }
    std::memcpy(to + i, &a, sizeof a);
    std::memcpy(to + i + LANES, &b, sizeof b);
    std::memcpy(to + i + 2 * LANES, &c, sizeof c);
    std::memcpy(to + i + 3 * LANES, &e, sizeof e);
  }
  for (; i + LANES <= d; i += LANES) {
    Lanes a = share * read(to + i);
    for (i64 j = 0; j < n; ++j) a += weights[j] * read(rows + j * stride + i);
    std::memcpy(to + i, &a, sizeof a);
  }
  for (; i < d; ++i) {
    float total = share * to[i];
    for (i64 j = 0; j < n; ++j) total += weights[j] * rows[j * stride + i];
    to[i] = total;
  }
}

// x = e^(x - shift), in whole vectors: `x` has room for `padded(n)`, and is 0 behind its end.
inline void exp_minus(float* x, float shift, i64 n) {
  std::fill(x + n, x + padded(n), -INFINITY);
  for (i64 from = 0; from < n; from += LANES)
#pragma omp simd
    for (i64 i = from; i < from + LANES; ++i) x[i] = fast_exp(x[i] - shift);
}

// Turns scores into weights of the whole row's softmax, of which `lse` is the text's part; returns
// the whole row's log-sum-exp.
inline float weigh(float* x, i64 n, float lse) {
  float peak = lse;
  for (i64 j = 0; j < n; ++j) peak = std::max(peak, x[j]);
  exp_minus(x, peak, n);
  float total = std::exp(lse - peak);
  for (i64 from = 0; from < n; from += LANES) total += sum(read(x + from));
  const float factor = 1.f / total;
  for (i64 from = 0; from < n; from += LANES)
#pragma omp simd
    for (i64 i = from; i < from + LANES; ++i) x[i] *= factor;
  return peak + std::log(total);
}

}  // namespace

extern "C" {

// One tensor of blocks: start tokens (X, Y, H) and the others (X, K, Y, H, W - 1), in elements.
struct Grid {
  void* start;
  void* rest;
  i64 start_x, start_y, start_h;
  i64 x, k, y, h, w;

  i64 next(i64 token) const { return token == 0 ? start_y : y; }
};

struct Sizes {
  i64 x, k, y, heads, key_heads, w, d;
  i64 threads;
  float scale;

  i64 work() const { return x * k * y * heads * w * w * d; }
};

// Newest tokens: (n, h, s) strides of queries and of what the text gave them.
struct Line {
  void* data;
  i64 n, h, s;
};

// Keys or values of the blocks so far, (tokens, N, S, Hkv, d).
struct Past {
  float* data;
  i64 t, n, s, h;
};

struct StepSizes {
  i64 n, s, heads, key_heads, tokens, d;
  i64 threads;
  float scale;

  i64 work() const { return n * s * heads * tokens * d; }
};
}

namespace {

template <class T>
inline T* at(const Grid& g, i64 x, i64 k, i64 y, i64 h, i64 w) {
  if (w == 0) return static_cast<T*>(g.start) + x * g.start_x + y * g.start_y + h * g.start_h;
  return static_cast<T*>(g.rest) + x * g.x + k * g.k + y * g.y + h * g.h + (w - 1) * g.w;
}

// Reads tokens first .. w - 1 of one head of a block into rows of d.
template <class T>
inline void load_block(float* to, const Grid& from, i64 x, i64 thought, i64 y, i64 h, i64 first,
                       i64 w, i64 d) {
  for (i64 i = first; i < w; ++i)
    load_ahead(to + i * d, at<T>(from, x, thought, y, h, i), d, from.next(i));
}

template <class T>
void forward(const Sizes& n, const Grid& q, const Grid& k, const Grid& v, const Grid& out,
             const Grid& lse) {
  const i64 d = n.d, groups = n.heads / n.key_heads;
#pragma omp parallel num_threads(worth(n.threads, n.work()))
  {
    std::vector<float> memory(2 * n.w * d + 2 * d + padded(n.w));
    float *keys = memory.data(), *values = keys + n.w * d, *query = values + n.w * d;
    float *result = query + d, *weights = result + d;
#pragma omp for collapse(3) schedule(static)
    for (i64 x = 0; x < n.x; ++x)
      for (i64 y = 0; y < n.y; ++y)
        for (i64 kh = 0; kh < n.key_heads; ++kh)
          for (i64 thought = 0; thought < n.k; ++thought) {
            const i64 first = thought == 0 ? 0 : 1;  // the start token is shared
            load_block<T>(keys, k, x, thought, y, kh, first, n.w, d);
            load_block<T>(values, v, x, thought, y, kh, first, n.w, d);
            for (i64 h = kh * groups; h < (kh + 1) * groups; ++h)
              for (i64 w = first; w < n.w; ++w) {
                load_ahead(query, at<T>(q, x, thought, y, h, w), d, q.next(w));
                dots(weights, query, keys, d, w + 1, d, n.scale);
                float* row_lse = at<float>(lse, x, thought, y, h, w);
                const float merged = weigh(weights, w + 1, *row_lse);
                T* row = at<T>(out, x, thought, y, h, w);
                load_ahead(result, row, d, out.next(w));
                const float share = std::exp(*row_lse - merged);
                weighted_sum(result, share, weights, values, d, w + 1, d);
                store(row, result, d);
                *row_lse = merged;
              }
          }
  }
}

// With p = exp(score - lse): dv = p^T do, ds = p (do v^T - delta), dq = scale ds k, and so on.
template <class T>
void backward(const Sizes& n, const Grid& grad, const Grid& q, const Grid& k, const Grid& v,
              const Grid& out, const Grid& lse, const Grid& dq, const Grid& dk, const Grid& dv) {
  const i64 d = n.d, size = n.w, groups = n.heads / n.key_heads, block = size * d;
#pragma omp parallel num_threads(worth(n.threads, n.work()))
  {
    // Weights and gradients of scores lie by key, so that sums over queries read a row.
    std::vector<float> memory(6 * block + 2 * size * size + 2 * padded(size) + d);
    float *keys = memory.data(), *values = keys + block, *dkeys = values + block;
    float *dvalues = dkeys + block, *queries = dvalues + block, *douts = queries + block;
    float *weights_of = douts + block, *dscores_of = weights_of + size * size;
    float *weights = dscores_of + size * size, *dscores = weights + padded(size);
    float* row = dscores + padded(size);
#pragma omp for collapse(3) schedule(static)
    for (i64 x = 0; x < n.x; ++x)
      for (i64 y = 0; y < n.y; ++y)
        for (i64 kh = 0; kh < n.key_heads; ++kh) {
          std::fill(dkeys, dkeys + d, 0.f);  // of the start token, for all thoughts
          std::fill(dvalues, dvalues + d, 0.f);
          for (i64 thought = 0; thought < n.k; ++thought) {
            const i64 first = thought == 0 ? 0 : 1;
            load_block<T>(keys, k, x, thought, y, kh, first, size, d);
            load_block<T>(values, v, x, thought, y, kh, first, size, d);
            std::fill(dkeys + d, dkeys + block, 0.f);
            std::fill(dvalues + d, dvalues + block, 0.f);
            for (i64 h = kh * groups; h < (kh + 1) * groups; ++h) {
              load_block<T>(queries, q, x, thought, y, h, first, size, d);
              load_block<T>(douts, grad, x, thought, y, h, first, size, d);
              for (i64 w = first; w < size; ++w) {
                dots(weights, queries + w * d, keys, d, w + 1, d, n.scale);
                dots(dscores, douts + w * d, values, d, w + 1, d, 1.f);
                exp_minus(weights, *at<float>(lse, x, thought, y, h, w), w + 1);
                load_ahead(row, at<float>(out, x, thought, y, h, w), d, out.next(w));
                const float delta = dot(douts + w * d, row, d);
                for (i64 j = 0; j <= w; ++j) {
                  dscores[j] = weights[j] * (dscores[j] - delta) * n.scale;
                  weights_of[j * size + w] = weights[j];
                  dscores_of[j * size + w] = dscores[j];
                }
                float* dquery = at<float>(dq, x, thought, y, h, w);
                load_ahead(row, dquery, d, dq.next(w));
                weighted_sum(row, 1.f, dscores, keys, d, w + 1, d);
                store(dquery, row, d);
              }
              for (i64 j = 0; j < size; ++j) {
                const i64 from = std::max(j, first), at_key = j * size + from;
                weighted_sum(dkeys + j * d, 1.f, dscores_of + at_key, queries + from * d, d,
                             size - from, d);
                weighted_sum(dvalues + j * d, 1.f, weights_of + at_key, douts + from * d, d,
                             size - from, d);
              }
            }
            for (i64 w = 1; w < size; ++w) {
              store(at<T>(dk, x, thought, y, kh, w), dkeys + w * d, d);
              store(at<T>(dv, x, thought, y, kh, w), dvalues + w * d, d);
            }
          }
          store(at<T>(dk, x, 0, y, kh, 0), dkeys, d);
          store(at<T>(dv, x, 0, y, kh, 0), dvalues, d);
        }
  }
}

template <class T>
void step(const StepSizes& n, const Line& q, const Past& k, const Past& v, const Line& out,
          const Line& lse) {
  const i64 d = n.d, groups = n.heads / n.key_heads;
#pragma omp parallel num_threads(worth(n.threads, n.work()))
  {
    std::vector<float> memory(2 * d + padded(n.tokens));
    float *query = memory.data(), *result = query + d, *weights = result + d;
#pragma omp for collapse(2) schedule(static)
    for (i64 row = 0; row < n.n; ++row)
      for (i64 s = 0; s < n.s; ++s)
        for (i64 h = 0; h < n.heads; ++h) {
          const float* keys = k.data + row * k.n + s * k.s + h / groups * k.h;
          const float* values = v.data + row * v.n + s * v.s + h / groups * v.h;
          load(query, static_cast<T*>(q.data) + row * q.n + h * q.h + s * q.s, d);
          dots(weights, query, keys, k.t, n.tokens, d, n.scale);
          const float before = static_cast<float*>(lse.data)[row * lse.n + h * lse.h + s * lse.s];
          const float share = std::exp(before - weigh(weights, n.tokens, before));
          T* to = static_cast<T*>(out.data) + row * out.n + h * out.h + s * out.s;
          load(result, to, d);
          weighted_sum(result, share, weights, values, v.t, n.tokens, d);
          store(to, result, d);
        }
  }
}

}  // namespace

extern "C" {

void own_forward(const Sizes* n, const Grid* g, i64 half) {
  auto* run = half ? forward<bfloat16> : forward<float>;
  run(*n, g[0], g[1], g[2], g[3], g[4]);
}

void own_backward(const Sizes* n, const Grid* g, i64 half) {
  auto* run = half ? backward<bfloat16> : backward<float>;
  run(*n, g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8]);
}

void own_step(const StepSizes* n, const Line* lines, const Past* past, i64 half) {
  auto* run = half ? step<bfloat16> : step<float>;
  run(*n, lines[0], past[0], past[1], lines[1], lines[2]);
}
}
