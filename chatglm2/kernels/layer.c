// One layer of the model: the new tokens of each of several conversations, in float32.
//
//   normed = RMSNorm(hidden)
//   query, key, value = qkv(normed); query and key are rotated, key and value join the cache
//   hidden += dense(attention(query, cached keys, cached values))
//   gate, up = h_to_4h(RMSNorm(hidden)); hidden += 4h_to_h(SiLU(gate) * up)
//
// Attention is computed by attention.c, the products by cpu.c.
#include "layer.h"

#define COLUMNS 1024  // numbers of an activation that a thread takes at a time

// normed = weight * hidden / sqrt(mean(hidden^2) + epsilon). A unit is a row.
static void normalize(const void *task, int64_t row) {
    const Task *t = task;
    const int64_t size = t->layer->qkv.in, whole = size / LANES * LANES;
    const float *x = t->hidden + (t->first + row) * size;
    float *to = t->normed + row * size;
    Floats sums = spread(0);
    for (int64_t c = 0; c < whole; c += LANES) sums = multiply_add(load(x + c), load(x + c), sums);
    float sum = add_lanes(sums);
    for (int64_t c = whole; c < size; c++) sum += x[c] * x[c];
    const float scale = 1 / sqrtf(sum / size + (float)t->layer->epsilon);
    for (int64_t c = 0; c < size; c++) to[c] = t->norm[c] * (x[c] * scale);
}

typedef struct {
    float *to;
    const float *residual, *output;
    int64_t size;
} Sum;

static void add(const void *task, int64_t unit) {
    const Sum *t = task;
    const int64_t end = smaller((unit + 1) * COLUMNS, t->size);
    for (int64_t i = unit * COLUMNS; i < end; i++) t->to[i] = t->residual[i] + t->output[i];
}

// activated = SiLU(gate) * up, where SiLU(x) = x / (1 + e^-x). A unit is COLUMNS numbers of a row.
static void activate(const void *task, int64_t unit) {
    const Task *t = task;
    const int64_t size = t->layer->h4_to_h.in, parts = divide_up(size, COLUMNS);
    const int64_t row = unit / parts, begin = unit % parts * COLUMNS;
    const float *gate = t->inner + row * 2 * size, *up = gate + size;
    for (int64_t c = begin; c < smaller(begin + COLUMNS, size); c += LANES) {
        const int64_t width = 4 * smaller(LANES, size - c);
        Floats g = {0}, u = {0};
        memcpy(&g, gate + c, width);
        memcpy(&u, up + c, width);
        g = g / (1 + exponential(-max_of(spread(-88), g))) * u;  // e^89 is infinite
        memcpy(t->activated + row * size + c, &g, width);
    }
}

static int multiply(const Task *t, const Linear *linear, const float *x, float *y,
                    int num_threads) {
    return chatglm_multiply(linear, x, y, t->rows, num_threads);
}

static void add_to_hidden(const Task *t, const float *output, int num_threads) {
    const int64_t size = t->layer->qkv.in;
    float *hidden = t->hidden + t->first * size;
    const Sum task = {hidden, t->layer->adds_to_normed ? t->normed : hidden, output,
                      t->rows * size};
    run(add, &task, divide_up(task.size, COLUMNS), num_threads);
}

static int compute_rows(Task *t, int num_threads) {
    const Layer *layer = t->layer;
    t->norm = layer->input_norm;
    run(normalize, t, t->rows, num_threads);
    if (multiply(t, &layer->qkv, t->normed, t->qkv, num_threads)) return -1;
    chatglm_attend(t, num_threads);
    if (multiply(t, &layer->dense, t->attended, t->inner, num_threads)) return -1;
    add_to_hidden(t, t->inner, num_threads);
    t->norm = layer->post_norm;
    run(normalize, t, t->rows, num_threads);
    if (multiply(t, &layer->h_to_4h, t->normed, t->inner, num_threads)) return -1;
    run(activate, t, t->rows * divide_up(layer->h4_to_h.in, COLUMNS), num_threads);
    if (multiply(t, &layer->h4_to_h, t->activated, t->inner, num_threads)) return -1;
    add_to_hidden(t, t->inner, num_threads);
    return 0;
}

// Sets the pointers to parts of `memory`, and returns how many numbers they need.
static int64_t lay_out(Task *t, float *memory) {
    const Layer *layer = t->layer;
    const int64_t hidden = layer->qkv.in, inner = layer->h_to_4h.out;
    const int64_t rows = smaller(MAX_ROWS, t->num_rows);
    int64_t query_size, partial_size;
    chatglm_size_attention(t, &query_size, &partial_size);
    struct {
        float **part;
        int64_t size;
    } parts[] = {
        {&t->normed, rows * hidden},
        {&t->qkv, rows * layer->qkv.out},
        {&t->attended, rows * layer->dense.in},
        {&t->inner, rows * (inner > hidden ? inner : hidden)},
        {&t->activated, rows * layer->h4_to_h.in},
        {&t->query, query_size},
        {&t->partial, partial_size},
    };
    int64_t total = 0;
    for (int i = 0; i < 7; total += divide_up(parts[i++].size, LANES) * LANES)
        *parts[i].part = memory + total;
    return total;
}

// Returns the bytes of `memory` that a call of `chatglm_compute_layer` needs.
int64_t chatglm_size_layer(const Layer *layer, const Conversation *conversations, int64_t num_new,
                           int64_t num_rows) {
    Task task = {.layer = layer, .conversations = conversations};
    task.num_new = num_new, task.num_rows = num_rows;
    return 4 * lay_out(&task, NULL) + ALIGNMENT;
}

// Computes a layer: replaces hidden [row][hidden size] by the output, and writes `num_new` tokens
// to the caches. Returns 0, or -1 if there is no memory.
int chatglm_compute_layer(const Layer *layer, float *hidden, const float *cos, const float *sin,
                          const Conversation *conversations, int64_t num_new, int64_t num_rows,
                          int cache_type, void *memory, int num_threads) {
    Task task = {layer, conversations, num_new, num_rows, cos, sin, hidden, cache_type};
    lay_out(&task, (float *)(divide_up((intptr_t)memory, ALIGNMENT) * ALIGNMENT));
    for (; task.first < num_rows; task.first += MAX_ROWS) {
        task.rows = smaller(MAX_ROWS, num_rows - task.first);
        if (compute_rows(&task, num_threads)) return -1;
    }
    return 0;
}
