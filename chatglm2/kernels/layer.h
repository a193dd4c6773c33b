// The structures of a layer, which layer.c and attention.c share.
#pragma once

#include "cpu.h"

#define MAX_ROWS 256  // rows that are computed at a time

typedef struct {
    Linear qkv, dense, h_to_4h, h4_to_h;
    const float *input_norm, *post_norm;  // weights
    double epsilon;
    int64_t num_heads, num_kv_heads, head_dim, rotated_dim;
    int64_t adds_to_normed;  // 1 if the residual is the output of the norm, 0 if it is its input
} Layer;

typedef struct {
    uint8_t *keys, *values;
    int64_t length, capacity;  // tokens; new tokens are written at `length`
} Conversation;

enum { FLOAT32, FLOAT16, BFLOAT16 };  // types of the cache

typedef struct {
    const Layer *layer;
    const Conversation *conversations;
    int64_t num_new, num_rows;  // new tokens of each conversation, and of all together
    const float *cos, *sin;     // [row][rotated_dim / 2]
    float *hidden;              // [row][hidden size]
    int cache_type;
    // The caller leaves the rest empty. Rows are counted from row `first` of `hidden`.
    int64_t first, rows, first_query, queries, bundles, max_blocks;
    float *normed, *qkv, *attended, *inner, *activated;  // [row][...]
    float *query;  // [key/value head][row][bundle][d][LANES], divided by sqrt(d)
    // [block][key/value head][query][bundle]: a vector of greatest scores, one of sums of weights,
    // and d of outputs
    float *partial;
    const float *norm;  // weight of the current norm
} Task;

static inline const Conversation *find_conversation(const Task *t, int64_t row) {
    return t->conversations + (t->first + row) / t->num_new;
}

// Returns the position of a row's token in its conversation.
static inline int64_t find_position(const Task *t, int64_t row) {
    return find_conversation(t, row)->length + (t->first + row) % t->num_new;
}

// e^x of numbers up to 88, from the Taylor series around the nearest multiple of ln 2. Numbers
// below -87 count as -87, so that the result is never 0.
INLINE Floats exponential(Floats x) {
    x = max_of(spread(-87), x);  // in this order of the arguments, NaN stays NaN
    // Adding 1.5 * 2^23 rounds to an integer, which is in the last bits.
    const Floats shifted = multiply_add(x, spread(1.44269504f), spread(0x1.8p23f));
    const Floats n = shifted - 0x1.8p23f;
    Floats r = multiply_add(n, spread(-0.693359375f), x);  // ln 2 in two parts
    r = multiply_add(n, spread(2.12194440e-4f), r);
    Floats sum = spread(1.0f / 720);
    const float factors[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    UNROLL for (int i = 0; i < 6; i++) sum = multiply_add(sum, r, spread(factors[i]));
    return sum * (Floats)(((Bits)shifted + 127) << 23);
}

// Attention (attention.c)

// Sets how the work is divided, and the numbers that `query` and `partial` need.
void chatglm_size_attention(Task *task, int64_t *query_size, int64_t *partial_size);

// Rotates queries and keys, writes keys and values to the cache, and sets `attended`.
void chatglm_attend(Task *task, int num_threads);
