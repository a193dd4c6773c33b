// Attention of the new tokens of each of several conversations, in float32.
//
//   score[k] = query . key[k] / sqrt(d)              for each key k up to the token's own
//   weight[k] = e^(score[k] - greatest score)
//   output[c] = sum over k of weight[k] * value[k][c] / sum over k of weight[k]
//
// The lanes of a vector are heads. A *bundle* is LANES query heads of a token that share a
// key/value head. They are multiplied by the same number of a key or value, so nothing is added up
// across lanes. With H query heads and G key/value heads of d numbers, query head g * H / G + i is
// lane i % LANES of bundle i / LANES of key/value head g.
//
// The cache of a conversation has G x capacity x d numbers, of float32, float16 or bfloat16. Each
// block of KEY_BLOCK keys has its own softmax (FlashAttention, arXiv 2205.14135, section 3.1), and
// the blocks are weighed against each other afterwards.
//
// A row (a token of a conversation) gets the same bits alone, in a batch and in a prompt: its
// blocks begin at multiples of KEY_BLOCK, and each lane is added up in the order of the columns and
// keys. Only *which* bundles are computed together depends on the other rows.
#include "layer.h"

#define QUERIES 32         // rows whose partial results are held
#define UNIT_ROWS 8        // rows for which a thread reads the same keys and values
#define KEY_BLOCK 512      // keys that a thread takes at a time
#define KEYS 64            // keys whose scores are held
#define SCORES (KEYS + 8)  // the last tile may exceed KEYS
#define MAX_BUNDLES 2      // bundles that are multiplied by the same tile
#define READ 16            // cached numbers that are read at a time; a multiple of LANES
#define PREFETCH 4096      // bytes ahead
#define MAX_HEAD_DIM 256

// A tile is some keys, or columns of values. Its sums, for one or two bundles, fill the registers.
#ifdef AVX512
#define TILE(bundles) 8
#define MAX_SUMS 16
#else
#define TILE(bundles) ((bundles) == 2 ? 6 : 8)
#define MAX_SUMS 12
#endif

// Returns the first bundle of a row for a key/value head.
static float *find_query(const Task *t, int64_t kv_head, int64_t row) {
    return t->query + (kv_head * t->rows + row) * t->bundles * t->layer->head_dim * LANES;
}

static int64_t size_partial(const Task *t) { return (2 + t->layer->head_dim) * LANES; }

// Returns the numbers that the partial results of a block take.
static int64_t size_block(const Task *t) {
    return t->layer->num_kv_heads * t->queries * t->bundles * size_partial(t);
}

// Returns the partial result of a row's first bundle for a key/value head.
static float *find_partial(const Task *t, int64_t block, int64_t kv_head, int64_t row) {
    const int64_t first = (kv_head * t->queries + row - t->first_query) * t->bundles;
    return t->partial + block * size_block(t) + first * size_partial(t);
}

void chatglm_size_attention(Task *t, int64_t *query_size, int64_t *partial_size) {
    const Layer *layer = t->layer;
    int64_t longest = 0;
    for (int64_t i = 0; i * t->num_new < t->num_rows; i++)
        if (t->conversations[i].length > longest) longest = t->conversations[i].length;
    t->max_blocks = (longest + t->num_new - 1) / KEY_BLOCK + 1;
    t->bundles = divide_up(layer->num_heads / layer->num_kv_heads, LANES);
    const int64_t rows = smaller(MAX_ROWS, t->num_rows);
    t->queries = smaller(QUERIES, rows);
    *query_size = rows * layer->num_kv_heads * t->bundles * layer->head_dim * LANES;
    *partial_size = t->max_blocks * size_block(t);
}

// Queries, and the cache

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
    float *head = t->qkv + row * layer->qkv.out;
    const float scale = 1 / sqrtf(d);
    for (int64_t g = 0; g < layer->num_kv_heads; g++) {
        float *query = find_query(t, g, row);
        memset(query, 0, 4 * t->bundles * d * LANES);
        for (int64_t h = 0; h < group; h++, head += d) {
            rotate(t, row, head);
            for (int64_t i = 0; i < d; i++)
                query[(h / LANES * d + i) * LANES + h % LANES] = head[i] * scale;
        }
    }
    for (int64_t g = 0; g < layer->num_kv_heads; g++, head += d) {
        rotate(t, row, head);
        append(t, at->keys, g * at->capacity + position, head);
        append(t, at->values, g * at->capacity + position, head + layer->num_kv_heads * d);
    }
}

// Cached numbers that are converted to float32. The loops that multiply also read the numbers that
// are multiplied next, READ of them at every second step, so nothing waits for memory. A cache of
// float32 is only prefetched.
typedef struct {
    const uint8_t *from;
    float *to;
    int64_t done, size;  // numbers
    int type;
} Reading;

INLINE Reading start_reading(const Task *t, const uint8_t *cache, int64_t token, int64_t count,
                             float *copy) {
    const int64_t first = token * t->layer->head_dim, size = count * t->layer->head_dim;
    if (t->cache_type != FLOAT32) return (Reading){cache + 2 * first, copy, 0, size, t->cache_type};
    return (Reading){cache + 4 * first, (float *)(cache + 4 * first), 0, size, FLOAT32};
}

INLINE void convert(Reading *r, const uint16_t *from) {
    UNROLL for (int i = 0; i < READ; i += LANES)
        store(r->to + r->done + i, load_stored(from + i, r->type == BFLOAT16));
}

INLINE void read_some(Reading *r, int64_t step) {
    if (step % 2 || r->done + READ > r->size) return;
    const uint8_t *from = r->from + r->done * (r->type == FLOAT32 ? 4 : 2);
    __builtin_prefetch(from + PREFETCH);
    if (r->type != FLOAT32) convert(r, (const uint16_t *)from);
    r->done += READ;
}

// Reads the rest, and returns all numbers.
INLINE const float *finish_reading(Reading *r) {
    if (r->type == FLOAT32) return r->to;
    while (r->done + READ <= r->size) read_some(r, 0);
    if (r->done < r->size) {
        uint16_t last[READ] = {0};
        memcpy(last, r->from + 2 * r->done, 2 * (r->size - r->done));
        convert(r, last);
        r->done = r->size;
    }
    return r->to;
}

// Attention

// scores[b][k] of each lane = query[b] . keys[k], for a tile of keys, of which `count` are there.
INLINE void score_tile(const float *query, const float *keys, int64_t d, int64_t count,
                       Reading *reading, Floats *scores, const int bundles) {
    const int tile = TILE(bundles);
    const float *key[TILE(1)];
    Floats sum[MAX_SUMS];
    UNROLL for (int k = 0; k < tile; k++) key[k] = keys + smaller(k, count - 1) * d;
    UNROLL for (int i = 0; i < bundles * tile; i++) sum[i] = spread(0);
    for (int64_t c = 0; c < d; c++) {
        read_some(reading, c);
        Floats q[MAX_BUNDLES];
        UNROLL for (int b = 0; b < bundles; b++) q[b] = load(query + (b * d + c) * LANES);
        UNROLL for (int k = 0; k < tile; k++)
            UNROLL for (int b = 0; b < bundles; b++)
                sum[b * tile + k] = multiply_add(spread(key[k][c]), q[b], sum[b * tile + k]);
    }
    UNROLL for (int b = 0; b < bundles; b++)
        UNROLL for (int k = 0; k < tile; k++) scores[b * SCORES + k] = sum[b * tile + k];
}

// Replaces the scores by weights, and adds them to the sum of the partial result. Returns the
// factor for the sums that were computed with the previous greatest score.
INLINE Floats weigh_keys(Floats *scores, int64_t count, float *partial) {
    const Floats before = load(partial);
    Floats greatest = before;
    for (int64_t k = 0; k < count; k++) greatest = max_of(scores[k], greatest);
    const Floats factor = exponential(before - greatest);
    Floats sum = load(partial + LANES) * factor;
    for (int64_t k = 0; k < count; k++) {
        scores[k] = exponential(scores[k] - greatest);
        sum += scores[k];
    }
    store(partial, greatest);
    store(partial + LANES, sum);
    return factor;
}

// output[b][c] = output[b][c] * factor[b] + sum over k of weights[b][k] * values[k][c], for a tile
// of columns.
INLINE void add_tile(const Floats *weights, const float *values, int64_t d, int64_t count,
                     const Floats *factor, Reading *reading, float *output, const int bundles,
                     const int tile) {
    const int64_t stride = (2 + d) * LANES;  // from the output of a bundle to the next
    Floats sum[MAX_SUMS];
    UNROLL for (int b = 0; b < bundles; b++)
        UNROLL for (int c = 0; c < tile; c++)
            sum[b * tile + c] = load(output + b * stride + c * LANES) * factor[b];
    for (int64_t k = 0; k < count; k++, values += d) {
        read_some(reading, k);
        UNROLL for (int c = 0; c < tile; c++)
            UNROLL for (int b = 0; b < bundles; b++)
                sum[b * tile + c] =
                    multiply_add(spread(values[c]), weights[b * SCORES + k], sum[b * tile + c]);
    }
    UNROLL for (int b = 0; b < bundles; b++)
        UNROLL for (int c = 0; c < tile; c++)
            store(output + b * stride + c * LANES, sum[b * tile + c]);
}

// Adds keys and values to the partial results of neighbouring bundles. Meanwhile reads the values,
// and the next keys.
INLINE void attend_keys(const float *query, const float *keys, int64_t d, int64_t count,
                        Reading *values, Reading *next_keys, float *partial, const int bundles) {
    const int tile = TILE(bundles);
    Floats scores[MAX_BUNDLES * SCORES], factor[MAX_BUNDLES];
    for (int64_t k = 0; k < count; k += tile)
        score_tile(query, keys + k * d, d, count - k, values, scores + k, bundles);
    for (int b = 0; b < bundles; b++)
        factor[b] = weigh_keys(scores + b * SCORES, count, partial + b * (2 + d) * LANES);
    const float *value = finish_reading(values);
    float *output = partial + 2 * LANES;
    int64_t c = 0;
    for (; c + tile <= d; c += tile)
        add_tile(scores, value + c, d, count, factor, next_keys, output + c * LANES, bundles, tile);
    for (; c + 2 <= d; c += 2)
        add_tile(scores, value + c, d, count, factor, next_keys, output + c * LANES, bundles, 2);
    if (c < d)
        add_tile(scores, value + c, d, count, factor, next_keys, output + c * LANES, bundles, 1);
}

// Some neighbouring rows of a conversation, for a key/value head and a block of keys.
typedef struct {
    const float *query;
    float *partial;
    int64_t position;     // of the first row
    int64_t row_bundles;  // bundles of a row
    int64_t bundles;      // of all rows
    int64_t d;
} Rows;

// Adds `count` keys from position `begin` on, and their values. A row sees the keys up to its own.
// Two bundles that see the same number of keys are computed together.
static void attend_rows(const Rows *t, int64_t begin, int64_t count, const float *keys,
                        Reading *values, Reading *next_keys) {
    const int64_t d = t->d, first = begin > t->position ? begin - t->position : 0;
    for (int64_t b = first * t->row_bundles, pair; b < t->bundles; b += 1 + pair) {
        const int64_t seen = t->position + b / t->row_bundles + 1 - begin;
        const int64_t next_seen = t->position + (b + 1) / t->row_bundles + 1 - begin;
        const float *query = t->query + b * d * LANES;
        float *partial = t->partial + b * (2 + d) * LANES;
        pair = b + 1 < t->bundles && smaller(count, seen) == smaller(count, next_seen);
        if (pair)
            attend_keys(query, keys, d, smaller(count, seen), values, next_keys, partial, 2);
        else attend_keys(query, keys, d, smaller(count, seen), values, next_keys, partial, 1);
    }
}

// Computes the partial results of a block for the rows from `first` to `last`, which belong to one
// conversation.
static void attend_block(const Task *t, int64_t block, int64_t kv_head, int64_t first,
                         int64_t last) {
    const Conversation *at = find_conversation(t, first);
    const Rows rows = {find_query(t, kv_head, first), find_partial(t, block, kv_head, first),
                       find_position(t, first), t->bundles, (last - first) * t->bundles,
                       t->layer->head_dim};
    const int64_t start = block * KEY_BLOCK;
    const int64_t end = smaller(start + KEY_BLOCK, rows.position + last - first);
    if (start >= end) return;
    memset(rows.partial, 0, 4 * rows.bundles * size_partial(t));
    for (int64_t b = 0; b < rows.bundles; b++)
        store(rows.partial + b * size_partial(t), spread(-INFINITY));
    float copies[3][KEYS * MAX_HEAD_DIM + READ];
    const int64_t token = kv_head * at->capacity;
    Reading keys = start_reading(t, at->keys, token + start, smaller(KEYS, end - start), copies[0]);
    for (int64_t begin = start; begin < end; begin += KEYS) {
        const int64_t count = smaller(KEYS, end - begin), next = begin + count;
        const float *read = finish_reading(&keys);
        keys = start_reading(t, at->keys, token + next, smaller(KEYS, end - next),
                             copies[read == copies[0]]);
        Reading values = start_reading(t, at->values, token + begin, count, copies[2]);
        attend_rows(&rows, begin, count, read, &values, &keys);
    }
}

static int64_t count_queries(const Task *t) {
    return smaller(t->queries, t->rows - t->first_query);
}

// Returns how many rows a thread takes at a time. They seldom belong to several conversations.
static int64_t count_unit_rows(const Task *t) { return smaller(UNIT_ROWS, t->num_new); }

// Computes the partial results of a unit: a block for some rows. Consecutive units have the same
// block, which is then in the CPU's cache.
static void attend_unit(const void *task, int64_t unit) {
    const Task *t = task;
    const int64_t rows = count_unit_rows(t), parts = divide_up(count_queries(t), rows);
    const int64_t kv_head = unit / parts % t->layer->num_kv_heads;
    const int64_t block = unit / parts / t->layer->num_kv_heads;
    const int64_t begin = unit % parts * rows;
    const int64_t last = t->first_query + smaller(begin + rows, count_queries(t));
    for (int64_t row = t->first_query + begin, end; row < last; row = end) {
        end = smaller(last, row + t->num_new - (t->first + row) % t->num_new);  // one conversation
        attend_block(t, block, kv_head, row, end);
    }
}

// Weighs the blocks of a bundle of a row against each other, and writes its heads in order.
static void join_blocks(const void *task, int64_t unit) {
    const Task *t = task;
    const Layer *layer = t->layer;
    const int64_t bundle = unit % t->bundles, kv_head = unit / t->bundles % layer->num_kv_heads;
    const int64_t row = t->first_query + unit / t->bundles / layer->num_kv_heads;
    const int64_t d = layer->head_dim, num_blocks = find_position(t, row) / KEY_BLOCK + 1;
    const float *partial = find_partial(t, 0, kv_head, row) + bundle * size_partial(t);
    Floats greatest = spread(-INFINITY), sum = spread(0), output[MAX_HEAD_DIM];
    for (int64_t i = 0; i < num_blocks; i++)
        greatest = max_of(greatest, load(partial + i * size_block(t)));
    for (int64_t c = 0; c < d; c++) output[c] = spread(0);
    for (int64_t i = 0; i < num_blocks; i++, partial += size_block(t)) {
        const Floats weight = exponential(load(partial) - greatest);
        sum = multiply_add(weight, load(partial + LANES), sum);
        for (int64_t c = 0; c < d; c++)
            output[c] = multiply_add(weight, load(partial + (2 + c) * LANES), output[c]);
    }
    for (int64_t c = 0; c < d; c++) output[c] /= sum;
    const int64_t group = layer->num_heads / layer->num_kv_heads;
    const int64_t first = bundle * LANES;  // first head of those that share a key
    float *to = t->attended + (row * layer->num_heads + kv_head * group + first) * d;
    for (int64_t lane = 0; lane < smaller(LANES, group - first); lane++)
        for (int64_t c = 0; c < d; c++) to[lane * d + c] = output[c][lane];
}

void chatglm_attend(Task *t, int num_threads) {
    const int64_t num_kv_heads = t->layer->num_kv_heads;
    run(place_heads, t, t->rows, num_threads);
    for (t->first_query = 0; t->first_query < t->rows; t->first_query += t->queries) {
        const int64_t parts = divide_up(count_queries(t), count_unit_rows(t));
        run(attend_unit, t, parts * num_kv_heads * t->max_blocks, num_threads);
        run(join_blocks, t, count_queries(t) * num_kv_heads * t->bundles, num_threads);
    }
}
