/* For processors with AVX-512: products by VNNI, or by AMX.

   Both multiply unsigned by signed bytes, and add four products to a sum of 32 bits. A token's integers are stored as
   q + 128; 128 times the sum of each output's weights is taken off again. VNNI keeps the sums of TILE tokens by a panel
   of outputs in registers. AMX has eight tiles of 16 rows of 64 bytes: four for the sums of 32 tokens by 32 outputs, two
   for their integers, two for weights; few tokens would leave them empty, and are multiplied by VNNI. */

#include "int8.h"

#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define KNOWS_AMX /* the compiler */
#endif
#if defined(__linux__) && defined(KNOWS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,amx-tile,amx-int8")))
#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define VECTORS 3 /* of outputs, in a panel of VNNI */
#define TILE 8
#define SQUARE 32 /* tokens and outputs whose sums AMX keeps */
#define STEP 64   /* inputs of a tile */

AVX512 INLINE __mmask16 mask_of(Py_ssize_t left) { return left < LANES ? (__mmask16)((1u << left) - 1) : 0xffff; }

AVX512 INLINE __m512 load(const char *place, __mmask16 mask, int dtype)
{
    if (dtype == FLOAT32)
        return _mm512_maskz_loadu_ps(mask, place);
    __m256i half = _mm256_maskz_loadu_epi16(mask, place);
    return dtype == FLOAT16 ? _mm512_cvtph_ps(half)
                            : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

AVX512 INLINE void store(char *place, __mmask16 mask, int dtype, __m512 values)
{
    if (dtype == FLOAT32) {
        _mm512_mask_storeu_ps(place, mask, values);
    } else if (dtype == FLOAT16) {
        const int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        _mm256_mask_storeu_epi16(place, mask, _mm512_cvtps_ph(values, nearest));
    } else {
        __m512i bits = _mm512_castps_si512(values);
        __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff)));
        __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
        nearest = _mm512_mask_mov_epi32(nearest, is_nan, _mm512_set1_epi32(0x7fc00000));
        _mm256_mask_storeu_epi16(place, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(nearest, 16)));
    }
}

AVX512 static void round_token(const Job *job, Py_ssize_t number)
{
    const Py_ssize_t n = job->n_inputs, size = size_of(job->dtype);
    const char *token = job->tokens + number * n * size;
    char *numbers = job->numbers + number * job->stride;
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    for (Py_ssize_t i = 0; i < n; i += LANES) {
        __m512i bits = _mm512_castps_si512(load(token + i * size, mask_of(n - i), job->dtype));
        /* Without their signs, numbers are in the order of their bits, infinity and NaN above all others. */
        largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, magnitude));
    }
    int32_t bits = _mm512_reduce_max_epi32(largest);
    float range;
    memcpy(&range, &bits, sizeof range);
    job->ranges[number] = range;
    const __m512 factor = _mm512_set1_ps(range > SMALLEST_RANGE ? LARGEST / range : 0.0f);
    for (Py_ssize_t i = 0; i < n; i += LANES) {
        __m512 scaled = _mm512_mul_ps(load(token + i * size, mask_of(n - i), job->dtype), factor);
        __m512i shifted = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(128));
        _mm_storeu_si128((__m128i *)(numbers + i), _mm512_cvtepi32_epi8(shifted));
    }
}

/* Of one vector of outputs, from `first` on: what their sums are rescaled by. */
typedef struct {
    Py_ssize_t first;
    __mmask16 mask;
    __m512i shift;
    __m512 scale, bias;
} Rescaling;

AVX512 INLINE Rescaling rescaling_of(const Job *job, Py_ssize_t first)
{
    __mmask16 mask = mask_of(job->n_outputs - first);
    return (Rescaling){
        .first = first,
        .mask = mask,
        .shift = _mm512_loadu_si512(job->sums + first),
        .scale = _mm512_maskz_loadu_ps(mask, job->scales + first),
        .bias = job->bias ? _mm512_maskz_loadu_ps(mask, job->bias + first) : _mm512_setzero_ps(),
    };
}

AVX512 INLINE void rescale(const Job *job, const Rescaling *by, Py_ssize_t token, __m512i sums)
{
    __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums, by->shift)), by->scale);
    product = _mm512_mul_ps(product, _mm512_set1_ps(job->ranges[token]));
    char *place = job->outputs + (token * job->n_outputs + by->first) * size_of(job->dtype);
    store(place, by->mask, job->dtype, _mm512_add_ps(product, by->bias));
}

VNNI INLINE void multiply_tile(
    const Job *job, Py_ssize_t token, Py_ssize_t output, const int rows, const int vectors)
{
    const Py_ssize_t n_padded = job->n_padded;
    const char *numbers = job->numbers + token * job->stride;
    const int8_t *panel = job->panels + output * n_padded;
    __m512i sums[TILE][VECTORS];
    #pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
        #pragma GCC unroll 3
        for (int vector = 0; vector < vectors; vector++)
            sums[row][vector] = _mm512_setzero_si512();
    for (Py_ssize_t i = 0; i < n_padded; i += 4, panel += 4 * vectors * LANES) {
        __m512i weights[VECTORS];
        #pragma GCC unroll 3
        for (int vector = 0; vector < vectors; vector++)
            weights[vector] = _mm512_loadu_si512(panel + vector * 64);
        #pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            int32_t four;
            memcpy(&four, numbers + row * job->stride + i, 4);
            __m512i repeated = _mm512_set1_epi32(four);
            #pragma GCC unroll 3
            for (int vector = 0; vector < vectors; vector++)
                sums[row][vector] = _mm512_dpbusd_epi32(sums[row][vector], repeated, weights[vector]);
        }
    }
    #pragma GCC unroll 3
    for (int vector = 0; vector < vectors; vector++) {
        Py_ssize_t first = output + vector * LANES;
        if (first >= job->n_outputs)
            break;
        const Rescaling by = rescaling_of(job, first);
        #pragma GCC unroll 8
        for (int row = 0; row < rows; row++)
            rescale(job, &by, token + row, sums[row][vector]);
    }
}

VNNI INLINE void multiply_tiles(
    const Job *job, Py_ssize_t token, Py_ssize_t end, Py_ssize_t output, const int vectors)
{
    for (; end - token >= TILE; token += TILE)
        multiply_tile(job, token, output, TILE, vectors);
    switch (end - token) {
    case 7: multiply_tile(job, token, output, 7, vectors); break;
    case 6: multiply_tile(job, token, output, 6, vectors); break;
    case 5: multiply_tile(job, token, output, 5, vectors); break;
    case 4: multiply_tile(job, token, output, 4, vectors); break;
    case 3: multiply_tile(job, token, output, 3, vectors); break;
    case 2: multiply_tile(job, token, output, 2, vectors); break;
    case 1: multiply_tile(job, token, output, 1, vectors); break;
    }
}

VNNI static void multiply_vnni(const Job *job, Py_ssize_t token, Py_ssize_t end, Py_ssize_t output)
{
    multiply_tiles(job, token, end, output, VECTORS);
}

#ifdef KNOWS_AMX

/* In the panels of AMX. */
VNNI static void multiply_few(const Job *job, Py_ssize_t token, Py_ssize_t end, Py_ssize_t output)
{
    multiply_tiles(job, token, end, output, SQUARE / LANES);
}

AMX static void multiply_square(const Job *job, Py_ssize_t token, Py_ssize_t end, Py_ssize_t output)
{
    const Py_ssize_t stride = job->stride;
    const char *numbers = job->numbers + token * stride;
    const int8_t *panel = job->panels + output * job->n_padded;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (Py_ssize_t i = 0; i < job->n_padded; i += STEP, panel += STEP * SQUARE) {
        _tile_loadd(4, numbers + i, stride);
        _tile_loadd(5, numbers + i + LANES * stride, stride);
        _tile_loadd(6, panel, 4 * SQUARE);
        _tile_loadd(7, panel + 4 * LANES, 4 * SQUARE);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    int32_t sums[SQUARE][SQUARE] __attribute__((aligned(64)));
    _tile_stored(0, &sums[0][0], sizeof *sums);
    _tile_stored(1, &sums[0][LANES], sizeof *sums);
    _tile_stored(2, &sums[LANES][0], sizeof *sums);
    _tile_stored(3, &sums[LANES][LANES], sizeof *sums);
    for (int vector = 0; vector < SQUARE / LANES; vector++) {
        Py_ssize_t first = output + vector * LANES;
        if (first >= job->n_outputs)
            break;
        const Rescaling by = rescaling_of(job, first);
        for (Py_ssize_t row = 0; row < SQUARE && token + row < end; row++)
            rescale(job, &by, token + row, _mm512_load_si512(&sums[row][vector * LANES]));
    }
}

AMX static void multiply_amx(const Job *job, Py_ssize_t token, Py_ssize_t end, Py_ssize_t output)
{
    if (job->n_tokens <= TILE) {
        multiply_few(job, token, end, output);
        return;
    }
    for (; token < end; token += SQUARE)
        multiply_square(job, token, end, output);
}

AMX static void configure_tiles(void)
{
    /* Not on the stack: GCC 12 believes that the instruction reads the first eight bytes alone. */
    static const struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {
        .palette = 1,
        .bytes = {STEP, STEP, STEP, STEP, STEP, STEP, STEP, STEP},
        .rows = {LANES, LANES, LANES, LANES, LANES, LANES, LANES, LANES},
    };
    _tile_loadconfig(&tiles);
}

/* The state of threads whose tiles are in use takes 8 KB more to save. */
AMX static void release_tiles(void) { _tile_release(); }

#endif

static int has_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

static int has_vnni(void) { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

static int has_amx(void)
{
#if defined(__linux__) && defined(KNOWS_AMX)
    /* A process has to ask for the tiles, which also tells whether the processor and the kernel have them. */
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned int a, b, c, d;
    __cpuid_count(7, 0, a, b, c, d);
    const unsigned int tiles_of_bytes = 3u << 24;
    return has_vnni() && (d & tiles_of_bytes) == tiles_of_bytes &&
           !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
#else
    return 0;
#endif
}

const Instructions int8_vnni = {
    .name = "AVX-512 VNNI",
    .is_supported = has_vnni,
    .panel = VECTORS * LANES,
    .group = 4,
    .inputs = LANES,
    .tokens = 1,
    .size = 1,
    .chunk = 4 * TILE,
    .few = 2e6,
    .round_token = round_token,
    .multiply = multiply_vnni,
};

const Instructions int8_amx = {
    .name = "AMX",
    .is_supported = has_amx,
    .panel = SQUARE,
    .group = 4,
    .inputs = STEP,
    .tokens = SQUARE,
    .size = 1,
    .chunk = 8 * SQUARE,
    .few = 4e6,
#ifdef KNOWS_AMX
    .begin = configure_tiles,
    .end = release_tiles,
    .round_token = round_token,
    .multiply = multiply_amx,
#endif
};
