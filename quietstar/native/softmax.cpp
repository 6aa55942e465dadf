// Cross entropies and draws over rows of logits, on CPUs: each row is read from memory once, and
// worked on while it lies in a cache. Rows (R, V) are `stride` apart; their last axis has stride 1.

#include <vector>

#include "lanes.h"

extern "C" {

struct Rows {
  void* logits;
  i64 rows, vocab, stride;
  i64 threads;
};
}

namespace {

constexpr i64 PIECE = 1024;  // summed in float32; the pieces are summed in float64
constexpr i64 BLOCK = 64;    // entries of which a draw knows the sum

inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

template <class T>
inline float largest(const T* x, i64 n) {
  Lanes found = {};
  found -= INFINITY;
  i64 i = 0;
  float part[LANES];
  for (; i + LANES <= n; i += LANES) {
    load(part, x + i, LANES);
    found = larger(found, read(part));
  }
  float top = -INFINITY;
  std::memcpy(part, &found, sizeof found);
  for (float y : part) top = std::max(top, y);
  for (; i < n; ++i) top = std::max(top, to_float(x[i]));
  return top;
}

// to = e^(x - shift); returns the sum.
template <class T>
inline float exp_sum(float* to, const T* x, float shift, i64 n) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (i64 i = 0; i < n; ++i) {
    to[i] = fast_exp(to_float(x[i]) - shift);
    total += to[i];
  }
  return total;
}

template <class T>
inline i64 first_equal(const T* x, float value, i64 n) {
  for (i64 i = 0; i < n; ++i)
    if (to_float(x[i]) == value) return i;
  return 0;
}

// Negative log-likelihoods of targets; with coefficients, logits become the gradient of
// sum of coefficient * nll.
template <class T>
void cross_entropy(const Rows& r, const i64* targets, const float* coefficients, float* nll,
                   i64* predicted) {
#pragma omp parallel num_threads(worth(r.threads, r.rows * r.vocab))
  {
    std::vector<float> memory(coefficients ? r.vocab : PIECE);
#pragma omp for schedule(static)
    for (i64 row = 0; row < r.rows; ++row) {
      T* x = static_cast<T*>(r.logits) + row * r.stride;
      const float top = largest(x, r.vocab);
      const i64 target = targets[row];
      if (predicted) predicted[row] = first_equal(x, top, r.vocab);
      double total = 0;
      for (i64 i = 0; i < r.vocab; i += PIECE) {
        float* weights = memory.data() + (coefficients ? i : 0);
        total += exp_sum(weights, x + i, top, std::min(PIECE, r.vocab - i));
      }
      nll[row] = target < 0 ? 0.f : float(std::log(total) + top - to_float(x[target]));
      if (!coefficients) continue;
      const float coefficient = target < 0 ? 0.f : coefficients[row];
      const float factor = float(coefficient / total);
      float* weights = memory.data();
      if (target >= 0) weights[target] -= float(total);
#pragma omp simd
      for (i64 i = 0; i < r.vocab; ++i) x[i] = from_float<T>(factor * weights[i]);
    }
  }
}

// The entry of a block at which its sum passes `rest`; one with a weight above zero.
inline i64 find_entry(const float* x, float top, double rest, i64 n) {
  double sum = 0;
  i64 found = 0;
  for (i64 i = 0; i < n; ++i) {
    const float weight = fast_exp(x[i] - top);
    if (weight > 0) found = i;
    sum += weight;
    if (sum >= rest) break;  // above zero: a weight was found
  }
  return found;
}

}  // namespace

extern "C" {

void softmax_cross_entropy(const Rows* r, i64 half, const i64* targets, const float* coefficients,
                           float* nll, i64* predicted) {
  auto* run = half ? cross_entropy<bfloat16> : cross_entropy<float>;
  run(*r, targets, coefficients, nll, predicted);
}

// Draws tokens (R, draws) by the inverse of the cumulative distribution of each row.
void softmax_draw(const Rows* r, const float* uniform, i64 draws, i64* tokens) {
  const i64 blocks = (r->vocab + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(worth(r->threads, r->rows * r->vocab))
  {
    std::vector<double> ends(blocks);
    float unused[BLOCK];
#pragma omp for schedule(static)
    for (i64 row = 0; row < r->rows; ++row) {
      const float* x = static_cast<const float*>(r->logits) + row * r->stride;
      const float top = largest(x, r->vocab);
      double total = 0;
      for (i64 b = 0; b < blocks; ++b) {
        const i64 size = std::min(BLOCK, r->vocab - b * BLOCK);
        ends[b] = total += exp_sum(unused, x + b * BLOCK, top, size);
      }
      for (i64 n = 0; n < draws; ++n) {
        const double threshold = uniform[row * draws + n] * total;
        const i64 found = std::lower_bound(ends.begin(), ends.end(), threshold) - ends.begin();
        const i64 b = std::min(found, blocks - 1), size = std::min(BLOCK, r->vocab - b * BLOCK);
        const double rest = b == 0 ? threshold : threshold - ends[b - 1];
        tokens[row * draws + n] = b * BLOCK + find_entry(x + b * BLOCK, top, rest, size);
      }
    }
  }
}
}
