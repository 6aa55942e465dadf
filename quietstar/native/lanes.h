// What the kernels share: loads and stores, sixteen numbers at once, the exponential function.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using i64 = std::int64_t;

struct bfloat16 {
  std::uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bfloat16 x) {
  std::uint32_t wide = std::uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &wide, sizeof y);
  return y;
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline bfloat16 from_float<bfloat16>(float x) {  // to nearest even; NaN stays NaN
  std::uint32_t wide;
  std::memcpy(&wide, &x, sizeof wide);
  std::uint32_t rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16;
  return {std::uint16_t(x != x ? 0x7FC0 : rounded)};
}

template <class T>
inline void load(float* to, const T* from, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

// And asks for what lies `ahead`: tokens lie in more places than the processor can guess.
template <class T>
inline void load_ahead(float* to, const T* from, i64 n, i64 ahead) {
  for (i64 i = 0; i < n; i += 64 / i64(sizeof(T))) __builtin_prefetch(from + ahead + i, 0, 3);
  load(to, from, n);
}

template <class T>
inline void store(T* to, const float* from, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) to[i] = from_float<T>(from[i]);
}

// Threads for so many multiplications: waking more costs some ten microseconds.
inline i64 worth(i64 threads, i64 work) { return work < 100000 ? 1 : threads; }

// Sixteen numbers at once: one, two or four registers, as the processor has them.
constexpr i64 LANES = 16;
typedef float Lanes __attribute__((vector_size(64)));

inline Lanes read(const float* x) {
  Lanes y;
  std::memcpy(&y, x, sizeof y);
  return y;
}

inline float sum(Lanes x) {
  float parts[LANES], total = 0;
  std::memcpy(parts, &x, sizeof parts);
#pragma omp simd reduction(+ : total)
  for (i64 i = 0; i < LANES; ++i) total += parts[i];
  return total;
}

// e^x within 2 units in the last place, written so that compilers make vectors of it: with n the
// nearest integer to x / ln 2, e^x = 2^n e^(x - n ln 2). Zero below the normal numbers.
inline float fast_exp(float x) {
  const float high = 88.f, low = -87.f;
  const float y = x > high ? high : x < low ? low : x;
  const float round = 12582912.f;  // 1.5 * 2^23: adding it leaves an integer in the last bits
  const float shifted = y * 1.44269504f + round;
  const float n = shifted - round;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  std::int32_t bits, power;
  std::memcpy(&bits, &shifted, sizeof bits);
  std::memcpy(&power, &p, sizeof power);
  power += std::int32_t(std::uint32_t(bits) << 23);
  std::memcpy(&p, &power, sizeof p);
  return x < low ? 0.f : x != x ? x : p;
}

inline i64 padded(i64 n) { return (n + LANES - 1) / LANES * LANES; }

}  // namespace
