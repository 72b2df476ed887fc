/* Products of tokens with eight-bit weights: rounding, integers and rescaling at once. int8_compiled.py calls them.

   y = (q_x q_w^T) s_x s_w + b, where a token's integers q_x are rounded by its own largest number. Each set of
   instructions keeps weights in panels of some outputs, in which a few inputs of each output lie side by side, in the
   order in which its products read them. All give the same bits. */

#ifndef HF_COMPRESS_INT8_H
#define HF_COMPRESS_INT8_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define LARGEST 127.0f
#define SMALLEST_RANGE 4e-37f /* below, 127 / range is infinite in float32 */

enum { FLOAT32, BFLOAT16, FLOAT16 }; /* of tokens and outputs; int8_compiled.py knows the order */

typedef struct {
    int dtype;
    const char *tokens;
    const int8_t *panels;
    const int32_t *sums; /* 128 times the sum of each output's weights */
    const float *scales, *bias;
    char *outputs;
    Py_ssize_t n_tokens, n_inputs, n_outputs;
    Py_ssize_t n_padded; /* inputs, with those whose weights are 0 */
    Py_ssize_t stride;   /* bytes from one token's integers to the next one's */
    char *numbers;
    float *ranges;
} Job;

typedef struct {
    const char *name;
    int (*is_supported)(void);
    int panel, group;        /* outputs in a panel, inputs of an output that lie side by side */
    int inputs, tokens;      /* both are padded to a multiple of these */
    int size;                /* bytes of a token's integer */
    int chunk;               /* tokens whose integers and outputs stay in a cache while panels pass by */
    double few;              /* products which one thread is done with before a second one has woken up */
    void (*begin)(void);     /* each thread calls it before it multiplies, and the next one after it, if there are */
    void (*end)(void);
    void (*round_token)(const Job *job, Py_ssize_t token);
    void (*multiply)(const Job *job, Py_ssize_t token, Py_ssize_t end, Py_ssize_t output);
} Instructions;

extern const Instructions int8_avx2, int8_vnni, int8_amx;

static inline Py_ssize_t size_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

#endif
