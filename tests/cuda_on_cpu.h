// What quantization.cu needs of CUDA, for g++: threads one after another.
#include <cstdint>
#include <cstring>

#define __global__
#define __device__

struct Index {
    unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim;

using __half = _Float16;

struct __nv_bfloat16 {
    uint16_t bits;  // the upper half of a float32

    explicit __nv_bfloat16(float value) {  // to nearest, ties to even; no NaN
        uint32_t word;
        std::memcpy(&word, &value, 4);
        bits = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    }
    explicit operator float() const {
        const uint32_t word = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &word, 4);
        return value;
    }
};

// As cuLaunchKernel: args holds the address of each argument.
extern "C" void launch(void (*kernel)(const void *, const void *, void *, int, int),
                       const unsigned *grid, const unsigned *block, void **args) {
    blockDim = {block[0], block[1], block[2]};
    for (blockIdx.z = 0; blockIdx.z < grid[2]; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++)
    for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++)
    for (threadIdx.z = 0; threadIdx.z < block[2]; threadIdx.z++)
    for (threadIdx.y = 0; threadIdx.y < block[1]; threadIdx.y++)
    for (threadIdx.x = 0; threadIdx.x < block[0]; threadIdx.x++)
        kernel(*static_cast<void **>(args[0]), *static_cast<void **>(args[1]),
               *static_cast<void **>(args[2]), *static_cast<int *>(args[3]),
               *static_cast<int *>(args[4]));
}
