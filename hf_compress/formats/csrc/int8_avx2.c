/* For processors with AVX2 alone.

   Their product of bytes adds pairs in 16 bits and clips what is too large, so weights are widened to 16 bits on the
   way, where sums of pairs have 32 bits. A tile of TILE tokens by PANEL outputs keeps its sums in registers. */

#include "int8.h"

#define AVX2 __attribute__((target("avx2,f16c")))
#define INLINE_AVX2 AVX2 static inline __attribute__((always_inline))
#define LANES 8
#define VECTORS 2
#define PANEL (VECTORS * LANES)
#define TILE 6

INLINE_AVX2 __m256 load(const char *place, Py_ssize_t left, int dtype)
{
    char few[32] = {0};
    if (left < LANES)
        place = memcpy(few, place, left * size_of(dtype));
    if (dtype == FLOAT32)
        return _mm256_loadu_ps((const float *)place);
    __m128i half = _mm_loadu_si128((const __m128i *)place);
    return dtype == FLOAT16 ? _mm256_cvtph_ps(half)
                            : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

INLINE_AVX2 __m128i to_bfloat16(__m256 values)
{
    __m256i bits = _mm256_castps_si256(values);
    __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff)));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    nearest = _mm256_srli_epi32(_mm256_blendv_epi8(nearest, _mm256_set1_epi32(0x7fc00000), is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(nearest), _mm256_extracti128_si256(nearest, 1));
}

INLINE_AVX2 void store(char *place, Py_ssize_t left, int dtype, __m256 values)
{
    char few[32], *to = left < LANES ? few : place;
    if (dtype == FLOAT32)
        _mm256_storeu_ps((float *)to, values);
    else if (dtype == FLOAT16)
        _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    else
        _mm_storeu_si128((__m128i *)to, to_bfloat16(values));
    if (left < LANES)
        memcpy(place, few, left * size_of(dtype));
}

AVX2 static void round_token(const Job *job, Py_ssize_t number)
{
    const Py_ssize_t n = job->n_inputs, size = size_of(job->dtype);
    const char *token = job->tokens + number * n * size;
    int16_t *numbers = (int16_t *)(job->numbers + number * job->stride);
    __m256i largest = _mm256_setzero_si256();
    for (Py_ssize_t i = 0; i < n; i += LANES) {
        __m256i bits = _mm256_castps_si256(load(token + i * size, n - i, job->dtype));
        /* Without their signs, numbers are in the order of their bits, infinity and NaN above all others. */
        largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
    int32_t each[LANES], bits = 0;
    _mm256_storeu_si256((__m256i *)each, largest);
    for (int lane = 0; lane < LANES; lane++)
        bits = each[lane] > bits ? each[lane] : bits;
    float range;
    memcpy(&range, &bits, sizeof range);
    job->ranges[number] = range;
    const __m256 factor = _mm256_set1_ps(range > SMALLEST_RANGE ? LARGEST / range : 0.0f);
    for (Py_ssize_t i = 0; i < n; i += LANES) {
        __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(load(token + i * size, n - i, job->dtype), factor));
        /* The lowest eight bits: what is not finite becomes 0, as with the other instructions. */
        rounded = _mm256_srai_epi32(_mm256_slli_epi32(rounded, 24), 24);
        __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
        _mm_storeu_si128((__m128i *)(numbers + i), halves);
    }
}

INLINE_AVX2 void multiply_tile(const Job *job, Py_ssize_t token, Py_ssize_t output, const int rows)
{
    const char *numbers = job->numbers + token * job->stride;
    const int8_t *panel = job->panels + output * job->n_padded;
    __m256i sums[TILE][VECTORS];
    #pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
        #pragma GCC unroll 2
        for (int vector = 0; vector < VECTORS; vector++)
            sums[row][vector] = _mm256_setzero_si256();
    for (Py_ssize_t i = 0; i < job->n_padded; i += 2, panel += 2 * PANEL) {
        __m256i weights[VECTORS];
        #pragma GCC unroll 2
        for (int vector = 0; vector < VECTORS; vector++)
            weights[vector] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(panel + vector * 16)));
        #pragma GCC unroll 6
        for (int row = 0; row < rows; row++) {
            int32_t two;
            memcpy(&two, numbers + row * job->stride + 2 * i, 4);
            __m256i repeated = _mm256_set1_epi32(two);
            #pragma GCC unroll 2
            for (int vector = 0; vector < VECTORS; vector++) {
                __m256i products = _mm256_madd_epi16(repeated, weights[vector]);
                sums[row][vector] = _mm256_add_epi32(sums[row][vector], products);
            }
        }
    }
    #pragma GCC unroll 2
    for (int vector = 0; vector < VECTORS; vector++) {
        Py_ssize_t first = output + vector * LANES, left = job->n_outputs - first;
        if (left <= 0)
            break;
        __m256 scale = load((const char *)(job->scales + first), left, FLOAT32);
        __m256 bias = job->bias ? load((const char *)(job->bias + first), left, FLOAT32) : _mm256_setzero_ps();
        #pragma GCC unroll 6
        for (int row = 0; row < rows; row++) {
            __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[row][vector]), scale);
            product = _mm256_mul_ps(product, _mm256_set1_ps(job->ranges[token + row]));
            char *place = job->outputs + ((token + row) * job->n_outputs + first) * size_of(job->dtype);
            store(place, left, job->dtype, _mm256_add_ps(product, bias));
        }
    }
}

AVX2 static void multiply(const Job *job, Py_ssize_t token, Py_ssize_t end, Py_ssize_t output)
{
    for (; end - token >= TILE; token += TILE)
        multiply_tile(job, token, output, TILE);
    switch (end - token) {
    case 5: multiply_tile(job, token, output, 5); break;
    case 4: multiply_tile(job, token, output, 4); break;
    case 3: multiply_tile(job, token, output, 3); break;
    case 2: multiply_tile(job, token, output, 2); break;
    case 1: multiply_tile(job, token, output, 1); break;
    }
}

/* Processors with AVX2 convert float16 too, which not every compiler can ask for. */
static int is_supported(void) { return __builtin_cpu_supports("avx2"); }

const Instructions int8_avx2 = {
    .name = "AVX2",
    .is_supported = is_supported,
    .panel = PANEL,
    .group = 2,
    .inputs = LANES,
    .tokens = 1,
    .size = 2,
    .chunk = 8 * TILE,
    .few = 5e5,
    .round_token = round_token,
    .multiply = multiply,
};
