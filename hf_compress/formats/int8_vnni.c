/* Products of tokens with eight-bit weights: rounding, integers and rescaling at once. int8_compiled.py calls it.

   Written for processors with AVX-512 VNNI, whose vpdpbusd adds four products of unsigned by signed bytes to a sum of
   32 bits. A token's integers are stored as q + 128; 128 times the sum of each output's weights is taken off again.

   Weights are packed into panels of PANEL outputs, in which the bytes of four inputs lie side by side for each output,
   in the order in which the products read them. A tile of TILE tokens by PANEL outputs keeps its sums in registers. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define INLINE_VNNI VNNI static inline __attribute__((always_inline))
#define LANES 16
#define VECTORS 3
#define PANEL (VECTORS * LANES)
#define TILE 8
#define CHUNK 32 /* tokens whose integers and outputs stay in a cache while panels pass by */
#define FEW_PRODUCTS 2000000 /* which one thread is done with before a second one has woken up */
#define LARGEST 127.0f
#define SMALLEST_RANGE 4e-37f /* below, 127 / range is infinite in float32 */

enum { FLOAT32, BFLOAT16, FLOAT16 }; /* of tokens and outputs; int8_compiled.py knows the order */

typedef struct {
    int dtype;
    const char *tokens;
    const int8_t *panels;
    const int32_t *sums;
    const float *scales, *bias;
    char *outputs;
    Py_ssize_t n_tokens, n_inputs, n_outputs, n_padded;
    uint8_t *numbers;
    float *ranges;
} Job;

static Py_ssize_t round_up(Py_ssize_t value, Py_ssize_t multiple) { return (value + multiple - 1) / multiple * multiple; }

INLINE_VNNI __mmask16 mask_of(Py_ssize_t left) { return left < LANES ? (__mmask16)((1u << left) - 1) : 0xffff; }

static Py_ssize_t size_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE_VNNI __m512 load(const char *place, __mmask16 mask, int dtype)
{
    if (dtype == FLOAT32)
        return _mm512_maskz_loadu_ps(mask, place);
    __m256i half = _mm256_maskz_loadu_epi16(mask, place);
    return dtype == FLOAT16 ? _mm512_cvtph_ps(half)
                            : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE_VNNI void store(char *place, __mmask16 mask, int dtype, __m512 values)
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

VNNI static void round_token(const char *token, Py_ssize_t n, int dtype, uint8_t *numbers, float *range)
{
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const Py_ssize_t size = size_of(dtype);
    __m512i largest = _mm512_setzero_si512();
    for (Py_ssize_t i = 0; i < n; i += LANES) {
        __m512i bits = _mm512_castps_si512(load(token + i * size, mask_of(n - i), dtype));
        /* Without their signs, numbers are in the order of their bits, infinity and NaN above all others. */
        largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, magnitude));
    }
    int32_t bits = _mm512_reduce_max_epi32(largest);
    memcpy(range, &bits, sizeof *range);
    const __m512 factor = _mm512_set1_ps(*range > SMALLEST_RANGE ? LARGEST / *range : 0.0f);
    for (Py_ssize_t i = 0; i < n; i += LANES) {
        __m512 scaled = _mm512_mul_ps(load(token + i * size, mask_of(n - i), dtype), factor);
        __m512i shifted = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(128));
        _mm_storeu_si128((__m128i *)(numbers + i), _mm512_cvtepi32_epi8(shifted));
    }
}

INLINE_VNNI void multiply_tile(const Job *job, Py_ssize_t token, Py_ssize_t output, const int rows)
{
    const Py_ssize_t n_padded = job->n_padded;
    const uint8_t *numbers = job->numbers + token * n_padded;
    const int8_t *panel = job->panels + output * n_padded;
    __m512i sums[TILE][VECTORS];
    #pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
        #pragma GCC unroll 3
        for (int vector = 0; vector < VECTORS; vector++)
            sums[row][vector] = _mm512_setzero_si512();
    for (Py_ssize_t i = 0; i < n_padded; i += 4, panel += 4 * PANEL) {
        __m512i weights[VECTORS];
        #pragma GCC unroll 3
        for (int vector = 0; vector < VECTORS; vector++)
            weights[vector] = _mm512_loadu_si512(panel + vector * 64);
        #pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            int32_t four;
            memcpy(&four, numbers + row * n_padded + i, 4);
            __m512i repeated = _mm512_set1_epi32(four);
            #pragma GCC unroll 3
            for (int vector = 0; vector < VECTORS; vector++)
                sums[row][vector] = _mm512_dpbusd_epi32(sums[row][vector], repeated, weights[vector]);
        }
    }
    #pragma GCC unroll 3
    for (int vector = 0; vector < VECTORS; vector++) {
        Py_ssize_t first = output + vector * LANES, left = job->n_outputs - first;
        if (left <= 0)
            break;
        __mmask16 mask = mask_of(left);
        __m512i shift = _mm512_loadu_si512(job->sums + first);
        __m512 scale = _mm512_maskz_loadu_ps(mask, job->scales + first);
        __m512 bias = job->bias ? _mm512_maskz_loadu_ps(mask, job->bias + first) : _mm512_setzero_ps();
        #pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            __m512 product = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[row][vector], shift));
            product = _mm512_mul_ps(_mm512_mul_ps(product, scale), _mm512_set1_ps(job->ranges[token + row]));
            char *place = job->outputs + ((token + row) * job->n_outputs + first) * size_of(job->dtype);
            store(place, mask, job->dtype, _mm512_add_ps(product, bias));
        }
    }
}

VNNI static void multiply_panel(const Job *job, Py_ssize_t token, Py_ssize_t end, Py_ssize_t output)
{
    for (; end - token >= TILE; token += TILE)
        multiply_tile(job, token, output, TILE);
    switch (end - token) {
    case 7: multiply_tile(job, token, output, 7); break;
    case 6: multiply_tile(job, token, output, 6); break;
    case 5: multiply_tile(job, token, output, 5); break;
    case 4: multiply_tile(job, token, output, 4); break;
    case 3: multiply_tile(job, token, output, 3); break;
    case 2: multiply_tile(job, token, output, 2); break;
    case 1: multiply_tile(job, token, output, 1); break;
    }
}

static void multiply(const Job *job, int n_threads)
{
    const Py_ssize_t n_tokens = job->n_tokens, n_outputs = job->n_outputs;
    const int is_small = (double)n_tokens * n_outputs * job->n_inputs < FEW_PRODUCTS;
#pragma omp parallel num_threads(n_threads) if (n_threads > 1 && !is_small)
    {
#pragma omp for schedule(static)
        for (Py_ssize_t token = 0; token < n_tokens; token++)
            round_token(
                job->tokens + token * job->n_inputs * size_of(job->dtype), job->n_inputs, job->dtype,
                job->numbers + token * job->n_padded, job->ranges + token);
#pragma omp for collapse(2) schedule(static)
        for (Py_ssize_t token = 0; token < n_tokens; token += CHUNK)
            for (Py_ssize_t output = 0; output < n_outputs; output += PANEL)
                multiply_panel(job, token, token + CHUNK < n_tokens ? token + CHUNK : n_tokens, output);
    }
}

VNNI static void rescale_token(
    const float *products, Py_ssize_t n, float range, const float *bias, char *outputs, int dtype)
{
    for (Py_ssize_t i = 0; i < n; i += LANES) {
        __mmask16 mask = mask_of(n - i);
        __m512 output = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, products + i), _mm512_set1_ps(range));
        output = _mm512_add_ps(output, bias ? _mm512_maskz_loadu_ps(mask, bias + i) : _mm512_setzero_ps());
        store(outputs + i * size_of(dtype), mask, dtype, output);
    }
}

static PyObject *is_supported(PyObject *module, PyObject *nothing)
{
    return PyBool_FromLong(
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"));
}

/* pack(weight, outputs, inputs, panels, sums): addresses of int8 (outputs, inputs), and of what is written. */
static PyObject *pack(PyObject *module, PyObject *arguments)
{
    unsigned long long from, to, to_sums;
    Py_ssize_t n_outputs, n_inputs;
    if (!PyArg_ParseTuple(arguments, "KnnKK", &from, &n_outputs, &n_inputs, &to, &to_sums))
        return NULL;
    const int8_t *weight = (const int8_t *)(uintptr_t)from;
    int8_t *panels = (int8_t *)(uintptr_t)to;
    int32_t *sums = (int32_t *)(uintptr_t)to_sums;
    const Py_ssize_t n_padded = round_up(n_inputs, LANES), n_rows = round_up(n_outputs, PANEL);
    Py_BEGIN_ALLOW_THREADS
    memset(panels, 0, n_rows * n_padded);
    memset(sums, 0, n_rows * sizeof *sums);
    for (Py_ssize_t row = 0; row < n_outputs; row++) {
        int8_t *place = panels + row / PANEL * PANEL * n_padded + row % PANEL * 4;
        for (Py_ssize_t i = 0; i < n_inputs; i++) {
            int8_t value = weight[row * n_inputs + i];
            place[i / 4 * 4 * PANEL + i % 4] = value;
            sums[row] += 128 * value;
        }
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* Reads `number` integers, addresses among them; -1 with an exception set where there are not so many. */
static int read_integers(PyObject *const *arguments, Py_ssize_t n_arguments, long long *values, Py_ssize_t number)
{
    if (n_arguments != number) {
        PyErr_Format(PyExc_TypeError, "%zd integers expected, %zd given", number, n_arguments);
        return -1;
    }
    for (Py_ssize_t i = 0; i < number; i++) {
        values[i] = PyLong_AsLongLong(arguments[i]);
        if (values[i] == -1 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

/* project(tokens, their number, inputs, panels, sums, scales, bias or 0, outputs, their number, dtype, threads) */
static PyObject *project(PyObject *module, PyObject *const *arguments, Py_ssize_t n_arguments)
{
    long long value[11];
    if (read_integers(arguments, n_arguments, value, 11))
        return NULL;
    Job job = {
        .tokens = (const char *)(intptr_t)value[0],
        .n_tokens = value[1],
        .n_inputs = value[2],
        .panels = (const int8_t *)(intptr_t)value[3],
        .sums = (const int32_t *)(intptr_t)value[4],
        .scales = (const float *)(intptr_t)value[5],
        .bias = (const float *)(intptr_t)value[6],
        .outputs = (char *)(intptr_t)value[7],
        .n_outputs = value[8],
        .dtype = (int)value[9],
        .n_padded = round_up(value[2], LANES),
    };
    job.numbers = malloc(job.n_tokens * (job.n_padded + sizeof(float)));
    if (!job.numbers)
        return PyErr_NoMemory();
    job.ranges = (float *)(job.numbers + job.n_tokens * job.n_padded);
    Py_BEGIN_ALLOW_THREADS
    multiply(&job, (int)value[10]);
    Py_END_ALLOW_THREADS
    free(job.numbers);
    Py_RETURN_NONE;
}

/* round(tokens, their number, inputs, dtype, numbers, ranges, threads): q + 128, padded to whole vectors */
static PyObject *round_tokens(PyObject *module, PyObject *const *arguments, Py_ssize_t n_arguments)
{
    long long value[7];
    if (read_integers(arguments, n_arguments, value, 7))
        return NULL;
    const char *tokens = (const char *)(intptr_t)value[0];
    uint8_t *numbers = (uint8_t *)(intptr_t)value[4];
    float *ranges = (float *)(intptr_t)value[5];
    const int dtype = (int)value[3];
    const Py_ssize_t n_tokens = value[1], n_inputs = value[2], n_padded = round_up(n_inputs, LANES);
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for num_threads((int)value[6]) schedule(static)
    for (Py_ssize_t token = 0; token < n_tokens; token++)
        round_token(
            tokens + token * n_inputs * size_of(dtype), n_inputs, dtype, numbers + token * n_padded, ranges + token);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* rescale(products, their tokens, outputs' number, ranges, bias or 0, outputs, dtype, threads): as in multiply_tile */
static PyObject *rescale(PyObject *module, PyObject *const *arguments, Py_ssize_t n_arguments)
{
    long long value[8];
    if (read_integers(arguments, n_arguments, value, 8))
        return NULL;
    const float *products = (const float *)(intptr_t)value[0];
    const float *ranges = (const float *)(intptr_t)value[3], *bias = (const float *)(intptr_t)value[4];
    char *outputs = (char *)(intptr_t)value[5];
    const int dtype = (int)value[6];
    const Py_ssize_t n_tokens = value[1], n_outputs = value[2];
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for num_threads((int)value[7]) schedule(static)
    for (Py_ssize_t token = 0; token < n_tokens; token++)
        rescale_token(
            products + token * n_outputs, n_outputs, ranges[token], bias,
            outputs + token * n_outputs * size_of(dtype), dtype);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"is_supported", is_supported, METH_NOARGS, "Whether this processor can run the others."},
    {"pack", pack, METH_VARARGS, "Packs weights, see above."},
    {"project", (PyCFunction)(void (*)(void))project, METH_FASTCALL, "Projects tokens, see above."},
    {"round", (PyCFunction)(void (*)(void))round_tokens, METH_FASTCALL, "Rounds tokens, see above."},
    {"rescale", (PyCFunction)(void (*)(void))rescale, METH_FASTCALL, "Rescales products, see above."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "int8_vnni", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_int8_vnni(void) { return PyModule_Create(&definition); }
