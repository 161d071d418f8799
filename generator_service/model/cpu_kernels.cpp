// Passes over rows, and attention of few rows to many keys, as a CPU runs them best.
//
// torch has no one kernel for any of them: it goes over the memory once for each operation, or multiplies so few rows
// at a time that starting takes longer than the product. Plain C, called through ctypes: no ABI of torch or Python.
// Threads are those of the OpenMP that torch has loaded.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_CPU __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FOR_EVERY_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int kLanes = 16;
constexpr int kRows = 4;  // rows that share what is read of keys and values
typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

INLINE Lanes Load(const float *from) { return *reinterpret_cast<const Lanes *>(from); }
INLINE void Store(float *to, Lanes x) { *reinterpret_cast<Lanes *>(to) = x; }

// Cephes' exp: within 2 units in the last place, 0 below -87.
INLINE float Exp(float x) {
  const float clamped = std::min(std::max(x, -87.33654f), 88.37626f);
  const float n = __builtin_rintf(clamped * 1.44269504088896341f);
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return x < -87.33654f ? 0.0f : p * power;
}

// scores -> exp(scores - the largest); returns one over their sum.
INLINE float Exponentials(float *scores, int64_t length) {
  float largest = -FLT_MAX, sum = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < length; ++j) largest = std::max(largest, scores[j]);
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < length; ++j) {
    scores[j] = Exp(scores[j] - largest);
    sum += scores[j];
  }
  return 1.0f / sum;
}

// One head of one context: rows [kept, dim] apart by query_step; keys [dim, length], values [length, dim].
template <int kept>
INLINE void CrossHead(const float *query, int64_t query_step, const float *keys, const float *values, int64_t length,
                      int64_t dim, float scale, float *out, float *scores) {
  constexpr int kColumns = 4;  // vectors of scores at a time
  int64_t j = 0;
  for (; j + kColumns * kLanes <= length; j += kColumns * kLanes) {
    Lanes sums[kept][kColumns] = {};
    for (int64_t d = 0; d < dim; ++d) {
      Lanes key[kColumns];
      for (int c = 0; c < kColumns; ++c) key[c] = Load(keys + d * length + j + c * kLanes);
      for (int r = 0; r < kept; ++r)
        for (int c = 0; c < kColumns; ++c) sums[r][c] += key[c] * query[r * query_step + d];
    }
    for (int r = 0; r < kept; ++r)
      for (int c = 0; c < kColumns; ++c) Store(scores + r * length + j + c * kLanes, sums[r][c] * scale);
  }
  while (j < length) {
    const int64_t at = length < kLanes ? j : std::min(j, length - kLanes);  // the last vector overlaps the one before
    if (length < kLanes) {
      for (int r = 0; r < kept; ++r) {
        float sum = 0;
        for (int64_t d = 0; d < dim; ++d) sum += keys[d * length + at] * query[r * query_step + d];
        scores[r * length + at] = sum * scale;
      }
      ++j;
      continue;
    }
    Lanes sums[kept] = {};
    for (int64_t d = 0; d < dim; ++d) {
      const Lanes key = Load(keys + d * length + at);
      for (int r = 0; r < kept; ++r) sums[r] += key * query[r * query_step + d];
    }
    for (int r = 0; r < kept; ++r) Store(scores + r * length + at, sums[r] * scale);
    j = at + kLanes;
  }
  float over[kept];
  for (int r = 0; r < kept; ++r) over[r] = Exponentials(scores + r * length, length);
  int64_t d = 0;
  for (; d + kColumns * kLanes <= dim; d += kColumns * kLanes) {
    Lanes sums[kept][kColumns] = {};
    for (int64_t i = 0; i < length; ++i) {
      Lanes value[kColumns];
      for (int c = 0; c < kColumns; ++c) value[c] = Load(values + i * dim + d + c * kLanes);
      for (int r = 0; r < kept; ++r)
        for (int c = 0; c < kColumns; ++c) sums[r][c] += value[c] * scores[r * length + i];
    }
    for (int r = 0; r < kept; ++r)
      for (int c = 0; c < kColumns; ++c) Store(out + r * query_step + d + c * kLanes, sums[r][c] * over[r]);
  }
  for (; d < dim; d += kLanes) {
    Lanes sums[kept] = {};
    for (int64_t i = 0; i < length; ++i) {
      const Lanes value = Load(values + i * dim + d);
      for (int r = 0; r < kept; ++r) sums[r] += value * scores[r * length + i];
    }
    for (int r = 0; r < kept; ++r) Store(out + r * query_step + d, sums[r] * over[r]);
  }
}

FOR_EVERY_CPU void CrossRows(const float *query, int64_t query_step, const float *keys, const float *values,
                             int64_t length, int64_t rows, int64_t dim, float scale, float *out, float *scores) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows)
    CrossHead<kRows>(query + row * query_step, query_step, keys, values, length, dim, scale, out + row * query_step,
                     scores);
  for (; row < rows; ++row)
    CrossHead<1>(query + row * query_step, query_step, keys, values, length, dim, scale, out + row * query_step,
                 scores);
}

// One head of one context: slots that the mask rules out are not read.
FOR_EVERY_CPU void SelfRows(const float *query, int64_t query_step, const float *keys, const float *values,
                            int64_t slots, const float *mask, int64_t rows, int64_t dim, float scale, float *out,
                            int64_t out_step, float *scores, int32_t *seen) {
  for (int64_t row = 0; row < rows; ++row) {
    const float *q = query + row * query_step;
    int64_t count = 0;
    for (int64_t j = 0; j < slots; ++j) {
      const float bias = mask == nullptr ? 0.0f : mask[row * slots + j];
      if (bias == -INFINITY) continue;
      Lanes sums = {};
      for (int64_t d = 0; d < dim; d += kLanes) sums += Load(keys + j * dim + d) * Load(q + d);
      float sum = 0;
      for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
      seen[count] = static_cast<int32_t>(j);
      scores[count++] = sum * scale + bias;
    }
    const float over = Exponentials(scores, count);
    for (int64_t d = 0; d < dim; d += kLanes) {
      Lanes sums = {};
      for (int64_t i = 0; i < count; ++i) sums += Load(values + seen[i] * dim + d) * scores[i];
      Store(out + row * out_step + d, sums * over);
    }
  }
}

FOR_EVERY_CPU void QuantizeRow(const float *x, int64_t columns, uint8_t *out, float *scale) {
  float largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < columns; ++i) largest = std::max(largest, std::fabs(x[i]));
  *scale = std::max(largest / 127.0f, FLT_MIN);
  const float factor = 1.0f / *scale;
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i)
    out[i] = static_cast<uint8_t>(static_cast<int32_t>(__builtin_rintf(x[i] * factor)) + 128);
}

FOR_EVERY_CPU void ScaleRow(float *x, int64_t columns, float scale, const float *bias) {
  if (bias == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) x[i] *= scale;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) x[i] = bias[i] + x[i] * scale;
  }
}

}  // namespace

extern "C" {

// float [rows, columns] -> bytes, 128 more than the int8 of each, and each row's scale.
void rag_quantize(const float *x, int64_t rows, int64_t columns, uint8_t *out, float *scales, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) QuantizeRow(x + row * columns, columns, out + row * columns, scales + row);
}

// x [rows, columns] times each row's scale, plus bias [columns] or null; in place.
void rag_scale(float *x, int64_t rows, int64_t columns, const float *scales, const float *bias, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) ScaleRow(x + row * columns, columns, scales[row], bias);
}

// Rows to their contexts. query and out [total rows, heads * dim], the rows of one context together; a context's keys
// [heads, dim, length] and values [heads, length, dim]; of each context its rows and length.
void rag_cross_attention(const float *query, int64_t contexts, const float *const *keys, const float *const *values,
                         const int64_t *rows, const int64_t *lengths, int64_t heads, int64_t dim, float scale,
                         float *out, int threads) {
  const int64_t inner = heads * dim;
  std::vector<int64_t> starts(contexts);
  int64_t longest = 0;
  for (int64_t c = 0, start = 0; c < contexts; start += rows[c++]) {
    starts[c] = start;
    longest = std::max(longest, lengths[c]);
  }
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scores(kRows * longest);
#pragma omp for collapse(2) schedule(static)
    for (int64_t c = 0; c < contexts; ++c)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = starts[c] * inner + h * dim, part = h * dim * lengths[c];
        CrossRows(query + at, inner, keys[c] + part, values[c] + part, lengths[c], rows[c], dim, scale, out + at,
                  scores.data());
      }
  }
}

// Rows of one block to their ancestors. qkv [contexts * rows, 3 * heads * dim]; keys and values of one layer
// [contexts, heads, capacity, dim], whose newest slots take the rows' own; mask [1 or heads, rows, slots] or null,
// heads apart by mask_step (0: one for all); out [contexts * rows, heads * dim].
void rag_self_attention(const float *qkv, int64_t contexts, int64_t rows, float *keys, float *values, int64_t capacity,
                        int64_t slots, const float *mask, int64_t mask_step, int64_t heads, int64_t dim, float scale,
                        float *out, int threads) {
  const int64_t inner = heads * dim;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scores(slots);
    std::vector<int32_t> seen(slots);
#pragma omp for collapse(2) schedule(static)
    for (int64_t c = 0; c < contexts; ++c)
      for (int64_t h = 0; h < heads; ++h) {
        const float *first = qkv + c * rows * 3 * inner + h * dim;
        float *own_keys = keys + (c * heads + h) * capacity * dim;
        float *own_values = values + (c * heads + h) * capacity * dim;
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t slot = (slots - rows + row) * dim;
          std::memcpy(own_keys + slot, first + row * 3 * inner + inner, dim * sizeof(float));
          std::memcpy(own_values + slot, first + row * 3 * inner + 2 * inner, dim * sizeof(float));
        }
        SelfRows(first, 3 * inner, own_keys, own_values, slots, mask == nullptr ? nullptr : mask + h * mask_step, rows,
                 dim, scale, out + c * rows * inner + h * dim, inner, scores.data(), seen.data());
      }
  }
}

}  // extern "C"
