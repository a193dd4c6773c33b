// A decode step of one layer: a new token of each of several conversations, in float32.
//
//   normed = RMSNorm(hidden)
//   query, key, value = qkv(normed); query and key are rotated, key and value join the cache
//   hidden += dense(attention(query, cached keys, cached values))
//   gate, up = h_to_4h(RMSNorm(hidden)); hidden += 4h_to_h(SiLU(gate) * up)
//
// Heads are the lanes of a vector: the query heads that share a key/value head, LANES at a time, a
// *bundle*, are multiplied by the same number of a key or value, and so nothing is ever added up
// across lanes. With H query heads and G key/value heads of d numbers, query head g * H / G + i is
// lane i % LANES of bundle g * bundles + i / LANES, where bundles = ceil(H / G / LANES).
//
// The cache of a conversation has G x capacity x d numbers, of float32, float16 or bfloat16. Its
// keys are taken in chunks, each with a softmax of its own (FlashAttention, arXiv 2205.14135,
// section 3.1), which are then weighed against each other. Chunks begin at multiples of CHUNK, so
// a row's result depends on no other row.
#include "cpu.h"

#define CHUNK 512     // keys that a thread takes at a time
#define KEYS 64       // keys whose scores are held
#define TILE 8        // sums in registers
#define MAX_HEAD_DIM 256
#define COLUMNS 1024  // of an activation, that a thread takes at a time

typedef struct {
    Linear qkv, dense, h_to_4h, h4_to_h;
    const float *input_norm, *post_norm;  // weights
    double epsilon;
    int64_t num_heads, num_kv_heads, head_dim, rotated_dim;
    int64_t adds_to_normed;  // the residual is the output of the norm
} Layer;

typedef struct {
    uint8_t *keys, *values;
    int64_t length, capacity;  // tokens; the new one comes at `length`
} Conversation;

enum { FLOAT32, FLOAT16, BFLOAT16 };  // of the cache

typedef struct {
    const Layer *layer;
    const Conversation *rows;
    const float *cos, *sin;  // [row][rotated_dim / 2]
    int64_t num_rows, num_bundles, max_chunks;
    int cache_type;
    float *hidden, *normed, *qkv, *attended, *inner, *activated;  // [row][...]
    float *query;    // [row][bundle][d][LANES], divided by sqrt(d)
    float *partial;  // [row][bundle][chunk]: greatest score, sum of exponentials, [d] of values;
                     // each [LANES]
    const float *norm;  // weight of the norm that is computed now
} Step;

static int64_t count_bundles(const Layer *layer) {
    return divide_up(layer->num_heads / layer->num_kv_heads, LANES) * layer->num_kv_heads;
}

// e^x from its Taylor series around the nearest multiple of ln 2; 0 < e^x < infinity is kept.
INLINE Floats exponential(Floats x) {
    x = max_of(spread(-87), x);  // in this order, NaN stays NaN
    x = -max_of(spread(-88), -x);
    const Ints power = round_to_ints(x * 1.44269504f);
    const Floats n = to_floats(power);
    const Floats r = x - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts
    Floats sum = spread(1.0f / 5040);
    const float factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    UNROLL for (int i = 0; i < 7; i++) sum = multiply_add(sum, r, spread(factors[i]));
    return sum * (Floats)((power + 127) << 23);
}

// normed = weight * hidden / sqrt(mean(hidden^2) + epsilon); a unit is a row.
static void normalize(const void *task, int64_t row) {
    const Step *t = task;
    const int64_t size = t->layer->qkv.in, whole = size / LANES * LANES;
    const float *x = t->hidden + row * size;
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

// activated = SiLU(gate) * up, SiLU(x) = x / (1 + e^-x); a unit is a part of a row.
static void activate(const void *task, int64_t unit) {
    const Step *t = task;
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

// Rotary embedding of the first `rotated_dim` numbers of a head, in neighbouring pairs.
static void rotate(const Step *t, int64_t row, float *head) {
    const int64_t pairs = t->layer->rotated_dim / 2;
    const float *cos = t->cos + row * pairs, *sin = t->sin + row * pairs;
    for (int64_t i = 0; i < pairs; i++) {
        const float x0 = head[2 * i], x1 = head[2 * i + 1];
        head[2 * i] = x0 * cos[i] - x1 * sin[i];
        head[2 * i + 1] = x1 * cos[i] + x0 * sin[i];
    }
}

// The nearest number; of two, the one with the last bit 0.
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
    if (size < 0x1p-14f) return sign | (uint16_t)rintf(size * 0x1p24f);  // with fewer bits
    bits = (bits & 0x7fffffff) - (112 << 23);  // the exponent's bias is 15, not 127
    return sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13;
}

static void append(const Step *t, uint8_t *cache, int64_t token, const float *head) {
    const int64_t size = t->layer->head_dim;
    uint16_t *to = (uint16_t *)cache + token * size;
    if (t->cache_type == FLOAT32) memcpy((float *)cache + token * size, head, 4 * size);
    else
        for (int64_t i = 0; i < size; i++)
            to[i] = t->cache_type == FLOAT16 ? to_float16(head[i]) : to_bfloat16(head[i]);
}

// Rotate, spread the query heads over the lanes, and write key and value; a unit is a row.
static void place_heads(const void *task, int64_t row) {
    const Step *t = task;
    const Layer *layer = t->layer;
    const Conversation *at = &t->rows[row];
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
        append(t, at->keys, g * at->capacity + at->length, head);
        append(t, at->values, g * at->capacity + at->length, head + layer->num_kv_heads * d);
    }
}

// `count` cached tokens from `token` on, as float32: as they are, or copied to `copy`.
INLINE const float *read_cache(const Step *t, const uint8_t *cache, int64_t token, int64_t count,
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

// scores[k] of each lane = query . key k, for `count` keys, computed TILE at a time.
INLINE void score_keys(const float *query, const float *keys, int64_t d, int64_t count,
                       Floats *scores) {
    for (int64_t first = 0; first < count; first += TILE) {
        const float *key[TILE];
        Floats sum[TILE];
        UNROLL for (int i = 0; i < TILE; i++) {
            key[i] = keys + smaller(first + i, count - 1) * d;
            sum[i] = spread(0);
        }
        for (int64_t c = 0; c < d; c++) {
            const Floats q = load(query + c * LANES);
            UNROLL for (int i = 0; i < TILE; i++) sum[i] = multiply_add(spread(key[i][c]), q, sum[i]);
        }
        UNROLL for (int i = 0; i < TILE; i++) scores[first + i] = sum[i];
    }
}

// output[c] = output[c] * factor + sum over k of weight[k] * value[k][c], `columns` of them.
INLINE void add_values(const Floats *weights, const float *values, int64_t d, int64_t count,
                       Floats factor, float *output, const int columns) {
    Floats sum[TILE];
    UNROLL for (int i = 0; i < columns; i++) sum[i] = load(output + i * LANES) * factor;
    for (int64_t k = 0; k < count; k++)
        UNROLL for (int i = 0; i < columns; i++)
            sum[i] = multiply_add(spread(values[k * d + i]), weights[k], sum[i]);
    UNROLL for (int i = 0; i < columns; i++) store(output + i * LANES, sum[i]);
}

static int64_t size_partial(const Step *t) { return (2 + t->layer->head_dim) * LANES; }

// The softmax over a chunk of keys, and the values weighted by it, for a bundle of a row.
static void attend_chunk(const void *task, int64_t unit) {
    const Step *t = task;
    const int64_t chunk = unit % t->max_chunks, place = unit / t->max_chunks;
    const int64_t row = place / t->num_bundles, bundle = place % t->num_bundles;
    const int64_t d = t->layer->head_dim, bundles = t->num_bundles / t->layer->num_kv_heads;
    const Conversation *at = &t->rows[row];
    const int64_t end = smaller((chunk + 1) * CHUNK, at->length + 1);
    const float *query = t->query + place * d * LANES;
    float *partial = t->partial + unit * size_partial(t), *output = partial + 2 * LANES;
    const int64_t first_token = bundle / bundles * at->capacity;
    float copy[(KEYS * MAX_HEAD_DIM + LANES)];
    Floats scores[KEYS], greatest = spread(-INFINITY), sum = spread(0);
    memset(output, 0, 4 * d * LANES);
    for (int64_t begin = chunk * CHUNK; begin < end; begin += KEYS) {
        const int64_t count = smaller(KEYS, end - begin), token = first_token + begin;
        score_keys(query, read_cache(t, at->keys, token, count, copy), d, count, scores);
        const Floats before = greatest;
        for (int64_t k = 0; k < count; k++) greatest = max_of(greatest, scores[k]);
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

// Weigh the chunks of a bundle of a row, and write its heads one after the other.
static void join_chunks(const void *task, int64_t unit) {
    const Step *t = task;
    const Layer *layer = t->layer;
    const int64_t row = unit / t->num_bundles, bundle = unit % t->num_bundles, d = layer->head_dim;
    const int64_t group = layer->num_heads / layer->num_kv_heads;
    const int64_t bundles = t->num_bundles / layer->num_kv_heads;
    const int64_t num_chunks = divide_up(t->rows[row].length + 1, CHUNK);
    const float *partial = t->partial + unit * t->max_chunks * size_partial(t);
    Floats greatest = spread(-INFINITY), sum = spread(0), output[MAX_HEAD_DIM];
    for (int64_t i = 0; i < num_chunks; i++)
        greatest = max_of(greatest, load(partial + i * size_partial(t)));
    for (int64_t c = 0; c < d; c++) output[c] = spread(0);
    for (int64_t i = 0; i < num_chunks; i++, partial += size_partial(t)) {
        const Floats weight = exponential(load(partial) - greatest);
        sum = multiply_add(weight, load(partial + LANES), sum);
        for (int64_t c = 0; c < d; c++)
            output[c] = multiply_add(weight, load(partial + (2 + c) * LANES), output[c]);
    }
    const int64_t first = bundle % bundles * LANES;  // of the heads that share a key/value head
    float *to = t->attended + (row * layer->num_heads + bundle / bundles * group + first) * d;
    for (int64_t lane = 0; lane < smaller(LANES, group - first); lane++)
        for (int64_t c = 0; c < d; c++) to[lane * d + c] = output[c][lane] / sum[lane];
}

static void add_to_hidden(const Step *t, const float *output, int num_threads) {
    const float *residual = t->layer->adds_to_normed ? t->normed : t->hidden;
    const Sum task = {t->hidden, residual, output, t->num_rows * t->layer->qkv.in};
    run(add, &task, divide_up(task.size, COLUMNS), num_threads);
}

static int compute(Step *t, int num_threads) {
    const Layer *layer = t->layer;
    const int64_t rows = t->num_rows;
    t->norm = layer->input_norm;
    run(normalize, t, rows, num_threads);
    if (chatglm_multiply(&layer->qkv, t->normed, t->qkv, rows, 1, num_threads)) return -1;
    run(place_heads, t, rows, num_threads);
    run(attend_chunk, t, rows * t->num_bundles * t->max_chunks, num_threads);
    run(join_chunks, t, rows * t->num_bundles, num_threads);
    if (chatglm_multiply(&layer->dense, t->attended, t->inner, rows, 1, num_threads)) return -1;
    add_to_hidden(t, t->inner, num_threads);
    t->norm = layer->post_norm;
    run(normalize, t, rows, num_threads);
    if (chatglm_multiply(&layer->h_to_4h, t->normed, t->inner, rows, 1, num_threads)) return -1;
    run(activate, t, rows * divide_up(layer->h4_to_h.in, COLUMNS), num_threads);
    if (chatglm_multiply(&layer->h4_to_h, t->activated, t->inner, rows, 1, num_threads)) return -1;
    add_to_hidden(t, t->inner, num_threads);
    return 0;
}

// Take a step: hidden [row][hidden size] becomes the layer's output, and the caches have a token
// more. Returns 0, or -1 if there is no memory.
int chatglm_decode_layer(const Layer *layer, float *hidden, const float *cos, const float *sin,
                         const Conversation *rows, int64_t num_rows, int cache_type,
                         int num_threads) {
    Step task = {.layer = layer, .rows = rows, .cos = cos, .sin = sin, .num_rows = num_rows};
    task.cache_type = cache_type, task.hidden = hidden;
    task.num_bundles = count_bundles(layer);
    for (int64_t row = 0; row < num_rows; row++) {
        const int64_t chunks = divide_up(rows[row].length + 1, CHUNK);
        if (chunks > task.max_chunks) task.max_chunks = chunks;
    }
    const int64_t lanes = num_rows * task.num_bundles * LANES;
    const int64_t inner = layer->h_to_4h.out > layer->qkv.in ? layer->h_to_4h.out : layer->qkv.in;
    float **parts[] = {&task.query,    &task.partial, &task.normed,   &task.qkv,
                       &task.attended, &task.inner,   &task.activated};
    const int64_t sizes[] = {lanes * layer->head_dim,
                             lanes * task.max_chunks * (2 + layer->head_dim),
                             num_rows * layer->qkv.in,
                             num_rows * layer->qkv.out,
                             num_rows * layer->dense.in,
                             num_rows * inner,
                             num_rows * layer->h4_to_h.in};
    int64_t total = 0;
    for (int i = 0; i < 7; i++) total += divide_up(sizes[i], LANES) * LANES;
    float *memory = allocate(4 * total);
    if (!memory) return -1;
    float *next = memory;
    for (int i = 0; i < 7; next += divide_up(sizes[i], LANES) * LANES, i++) *parts[i] = next;
    const int problem = compute(&task, num_threads);
    release(memory);
    return problem;
}
