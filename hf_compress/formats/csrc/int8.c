/* The module hf_compress.formats.int8_native: packs weights and projects tokens by one set of instructions. */

#include "int8.h"
#include <stdlib.h>

static const Instructions *const SETS[] = {&int8_avx2, &int8_vnni, &int8_amx};
enum { N_SETS = sizeof SETS / sizeof *SETS };

static Py_ssize_t round_up(Py_ssize_t value, Py_ssize_t multiple) { return (value + multiple - 1) / multiple * multiple; }

/* In cache lines an odd number, so that the tokens of a tile do not compete for the same places of a cache. */
static Py_ssize_t stride_of(const Instructions *set, Py_ssize_t n_padded)
{
    return round_up(n_padded * set->size, 64) | 64;
}

static void multiply(const Instructions *set, const Job *job, int n_threads)
{
    const Py_ssize_t n_tokens = job->n_tokens, n_outputs = job->n_outputs;
    const int is_small = (double)n_tokens * n_outputs * job->n_inputs < set->few;
#pragma omp parallel num_threads(n_threads) if (n_threads > 1 && !is_small)
    {
#pragma omp for schedule(static)
        for (Py_ssize_t token = 0; token < n_tokens; token++)
            set->round_token(job, token);
        if (set->begin)
            set->begin();
#pragma omp for collapse(2) schedule(static)
        for (Py_ssize_t token = 0; token < n_tokens; token += set->chunk)
            for (Py_ssize_t output = 0; output < n_outputs; output += set->panel)
                set->multiply(job, token, token + set->chunk < n_tokens ? token + set->chunk : n_tokens, output);
        if (set->end)
            set->end();
    }
}

/* Reads a set's number and `number` integers, addresses among them; NULL with an exception set where that fails. */
static const Instructions *read_arguments(
    PyObject *const *arguments, Py_ssize_t n_arguments, long long *values, Py_ssize_t number)
{
    if (n_arguments != number + 1) {
        PyErr_Format(PyExc_TypeError, "%zd integers expected, %zd given", number + 1, n_arguments);
        return NULL;
    }
    long long set = PyLong_AsLongLong(arguments[0]);
    for (Py_ssize_t i = 0; i < number && !PyErr_Occurred(); i++)
        values[i] = PyLong_AsLongLong(arguments[i + 1]);
    if (PyErr_Occurred())
        return NULL;
    if (set < 0 || set >= N_SETS) {
        PyErr_Format(PyExc_ValueError, "There are %d sets of instructions, and none has the number %lld", N_SETS, set);
        return NULL;
    }
    return SETS[set];
}

/* sets() -> ((name, whether this processor has it, outputs' multiple, inputs' multiple), ...) */
static PyObject *sets(PyObject *module, PyObject *nothing)
{
    PyObject *result = PyTuple_New(N_SETS);
    for (int i = 0; result && i < N_SETS; i++) {
        const Instructions *set = SETS[i];
        PyObject *row = Py_BuildValue(
            "sNii", set->name, PyBool_FromLong(set->is_supported()), set->panel, set->inputs);
        if (!row || PyTuple_SetItem(result, i, row)) {
            Py_DECREF(result);
            return NULL;
        }
    }
    return result;
}

/* pack(set, weight, outputs, inputs, panels, sums): addresses of int8 (outputs, inputs), and of what is written. */
static PyObject *pack(PyObject *module, PyObject *const *arguments, Py_ssize_t n_arguments)
{
    long long value[5];
    const Instructions *set = read_arguments(arguments, n_arguments, value, 5);
    if (!set)
        return NULL;
    const int8_t *weight = (const int8_t *)(intptr_t)value[0];
    const Py_ssize_t n_outputs = value[1], n_inputs = value[2];
    int8_t *panels = (int8_t *)(intptr_t)value[3];
    int32_t *sums = (int32_t *)(intptr_t)value[4];
    const Py_ssize_t panel = set->panel, group = set->group;
    const Py_ssize_t n_padded = round_up(n_inputs, set->inputs), n_rows = round_up(n_outputs, panel);
    Py_BEGIN_ALLOW_THREADS
    memset(panels, 0, n_rows * n_padded);
    memset(sums, 0, n_rows * sizeof *sums);
    for (Py_ssize_t row = 0; row < n_outputs; row++) {
        int8_t *place = panels + row / panel * panel * n_padded + row % panel * group;
        for (Py_ssize_t i = 0; i < n_inputs; i++) {
            int8_t number = weight[row * n_inputs + i];
            place[i / group * group * panel + i % group] = number;
            sums[row] += 128 * number;
        }
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* project(set, tokens, their number, inputs, panels, sums, scales, bias or 0, outputs, their number, dtype, threads) */
static PyObject *project(PyObject *module, PyObject *const *arguments, Py_ssize_t n_arguments)
{
    long long value[11];
    const Instructions *set = read_arguments(arguments, n_arguments, value, 11);
    if (!set)
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
        .n_padded = round_up(value[2], set->inputs),
    };
    job.stride = stride_of(set, job.n_padded);
    const Py_ssize_t n_tokens = round_up(job.n_tokens, set->tokens);
    char *memory = malloc(n_tokens * (job.stride + sizeof(float)) + 64);
    if (!memory)
        return PyErr_NoMemory();
    job.numbers = (char *)round_up((intptr_t)memory, 64);
    job.ranges = (float *)(job.numbers + n_tokens * job.stride);
    Py_BEGIN_ALLOW_THREADS
    multiply(set, &job, (int)value[10]);
    Py_END_ALLOW_THREADS
    free(memory);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"sets", sets, METH_NOARGS, "The sets of instructions, see above."},
    {"pack", (PyCFunction)(void (*)(void))pack, METH_FASTCALL, "Packs weights, see above."},
    {"project", (PyCFunction)(void (*)(void))project, METH_FASTCALL, "Projects tokens, see above."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "int8_native", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_int8_native(void) { return PyModule_Create(&definition); }
