// W[r, c] = level(r, c) * scale[r, c / group_size]
//   INT8: level(r, c) = weight[r, c]
//   INT4: level(r, c) = the high four bits, with sign, of the byte weight[r, c / 2] for even c,
//         the low four for odd c
// All matrices are row-major. scale has columns / group_size entries for each row of W (one entry
// if group_size = columns). A CUDA block writes one row. The product is rounded once, from float32
// to the type of W, as in torch, so the result equals plain torch bit for bit. Threads share no
// memory, so the tests can compile this file for a CPU.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <typename T>
__device__ void extract_int8(const signed char *weight, const T *scale, T *out, int columns,
                             int group_size) {
    const long long row = blockIdx.x;
    weight += row * columns;
    scale += row * (columns / group_size);
    out += row * columns;
    for (int c = threadIdx.x; c < columns; c += blockDim.x) {
        const float s = static_cast<float>(scale[c / group_size]);
        out[c] = static_cast<T>(weight[c] * s);
    }
}

// A thread reads one byte, two columns, at a time. They share a scale, because group_size is even.
template <typename T>
__device__ void extract_int4(const signed char *weight, const T *scale, T *out, int columns,
                             int group_size) {
    const long long row = blockIdx.x;
    weight += row * (columns / 2);
    scale += row * (columns / group_size);
    out += row * columns;
    for (int c = 2 * threadIdx.x; c < columns; c += 2 * blockDim.x) {
        const unsigned char byte = weight[c / 2];
        const int even = static_cast<signed char>(byte) >> 4;
        const int odd = static_cast<signed char>(byte << 4) >> 4;
        const float s = static_cast<float>(scale[c / group_size]);
        out[c] = static_cast<T>(even * s);
        out[c + 1] = static_cast<T>(odd * s);
    }
}

#define DEFINE_KERNELS(name, T)                                                               \
    extern "C" __global__ void int8_to_##name(const signed char *weight, const T *scale,      \
                                              T *out, int columns, int group_size) {          \
        extract_int8(weight, scale, out, columns, group_size);                                \
    }                                                                                         \
    extern "C" __global__ void int4_to_##name(const signed char *weight, const T *scale,      \
                                              T *out, int columns, int group_size) {          \
        extract_int4(weight, scale, out, columns, group_size);                                \
    }

DEFINE_KERNELS(float16, __half)
DEFINE_KERNELS(bfloat16, __nv_bfloat16)
DEFINE_KERNELS(float32, float)
