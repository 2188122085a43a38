// The kernels for x86-64 with AVX-512. The pragma stays in force to the end of the file, where templates are instantiated.
#include "attention.h"
#include "matching.h"
#include "pixels.h"
#include "points.h"
#include "problem.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define MASK2FORMER_VECTOR_BYTES 64
#define MASK2FORMER_KERNELS kernels_avx512
#define MASK2FORMER_POINT_KERNELS point_kernels_avx512
#define MASK2FORMER_PIXEL_KERNELS pixel_kernels_avx512
#define MASK2FORMER_MATCHING_KERNELS matching_kernels_avx512
#define MASK2FORMER_ATTENTION_KERNELS attention_kernels_avx512
#include "kernel.h"
#include "points_kernel.h"
#include "tile_kernel.h"
#include "pixels_kernel.h"
#include "matching_kernel.h"
#include "attention_kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
