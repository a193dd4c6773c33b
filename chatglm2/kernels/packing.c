// The order of INT8 and INT4 weights for the products of cpu.c, from the official order and back.
//
// Order of the weights in memory: a *block* is 16 outputs, which are lanes side by side. A lane has
// 32 bits: 8 columns of INT4, or 4 of INT8. With o = 16 * block + lane,
//
//   INT4: byte ((block * ceil(in / 8) + c / 8) * 16 + lane) * 4 + c % 4
//         holds level + 8, in its low four bits if c % 8 < 4, else in the high ones
//   INT8: byte ((block * ceil(in / 4) + c / 4) * 16 + lane) * 4 + c % 4   holds level + 128
//   scale: float ((block * in / group_size) + c / group_size) * 16 + lane
//
// Example, INT4, in = 16, level(17, 13) = -3: block 1, lane 1, c / 8 = 1, c % 8 = 5, so the high
// bits of byte ((1 * 2 + 1) * 16 + 1) * 4 + 1 = 197 are -3 + 8 = 5. The last block and the last
// lane are filled up with level 0.
#include "cpu.h"

typedef struct {
    const uint8_t *official;     // INT4: column 2 * i is in the high bits of byte i
    uint8_t *packed, *restored;  // one of them is written
    int64_t out, row_bytes;
    int bits;
} Packing;

static int64_t count_steps(const Packing *t) { return divide_up(t->row_bytes, 4); }

// Reorders the INT4 columns of a lane: 1 0 3 2 5 4 7 6, from low to high bits, become
// 0 4 1 5 2 6 3 7. Inverting the sign bit adds 8 to an INT4 level, or 128 to an INT8 level.
static uint32_t pack_lane(uint32_t v, int bits) {
    if (bits == 8) return v ^ 0x80808080u;
    const uint32_t even = v >> 4 & 0x0f0f0f0fu, odd = v & 0x0f0f0f0fu;  // columns 0 2 4 6, 1 3 5 7
    // columns 0 1 2 3 and 4 5 6 7
    const uint32_t low = (even & 0xff) | (odd & 0xff) << 8 | (even & 0xff00) << 8 |
                         (odd & 0xff00) << 16;
    const uint32_t high = (even >> 16 & 0xff) | (odd >> 8 & 0xff00) | (even >> 8 & 0xff0000) |
                          (odd & 0xff000000u);
    return (low | high << 4) ^ 0x88888888u;
}

static uint32_t restore_lane(uint32_t v, int bits) {
    if (bits == 8) return v ^ 0x80808080u;
    const uint32_t signed_levels = v ^ 0x88888888u;
    const uint32_t low = signed_levels & 0x0f0f0f0fu, high = signed_levels >> 4 & 0x0f0f0f0fu;
    const uint32_t even = (low & 0xff) | (low >> 8 & 0xff00) | (high & 0xff) << 16 |
                          (high & 0xff0000) << 8;
    const uint32_t odd = (low >> 8 & 0xff) | (low >> 16 & 0xff00) | (high & 0xff00) << 8 |
                         (high & 0xff000000u);
    return even << 4 | odd;
}

static void pack_block(const void *task, int64_t block) {
    const Packing *t = task;
    const int64_t steps = count_steps(t), whole = t->row_bytes / 4;
    uint32_t *packed = (uint32_t *)t->packed + block * steps * BLOCK;
    for (int lane = 0; lane < BLOCK; lane++) {
        const int64_t row = block * BLOCK + lane;
        const uint8_t *from = t->official + row * t->row_bytes;
        for (int64_t step = 0; step < steps; step++) {
            uint32_t v = 0;
            if (row < t->out) memcpy(&v, from + 4 * step, step < whole ? 4 : t->row_bytes % 4);
            packed[step * BLOCK + lane] = pack_lane(v, t->bits);
        }
    }
}

static void restore_block(const void *task, int64_t block) {
    const Packing *t = task;
    const int64_t steps = count_steps(t), whole = t->row_bytes / 4;
    const uint32_t *packed = (const uint32_t *)t->packed + block * steps * BLOCK;
    for (int lane = 0; lane < smaller(BLOCK, t->out - block * BLOCK); lane++) {
        uint8_t *to = t->restored + (block * BLOCK + lane) * t->row_bytes;
        for (int64_t step = 0; step < steps; step++) {
            const uint32_t v = restore_lane(packed[step * BLOCK + lane], t->bits);
            memcpy(to + 4 * step, &v, step < whole ? 4 : t->row_bytes % 4);
        }
    }
}

void chatglm_pack(const uint8_t *official, uint8_t *packed, int64_t out, int64_t row_bytes,
                  int bits, int num_threads) {
    const Packing task = {official, packed, NULL, out, row_bytes, bits};
    run(pack_block, &task, divide_up(out, BLOCK), num_threads);
}

void chatglm_restore(const uint8_t *packed, uint8_t *restored, int64_t out, int64_t row_bytes,
                     int bits, int num_threads) {
    const Packing task = {NULL, (uint8_t *)packed, restored, out, row_bytes, bits};
    run(restore_block, &task, divide_up(out, BLOCK), num_threads);
}
