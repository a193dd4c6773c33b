// One layer of the model: the new tokens of each of several conversations, in float32.
//
//   normed = RMSNorm(hidden)
//   query, key, value = qkv(normed); query and key are rotated, key and value join the cache
//   hidden += dense(attention(query, cached keys, cached values))
//   gate, up = h_to_4h(RMSNorm(hidden)); hidden += 4h_to_h(SiLU(gate) * up)
//
// The lanes of a vector are heads. A *bundle* is LANES query heads that share a key/value head.
// They are multiplied by the same number of a key or value, so nothing is added up across lanes.
// With H query heads and G key/value heads of d numbers, query head g * H / G + i is lane i % LANES
// of bundle g * bundles + i / LANES, where bundles = ceil(H / G / LANES).
//
// The cache of a conversation has G x capacity x d numbers, of float32, float16 or bfloat16. Each
// block of KEY_BLOCK keys has its own softmax (FlashAttention, arXiv 2205.14135, section 3.1), and
// the blocks are weighed against each other afterwards. Blocks begin at multiples of KEY_BLOCK, so
// a row (a token of a conversation) is computed in the same way whatever other rows there are.
#include "cpu.h"

#define ROWS 256       // rows that are computed at a time
#define QUERIES 32     // rows whose partial results are held
#define KEY_BLOCK 512  // keys that a thread takes at a time
#define KEYS 64        // keys whose scores are held
#define TILE 8         // sums in registers
#define MAX_HEAD_DIM 256
#define COLUMNS 1024   // numbers of an activation that a thread takes at a time

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
    int cache_type, is_exact;
    // The caller leaves the rest empty. Rows are counted from row `first` of `hidden`.
    int64_t first, rows, first_query, queries, num_bundles, max_blocks;
    float *normed, *qkv, *attended, *inner, *activated;  // [row][...]
    float *query;    // [row][bundle][d][LANES], divided by sqrt(d)
    float *partial;  // [block][bundle][query]: vectors of the greatest score, of the sum of
                     // exponentials, and [d] of values
    const float *norm;  // weight of the current norm
} Task;

static const Conversation *find_conversation(const Task *t, int64_t row) {
    return t->conversations + (t->first + row) / t->num_new;
}

// Returns the position of a row's token in its conversation.
static int64_t find_position(const Task *t, int64_t row) {
    return find_conversation(t, row)->length + (t->first + row) % t->num_new;
}

// e^x from the Taylor series around the nearest multiple of ln 2. x is clamped, so that the result
// is neither 0 nor infinite.
INLINE Floats exponential(Floats x) {
    x = max_of(spread(-87), x);  // in this order of the arguments, NaN stays NaN
    x = -max_of(spread(-88), -x);
    const Floats number = max_of(x, spread(-87));  // converting NaN to an integer is undefined
    const Ints power = round_to_ints(number * 1.44269504f);
    const Floats n = to_floats(power);
    const Floats r = x - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts
    Floats sum = spread(1.0f / 5040);
    const float factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    UNROLL for (int i = 0; i < 7; i++) sum = multiply_add(sum, r, spread(factors[i]));
    return sum * (Floats)((power + 127) << 23);
}

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
        g = g / (1 + exponential(-g)) * u;
        memcpy(t->activated + row * size + c, &g, width);
    }
}

// Applies the rotary embedding to neighbouring pairs of the first `rotated_dim` numbers of a head.
static void rotate(const Task *t, int64_t row, float *head) {
    const int64_t pairs = t->layer->rotated_dim / 2;
    const float *cos = t->cos + (t->first + row) * pairs, *sin = t->sin + (t->first + row) * pairs;
    for (int64_t i = 0; i < pairs; i++) {
        const float x0 = head[2 * i], x1 = head[2 * i + 1];
        head[2 * i] = x0 * cos[i] - x1 * sin[i];
        head[2 * i + 1] = x1 * cos[i] + x0 * sin[i];
    }
}

// Rounds to the nearest number, halves to the number whose last bit is 0; so does `to_float16`.
static uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static uint16_t to_float16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    const float size = fabsf(value);
    if (value != value) return sign | 0x7e00;
    if (size >= 65520) return sign | 0x7c00;  // infinity
    if (size < 0x1p-14f) return sign | (uint16_t)rintf(size * 0x1p24f);  // subnormal
    bits = (bits & 0x7fffffff) - (112 << 23);  // the bias of the exponent is 15 instead of 127
    return sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13;
}

static void append(const Task *t, uint8_t *cache, int64_t token, const float *head) {
    const int64_t size = t->layer->head_dim;
    uint16_t *to = (uint16_t *)cache + token * size;
    if (t->cache_type == FLOAT32) memcpy((float *)cache + token * size, head, 4 * size);
    else
        for (int64_t i = 0; i < size; i++)
            to[i] = t->cache_type == FLOAT16 ? to_float16(head[i]) : to_bfloat16(head[i]);
}

// Rotates a row, spreads its query heads over the lanes, and writes key and value to the cache.
static void place_heads(const void *task, int64_t row) {
    const Task *t = task;
    const Layer *layer = t->layer;
    const Conversation *at = find_conversation(t, row);
    const int64_t position = find_position(t, row);
    const int64_t d = layer->head_dim, group = layer->num_heads / layer->num_kv_heads;
    const int64_t bundles = t->num_bundles / layer->num_kv_heads;
    float *head = t->qkv + row * layer->qkv.out;
    float *query = t->query + row * t->num_bundles * d * LANES;
    memset(query, 0, 4 * t->num_bundles * d * LANES);
    const float scale = 1 / sqrtf(d);
    for (int64_t h = 0; h < layer->num_heads; h++, head += d) {
        const int64_t bundle = h / group * bundles + h % group / LANES;
        rotate(t, row, head);
        for (int64_t i = 0; i < d; i++)
            query[(bundle * d + i) * LANES + h % group % LANES] = head[i] * scale;
    }
    for (int64_t g = 0; g < layer->num_kv_heads; g++, head += d) {
        rotate(t, row, head);
        append(t, at->keys, g * at->capacity + position, head);
        append(t, at->values, g * at->capacity + position, head + layer->num_kv_heads * d);
    }
}

// Returns `count` cached tokens from `token` on as float32: in place, or converted into `copy`.
INLINE const float *read_cache(const Task *t, const uint8_t *cache, int64_t token, int64_t count,
                               float *copy) {
    const int64_t d = t->layer->head_dim;
    if (t->cache_type == FLOAT32) return (const float *)cache + token * d;
    const uint16_t *from = (const uint16_t *)cache + token * d;
    const int64_t size = count * d, whole = size / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        store(copy + i, load_stored(from + i, t->cache_type == BFLOAT16));
    uint16_t last[LANES] = {0};
    memcpy(last, from + whole, 2 * (size - whole));
    store(copy + whole, load_stored(last, t->cache_type == BFLOAT16));
    return copy;
}

INLINE void score_column(const float *query, const float *const *key, int64_t c, Floats *sum) {
    const Floats q = load(query + c * LANES);
    UNROLL for (int i = 0; i < TILE; i++) sum[i] = multiply_add(spread(key[i][c]), q, sum[i]);
}

// scores[k] of each lane = query . key k, for `count` keys, TILE at a time. Meanwhile the next keys
// and the values are prefetched, `size` bytes of each for each key.
INLINE void score_keys(const float *query, const float *keys, int64_t d, int64_t count,
                       const uint8_t *next_keys, const uint8_t *values, int64_t size,
                       Floats *scores) {
    const int64_t part = TILE * size / d;
    for (int64_t first = 0; first < count; first += TILE) {
        const float *key[TILE];
        Floats sum[TILE];
        UNROLL for (int i = 0; i < TILE; i++) {
            key[i] = keys + smaller(first + i, count - 1) * d;
            sum[i] = spread(0);
        }
        int64_t c = 0;
        for (; c + 2 <= d; c += 2) {
            __builtin_prefetch(next_keys + first * size + c * part);
            score_column(query, key, c, sum);
            __builtin_prefetch(values + first * size + c * part);
            score_column(query, key, c + 1, sum);
        }
        if (c < d) score_column(query, key, c, sum);
        UNROLL for (int i = 0; i < TILE; i++) scores[first + i] = sum[i];
    }
}

// output[c] = output[c] * factor + sum over k of weight[k] * value[k][c], for `columns` columns.
INLINE void add_values(const Floats *weights, const float *values, int64_t d, int64_t count,
                       Floats factor, float *output, const int columns) {
    Floats sum[TILE];
    UNROLL for (int i = 0; i < columns; i++) sum[i] = load(output + i * LANES) * factor;
    for (int64_t k = 0; k < count; k++)
        UNROLL for (int i = 0; i < columns; i++)
            sum[i] = multiply_add(spread(values[k * d + i]), weights[k], sum[i]);
    UNROLL for (int i = 0; i < columns; i++) store(output + i * LANES, sum[i]);
}

static int64_t size_partial(const Task *t) { return (2 + t->layer->head_dim) * LANES; }

static float *find_partial(const Task *t, int64_t block, int64_t bundle, int64_t query) {
    return t->partial + ((block * t->num_bundles + bundle) * t->queries + query) * size_partial(t);
}

// Computes the softmax over a block of keys and the values weighted by it, for a bundle of a row.
// Consecutive units are queries for the same block, which is then in the CPU's cache.
static void attend_block(const void *task, int64_t unit) {
    const Task *t = task;
    const int64_t queries = smaller(t->queries, t->rows - t->first_query);
    const int64_t block = unit / queries / t->num_bundles;
    const int64_t bundle = unit / queries % t->num_bundles, row = t->first_query + unit % queries;
    const int64_t d = t->layer->head_dim, bundles = t->num_bundles / t->layer->num_kv_heads;
    const Conversation *at = find_conversation(t, row);
    const int64_t end = smaller((block + 1) * KEY_BLOCK, find_position(t, row) + 1);
    const float *query = t->query + (row * t->num_bundles + bundle) * d * LANES;
    float *partial = find_partial(t, block, bundle, unit % queries), *output = partial + 2 * LANES;
    const int64_t first_token = bundle / bundles * at->capacity;
    const int64_t token_size = d * (t->cache_type == FLOAT32 ? 4 : 2);
    float copy[(KEYS * MAX_HEAD_DIM + LANES)];
    Floats scores[KEYS], greatest = spread(-INFINITY), sum = spread(0);
    memset(output, 0, 4 * d * LANES);
    for (int64_t begin = block * KEY_BLOCK; begin < end; begin += KEYS) {
        const int64_t count = smaller(KEYS, end - begin), token = first_token + begin;
        const float *keys = read_cache(t, at->keys, token, count, copy);
        score_keys(query, keys, d, count, at->keys + (token + KEYS) * token_size,
                   at->values + token * token_size, token_size, scores);
        const Floats before = greatest;
        for (int64_t k = 0; k < count; k++) greatest = max_of(scores[k], greatest);
        const Floats factor = exponential(before - greatest);
        sum *= factor;
        for (int64_t k = 0; k < count; k++) {
            scores[k] = exponential(scores[k] - greatest);
            sum += scores[k];
        }
        const float *values = read_cache(t, at->values, token, count, copy);
        int64_t c = 0;
        for (; c + TILE <= d; c += TILE)
            add_values(scores, values + c, d, count, factor, output + c * LANES, TILE);
        for (; c < d; c++) add_values(scores, values + c, d, count, factor, output + c * LANES, 1);
    }
    store(partial, greatest);
    store(partial + LANES, sum);
}

// Weighs the blocks of a bundle of a row against each other, and writes its heads in order.
static void join_blocks(const void *task, int64_t unit) {
    const Task *t = task;
    const Layer *layer = t->layer;
    const int64_t query = unit / t->num_bundles, bundle = unit % t->num_bundles;
    const int64_t row = t->first_query + query, d = layer->head_dim;
    const int64_t group = layer->num_heads / layer->num_kv_heads;
    const int64_t bundles = t->num_bundles / layer->num_kv_heads;
    const int64_t num_blocks = find_position(t, row) / KEY_BLOCK + 1;
    Floats greatest = spread(-INFINITY), sum = spread(0), output[MAX_HEAD_DIM];
    for (int64_t i = 0; i < num_blocks; i++)
        greatest = max_of(greatest, load(find_partial(t, i, bundle, query)));
    for (int64_t c = 0; c < d; c++) output[c] = spread(0);
    for (int64_t i = 0; i < num_blocks; i++) {
        const float *partial = find_partial(t, i, bundle, query);
        const Floats weight = exponential(load(partial) - greatest);
        sum = multiply_add(weight, load(partial + LANES), sum);
        for (int64_t c = 0; c < d; c++)
            output[c] = multiply_add(weight, load(partial + (2 + c) * LANES), output[c]);
    }
    const int64_t first = bundle % bundles * LANES;  // first head of those that share a key
    float *to = t->attended + (row * layer->num_heads + bundle / bundles * group + first) * d;
    for (int64_t lane = 0; lane < smaller(LANES, group - first); lane++)
        for (int64_t c = 0; c < d; c++) to[lane * d + c] = output[c][lane] / sum[lane];
}

static void attend(Task *t, int num_threads) {
    for (t->first_query = 0; t->first_query < t->rows; t->first_query += t->queries) {
        const int64_t units = smaller(t->queries, t->rows - t->first_query) * t->num_bundles;
        run(attend_block, t, units * t->max_blocks, num_threads);
        run(join_blocks, t, units, num_threads);
    }
}

static int multiply(const Task *t, const Linear *linear, const float *x, float *y,
                    int num_threads) {
    return chatglm_multiply(linear, x, y, t->rows, t->is_exact, num_threads);
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
    run(place_heads, t, t->rows, num_threads);
    attend(t, num_threads);
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
    const int64_t d = layer->head_dim, group = layer->num_heads / layer->num_kv_heads;
    const int64_t hidden = layer->qkv.in, inner = layer->h_to_4h.out;
    const int64_t rows = smaller(ROWS, t->num_rows);
    t->queries = smaller(QUERIES, rows);
    int64_t longest = 0;
    for (int64_t i = 0; i * t->num_new < t->num_rows; i++)
        if (t->conversations[i].length > longest) longest = t->conversations[i].length;
    t->max_blocks = (longest + t->num_new - 1) / KEY_BLOCK + 1;
    t->num_bundles = divide_up(group, LANES) * layer->num_kv_heads;
    struct {
        float **part;
        int64_t size;
    } parts[] = {
        {&t->normed, rows * hidden},
        {&t->qkv, rows * layer->qkv.out},
        {&t->attended, rows * layer->dense.in},
        {&t->inner, rows * (inner > hidden ? inner : hidden)},
        {&t->activated, rows * layer->h4_to_h.in},
        {&t->query, rows * t->num_bundles * d * LANES},
        {&t->partial, t->max_blocks * t->num_bundles * t->queries * size_partial(t)},
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
                          int cache_type, int is_exact, void *memory, int num_threads) {
    Task task = {layer, conversations, num_new, num_rows, cos, sin, hidden, cache_type, is_exact};
    lay_out(&task, (float *)(divide_up((intptr_t)memory, ALIGNMENT) * ALIGNMENT));
    for (; task.first < num_rows; task.first += ROWS) {
        task.rows = smaller(ROWS, num_rows - task.first);
        if (compute_rows(&task, num_threads)) return -1;
    }
    return 0;
}
