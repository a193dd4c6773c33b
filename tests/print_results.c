// Prints what the C kernels compute from numbers that are the same on every machine: for each case
// a line with the sum of the bits of its results. Used by test_arm.py.
#include <stdio.h>

#include "layer.h"

#define NUM_ROWS 20

const char *chatglm_isa(void);
int chatglm_runs_here(void);
void chatglm_pack(const uint8_t *official, uint8_t *packed, int64_t out, int64_t row_bytes,
                  int bits, int num_threads);
int chatglm_multiply_stored(const uint16_t *weight, const float *x, float *y, int64_t num_rows,
                            int64_t in, int64_t out, int is_bfloat16, int num_threads);
int64_t chatglm_size_layer(const Layer *layer, const Conversation *conversations, int64_t num_new,
                           int64_t num_rows);
int chatglm_compute_layer(const Layer *layer, float *hidden, const float *cos, const float *sin,
                          const Conversation *conversations, int64_t num_new, int64_t num_rows,
                          int cache_type, void *memory, int num_threads);

static uint32_t draw_bits(void) {
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return state >> 32;
}

// Returns numbers between -1 and 1.
static float *draw(int64_t count) {
    float *x = allocate(4 * count);
    for (int64_t i = 0; i < count; i++) x[i] = (int32_t)draw_bits() * 0x1p-31f;
    return x;
}

static uint16_t *draw_stored(int64_t count) {
    uint16_t *x = allocate(2 * count);
    for (int64_t i = 0; i < count; i++) x[i] = (draw_bits() & 0x87ff) | 0x3000;
    return x;
}

static uint8_t *draw_cache(int64_t count, int type) {
    return type == FLOAT32 ? (uint8_t *)draw(count) : (uint8_t *)draw_stored(count);
}

// The sign and the bits of a NaN do not count.
static void print(const char *name, const float *y, int64_t count) {
    uint64_t sum = 0;
    int64_t nans = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, &y[i], 4);
        if (y[i] != y[i]) bits = 0x7fc00000, nans++;
        sum = (sum ^ bits) * 0x100000001b3u;
    }
    printf("%s: %016llx, %d NaN, y[0] = %a\n", name, (unsigned long long)sum, (int)nans, y[0]);
}

static Linear create(int bits, int64_t in, int64_t out, int64_t group_size) {
    const int64_t row_bytes = in * bits / 8, blocks = divide_up(out, 16);
    uint8_t *official = allocate(out * row_bytes), *packed = allocate(blocks * (in + 8) * 16);
    for (int64_t i = 0; i < out * row_bytes; i++) official[i] = draw_bits();
    chatglm_pack(official, packed, out, row_bytes, bits, 1);
    release(official);
    return (Linear){packed, draw(blocks * 16 * (in / group_size)), draw(out), in, out, group_size,
                    bits};
}

static void print_products(int bits, int64_t in, int64_t out, int64_t group_size) {
    const Linear linear = create(bits, in, out, group_size);
    float *x = draw(NUM_ROWS * in), *y = draw(NUM_ROWS * out);
    x[1 * in] = NAN;
    x[5 * in + in - 1] = INFINITY;
    for (int64_t c = 0; c < in; c++) x[6 * in + c] *= c % 100 ? 1e-36f : 1e30f;
    for (int rows = 1; rows <= NUM_ROWS; rows++) {
        char name[80];
        sprintf(name, "INT%d %d x %d, groups of %d, rows %d", bits, (int)in, (int)out,
                (int)group_size, rows);
        chatglm_multiply(&linear, x, y, rows, 1);
        print(name, y, rows * out);
    }
}

static void print_stored(int64_t in, int64_t out, int is_bfloat16) {
    const uint16_t *weight = draw_stored(in * out);
    float *x = draw(NUM_ROWS * in), *y = draw(NUM_ROWS * out);
    for (int rows = 1; rows <= NUM_ROWS; rows++) {
        char name[80];
        sprintf(name, "stored %d, %d x %d, rows %d", is_bfloat16, (int)in, (int)out, rows);
        chatglm_multiply_stored(weight, x, y, rows, in, out, is_bfloat16, 1);
        print(name, y, rows * out);
    }
}

// 5 new tokens after 700 others, and the attention alone.
static void print_layer(int cache_type) {
    enum { HEADS = 6, KV_HEADS = 2, D = 64, SIZE = HEADS * D, INNER = 300, PAST = 700, NEW = 5 };
    const Layer layer = {
        create(4, SIZE, (HEADS + 2 * KV_HEADS) * D, SIZE),
        create(4, SIZE, SIZE, 128),
        create(8, SIZE, 2 * INNER, SIZE),
        create(8, INNER, SIZE, INNER),
        .input_norm = draw(SIZE),
        .post_norm = draw(SIZE),
        .epsilon = 1e-5,
        .num_heads = HEADS,
        .num_kv_heads = KV_HEADS,
        .head_dim = D,
        .rotated_dim = D / 2,
    };
    const int64_t numbers = KV_HEADS * (PAST + NEW) * D;
    const Conversation at = {draw_cache(numbers, cache_type), draw_cache(numbers, cache_type), PAST,
                             PAST + NEW};
    float *hidden = draw(NEW * SIZE), *cos = draw(NEW * D), *sin = draw(NEW * D);

    Task task = {&layer, &at, NEW, NEW, cos, sin, .cache_type = cache_type, .rows = NEW};
    int64_t query_size, partial_size;
    chatglm_size_attention(&task, &query_size, &partial_size);
    task.qkv = draw(NEW * layer.qkv.out);
    task.attended = allocate(4 * NEW * SIZE);
    task.query = allocate(4 * query_size);
    task.partial = allocate(4 * partial_size);
    chatglm_attend(&task, 1);
    char name[80];
    sprintf(name, "attention, cache %d", cache_type);
    print(name, task.attended, NEW * SIZE);

    void *memory = allocate(chatglm_size_layer(&layer, &at, NEW, NEW));
    chatglm_compute_layer(&layer, hidden, cos, sin, &at, NEW, NEW, cache_type, memory, 1);
    sprintf(name, "layer, cache %d", cache_type);
    print(name, hidden, NEW * SIZE);
}

int main(void) {
    printf("%s runs here: %d\n", chatglm_isa(), chatglm_runs_here());
    if (!chatglm_runs_here()) return 0;
    print_products(4, 384, 80, 384);
    print_products(4, 130, 33, 130);
    print_products(4, 6, 5, 6);
    print_products(4, 1000, 100, 1000);
    print_products(4, 384, 80, 128);
    print_products(4, 1024, 17, 128);
    print_products(8, 384, 80, 384);
    print_products(8, 7, 20, 7);
    print_products(8, 28, 20, 28);
    print_products(8, 531, 33, 531);
    for (int is_bfloat16 = 0; is_bfloat16 < 2; is_bfloat16++) {
        print_stored(64, 40, is_bfloat16);
        print_stored(101, 77, is_bfloat16);
        print_stored(6, 1, is_bfloat16);
    }
    print_layer(FLOAT32);
    print_layer(FLOAT16);
    print_layer(BFLOAT16);
    return 0;
}
